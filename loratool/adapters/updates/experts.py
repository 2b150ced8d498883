"""Add low-rank products to the matrices of a stack (PEFT's target_parameters, `peft/tuners/lora/layer.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..config import AdapterConfig
from .low_rank import LowRank, other_rank
from .update import Stack, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide


@dataclass(frozen=True)
class Experts(Update):
    """LoRA on a stack of E matrices, the class `ParamWrapper` of PEFT."""

    A: Numbers  # (E * r, in), expert by expert
    B: Numbers  # (out, r * E), for each rank the E experts
    scale: float  # as LowRank.scale
    experts: int  # E

    kind = "experts"
    roles = ("A", "B")
    stack = True
    check = LowRank.check

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.experts, *LowRank.shape(spec))

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["A"].shape[0] // spec.experts

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        total, expected = spec.specs["A"].shape[0], config.rank_of(spec.module)  # the config has the rank of one matrix
        experts = total // expected if expected and total % expected == 0 else 1
        if expected is not None and expected * experts != total:
            raise other_rank(spec, expected)
        return replace(spec, scale=config.scale_of(spec.module, total // experts), detail=Stack(experts))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> Experts:
        return cls(tensors["A"], tensors["B"], spec.scale, spec.experts)

    def matrix(self, expert: int | None) -> LowRank:
        assert expert is not None
        rank = len(self.A) // self.experts
        A = self.A.reshape(self.experts, rank, -1)[expert]
        return LowRank(A, self.B.reshape(-1, rank, self.experts)[:, :, expert], self.scale)

    def factors(self) -> tuple[Wide, Wide]:
        import numpy as np

        pairs = [self.matrix(number).factors() for number in range(self.experts)]
        B, A = (np.concatenate(sides) for sides in zip(*pairs, strict=True))
        return B, A
