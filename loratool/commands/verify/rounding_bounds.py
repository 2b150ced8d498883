"""Bound each weight of a merged tensor by an interval, for the ways in which other programs round.

An interval starts from the exact numbers, is widened by the largest error of float32 arithmetic, and is rounded
wherever the way of rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...files.tensor_ref import TensorRef
from ...numerics.forms import F32, F64, Form, Wide
from ...streaming.segment import UpdateLoader
from .replay import (
    U32,
    AdapterDelta,
    AdapterDeltas,
    DeltaBounds,
    Replay,
    ReplayBlock,
    columns_of_a_norm,
    has_terms_alone,
    norm_axis,
    normalizes_rows,
)
from .roundings import Rounding, cast_wide

U16 = 2.0**-8  # half an ulp of bf16, relative

LEAST_OF_FP16 = 2.0**-25  # half of its least step

HALF_OF_FP16 = 3e4  # of its largest number


@dataclass(frozen=True)
class Interval:
    """Lower and upper bounds of numbers, in float64."""

    low: Wide  # (rows, n), of norms (rows, 1) or (1, n)
    high: Wide

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def widened(self, by: Wide) -> Interval:
        return Interval(self.low - by, self.high + by)

    def rounded(self, *forms: Form) -> Interval:
        """Return the interval after rounding to each of the forms in turn. Rounding keeps the order of numbers."""
        low, high = self.low, self.high
        for form in forms:
            low, high = cast_wide(low, form), cast_wide(high, form)
        return Interval(low, high)

    def times(self, *factors: Wide | float) -> Interval:
        """Return the interval of products with a factor, or with any factor between the given ones."""
        ends = np.stack([factor * end for factor in factors for end in (self.low, self.high)])
        return Interval(ends.min(0), ends.max(0))

    def squares(self, axis: int, together: int = 1) -> Interval:
        """Return the interval of sums of squares along an axis, which is kept, each over that many columns."""
        low, high = np.abs(self.low), np.abs(self.high)
        least = np.where(self.low * self.high <= 0, 0.0, np.minimum(low, high))
        ends = (np.square(x).sum(axis, keepdims=True) for x in (least, np.maximum(low, high)))
        if together > 1:
            ends = (np.repeat(x.reshape(len(x), -1, together).sum(2), together, 1) for x in ends)
        return Interval(*ends)

    def equals(self, other: Interval) -> bool:
        """Return whether both have the same bounds, and none is nan."""
        return np.array_equal(self.low, other.low) and np.array_equal(self.high, other.high)

    def holds(self, x: Wide) -> npt.NDArray[np.bool_]:
        """Return which elements of x are inside."""
        return (x >= self.low) & (x <= self.high)


class Predictions:
    """The intervals that ways of rounding predict for the weights of a tensor."""

    def __init__(self, replay: Replay, merged: TensorRef, load: UpdateLoader) -> None:
        self._replay, self._found, self.deltas = replay, merged, AdapterDeltas(load)
        self._column_norms: dict[tuple[int, Rounding], Interval] = {}

    def of(self, block: ReplayBlock, way: Rounding, order: Sequence[int], slack: float = 1.0) -> Interval:
        """Return the interval of each weight of a block, (rows, n).

        Args:
            order: id() of adapters, in the order of addition if `way` adds them separately.
            slack: a factor of float32's error bound.
        """
        form, deltas = block.merged.form, self.deltas.of(block, way.factors)
        start, moving = self._start(block, way, deltas)
        apart: list[list[DeltaBounds]] = [
            [d for d in deltas if d.is_additive and id(d.placement.adapter) == each] for each in order
        ]
        groups: list[list[DeltaBounds]] = [moving, *apart] if way.apart else [sum(apart, moving)]
        interval = (start.rounded(form) if way.apart else start).rounded(way.total)
        for group in filter(None, groups):  # the deltas of a group are added before one rounding
            first, *others = (bound_delta(delta, way, slack) for delta in group)
            change = sum(others, first)
            sizes = np.maximum(np.abs(interval.low) + np.abs(change.low), np.abs(interval.high) + np.abs(change.high))
            unit = 2.0**-51 if way.total == F64 else U32 * 2
            if way.total != F64 and len(group) == 1 and (way.change or form.itemsize > 2):
                unit = 0.0  # the sum of two float32 numbers is rounded right by everyone
            interval = (interval + change).widened(sizes * (slack * unit)).rounded(way.total, form)
        return interval.rounded(form)

    def rule_out(self, block: ReplayBlock) -> bool:
        """Return whether a weight of a block is farther from X than any way of rounding brings it.

        A way rounds W, both factors, their product, the delta twice, and each sum twice, to bf16 or fp16 at worst: an
        error of U16 relatively, or half the least step of fp16, which counts once for each number of a factor. Where
        fp16 might overflow, and for updates other than products of factors, this says no.
        """
        (X, a), W, deltas = block.reals, np.abs(block.base.wide()), self.deltas.of(block)
        if a is not None or not deltas or not all(has_terms_alone(delta.placement) for delta in deltas):
            return False
        sizes, roundings = sum(delta.sizes for delta in deltas), 2 * len(deltas) + 2
        least, most = float(roundings), float(W.max(initial=0.0))
        for delta in deltas:
            factors = self.deltas.factors(delta, block.width)
            assert factors is not None, "terms are products of factors"
            left, right, scale = np.abs(factors[0]), np.abs(factors[1]), abs(factors[2])
            least += scale * (1 + left.sum(1).max(initial=0.0) + right.sum(0).max(initial=0.0))
            most = max(most, left.max(initial=0.0), right.max(initial=0.0), float(delta.sizes.max()) / min(scale, 1.0))
        if not most < HALF_OF_FP16:
            return False
        bound = 1.25 * (U16 * (6 * sizes + roundings * (W + sizes)) + LEAST_OF_FP16 * least)
        return bool((np.abs(block.merged.wide() - X) > bound)[np.isfinite(X)].any())

    def _start(
        self, block: ReplayBlock, way: Rounding, deltas: Sequence[AdapterDelta]
    ) -> tuple[Interval, list[DeltaBounds]]:
        """Return the interval to which deltas are added, and the delta of a non-additive update.

        That delta is empty if its weight is 1. Else it is a part of the way from W to the update's value.
        """
        W = cast_wide(block.base.wide(), way.base)
        X, a = block.reals
        if any(map(normalizes_rows, block.inside)):
            return self._normalize(block, way, next(d for d in deltas if normalizes_rows(d.placement))), []
        if a is None:
            return Interval(W, W), []
        value = X - sum((delta.change for delta in deltas if delta.is_additive), np.zeros_like(X))
        start = np.where(a == 0, value if way.factors is None else cast_wide(value, way.factors), W)
        moving = (a != 0) & (a != 1)
        if not moving.any():
            return Interval(start, start), []
        weight = next(p.weight for p in block.inside if not p.update.additive)
        sizes = np.where(moving, np.abs(value) + (2 + abs(weight)) * np.abs(W), 0.0)
        slack = sizes * (U32 * (max(X.shape) ** 0.5 + 16))
        slack = sum((delta.slack * delta.gain for delta in deltas if not delta.is_additive), slack)
        return Interval(start, start), [DeltaBounds(np.where(moving, value - W, 0.0), slack, weight)]

    def _normalize(self, block: ReplayBlock, way: Rounding, delta: AdapterDelta) -> Interval:
        """Return the interval of m / n * V with V = W + D and its norms n, in the rows of a DoRA."""
        assert delta.magnitude is not None
        norms = self._norms(block, way, delta)
        m = delta.magnitude if way.magnitude is None else cast_wide(delta.magnitude, way.magnitude)
        ratios = [np.nan_to_num(m / n, nan=0.0, posinf=1e300, neginf=-1e300) for n in (norms.low, norms.high)]
        return self._sum(block, way, delta).times(*(cast_wide(ratio, way.ratio) for ratio in ratios)).rounded(way.ratio)

    def _sum(self, block: ReplayBlock, way: Rounding, delta: AdapterDelta) -> Interval:
        """Return the interval of V = W + D, (rows, n)."""
        W = cast_wide(block.base.wide(), way.base)
        if way.total == F32:
            W = cast_wide(W, way.total)
        return (Interval(W, W) + bound_delta(delta, way)).rounded(way.total)

    def _norms(self, block: ReplayBlock, way: Rounding, delta: AdapterDelta) -> Interval:
        """Return the interval of the norms of V, (rows, 1), or (1, n) if the base stores (in, out)."""
        if norm_axis(delta.placement) == 0:
            return bound_norms(self._sum(block, way, delta).squares(1), block.base.shape[1], way)
        key, together = (id(delta.placement.update), way), columns_of_a_norm(delta.placement, block.base.shape[1])
        if key not in self._column_norms:
            squares = [
                self._sum(each, way, part).squares(0, together)
                for each in self._replay.blocks(self._found)
                for part in self.deltas.of(each, way.factors)
                if part.placement.update is delta.placement.update  # in any of its runs of rows
            ]
            self._column_norms[key] = bound_norms(sum(squares[1:], squares[0]), self._replay.rows * together, way)
        return self._column_norms[key]


def bound_delta(delta: DeltaBounds, way: Rounding, slack: float = 1.0) -> Interval:
    """Return the interval of a delta, (rows, n), rounded as by `way`. `slack` scales the bound of other errors."""
    interval = Interval(delta.change, delta.change).widened(delta.slack * slack)
    if way.product and delta.scale:
        interval = interval.times(1 / delta.scale).rounded(way.product).times(delta.scale)
    return interval.rounded(*way.change)


def bound_norms(squares: Interval, count: int, way: Rounding) -> Interval:
    """Return the interval of norms, from that of sums of `count` squares.

    The random errors of a float32 sum grow with the square root of `count`.
    """
    tolerance = (2.0**-50 if way.total == F64 else U32) * (count**0.5 + 8)
    low, high = np.sqrt(squares.low) * (1 - tolerance), np.sqrt(squares.high) * (1 + tolerance)
    return Interval(low, high).rounded(way.total)
