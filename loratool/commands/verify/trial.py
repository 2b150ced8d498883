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

import torch
from torch import Tensor

from ...files.dtypes import TORCH_FLOATS
from ...files.tensor_compare import float_ordinals
from ...files.tensor_ref import TensorRef
from ...streaming.segment import UpdateLoader
from .replay import F32, AdapterDelta, Replay, ReplayBlock, normalizes_rows
from .rounding_bounds import Interval, Predictions
from .roundings import Rounding, list_roundings

_BIT_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

TIE = 1e-6  # in F32 times the summed sizes: weights this near to a tie can round either way, since float64 rounds too


def same_bits(first: Tensor, second: Tensor) -> Tensor:
    """Return which elements have the same bits, in the shape of both."""
    kind = _BIT_TYPES[first.element_size()]
    return first.view(kind) == second.view(kind)


def next_toward(x: Tensor, goal: Tensor) -> Tensor:
    """Return the next number of x's type toward `goal` (float64), in float64. torch.nextafter takes no float8."""
    if x.element_size() > 1:
        return torch.nextafter(x, goal.to(x.dtype)).double()
    sizes = torch.arange(128, dtype=torch.uint8).view(x.dtype).double()
    sizes = sizes[sizes.isfinite()]
    numbers = torch.cat([-sizes[1:].flip(0), sizes])
    index = torch.searchsorted(numbers, x.double()) + (goal - x.double()).nan_to_num(0.0).sign().long()
    return numbers[index.clamp(0, len(numbers) - 1)]


def ulp_of(x: Tensor) -> Tensor:
    """Return the distance from each number to the next larger one in absolute value, in float64."""
    size = x.abs()
    return next_toward(size, torch.full_like(size, torch.inf, dtype=torch.float64)) - size.double()


def max_ulps_off(expected: Tensor, actual: Tensor, where: Tensor) -> float:
    """Return the largest distance in ulps between `actual` and `expected`.

    Returns:
        At least 1, as bits differ; inf if either is inf or nan, 0 for no weights.
    """
    expected, actual = expected[where].to(actual.dtype), actual[where]
    if not actual.numel():
        return 0.0
    if not bool((actual.double().isfinite() & expected.double().isfinite()).all()):
        return math.inf
    here, wanted = float_ordinals(actual), float_ordinals(expected)
    across_zero = here.double().abs() + wanted.double().abs()  # of float64 more than an int64 holds
    return max(1.0, float(torch.where((here < 0) == (wanted < 0), (here - wanted).abs().double(), across_zero).max()))


class ReplayErrors:
    """A test that float32 explains how many weights differ from our replay, and how near they are to a tie.

    Errors are in units of F32 times the sizes of the terms.
    """

    def __init__(self) -> None:
        self.differ = 0  # weights that differ, except near ties
        self.need = 0.0  # the error that the other arithmetic must have made at least, at the worst weight
        self.expected = self.largest = torch.zeros(1, dtype=torch.float64)  # by way: changed weights; largest error

    def add(self, block: ReplayBlock, deltas: Sequence[AdapterDelta]) -> None:
        """Add a block with its deltas."""
        (X, a), actual, wanted = block.reals, block.merged, block.expected[0]
        known = X.isfinite() & actual.double().isfinite()
        zero = torch.zeros_like(X)
        sizes = sum((delta.sizes * delta.gain for delta in deltas), zero)
        errors = sum((delta.errors * delta.gain for delta in deltas), zero.unsqueeze(0))  # (ways, rows, n)
        extra = least = zero
        if a is not None or sum(delta.is_additive for delta in deltas) > 1:
            grown = 1 + (max(X.shape) ** 0.5 / 8 if a is not None else 0.0)
            magnitudes = X.abs() + block.base.double().abs()
            extra, least, sizes = magnitudes * (F32 * 0.25 * grown), magnitudes * (F32 * 0.05), sizes + magnitudes
        unit = (sizes * F32).clamp_min(1e-300)
        if actual.element_size() > 2:  # in 16 bits the few that differ are at ties, where `need` tells
            self.expected = self.expected + ((errors + least) / ulp_of(actual)).clamp(max=1.0)[:, known].sum(1)
        if known.any():
            self.largest = torch.maximum(self.largest, ((errors + extra) / unit)[:, known].amax(1))
        off = (actual != wanted) & known
        if off.any():
            tie = (actual.double() + next_toward(actual, wanted.double())) / 2
            need = (X - tie).abs()
            if actual.element_size() <= 2:
                need = (need - X.abs() * (F32 * 1.5)).clamp_min(0.0)
            needed = (need / unit)[off]
            self.differ += int((needed > TIE).sum())
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


