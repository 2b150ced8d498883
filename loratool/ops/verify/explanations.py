"""List the explanations of a merged weight in tables: ways of rounding that are right, and faults.

A way of rounding predicts an interval for each weight (`rounding_bounds.Predictions`). A fault changes the placements,
and what `merge` would then write is its prediction; the fault with the nearest prediction names what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from ...adapters.updates import ADDITIVE
from ...binding.placement import Placement


@dataclass(frozen=True)
class Rounding:
    """The roundings of a merge as types; None or no type where nothing is rounded."""

    base: torch.dtype  # W
    factors: torch.dtype | None  # A and B, before they are multiplied
    product: torch.dtype | None  # B @ A, before it is scaled
    change: tuple[torch.dtype, ...]  # each adapter's delta, one type after the other
    total: torch.dtype  # W + D, and its norm
    magnitude: torch.dtype | None  # m
    ratio: torch.dtype  # m / n, and its product with W + D
    apart: bool  # adapters are added one after the other, and each sum is rounded


NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what {type} in a title stands for


# Title -> what is rounded to {type}, as in `Rounding`; `cast` is the delta to the base's type, `apart` no type. From
# the least rounding to the most, as in peft/tuners/lora/layer.py (Linear.merge and get_delta_weight), where the
# adapter's type, the device and safe_merge decide.
ROUNDINGS = {
    "one rounding of a float32 sum (peft with an fp32 adapter)": "",
    "one rounding of a float32 sum an adapter": "apart",
    "change rounded to the base's type, then the sum": "cast",
    "change rounded to {type}, then the sum (peft with a {type} adapter or safe_merge)": "change",
    "change rounded to {type}, then to the base's type, then the sum": "change cast",
    "change rounded to the base's type, the sum once an adapter": "cast apart",
    "change rounded to {type}, the sum once an adapter": "change apart",
    "change rounded to {type} and to the base's type, the sum once an adapter": "change cast apart",
    "product and scale rounded to {type} (peft on a GPU)": "product change",
    "product and scale rounded to {type}, the sum once an adapter": "product change apart",
    "factors in {type}, one rounding of the sum": "factors",
    "factors and change in {type}": "factors change",
    "factors and change in {type}, the sum once an adapter": "factors change apart",
    "factors, product and scale in {type}": "factors product change",
    "factors, product and scale in {type}, rounded to the base's type": "factors product change cast",
}


# The same for W' = m / ||W + D|| * (W + D), as in peft/tuners/lora/variants.py (DoraLinearVariant.merge_unsafe), where
# torch's type promotion and autocast_adapter_dtype decide.
DORA_ROUNDINGS = {
    "float32 norms, one rounding (peft with an fp32 adapter)": "",
    "float32 norms, the sum once an adapter": "apart",
    "change in {type}, float32 norms": "change",
    "change and magnitudes in {type}, float32 norms": "change magnitude",
    "change, sum and norms in {type}": "change total",
    "all in {type}": "change total magnitude ratio",
    "factors in {type}, float32 norms": "factors",
    "factors and magnitudes in {type}, float32 norms": "factors magnitude",
    "factors and change in {type}, float32 norms": "factors change",
    "factors, change and magnitudes in {type}, float32 norms": "factors change magnitude",
    "factors, change, sum and norms in {type}": "factors change total",
    "factors and all else in {type}": "factors change total magnitude ratio",
}


def list_roundings(
    kind: torch.dtype, others: Sequence[torch.dtype], dora: bool, several: bool
) -> list[tuple[str, Rounding]]:
    """Return the ways of rounding on a base of type `kind` with their titles, the likeliest first, no way twice.

    Args:
        others: types that the base may have been rounded to first.
        dora: whether a DoRA divides rows by their norms.
        several: whether more than one adapter changes the tensor.
    """
    table = (DORA_ROUNDINGS if dora else ROUNDINGS).items()
    totals = {"": torch.float32} if kind != torch.float64 else {"": kind, ", all in float32": torch.float32}
    found: dict[Rounding, str] = {}
    for base, (end, total), (title, words), (name, narrow) in product(
        (kind, *others), totals.items(), table, NARROW.items()
    ):
        to = dict.fromkeys(words.split(), narrow)
        change = dict.fromkeys(each for word, each in (("change", narrow), ("cast", kind)) if word in to)
        way = Rounding(
            base=base,
            factors=to.get("factors"),
            product=to.get("product"),
            change=tuple(each for each in change if each.itemsize == 2),  # in float32 it is of that type already
            total=to.get("total", total),
            magnitude=to.get("magnitude"),
            ratio=to.get("ratio", torch.float32 if "total" in to else total),
            apart="apart" in to,
        )
        if several or not way.apart:
            first = f", from weights in {base}" if base != kind else ""
            found.setdefault(way, title.format(type=name) + end + first)
    return [(title, way) for way, title in found.items()]


def _scaled(factor: Callable[[Placement], float]) -> Callable[[Placement], Placement | None]:
    def fault(placement: Placement) -> Placement | None:
        by = factor(placement)
        if placement.update.kind in (*ADDITIVE, "dora"):
            return replace(placement, update=replace(placement.update, scale=placement.update.scale * by))
        return replace(placement, weight=placement.weight * by)

    return fault


def _transposed(placement: Placement) -> Placement | None:
    low_rank = placement.update.kind in ("lora", "experts")
    return replace(placement, transposed=not placement.transposed) if low_rank else placement


def _without_norm(placement: Placement) -> Placement | None:
    dora = placement.update.kind == "dora"
    return replace(placement, update=replace(placement.update, kind="lora")) if dora else placement


# Fault -> the placement that was merged instead, None for none. Among faults with equal predictions the first counts.
FAULTS: dict[str, Callable[[Placement], Placement | None]] = {
    "the change is not applied": lambda p: None,
    "the change is applied twice, or its scale doubled": _scaled(lambda p: 2.0),
    "the change is applied with half its scale": _scaled(lambda p: 0.5),
    "the scale is alpha / sqrt(r) and should be alpha / r": _scaled(lambda p: max(1, p.update.rank) ** 0.5),
    "the scale is alpha / r and should be alpha / sqrt(r)": _scaled(lambda p: max(1, p.update.rank) ** -0.5),
    "the scale alpha / r is missing": _scaled(lambda p: 1 / p.update.scale if p.update.scale else 1.0),
    "the scale alpha / r is applied twice": _scaled(lambda p: p.update.scale),
    "the change is negated: subtracted, not added": _scaled(lambda p: -1.0),
    "the change is transposed": _transposed,
    "the magnitudes of DoRA are ignored": _without_norm,
}


# Fault that involves another tensor of the same shape -> whether its weights were taken too, not its delta only
OTHERS: dict[str, bool] = {
    "it has the change of {other}": False,
    "it is {other} whole: two tensors are swapped": True,
}


@dataclass(frozen=True)
class DeltaEvidence:
    """The evidence of one tensor, as sums over its weights; E is the delta found, D the requested one."""

    found: float  # ||E||^2
    asked: float  # ||D||^2
    both: float  # <E, D>
    weights: int
    outside: int  # weights that no rounding explains
    beyond: float  # by how many ulps the farthest of them is off
    misses: float  # the squared distance from the replay of what was requested
    fault: str = ""  # the best of FAULTS and OTHERS
    of: float = float("inf")  # the squared distance from the replay of that fault

    @property
    def scale(self) -> float:
        """The factor s with which s * D is nearest to E."""
        return self.both / self.asked if self.asked else 0.0

    @property
    def explained(self) -> float:
        """The cosine of E and D, which is 1 if E is a multiple of D."""
        return self.both / (self.found * self.asked) ** 0.5 if self.found and self.asked else 0.0


CLOSE = 0.9  # the cosine above which one delta counts as a multiple of the other


NEARER = 0.25  # a fault is named if its squared distance is below this share of `misses`


# Diagnosis -> whether the evidence shows it; the first that holds is reported.
DIAGNOSES: dict[str, Callable[[DeltaEvidence], bool]] = {
    "{fault}": lambda e: e.of < NEARER * e.misses,
    "{outside} weights were altered, {beyond}": lambda e: e.outside <= max(64, e.weights // 1000),
    "the scale alpha / r is another: the change is {scale:.3g} times what it should be": lambda e: (
        e.explained > CLOSE and abs(e.scale - 1) > 0.1
    ),
    "the change is in it, and another one: of another adapter, or from another base": lambda e: e.both > 0.2 * e.asked,
    "it is not this base with this adapter": lambda e: True,
}


def describe_ulps(ulps: float) -> str:
    """Return in words how far the farthest weight is off; inf means that it is, or should be, not finite."""
    if not math.isfinite(ulps):
        return "inf or nan among them"
    return f"by up to {ulps:.0f} steps" if ulps < 1e6 else f"by up to {ulps:.1e} steps"


def diagnose(evidence: DeltaEvidence) -> str:
    """Return the first of DIAGNOSES that the evidence shows, with its numbers filled in."""
    diagnosis = next(diagnosis for diagnosis, holds in DIAGNOSES.items() if holds(evidence))
    beyond = describe_ulps(evidence.beyond)
    return diagnosis.format(outside=evidence.outside, beyond=beyond, scale=evidence.scale, fault=evidence.fault)
