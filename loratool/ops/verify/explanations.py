"""What a merged weight can have come from, as literal tables: ways of rounding that are right, and faults.

A way of rounding predicts an interval for each weight (`judging.interval`). A fault changes the placements; what
merge would then write is its prediction, and of several the one whose bits are nearest names what is wrong.
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
    """How a merge rounds. factors: the type that the factors were cast to before (None: as they are); change: the type
    that each adapter's change was rounded to; product: that B @ A was rounded to it before the scale; cast: that the
    change was rounded to the base's type besides; apart: adapters are added one after the other, each sum rounded;
    total: the type of W + D (None: float32, or float64 where the base is that), and of its norm; magnitude: the type
    that m was cast to; ratio: the type of m / n and of its product with W + D; base: the type that W was cast to first.
    """

    factors: torch.dtype | None = None
    change: torch.dtype | None = None
    product: bool = False
    cast: bool = False
    apart: bool = False
    total: torch.dtype | None = None
    magnitude: torch.dtype | None = None
    ratio: torch.dtype | None = None
    base: torch.dtype | None = None


_BF16, _FP16 = torch.bfloat16, torch.float16


# name -> rounding, from the least rounding to the most. Sources: peft/tuners/lora/layer.py:Linear.merge,
# get_delta_weight; what each does depends on the adapter's type, the device and safe_merge.
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


# The same of W' = m / ||W + D|| * (W + D). Source: peft/tuners/lora/variants.py:DoraLinearVariant.merge_unsafe, in
# which torch's promotion of the adapter's and the base's types decides; autocast_adapter_dtype decides the adapter's.
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


# What is wrong -> the placement that was merged instead, None for none. Of two that predict the same the first counts.
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


# The same with the name of another tensor of its shape -> whether its values are under the change too.
OTHERS: dict[str, bool] = {
    "it has the change of {other}": False,
    "it is {other} whole: two tensors are swapped": True,
}


@dataclass(frozen=True)
class DeltaEvidence:
    """Of one tensor, as sums over its weights: E is the change found, D the one asked for.

    outside: weights that no rounding explains, of `weights`; beyond: how far the farthest is, in steps; misses: |E|^2
    less what is predicted, of what was asked for; fault, of: the best of FAULTS and OTHERS, and its misses.
    """

    found: float
    asked: float
    both: float
    weights: int
    outside: int
    beyond: float
    misses: float
    fault: str = ""
    of: float = float("inf")

    @property
    def scale(self) -> float:
        """How many times D is in E."""
        return self.both / self.asked if self.asked else 0.0

    @property
    def explained(self) -> float:
        """The cosine of E and D: how much of E is some multiple of D."""
        return self.both / (self.found * self.asked) ** 0.5 if self.found and self.asked else 0.0


CLOSE = 0.9  # a cosine from which a change is taken for another


NEARER = 0.25  # of the misses of what was asked for: a fault with fewer names what is wrong


# What is said -> whether the evidence says so, the first that does.
DIAGNOSES: dict[str, Callable[[DeltaEvidence], bool]] = {
    "{fault}": lambda e: e.of < NEARER * e.misses,
    "{outside} weights were altered, {beyond}": lambda e: e.outside <= max(64, e.weights // 1000),
    "the scale alpha / r is another: the change is {scale:.3g} times what it should be": lambda e: (
        e.explained > CLOSE and abs(e.scale - 1) > 0.1
    ),
    "the change is in it, and another one: of another adapter, or from another base": lambda e: e.both > 0.2 * e.asked,
    "it is not this base with this adapter": lambda e: True,
}


def describe_ulps(steps: float) -> str:
    """In words, by how many steps the farthest weight is off; inf is one that is, or should be, no finite number."""
    if not math.isfinite(steps):
        return "inf or nan among them"
    return f"by up to {steps:.0f} steps" if steps < 1e6 else f"by up to {steps:.1e} steps"


def diagnose(evidence: DeltaEvidence) -> str:
    said = next(said for said, holds in DIAGNOSES.items() if holds(evidence))
    beyond = describe_ulps(evidence.beyond)
    return said.format(outside=evidence.outside, beyond=beyond, scale=evidence.scale, fault=evidence.fault)
