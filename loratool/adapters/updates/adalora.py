"""Add a low-rank product with singular values, AdaLoRA: D = scale * B @ diag(E) @ A (Zhang et al., ICLR 2023).

Defined by `peft/tuners/adalora/layer.py`: the scale is alpha / (r + 1e-5) with the rank that training began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .tucker import transposed_terms
from .update import PeftMethod, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.products import Term


@dataclass(frozen=True)
class AdaLoRA(Update):
    """AdaLoRA before or after pruning; if all singular values are pruned, the rank is 0."""

    A: Numbers  # (r, in)
    E: Numbers  # (r, 1)
    B: Numbers  # (out, r)
    scale: float

    kind = "adalora"
    roles = ("A", "E", "B")
    flattened = True
    peft = PeftMethod("ADALORA", {"lora_A": "A", "lora_E": "E", "lora_B": "B"}, "lora_alpha", prunes=True)

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.specs["B"].shape[0], spec.specs["A"].shape[1])

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["A"].shape[0]

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        return 0  # the divisor is init_r + 1e-5, not the rank of the tensors

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, E, B = (specs[role].shape for role in cls.roles)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or (*A[:1], 1) != E:
            raise InputError(f"A is {A}, E is {E}, B is {B}: they cannot be multiplied", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        alpha, first = config.peft.get("lora_alpha"), config.peft.get("init_r")
        if not isinstance(alpha, int | float) or not isinstance(first, int) or first < 1:
            raise InputError(
                "the config does not say lora_alpha and init_r",
                culprit=spec.module,
                remedy="put its adapter_config.json beside it",
            )
        if spec.specs["A"].shape[0] > first:
            raise InputError(f"has more ranks than the config's init_r {first}", culprit=spec.module)
        # PEFT takes the rank for an alpha that is not positive
        top = Fraction(alpha) if alpha > 0 else Fraction(spec.specs["A"].shape[0])
        return replace(spec, scale=float(top / (first + Fraction(1, 10**5))))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> AdaLoRA:
        return cls(tensors["A"], tensors["E"], tensors["B"], spec.scale)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.exact_factors import multiply_exactly
        from ...numerics.products import Term

        scale = Fraction(self.scale) * Fraction(weight)
        terms = [Term(self.B, right, scale) for right in multiply_exactly(self.E, self.A)]
        return transposed_terms(terms) if transposed else terms

    def factors(self) -> tuple[Wide, Wide]:

        B, E, A = (each.wide() for each in (self.B, self.E, self.A))
        return B[None] * self.scale, (E * A)[None]
