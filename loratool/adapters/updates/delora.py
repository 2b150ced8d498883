"""Add a low-rank product of bounded size, DeLoRA: D = B diag(c) A diag(n) (Bini et al., ICLR 2025).

c_k = lambda / (r max(|A_k|, 1e-4) max(|B_k|, 1e-4)), with the norms of A's rows and B's columns; n are the stored norms
of the base's columns (`peft/tuners/delora/layer.py`). c has square roots, so it is defined as the nearest float64
number. What follows from it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .tucker import transposed_terms
from .update import PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.products import Term

LEAST_SQUARE = Fraction(1, 10**8)  # of a norm
BITS = 64  # of an integer root before it is rounded to float64's 53


@dataclass(frozen=True)
class DeLoRA(Update):
    """An update of DeLoRA."""

    A: Numbers  # (r, in)
    B: Numbers  # (out, r)
    c: Numbers  # (r,), in float64
    norms: Numbers  # (in,)

    kind = "delora"
    roles = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    peft = PeftMethod("DELORA", {role: role for role in roles})

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.specs["delora_B"].shape[0], spec.specs["delora_A"].shape[1])

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["delora_A"].shape[0]

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, B, factor, norms = (specs[role].shape for role in cls.roles)
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or not A[0] or math.prod(factor) != 1 or norms != A[1:]:
            raise InputError(
                f"A is {A}, B is {B}, lambda is {factor}, w_norm is {norms}: they cannot be multiplied", culprit=module
            )

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, cls.rank(spec))
        return replace(spec, transposed=False)  # PEFT has it for nn.Linear alone

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> DeLoRA:
        A, B, factor, norms = (tensors[role] for role in cls.roles)
        return cls(A, B, _scales(A, B, Fraction(float(factor.wide().reshape(-1)[0]))), norms)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.exact_factors import multiply_exactly
        from ...numerics.products import Term

        lefts, rights = multiply_exactly(self.B, self.c[None]), multiply_exactly(self.A, self.norms[None])
        terms = [Term(left, right, Fraction(weight)) for left in lefts for right in rights]
        return transposed_terms(terms) if transposed else terms

    def factors(self) -> tuple[Wide, Wide]:
        B, c, A, norms = (each.wide() for each in (self.B, self.c, self.A, self.norms))
        return (B * c)[None], (A * norms)[None]


def _scales(A: Numbers, B: Numbers, factor: Fraction) -> Numbers:
    """Return c."""
    import numpy as np

    from ...numerics.arrays import Numbers

    sign = -1 if factor < 0 else 1
    squares = zip(_squares(A), _squares(B.T), strict=True)
    roots = [nearest_root((factor / len(A)) ** 2 / max(a, LEAST_SQUARE) / max(b, LEAST_SQUARE)) for a, b in squares]
    return Numbers.of(np.array([sign * root for root in roots]))


def _squares(matrix: Numbers) -> list[Fraction]:
    """Return the sum of the squares of each row."""
    import numpy as np

    from ...numerics.error_free import exact_sum
    from ...numerics.exact_factors import multiply_exactly

    parts = np.concatenate([part.wide() for part in multiply_exactly(matrix, matrix)], axis=1)
    return [exact_sum(row) for row in parts.tolist()]


def nearest_root(x: Fraction) -> float:
    """Return the float64 number nearest to the square root of x."""
    if x <= 0:
        return 0.0
    shift = BITS - (x.numerator.bit_length() - x.denominator.bit_length()) // 2
    scaled = x * Fraction(4) ** shift
    root = math.isqrt(scaled.__floor__())
    sticky = 2 * root + (root * root != scaled)  # an odd number stands for what is between, so that no tie is made up
    return float(Fraction(sticky) / Fraction(2) ** (shift + 1))
