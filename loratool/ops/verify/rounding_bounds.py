"""Decide whether one way of rounding explains every weight of a merged tensor, by an interval for each weight.

The intervals are worst cases, so wide in float32 that an altered weight can hide in one. So the number of weights that
differ from our replay, and their distance, must also be what float32 arithmetic causes: `ReplayErrors` does the
arithmetic in a few ways and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from ...adapters.updates import ADDITIVE
from ...binding.placement import Placement
from ...files.tensor_ref import TensorRef
from ...numerics.exact import Workspace, round_once
from ...streaming.apply import UpdateLoader
from .explanations import DORA_ROUNDINGS, ROUNDINGS, Rounding
from .replay import F32, AdapterDeltas, DeltaBounds, Replay, ReplayBlock, normalizes_rows

ERROR_TERMS = 3  # ways to compute a delta in float32, in `DeltaBounds.errors`


_BIT_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


TIE = 1e-6  # in F32 times the summed sizes: weights this near to a tie can round either way, since float64 rounds too


def same_bits(one: Tensor, two: Tensor) -> Tensor:
    """Return which elements have the same bits, in the shape of both."""
    kind = _BIT_TYPES[one.element_size()]
    return one.view(kind) == two.view(kind)


def next_toward(x: Tensor, goal: Tensor) -> Tensor:
    """Return the next number of x's type toward `goal` (float64), in float64; torch.nextafter takes no float8."""
    if x.element_size() > 1:
        return torch.nextafter(x, goal.to(x.dtype)).double()
    sizes = torch.arange(128, dtype=torch.uint8).view(x.dtype).double()
    sizes = sizes[sizes.isfinite()]
    numbers = torch.cat([-sizes[1:].flip(0), sizes])
    at = torch.searchsorted(numbers, x.double()) + (goal - x.double()).nan_to_num(0.0).sign().long()
    return numbers[at.clamp(0, len(numbers) - 1)]


def ulp_of(x: Tensor) -> Tensor:
    """Return the distance from each number to the next larger one in absolute value, in float64."""
    size = x.abs()
    return next_toward(size, torch.full_like(size, torch.inf, dtype=torch.float64)) - size.double()


