"""Diagnose a tensor that no rounding explains.

A fault changes the placements. Its prediction is what `merge` would then write, and the fault with the nearest
prediction is the diagnosis. If none is near, the sizes of the requested and the actual delta are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ...adapters.updates.update import Fault
from ...binding.merge.merge_plan import MergePlan
from ...binding.modules.placement import Placement
from ...files.tensor_ref import TensorRef
from ...numerics.forms import Wide
from ...streaming.segment import UpdateLoader
from ...undo.records import CodedRows
from ...views.parts.numbers import measure, plural
from ...views.verify import Misfit
from .replay import Replay, ReplayBlock, Spans, adds
from .roundings import cast_wide
from .trial import TrialOutcome


def _scaled(factor: Callable[[Placement], float]) -> Callable[[Placement], Placement | None]:
    def fault(placement: Placement) -> Placement | None:
        by = factor(placement)
        if adds(placement) and _has_scale(placement):
            return replace(placement, update=replace(placement.update, scale=placement.update.scale * by))
        return replace(placement, weight=placement.weight * by)

    return fault


def _has_scale(placement: Placement) -> bool:
    added = placement.update.cls.without_norm(placement.update)
    return any(each.name == "scale" for each in fields(added.cls))  # type: ignore[arg-type]  # all are dataclasses


def _divisor(placement: Placement) -> int:
    return max(1, placement.update.cls.divisor(placement.update))


def _transposed(placement: Placement) -> Placement | None:
    if not placement.update.additive or placement.update.cls.in_stored_layout or len(placement.update.shape) < 2:
        return placement
    rows, columns = placement.update.shape[0 if placement.expert is None else 1 :][:2]
    # What is fused is no square, though the tensor may be that has some rows of it.
    return replace(placement, transposed=not placement.transposed) if rows == columns else placement


def _misread(fault: Fault) -> Callable[[Placement], Placement | None]:
    return lambda p: replace(p, update=p.update.cls.misread(p.update).get(fault, p.update))


# Fault -> what the delta is multiplied by
FACTORS: dict[str, Callable[[Placement], float]] = {
    "the delta is not applied": lambda p: 0.0,
    "the delta is applied twice, or its scale doubled": lambda p: 2.0,
    "the delta is applied with half its scale": lambda p: 0.5,
    "the scale is alpha / sqrt(r), not alpha / r": lambda p: _divisor(p) ** 0.5,
    "the scale is alpha / r, not alpha / sqrt(r)": lambda p: _divisor(p) ** -0.5,
    "the scale alpha / r is missing": lambda p: 1 / p.update.scale if p.update.scale else 1.0,
    "the scale alpha / r is applied twice": lambda p: p.update.scale,
    "the delta is negated: subtracted": lambda p: -1.0,
    "the weight of the adapter is applied twice": lambda p: p.weight,
}

# Fault -> the placement that was merged instead, None for none. Among faults with equal predictions the first counts.
FAULTS: dict[str, Callable[[Placement], Placement | None]] = {
    **{fault: _scaled(factor) for fault, factor in FACTORS.items()},
    "the delta is not applied": lambda p: None,
    "the delta is transposed": _transposed,
    "the rotations are turned the other way": _misread("turned"),
    "the bound on the rotations is ignored": _misread("unbound"),
    "the rotations are bound by alpha, not by alpha times the outputs": _misread("bound by alpha"),
    "the scales of the outputs are ignored": _misread("unscaled"),
    "the magnitudes of DoRA are ignored": lambda p: replace(p, update=p.update.cls.without_norm(p.update)),
}

# Fault that involves another tensor of the same shape -> whether its weights were taken too, not its delta only
OTHERS: dict[str, bool] = {
    "it has the delta of {other}": False,
    "it is a copy of {other}": True,
}

NEARER = 0.25  # a fault is named if its squared distance is below this share of that of what was requested

FOUND = 0.01  # below this share of it, no fault that takes long is tried

MANY = 1e6  # ulps, whose digits say no more than their size

TRIED = 8  # of the tensors of the same shape, the nearest by their sketches

SKETCHED = 256  # numbers of a tensor, about

# Tensor, merged model's type -> some of its numbers in the base and in the merge, which one run of `verify` fills
Sketches = dict[tuple[str, str], tuple[Wide, Wide]]

CLOSE = 0.9  # the cosine above which one delta counts as a multiple of the other


def describe_ulps(ulps: float) -> str:
    """Return in words how far the farthest weight is off. inf means that it is, or should be, not finite."""
    if not math.isfinite(ulps):
        return "inf or nan among them"
    return f"by up to {plural(round(ulps), 'ulp') if ulps < MANY else f'{measure(ulps)} ulps'}"


@dataclass
class Sums:
    """Sums over weights of the delta that was found, E = W' - W, and of the requested one, D = X - W."""

    found: float = 0.0  # <E, E>
    asked: float = 0.0  # <D, D>
    both: float = 0.0  # <E, D>
    apart: float = 0.0  # <E - D, E - D>

    def add(self, block: ReplayBlock) -> None:
        W = block.base.wide()
        E, D = (finite(x - W) for x in (block.merged.wide(), block.reals[0]))
        self.found += float((E * E).sum())
        self.asked += float((D * D).sum())
        self.both += float((E * D).sum())
        self.apart += float(np.square(E - D).sum())

    def without(self, factor: float) -> float:
        """Return <E - s D, E - s D> for a factor s."""
        return max(0.0, self.found - 2 * factor * self.both + factor * factor * self.asked)

    @property
    def cosine(self) -> float:
        """Of E and D; 0 if one of them is 0."""
        sizes = math.sqrt(self.found) * math.sqrt(self.asked)
        return self.both / sizes if sizes else 0.0

    def misfit(self, differing: float, steps: float) -> Misfit | None:
        """Return the figures of what was found. None if no delta was requested, or the sums overflowed."""
        if not self.asked:
            return None
        scale, distance = self.both / self.asked, math.sqrt(self.apart) / math.sqrt(self.asked)
        if not all(map(math.isfinite, (scale, self.cosine, distance))):
            return None
        return Misfit(scale, self.cosine, distance, differing, None if math.isinf(steps) else round(steps))


