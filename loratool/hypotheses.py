"""What a merged weight can have come from, as literal tables: ways of rounding that are right, and faults.

A way of rounding predicts an interval for each weight: where other arithmetic than ours ends, given that it sums in
float32 in any order. A fault predicts another change, and is scored by how much of the change found it explains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

F32 = 2.0**-24  # half a float32 step, relative


@dataclass(frozen=True)
class Part:
    """One adapter's change to a tile in float64, and how far a float32 sum can be from it. change, slack: (rows, n)."""

    change: Tensor
    slack: Tensor
    scale: float


@dataclass(frozen=True)
class Rounding:
    """How a merge rounds. factors: the type that the factors were cast to before (None: as they are); change: the type
    that each adapter's change was rounded to; product: that B @ A was rounded to it before the scale; cast: that the
    change was rounded to the base's type besides; apart: adapters are added one after the other, each sum rounded.
    """

    factors: torch.dtype | None = None
    change: torch.dtype | None = None
    product: bool = False
    cast: bool = False
    apart: bool = False


# name -> rounding, from the least rounding to the most. Sources: peft/tuners/lora/layer.py:Linear.merge,
# get_delta_weight; what each does depends on the adapter's type, the device and safe_merge.
ROUNDINGS: dict[str, Rounding] = {
    "one rounding of a float32 sum (peft with an fp32 adapter)": Rounding(),
    "one rounding of a float32 sum an adapter": Rounding(apart=True),
    "change rounded to bf16, then the sum (peft with a bf16 adapter or safe_merge)": Rounding(None, torch.bfloat16),
    "change rounded to fp16, then the sum (peft with an fp16 adapter or safe_merge)": Rounding(None, torch.float16),
    "change rounded to bf16, then to the base's type, then the sum": Rounding(None, torch.bfloat16, cast=True),
    "change rounded to fp16, then to the base's type, then the sum": Rounding(None, torch.float16, cast=True),
    "change rounded to bf16, the sum once an adapter": Rounding(None, torch.bfloat16, apart=True),
    "change rounded to fp16, the sum once an adapter": Rounding(None, torch.float16, apart=True),
    "product and scale rounded to bf16 (peft on a GPU)": Rounding(None, torch.bfloat16, True),
    "product and scale rounded to fp16 (peft on a GPU)": Rounding(None, torch.float16, True),
    "factors in bf16, one rounding of the sum": Rounding(torch.bfloat16),
    "factors in fp16, one rounding of the sum": Rounding(torch.float16),
    "factors and change in bf16": Rounding(torch.bfloat16, torch.bfloat16),
    "factors and change in fp16": Rounding(torch.float16, torch.float16),
    "factors, product and scale in bf16": Rounding(torch.bfloat16, torch.bfloat16, True),
    "factors, product and scale in fp16": Rounding(torch.float16, torch.float16, True),
}
# Updates with norms or parts (DoRA, a weight besides 1): what 16 bits on the way leave of them.
LOOSE = "norms or parts in 16 bits"
LOOSE_STEPS = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-18, torch.float64: 2.0**-18}


def interval(base: Tensor, parts: Sequence[Part], way: Rounding, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The least and the largest value that a weight can have, in float64. base: (rows, n) in float64."""
    groups = [[part] for part in parts] if way.apart else [list(parts)]
    low = high = base
    for group in groups:
        least, most = torch.zeros_like(base), torch.zeros_like(base)
        for part in group:
            one, two = _rounded_change(part, way)
            if way.cast:
                one, two = one.to(dtype).double(), two.to(dtype).double()
            least, most = least + one, most + two
        slack = F32 * 2 * torch.maximum(low.abs() + least.abs(), high.abs() + most.abs())
        low, high = (low + least - slack).to(dtype).double(), (high + most + slack).to(dtype).double()
    return low, high


def _rounded_change(part: Part, way: Rounding) -> tuple[Tensor, Tensor]:
    low, high = part.change - part.slack, part.change + part.slack
    if way.product and way.change is not None and part.scale:
        low, high = low / part.scale, high / part.scale
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        low, high = low.to(way.change).double() * part.scale, high.to(way.change).double() * part.scale
        low, high = torch.minimum(low, high), torch.maximum(low, high)
    if way.change is None:
        return low, high
    return low.to(way.change).double(), high.to(way.change).double()


@dataclass(frozen=True)
class Evidence:
    """Of one tensor, as sums over its weights: E is the change found, D the one asked for.

    rank: of the update; outside: weights that no rounding explains, of `weights`; beyond: how far the farthest is,
    in steps; transposed, swapped: <E, P> / (|E| |P|) of D's transpose and of the best other tensor's change.
    """

    found: float
    asked: float
    both: float
    rank: int
    weights: int
    outside: int
    beyond: float
    transposed: float = 0.0
    swapped: float = 0.0
    other: str = ""

    @property
    def scale(self) -> float:
        """How many times D is in E."""
        return self.both / self.asked if self.asked else 0.0

    @property
    def explained(self) -> float:
        """The cosine of E and D: how much of E is some multiple of D."""
        return self.both / (self.found * self.asked) ** 0.5 if self.found and self.asked else 0.0


CLOSE = 0.9  # a cosine from which a change is taken for another


def _times(evidence: Evidence, factor: float) -> bool:
    return evidence.explained > CLOSE and abs(evidence.scale / factor - 1) < 0.1


# What is wrong -> whether the evidence says so, the first that does.
FAULTS: dict[str, Callable[[Evidence], bool]] = {
    "the change is not applied": lambda e: e.found == 0 or (abs(e.scale) < 0.05 and e.found < 0.05 * e.asked),
    "{outside} weights were altered, by up to {beyond:.0f} steps": lambda e: (
        _times(e, 1.0) and e.outside <= max(64, e.weights // 1000)
    ),
    "the change is applied twice, or its scale doubled": lambda e: _times(e, 2.0),
    "the change is applied with half its scale": lambda e: _times(e, 0.5),
    "the scale is alpha / sqrt(r) and should be alpha / r": lambda e: e.rank > 1 and _times(e, e.rank**0.5),
    "the scale is alpha / r and should be alpha / sqrt(r)": lambda e: e.rank > 1 and _times(e, e.rank**-0.5),
    "the scale alpha / r is missing or doubled: the change is {scale:.3g} times what it should be": lambda e: (
        e.explained > CLOSE and abs(e.scale - 1) > 0.1
    ),
    "the change is transposed": lambda e: e.transposed > CLOSE,
    "it has the change of {other}": lambda e: e.swapped > CLOSE,
    "the change is in it, and another one: of another adapter, or from another base": lambda e: e.both > 0.2 * e.asked,
    "it is not this base with this adapter": lambda e: True,
}


def diagnose(evidence: Evidence) -> str:
    fault = next(fault for fault, holds in FAULTS.items() if holds(evidence))
    return fault.format(outside=evidence.outside, beyond=evidence.beyond, scale=evidence.scale, other=evidence.other)
