"""Decide whether one way of rounding explains every weight of a merged tensor.

The intervals of `rounding_bounds` are worst cases. In float32 they are so wide that an altered weight can hide in one.
So the number of weights that differ from our replay, and their distance, must also be plausible for float32:
`ReplayErrors` runs the arithmetic in a few ways and compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from ...files.dtypes import TORCH_FLOATS
from ...files.tensor_ref import TensorRef
from ...numerics.arrays import Numbers, rounded_to
from ...numerics.forms import F32, FORMS, Form, IntArray, Wide
from ...streaming.segment import UpdateLoader
from .replay import U32, AdapterDelta, Flags, PickedWeights, Replay, ReplayBlock, normalizes_rows
from .rounding_bounds import Interval, Predictions
from .roundings import Rounding, list_roundings

TIE = 1e-6  # in U32 times the summed sizes: weights this near to a tie can round either way, since float64 rounds too


def ordinals(x: Numbers) -> IntArray:
    """Return an integer for each number such that adjacent numbers have adjacent integers, and both zeros 0."""
    values: IntArray = x.bits.astype(np.int64 if x.form.itemsize > 2 else np.int32)
    signs = values >> (8 * values.itemsize - 1)  # 0 or -1
    values &= x.form.size
    values ^= signs
    values -= signs
    return values


def next_toward(x: Numbers, goal: Wide) -> Wide:
    """Return the next number of x's form toward `goal`, in float64. In 8 bits none is after the largest finite one."""
    form, here = x.form, x.wide()
    most = form.inf - (form.itemsize == 1)
    after = np.clip(ordinals(x) + (goal > here) - (goal < here), -most, most)
    value: Wide = np.copysign(Numbers(np.abs(after).astype(form.bits_type), form).wide(), after)
    return value


def ulp_of(x: Numbers) -> Wide:
    """Return the distance from each number to the next larger one in absolute value, in float64."""
    size = abs(x)
    return next_toward(size, np.full(x.shape, np.inf)) - size.wide()


def max_ulps_off(expected: Numbers, actual: Numbers, where: Flags) -> float:
    """Return the largest distance in ulps between numbers of one form where `where` is set.

    Returns:
        At least 1, as bits differ; inf if either is inf or nan, 0 for no weights.
    """
    if not where.any():
        return 0.0
    if 4 * np.count_nonzero(where) < where.size or expected.form.itemsize > 2 or not actual.all_finite():
        expected, actual = expected[where], actual[where]  # else all are looked at, without copies of most
    if not (expected.all_finite() and actual.all_finite()):
        return math.inf
    here, wanted = ordinals(actual), ordinals(expected)
    if expected.form.itemsize < 8:
        return max(1.0, float(np.abs(here - wanted).max()))
    across_zero = np.abs(here.astype(np.float64)) + np.abs(wanted)  # of float64 more than an int64 holds
    return max(1.0, float(np.where((here < 0) == (wanted < 0), np.abs(here - wanted), across_zero).max()))


class ReplayErrors:
    """A test that float32 explains how many weights differ from our replay, and how near they are to a tie.

    Errors are in units of U32 times the sizes of the terms.
    """

    def __init__(self) -> None:
        self.differ = 0  # weights that differ, except near ties
        self.need = 0.0  # the error that the other arithmetic must have made at least, at the worst weight
        self.expected = self.largest = np.zeros(1)  # by way: changed weights; largest error

    def add(self, block: ReplayBlock, deltas: Sequence[AdapterDelta]) -> None:
        """Add a block with its deltas."""
        (X, a), form = block.reals, block.merged.form
        actual, wanted = block.merged.wide(), block.expected[0].wide()
        known = np.isfinite(X) & np.isfinite(actual)
        zero = np.zeros_like(X)
        sizes = sum((delta.sizes * delta.gain for delta in deltas), zero)
        errors = sum((delta.errors * delta.gain for delta in deltas), zero[None])  # (ways, rows, n)
        extra = least = zero
        if a is not None or sum(delta.is_additive for delta in deltas) > 1:
            grown = 1 + (max(X.shape) ** 0.5 / 8 if a is not None else 0.0)
            magnitudes = np.abs(X) + np.abs(block.base.wide())
            extra, least, sizes = magnitudes * (U32 * 0.25 * grown), magnitudes * (U32 * 0.05), sizes + magnitudes
        unit = np.maximum(sizes * U32, 1e-300)
        if form.itemsize > 2:  # in 16 bits the few that differ are at ties, where `need` tells
            self.expected = self.expected + np.minimum((errors + least) / ulp_of(block.merged), 1.0)[:, known].sum(1)
        if known.any():
            self.largest = np.maximum(self.largest, ((errors + extra) / unit)[:, known].max(1))
        off = (actual != wanted) & known
        if off.any():
            tie = (actual + next_toward(block.merged, wanted)) / 2
            need = np.abs(X - tie)
            if form.itemsize <= 2:
                need = np.maximum(need - np.abs(X) * (U32 * 1.5), 0.0)
            needed = (need / unit)[off]
            self.differ += int(np.count_nonzero(needed > TIE))
            self.need = max(self.need, float(needed.max()))

    @property
    def plausible(self) -> bool:
        by_way = (self.differ * 8 + 8 >= self.expected) & (self.need <= 8 * self.largest + TIE)
        return self.differ == 0 or bool(by_way.any())