def diagnose(
    plan: MergePlan,
    name: str,
    merged: TensorRef,
    trial: TrialOutcome,
    sums: Sums,
    sketches: Sketches,
    spans: Spans = (),
) -> str:
    """Return in words what is wrong with a tensor.

    Args:
        trial: how many weights no rounding explains, and how far the farthest of them is off.
        sums: of the tensor, or of the spans.
        sketches: a cache for this plan.
        spans: look at these rows alone.
    """
    fault = find_fault(plan, name, merged, sketches, Sample(spans, sums) if spans else None)
    if fault:
        return fault
    if trial.outside <= max(64, merged.spec.size // 1000):
        return f"{plural(trial.outside, 'weight')} altered, {describe_ulps(trial.beyond)}"
    times = sums.both / sums.asked if sums.asked else 0.0
    if sums.cosine > CLOSE and abs(times - 1) > 0.1:
        return f"the delta is {times:.3g} times what it should be"
    return "it has the delta and another change" if times > 0.2 else "it is not this base with this adapter"


@dataclass(frozen=True)
class Sample:
    """Some rows of a tensor under additive updates, with their sums."""

    spans: Spans
    sums: Sums


def find_fault(
    plan: MergePlan, name: str, merged: TensorRef, sketches: Sketches, sample: Sample | None = None
) -> str | None:
    """Return the fault that predicts a tensor far better than the requested merge. None if no fault does.

    Args:
        sample: look at these rows alone.
    """
    misses = sample.sums.apart if sample else _distance(_replay(plan, name, plan.placements[name]), merged)
    fault, nearest = _likeliest_fault(plan, name, merged, misses, sketches, sample)
    return fault if nearest < NEARER * misses else None


def _replay(plan: MergePlan, name: str, placements: Sequence[Placement]) -> Replay:
    return Replay(plan.sources[name], placements, UpdateLoader())


def _distance(replay: Replay, merged: TensorRef, spans: Spans = ()) -> float:
    """Return the sum of the squared differences between a tensor, or spans of its rows, and a rounded replay."""
    blocks = replay.blocks(merged, spans)
    return sum(float(np.square(finite(_rounded(block, merged) - block.merged.wide())).sum()) for block in blocks)


def _rounded(block: ReplayBlock, merged: TensorRef) -> Wide:
    """Return the rows of a replay rounded to the merged tensor's type, or to its codes."""
    if merged.parts is None:
        return block.expected[0].wide()
    grid = CodedRows(merged.parts, block.first, block.base.shape[1])
    return grid.values(0, grid.nearest(0, block.reals[0]))


def _likeliest_fault(
    plan: MergePlan, name: str, merged: TensorRef, misses: float, sketches: Sketches, sample: Sample | None
) -> tuple[str, float]:
    """Return the best of FAULTS and OTHERS, and the squared distance of its prediction. ("", inf) if there is none."""
    placements, faults, spans = plan.placements[name], {"": math.inf}, sample.spans if sample else ()
    is_square = len(merged.spec.shape) == 2 and merged.spec.shape[0] == merged.spec.shape[1]
    for title, fault in FAULTS.items():
        faulty = tuple(instead for instead in map(fault, placements) if instead is not None)
        is_transposed = any(p.transposed != q.transposed for p, q in zip(placements, faulty, strict=False))
        if faulty == placements or (is_transposed and not is_square):
            continue
        factors = {FACTORS[title](p) for p in placements} if title in FACTORS else set[float]()
        if sample and len(factors) == 1:
            faults[title] = sample.sums.without(*factors)
        elif not sample or min(faults.values()) > FOUND * misses:
            faults[title] = _distance(_replay(plan, name, faulty), merged, spans)
    likeliest = min(faults, key=lambda title: faults[title])
    if misses and faults[likeliest] > FOUND * misses:
        other = _likeliest_other(plan, name, merged, sketches, spans)
        return min((likeliest, faults[likeliest]), other, key=lambda pair: pair[1])
    return likeliest, faults[likeliest]


def _likeliest_other(
    plan: MergePlan, name: str, merged: TensorRef, sketches: Sketches, spans: Spans
) -> tuple[str, float]:
    """Return the best of OTHERS by a few rows of each tensor of the same shape, and its distance over all rows."""
    mine, tried, others = plan.placements[name], {}, {}
    for other, source in plan.sources.items():
        theirs = plan.placements.get(other, ())
        if other != name and source.spec == plan.sources[name].spec and (not theirs or theirs[0].rows == mine[0].rows):
            others[other] = theirs
    for other in _nearest_others(plan, name, merged, others, sketches):
        theirs = others[other]
        for title, is_swapped in OTHERS.items():
            if theirs or is_swapped:
                replay = _replay(plan, other if is_swapped else name, theirs)
                tried[title.format(other=other)] = replay, _distance(replay, merged, replay.middle())
    if not tried:
        return "", math.inf
    title = min(tried, key=lambda title: tried[title][1])
    return title, _distance(tried[title][0], merged, spans)


def _nearest_others(
    plan: MergePlan,
    name: str,
    merged: TensorRef,
    others: Mapping[str, tuple[Placement, ...]],
    sketches: Sketches,
) -> list[str]:
    """Return the few of `others` that are likely equal to a tensor, or have its delta. All if sketches do not decide.

    Each tensor is sketched once, as replaying all pairs would take quadratic time.
    """
    placements = (plan.placements[name], *others.values())
    if len(others) <= TRIED or merged.parts or not all(p.update.additive for tensor in placements for p in tensor):
        return list(others)
    kind = merged.spec.dtype
    for tensor in (tensor for tensor in (name, *others) if (tensor, kind) not in sketches):
        block = _middle(_replay(plan, tensor, plan.placements.get(tensor, ())), merged)
        sketches[tensor, kind] = _sketch(block.base.wide()), _sketch(block.reals[0])
    block = _middle(_replay(plan, name, plan.placements[name]), merged)
    W, wanted = sketches[name, kind][0], _sketch(block.merged.wide())
    if any(sketches[other, kind][0].shape != W.shape for other in others):
        return list(others)
    bases, merges = (np.stack([sketches[other, kind][i] for other in others]) for i in range(2))

    def misses(predictions: Wide) -> Wide:
        apart: Wide = np.square(finite(cast_wide(predictions, block.merged.form) - wanted)).sum(-1)
        return apart

    by_sketch = np.minimum(misses(W + (merges - bases)), misses(merges))
    is_near = by_sketch < NEARER * misses(sketches[name, kind][1])
    names = list(others)
    return [names[i] for i in by_sketch.argsort(kind="stable").tolist()[:TRIED] if is_near[i]]


def _middle(replay: Replay, merged: TensorRef) -> ReplayBlock:
    """Return a block from the middle: of a span over rows with other placements, the first part."""
    return next(replay.blocks(merged, replay.middle()))


def _sketch(x: Wide) -> Wide:
    """Return some numbers of a block, evenly spaced."""
    return x.reshape(-1)[:: max(1, x.size // SKETCHED)].copy()


def finite(x: Wide) -> Wide:
    """Return numbers with 0 in place of inf and nan, so that sums ignore these."""
    return np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