def max_ulps_off(expected: Tensor, actual: Tensor, where: Tensor) -> float:
    """Return by how many ulps of `actual` its farthest weight is off `expected` (float64); inf for inf and nan."""
    wanted, found = expected[where], actual[where]
    ulps = ((found.double() - wanted).abs() / ulp_of(found)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(ulps.max()) if ulps.numel() else 0.0


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a type and return the values in float64."""
    return x.to(dtype).double()


def base_of(block: ReplayBlock, way: Rounding) -> Tensor:
    return block.base.double() if way.base is None else cast(block.base, way.base)


def wide_type(block: ReplayBlock, way: Rounding) -> torch.dtype:
    return way.total or (torch.float64 if block.base.dtype == torch.float64 else torch.float32)


def delta_bounds(delta: DeltaBounds, way: Rounding, block: ReplayBlock, slack: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the least and the largest delta, rounded as `way` does; `slack` scales the bound of other errors."""
    low, high = delta.change - delta.slack * slack, delta.change + delta.slack * slack
    if way.product and way.change is not None and delta.scale:
        low, high = low / delta.scale, high / delta.scale
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        low, high = cast(low, way.change) * delta.scale, cast(high, way.change) * delta.scale
        low, high = torch.minimum(low, high), torch.maximum(low, high)
    for kind in (way.change, block.base.dtype if way.cast else None):
        if kind is not None:
            low, high = cast(low, kind), cast(high, kind)
    return low, high


def sum_bounds(
    block: ReplayBlock,
    start: tuple[Tensor, Tensor],
    groups: Sequence[Sequence[DeltaBounds]],
    way: Rounding,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the interval of each weight, (rows, n) in float64; the deltas of a group are added before one rounding."""
    dtype, wide = block.merged.dtype, wide_type(block, way)
    low, high = start if wide == torch.float64 else (cast(start[0], wide), cast(start[1], wide))
    zero = torch.zeros_like(low)
    for group in groups:
        changes = [delta_bounds(delta, way, block, slack) for delta in group]
        least, most = sum((c[0] for c in changes), zero), sum((c[1] for c in changes), zero)
        tolerance = torch.maximum(low.abs() + least.abs(), high.abs() + most.abs()) * slack
        if wide == torch.float64:
            tolerance = tolerance * 2.0**-51
        elif len(group) == 1 and (way.change or way.cast or dtype.itemsize > 2):
            tolerance = torch.zeros_like(tolerance)  # the sum of two float32 numbers is rounded right by everyone
        else:
            tolerance = tolerance * (F32 * 2)
        low, high = cast(cast(low + least - tolerance, wide), dtype), cast(cast(high + most + tolerance, wide), dtype)
    return cast(low, dtype), cast(high, dtype)


def dora_bounds(
    sums: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor], magnitude: Tensor, way: Rounding, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the interval of m / n * V, from those of V, (rows, n), and of its norms, (rows, 1) or (1, n)."""
    m = magnitude if way.magnitude is None else cast(magnitude, way.magnitude)
    kind = way.ratio or (torch.float32 if wide != torch.float64 else wide)
    ends = [cast((m / n).nan_to_num(nan=0.0, posinf=1e300, neginf=-1e300), kind) for n in norms]
    corners = [factor * v for factor in ends for v in sums]
    low, high = torch.stack(corners).amin(0), torch.stack(corners).amax(0)
    return cast(low, kind), cast(high, kind)


def squared_norm_bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    least = torch.where(low * high <= 0, 0.0, torch.minimum(low.abs(), high.abs()))
    return least.square(), torch.maximum(low.abs(), high.abs()).square()


def norm_bounds(least: Tensor, most: Tensor, count: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the interval of norms from that of sums of `count` squares.

    The random errors of a float32 sum grow with the square root of `count`.
    """
    unit = 2.0**-50 if wide == torch.float64 else F32
    tolerance = unit * (count**0.5 + 8)
    return cast(least.sqrt() * (1 - tolerance), wide), cast(most.sqrt() * (1 + tolerance), wide)


class ReplayErrors:
    """A test that the weights that differ from our replay are as many, and as near to a tie, as float32 causes.

    Errors are in units of F32 times the sizes that were summed.
    """

    def __init__(self) -> None:
        self.differ = 0  # weights that differ, except near ties
        self.need = 0.0  # the error that the other arithmetic must have made at least, at the worst weight
        self.expected = [0.0] * ERROR_TERMS  # by float32 way: how many weights it changes
        self.largest = [0.0] * ERROR_TERMS  # by float32 way: its largest error

    def add(
        self, block: ReplayBlock, deltas: Sequence[DeltaBounds], products: Sequence[DeltaBounds], same: Tensor
    ) -> None:
        exact, a = block.replay
        actual = block.merged
        known = exact.isfinite() & actual.double().isfinite()
        zero = torch.zeros_like(exact)
        factor = block.most
        sizes = sum((p.sizes for p in deltas), zero) + sum((p.sizes for p in products), zero) * factor
        extra = least = zero
        if a is not None or len(deltas) > 1:
            grown = 1 + (max(exact.shape) ** 0.5 / 8 if a is not None else 0.0)
            whole = exact.abs() + block.base.double().abs()
            extra, least, sizes = whole * (F32 * 0.25 * grown), whole * (F32 * 0.05), sizes + whole
        unit, step = (sizes * F32).clamp_min(1e-300), ulp_of(actual)
        for kind in range(ERROR_TERMS):
            error = sum((p.errors[kind] for p in deltas), zero) + sum((p.errors[kind] for p in products), zero) * factor
            if actual.element_size() > 2:  # in 16 bits the few that differ are at ties, where `need` tells
                self.expected[kind] += float(((error + least) / step).clamp(max=1.0)[known].sum())
            error = (error + extra) / unit
            self.largest[kind] = max(self.largest[kind], float(error[known].max()) if known.any() else 0.0)
        off = ~same & known
        if bool(off.any()):
            toward = next_toward(actual, exact)
            rounded = cast(exact, actual.dtype)
            limit = torch.where(rounded == actual.double(), exact, (actual.double() + toward) / 2)
            need = (exact - limit).abs()
            if actual.element_size() <= 2:
                need = (need - exact.abs() * (F32 * 1.5)).clamp_min(0.0)
            needed = (need / unit)[off]
            self.differ += int((needed > TIE).sum())
            self.need = max(self.need, float(needed.max()))

    @property
    def plausible(self) -> bool:
        return self.differ == 0 or any(
            self.differ * 8 + 8 >= expected and self.need <= 8 * largest + TIE
            for expected, largest in zip(self.expected, self.largest, strict=True)
        )


@dataclass
class RoundingCandidate:
    """A way of rounding, with the order in which adapters are added, and the weights that it leaves unexplained."""

    title: str
    way: Rounding
    order: tuple[int, ...]  # id() of adapters
    outside: int = 0  # weights outside of their intervals
    beyond: float = 0.0  # by how many ulps at most
    moved: int = 0  # weights that it predicts to differ from our replay, without float32 errors
    distinct: bool = False  # it predicts something else than the first way


@dataclass(frozen=True)
class TrialOutcome:
    """The result of a RoundingTrial."""

    title: str | None  # the way that explains every weight
    outside: int  # weights that the first way does not explain, or that were altered in an otherwise exact tensor
    beyond: float  # by how many ulps at most


class RoundingTrial:
    """A trial of all ways of rounding on one tensor."""

    def __init__(
        self, replay: Replay, found: TensorRef, load: UpdateLoader, stored: Sequence[torch.dtype] = ()
    ) -> None:
        """Prepare a trial.

        Args:
            stored: types that others may have rounded the base to first: if the base and an adapter that replaces its
                weights have two types, loaders cast the one to the other.
        """
        self._replay, self._found, self._load, self._stored = replay, found, load, stored
        self._work = Workspace(torch.device("cpu"))
        self._changes: dict[torch.dtype | None, AdapterDeltas] = {}
        self._columns: dict[tuple[int, Rounding], tuple[Tensor, Tensor]] = {}
        self._errors = ReplayErrors()
        self._stray = 0  # weights that differ in untouched rows, or in being finite
        self._farthest = 0.0

    def run(self) -> TrialOutcome:
        candidates = list(self._candidates())
        for block in self._replay.blocks(self._found):
            known = self._count_stray(block)
            if block.piece is not None:
                self._test(block, candidates, known)
        first = candidates[0]
        if not self._stray:
            for each in candidates:
                if each.outside == 0 and self._likely(each):
                    return TrialOutcome(each.title, 0, 0.0)
        outside = first.outside + self._stray
        return TrialOutcome(None, outside or self._errors.differ, max(first.beyond, self._farthest))

    def _candidates(self) -> list[RoundingCandidate]:
        placements = self._replay.placements
        adapters = tuple(dict.fromkeys(id(p.adapter) for p in placements if p.update.kind in ADDITIVE))
        additions = len(adapters) + any(p.update.kind not in ADDITIVE for p in placements)
        orders = list(permutations(adapters)) if len(adapters) <= 3 else [adapters, adapters[::-1]]
        table = DORA_ROUNDINGS if any(normalizes_rows(p) for p in placements) else ROUNDINGS
        kind = self._replay.source.spec.dtype
        ways = {title: way for title, way in table.items() if additions > 1 or not way.apart}
        if kind in ("F32", "F64"):  # float32 changes are of that type already
            ways = {title: way for title, way in ways.items() if way.change or not way.cast}
        if kind == "F64":
            narrow = {t: replace(w, total=torch.float32) for t, w in ways.items() if w.total is None}
            ways |= {f"{title}, all in float32": way for title, way in narrow.items()}
        for each in self._stored:
            first = {f"{title}, from weights in {each}": replace(way, base=each) for title, way in ways.items()}
            ways = {**ways, **first}
        return [
            RoundingCandidate(title, way, order)
            for title, way in ways.items()
            for order in (orders if way.apart else [adapters])
        ]

    def _count_stray(self, block: ReplayBlock) -> Tensor:
        """Count the weights that no rounding explains, and return a mask of those that one may."""
        exact, _ = block.replay
        base, actual = block.base.double(), block.merged.double()
        if block.piece is None:
            out = torch.empty_like(block.merged)
            round_once(base, out, self._work)
            bad = ~(same_bits(out, block.merged) | (out.isnan() & actual.isnan()))
        else:
            kept = (base.isnan() & actual.isnan()) | (actual == base) | (actual == exact)
            bad = ~exact.isfinite() & ~kept
        if bool(bad.any()):
            self._stray += int(bad.sum())
            self._farthest = max(self._farthest, max_ulps_off(exact, block.merged, bad))
        return exact.isfinite()

    def _test(self, block: ReplayBlock, candidates: Sequence[RoundingCandidate], known: Tensor) -> None:
        out = torch.empty_like(block.merged)
        round_once(block.replay[0], out, self._work)
        same = same_bits(out, block.merged) | (out == block.merged) | ~known
        actual = block.merged.double()
        self._deltas: dict[torch.dtype | None, tuple[list[DeltaBounds], list[DeltaBounds]]] = {}
        self._errors.add(block, *self._deltas_of(block, None), same)
        for each in candidates:
            if each.outside and each is not candidates[0]:
                continue
            low, high = self._interval(block, each)
            if each is candidates[0]:
                plain = low, high
            each.distinct |= not (torch.equal(low, plain[0]) and torch.equal(high, plain[1]))
            off = ~((actual >= low) & (actual <= high)) & known
            if bool(off.any()):
                each.outside += int(off.sum())
                nearest = torch.minimum(high, torch.maximum(low, actual.nan_to_num()))
                each.beyond = max(each.beyond, max_ulps_off(nearest, block.merged, off))
            elif each.way.apart and each.way.change is None and not any(map(normalizes_rows, block.inside)):
                middle, _ = self._interval(block, each, 0.0)
                each.moved += int(((middle != out.double()) & known).sum())

    def _likely(self, candidate: RoundingCandidate) -> bool:
        if not candidate.distinct:
            return self._errors.plausible
        return self._errors.differ * 4 + 16 >= candidate.moved

    def _deltas_of(
        self, block: ReplayBlock, factors: torch.dtype | None
    ) -> tuple[list[DeltaBounds], list[DeltaBounds]]:
        """Return the deltas of additive updates, and the s * B @ A of a DoRA."""
        if factors not in self._changes:
            self._changes[factors] = AdapterDeltas(self._load, factors)
        if factors not in self._deltas:
            changes = self._changes[factors]
            self._deltas[factors] = changes.of(block), changes.of(block, additive=False)
        return self._deltas[factors]

    def _interval(self, block: ReplayBlock, candidate: RoundingCandidate, slack: float = 1.0) -> tuple[Tensor, Tensor]:
        way = candidate.way
        deltas, products = self._deltas_of(block, way.factors)
        start, partial = self._start(block, way, deltas, products)
        if way.apart:
            dtype = block.merged.dtype
            start = cast(start[0], dtype), cast(start[1], dtype)
            named = [[delta for delta in deltas if delta.adapter == adapter] for adapter in candidate.order]
            groups = [partial, *named]
        else:
            groups = [partial + deltas]
        return sum_bounds(block, start, [group for group in groups if group], way, slack)

    def _start(
        self, block: ReplayBlock, way: Rounding, deltas: list[DeltaBounds], products: list[DeltaBounds]
    ) -> tuple[tuple[Tensor, Tensor], list[DeltaBounds]]:
        """Return the interval that deltas are added to, and the delta of an update that is not additive.

        That delta is empty if its weight is 1; else it goes a part of the way from W to the update's value.
        """
        wide = base_of(block, way)
        exact, a = block.replay
        if any(map(normalizes_rows, block.inside)):
            placement = next(p for p in block.inside if normalizes_rows(p))
            sums = self._sums(block, way, products[0])
            kind = wide_type(block, way)
            norms = self._norms(block, placement, way, sums)
            magnitude = self._changes[way.factors].magnitude(placement, block)
            return dora_bounds(sums, norms, magnitude, way, kind), []
        if a is None:
            return (wide, wide), []
        value = exact - sum((delta.change for delta in deltas), torch.zeros_like(exact))
        start = torch.where(a == 0, value if way.factors is None else cast(value, way.factors), wide)
        if bool(((a == 0) | (a == 1)).all()):
            return (start, start), []
        weight = next(p.weight for p in block.inside if p.update.kind not in ADDITIVE)
        moving = (a != 0) & (a != 1)
        change = torch.where(moving, value - wide, 0.0)
        sizes = torch.where(moving, value.abs() + (2 + abs(weight)) * wide.abs(), 0.0)
        slack = sizes * (F32 * (max(exact.shape) ** 0.5 + 16))
        slack = sum((delta.slack * block.most for delta in products), slack)
        zero = torch.zeros_like(exact)
        return (start, start), [DeltaBounds(0, change, slack, weight, sizes, (zero,) * ERROR_TERMS)]

    def _sums(self, block: ReplayBlock, way: Rounding, delta: DeltaBounds) -> tuple[Tensor, Tensor]:
        """Return the interval of V = W + D."""
        wide, kind = base_of(block, way), wide_type(block, way)
        if kind == torch.float32:
            wide = cast(wide, kind)
        low, high = delta_bounds(delta, way, block)
        return cast(wide + low, kind), cast(wide + high, kind)

    def _norms(
        self, block: ReplayBlock, placement: Placement, way: Rounding, sums: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        kind = wide_type(block, way)
        if not placement.transposed:
            least, most = squared_norm_bounds(*sums)
            return norm_bounds(least.sum(1, True), most.sum(1, True), least.shape[1], kind)
        if (id(placement), way) not in self._columns:
            changes = AdapterDeltas(self._load, way.factors)
            least = most = torch.zeros(1, block.base.shape[1], dtype=torch.float64)
            for each in self._replay.blocks(self._found):
                if placement in each.inside:
                    one, two = squared_norm_bounds(*self._sums(each, way, changes.of(each, additive=False)[0]))
                    least, most = least + one.sum(0, True), most + two.sum(0, True)
            self._columns[id(placement), way] = norm_bounds(least, most, self._replay.rows, kind)
        return self._columns[id(placement), way]
