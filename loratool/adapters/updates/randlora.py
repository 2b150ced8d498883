"""Add scaled products of random matrices that all modules share, RandLoRA (Albert et al., ICLR 2025).

With lo and hi the smaller and the larger side of the weight, n bases of rank r, and the trained L (r, n), G (n, lo):
D = scale * b a, (hi, lo), transposed if the weight has more inputs than outputs. Row rho n + j of a is L[rho, j] A[rho]
G[j], element by element; column j r + rho of b is B[:, j, rho]. The two orders differ, and column t meets row t.
Defined by `peft/tuners/randlora/layer.py`. Only the base shows the larger side.
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
from .update import PeftMethod, Update, UpdateSpec, require_rank
from .vera import require_projections

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.products import Term


@dataclass(frozen=True)
class RandLoRA(Update):
    """An update of RandLoRA, with the shared matrices; the size is that of the weight."""

    L: Numbers  # (r, n)
    G: Numbers  # (n, lo)
    A: Numbers  # (r, 1, at least lo)
    B: Numbers  # (at least hi, at least n, r)
    scale: float  # alpha / r
    outputs: int = 0
    inputs: int = 0

    kind = "randlora"
    roles = ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B")
    peft = PeftMethod(
        "RANDLORA",
        {"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"},
        "randlora_alpha",
        shared=roles[2:],
    )

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["randlora_gamma"].shape[1:]

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        return spec.specs["randlora_lambda"].shape[0]

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and (min(shape),) == spec.shape and max(shape) <= spec.specs["randlora_B"].shape[0]

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return None, None

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        require_projections(cls.roles[2:], "RandLoRA", roles)
        super().require(module, roles)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        L, G, A, B = (specs[role].shape for role in cls.roles)
        good = len(L) == len(G) == 2 and len(A) == len(B) == 3 and all((*L, *G, *A, *B))
        if not good or G[0] != L[1] or A[:2] != (L[0], 1) or A[2] < G[1] or B[1] < L[1] or B[2] != L[0]:
            raise InputError(
                f"lambda is {L}, gamma is {G}, A is {A}, B is {B}: they cannot be multiplied", culprit=module
            )

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, cls.divisor(spec))
        return replace(spec, scale=config.scale_of(spec.module, cls.divisor(spec)))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> RandLoRA:
        L, G, A, B = (tensors[role] for role in cls.roles)
        return cls(L, G, A, B, spec.scale)

    def sized(self, outputs: int, inputs: int) -> RandLoRA:
        return replace(self, outputs=outputs, inputs=inputs)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.exact_factors import multiply_exactly
        from ...numerics.products import Term

        (rank, bases), low, high = self.L.shape, self.G.shape[1], max(self.outputs, self.inputs)
        size, scale = rank * bases, Fraction(self.scale) * Fraction(weight)
        b = self.B[:high, :bases].reshape(high, size)
        lefts = multiply_exactly(b, self.L.reshape(1, size))
        rights = [each.reshape(size, low) for each in multiply_exactly(self.A[:, :, :low], self.G[None])]
        terms = [Term(left, right, scale) for left in lefts for right in rights]
        is_wide = low != self.inputs
        return transposed_terms(terms) if transposed != is_wide else terms
