"""List the explanations of a merged weight in tables: ways of rounding that are right, and faults.

A way of rounding predicts an interval for each weight (`rounding_bounds.sum_bounds`). A fault changes the placements,
and what `merge` would then write is its prediction; the fault with the nearest prediction names what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...adapters.updates import ADDITIVE
from ...binding.placement import Placement


@dataclass(frozen=True)
class Rounding:
    """The roundings of a merge; a type is None if nothing is rounded there."""

    factors: torch.dtype | None = None  # the type that A and B are cast to first
    change: torch.dtype | None = None  # the type that each adapter's delta is rounded to
    product: bool = False  # B @ A is rounded to `change` before it is scaled
    cast: bool = False  # the delta is rounded to the base's type too
    apart: bool = False  # adapters are added one after the other, and each sum is rounded
    total: torch.dtype | None = None  # of W + D and its norm; None: float32, or float64 if the base is that
    magnitude: torch.dtype | None = None  # the type that m is cast to
    ratio: torch.dtype | None = None  # of m / n, and of its product with W + D
    base: torch.dtype | None = None  # the type that W is cast to first


_BF16, _FP16 = torch.bfloat16, torch.float16


# Title -> rounding, from the least rounding to the most, as in peft/tuners/lora/layer.py (Linear.merge and
# get_delta_weight), where the adapter's type, the device and safe_merge decide.
ROUNDINGS: dict[str, Rounding] = {
    "one rounding of a float32 sum (peft with an fp32 adapter)": Rounding(),
    "one rounding of a float32 sum an adapter": Rounding(apart=True),
    "change rounded to the base's type, then the sum": Rounding(cast=True),
    "change rounded to bf16, then the sum (peft with a bf16 adapter or safe_merge)": Rounding(None, _BF16),
    "change rounded to fp16, then the sum (peft with an fp16 adapter or safe_merge)": Rounding(None, _FP16),
    "change rounded to bf16, then to the base's type, then the sum": Rounding(None, _BF16, cast=True),
    "change rounded to fp16, then to the base's type, then the sum": Rounding(None, _FP16, cast=True),
    "change rounded to the base's type, the sum once an adapter": Rounding(cast=True, apart=True),
    "change rounded to bf16, the sum once an adapter": Rounding(None, _BF16, apart=True),
    "change rounded to fp16, the sum once an adapter": Rounding(None, _FP16, apart=True),
    "change rounded to bf16 and to the base's type, the sum once an adapter": Rounding(
        None, _BF16, cast=True, apart=True
    ),
    "change rounded to fp16 and to the base's type, the sum once an adapter": Rounding(
        None, _FP16, cast=True, apart=True
    ),
    "product and scale rounded to bf16 (peft on a GPU)": Rounding(None, _BF16, True),
    "product and scale rounded to fp16 (peft on a GPU)": Rounding(None, _FP16, True),
    "product and scale rounded to bf16, the sum once an adapter": Rounding(None, _BF16, True, apart=True),
    "product and scale rounded to fp16, the sum once an adapter": Rounding(None, _FP16, True, apart=True),
    "factors in bf16, one rounding of the sum": Rounding(_BF16),
    "factors in fp16, one rounding of the sum": Rounding(_FP16),
    "factors and change in bf16": Rounding(_BF16, _BF16),
    "factors and change in fp16": Rounding(_FP16, _FP16),
    "factors and change in bf16, the sum once an adapter": Rounding(_BF16, _BF16, apart=True),
    "factors and change in fp16, the sum once an adapter": Rounding(_FP16, _FP16, apart=True),
    "factors, product and scale in bf16": Rounding(_BF16, _BF16, True),
    "factors, product and scale in fp16": Rounding(_FP16, _FP16, True),
    "factors, product and scale in bf16, rounded to the base's type": Rounding(_BF16, _BF16, True, True),
    "factors, product and scale in fp16, rounded to the base's type": Rounding(_FP16, _FP16, True, True),
}


# Title -> rounding of W' = m / ||W + D|| * (W + D), as in peft/tuners/lora/variants.py
# (DoraLinearVariant.merge_unsafe), where torch's type promotion and autocast_adapter_dtype decide.
DORA_ROUNDINGS: dict[str, Rounding] = {
    "float32 norms, one rounding (peft with an fp32 adapter)": Rounding(),
    "float32 norms, the sum once an adapter": Rounding(apart=True),
    "change in bf16, float32 norms": Rounding(None, _BF16),
    "change in fp16, float32 norms": Rounding(None, _FP16),
    "change and magnitudes in bf16, float32 norms": Rounding(None, _BF16, magnitude=_BF16),
    "change and magnitudes in fp16, float32 norms": Rounding(None, _FP16, magnitude=_FP16),
    "change, sum and norms in bf16": Rounding(None, _BF16, total=_BF16),
    "change, sum and norms in fp16": Rounding(None, _FP16, total=_FP16),
    "all in bf16": Rounding(None, _BF16, total=_BF16, magnitude=_BF16, ratio=_BF16),
    "all in fp16": Rounding(None, _FP16, total=_FP16, magnitude=_FP16, ratio=_FP16),
    "factors in bf16, float32 norms": Rounding(_BF16),
    "factors in fp16, float32 norms": Rounding(_FP16),
    "factors and magnitudes in bf16, float32 norms": Rounding(_BF16, magnitude=_BF16),
    "factors and magnitudes in fp16, float32 norms": Rounding(_FP16, magnitude=_FP16),
    "factors and change in bf16, float32 norms": Rounding(_BF16, _BF16),
    "factors and change in fp16, float32 norms": Rounding(_FP16, _FP16),
    "factors, change and magnitudes in bf16, float32 norms": Rounding(_BF16, _BF16, magnitude=_BF16),
    "factors, change and magnitudes in fp16, float32 norms": Rounding(_FP16, _FP16, magnitude=_FP16),
    "factors, change, sum and norms in bf16": Rounding(_BF16, _BF16, total=_BF16),
    "factors, change, sum and norms in fp16": Rounding(_FP16, _FP16, total=_FP16),
    "factors and all else in bf16": Rounding(_BF16, _BF16, total=_BF16, magnitude=_BF16, ratio=_BF16),
    "factors and all else in fp16": Rounding(_FP16, _FP16, total=_FP16, magnitude=_FP16, ratio=_FP16),
}


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