@dataclass
class RoundingCandidate:
    """A way of rounding, with an order of addition of adapters, and the weights that it does not explain."""

    title: str
    way: Rounding
    order: tuple[int, ...]  # id() of adapters
    outside: int = 0  # weights outside of their intervals
    beyond: float = 0.0  # by how many ulps at most
    moved: int = 0  # weights that it predicts to differ from our replay, without float32 errors
    distinct: bool = False  # it predicts something else than the first way


@dataclass(frozen=True)
class TrialOutcome:
    """The result of a trial."""

    title: str | None  # the way that explains every weight
    outside: int  # weights that the first way does not explain, or that were altered in an otherwise exact tensor
    beyond: float  # by how many ulps at most


def try_roundings(replay: Replay, merged: TensorRef, load: UpdateLoader, stored: Sequence[Form] = ()) -> TrialOutcome:
    """Try all ways of rounding on one tensor.

    Args:
        stored: types to which others may have rounded the base first: if the base and an adapter that replaces its
            weights have two types, loaders cast one to the other.
    """
    candidates, predictions, errors = (
        _list_candidates(replay, stored),
        Predictions(replay, merged, load),
        ReplayErrors(),
    )
    stray, farthest = 0, 0.0
    for block in replay.blocks(merged):
        bad = _where_stray(block)
        stray += int(np.count_nonzero(bad))
        farthest = max(farthest, max_ulps_off(rounded_to(block.reals[0], block.merged.form), block.merged, bad))
        if block.piece is not None:
            errors.add(block, predictions.deltas.of(block))
            _test(block, candidates, predictions)
    for candidate in candidates:
        likely = errors.differ * 4 + 16 >= candidate.moved if candidate.distinct else errors.plausible
        if not stray and not candidate.outside and likely:
            return TrialOutcome(candidate.title, 0, 0.0)
    first = candidates[0]
    return TrialOutcome(None, first.outside + stray or errors.differ, max(first.beyond, farthest))


def try_single_rounding(picked: Sequence[PickedWeights], replay: Replay, predictions: Predictions) -> TrialOutcome:
    """Try one rounding of a float32 sum on a tensor, by the weights that differ from our replay.

    The others are right by it, as their interval holds the nearest number. If `ReplayErrors` are plausible for these
    weights alone, they are for all.

    Args:
        picked: additive updates with terms alone, in a type of 16 bits.
    """
    first, errors = _list_candidates(replay, ())[0], ReplayErrors()
    for block in picked:
        errors.add(block, predictions.deltas.of(block))
        _test(block, [first], predictions)
    is_right = not first.outside and errors.plausible
    return TrialOutcome(first.title if is_right else None, first.outside, first.beyond)


def _list_candidates(replay: Replay, stored: Sequence[Form]) -> list[RoundingCandidate]:
    placements = replay.placements
    adapters = tuple(dict.fromkeys(id(p.adapter) for p in placements if p.update.additive))
    several = len(adapters) + any(not p.update.additive for p in placements) > 1
    orders = list(permutations(adapters)) if len(adapters) <= 3 else [adapters, adapters[::-1]]
    dtype = replay.source.spec.dtype
    kind = FORMS[dtype] if dtype in TORCH_FLOATS else F32
    return [
        RoundingCandidate(title, way, order)
        for title, way in list_roundings(kind, stored, any(map(normalizes_rows, placements)), several)
        for order in (orders if way.apart else [adapters])
    ]


def _where_stray(block: ReplayBlock) -> Flags:
    """Return which weights no rounding explains, in untouched rows and among weights that are not finite."""
    X, base, actual = block.reals[0], block.base.wide(), block.merged.wide()
    right: Flags = np.isnan(base) & np.isnan(actual)
    if block.piece is None:
        right |= block.expected[0].bits == block.merged.bits
    else:
        right |= np.isfinite(X) | (actual == base) | (actual == X)
    return ~right


def _test(block: ReplayBlock, candidates: Sequence[RoundingCandidate], predictions: Predictions) -> None:
    """Count the weights of a block that each candidate does not explain, if it is the first or explained all so far."""
    form, actual, known = block.merged.form, block.merged.wide(), np.isfinite(block.reals[0])
    first: Interval | None = None
    for candidate in candidates:
        if candidate.outside and first:
            continue
        intervals = predictions.of(block, candidate.way, candidate.order)
        first = first or intervals
        candidate.distinct |= not (
            np.array_equal(intervals.low, first.low) and np.array_equal(intervals.high, first.high)
        )
        off = ~intervals.holds(actual) & known
        if off.any():
            candidate.outside += int(np.count_nonzero(off))
            nearest = np.minimum(intervals.high, np.maximum(intervals.low, np.nan_to_num(actual)))
            candidate.beyond = max(candidate.beyond, max_ulps_off(rounded_to(nearest, form), block.merged, off))
        elif candidate.way.apart and not candidate.way.change and not any(map(normalizes_rows, block.inside)):
            middle = predictions.of(block, candidate.way, candidate.order, 0.0)
            candidate.moved += int(np.count_nonzero((middle.low != block.expected[0].wide()) & known))