def try_roundings(
    replay: Replay, merged: TensorRef, load: UpdateLoader, stored: Sequence[torch.dtype] = ()
) -> TrialOutcome:
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
        stray += int(bad.sum())
        farthest = max(farthest, max_ulps_off(block.reals[0], block.merged, bad))
        if block.piece is not None:
            errors.add(block, predictions.deltas.of(block))
            _test(block, candidates, predictions)
    for candidate in candidates:
        likely = errors.differ * 4 + 16 >= candidate.moved if candidate.distinct else errors.plausible
        if not stray and not candidate.outside and likely:
            return TrialOutcome(candidate.title, 0, 0.0)
    first = candidates[0]
    return TrialOutcome(None, first.outside + stray or errors.differ, max(first.beyond, farthest))


def _list_candidates(replay: Replay, stored: Sequence[torch.dtype]) -> list[RoundingCandidate]:
    placements = replay.placements
    adapters = tuple(dict.fromkeys(id(p.adapter) for p in placements if p.update.additive))
    several = len(adapters) + any(not p.update.additive for p in placements) > 1
    orders = list(permutations(adapters)) if len(adapters) <= 3 else [adapters, adapters[::-1]]
    kind = getattr(torch, TORCH_FLOATS.get(replay.source.spec.dtype, "float32"))
    return [
        RoundingCandidate(title, way, order)
        for title, way in list_roundings(kind, stored, any(map(normalizes_rows, placements)), several)
        for order in (orders if way.apart else [adapters])
    ]


def _where_stray(block: ReplayBlock) -> Tensor:
    """Return which weights no rounding explains, in untouched rows and among weights that are not finite."""
    X, base, actual = block.reals[0], block.base.double(), block.merged.double()
    if block.piece is None:
        return ~(same_bits(block.expected[0], block.merged) | (base.isnan() & actual.isnan()))
    return ~(X.isfinite() | (base.isnan() & actual.isnan()) | (actual == base) | (actual == X))


def _test(block: ReplayBlock, candidates: Sequence[RoundingCandidate], predictions: Predictions) -> None:
    """Count the weights of a block that each candidate does not explain, if it is the first or explained all so far."""
    actual, known = block.merged.double(), block.reals[0].isfinite()
    first: Interval | None = None
    for candidate in candidates:
        if candidate.outside and first:
            continue
        intervals = predictions.of(block, candidate.way, candidate.order)
        first = first or intervals
        candidate.distinct |= not (torch.equal(intervals.low, first.low) and torch.equal(intervals.high, first.high))
        off = ~intervals.holds(actual) & known
        if off.any():
            candidate.outside += int(off.sum())
            nearest = torch.minimum(intervals.high, torch.maximum(intervals.low, actual.nan_to_num()))
            candidate.beyond = max(candidate.beyond, max_ulps_off(nearest, block.merged, off))
        elif candidate.way.apart and not candidate.way.change and not any(map(normalizes_rows, block.inside)):
            middle = predictions.of(block, candidate.way, candidate.order, 0.0)
            candidate.moved += int(((middle.low != block.expected[0].double()) & known).sum())
