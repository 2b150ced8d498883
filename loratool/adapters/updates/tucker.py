"""Add a convolution in Tucker's decomposition: D[p, s, k] = scale * sum over i, j of up[p, i] mid[i, j, k] down[j, s].

LyCORIS calls it CP or Tucker (`lycoris/modules/locon.py`, `lora_mid`), after Kim et al., ICLR 2016.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .update import Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide
    from ...numerics.products import Products, Term


@dataclass(frozen=True)
class Tucker(Update):
    """A low-rank convolution with the kernel between its two factors."""

    A: Numbers  # (r, in, 1, ...)
    mid: Numbers  # (r, r, *kernel)
    B: Numbers  # (out, r, 1, ...)
    scale: float  # alpha / r

    kind = "tucker"
    roles = ("A", "mid", "B")
    suffixes: ClassVar = {".lora_mid.weight": "mid"}

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return (spec.specs["B"].shape[0], spec.specs["A"].shape[1], *spec.specs["mid"].shape[2:])

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["B"].shape[1]

    @classmethod
    def sums(cls, spec: UpdateSpec) -> bool:
        return True

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, mid, B = (specs[role].shape for role in cls.roles)
        ones = {*A[2:], *B[2:]} <= {1}
        if min(map(len, (A, mid, B))) < 2 or not ones or mid[:2] != (B[1], A[0]) or not mid[0] * mid[1]:
            raise InputError(f"down is {A}, mid is {mid}, up is {B}: not a Tucker decomposition", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        return replace(spec, scale=config.scale_of(spec.module, spec.specs["A"].shape[0]))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> Tucker:
        return cls(tensors["A"], tensors["mid"], tensors["B"], spec.scale)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.exact_factors import tucker_terms

        scale = Fraction(self.scale) * Fraction(weight)
        terms = tucker_terms(self.B.matrix, self.mid, self.A.matrix, scale)
        return transposed_terms(terms) if transposed else terms

    def factors(self) -> tuple[Wide, Wide]:

        up, right = tucker_factors(self.B.matrix, self.mid, self.A.matrix)
        return up[None] * self.scale, right[None]


def tucker_factors(up: Numbers, mid: Numbers, down: Numbers) -> tuple[Wide, Wide]:
    """Return (B, A) in float64 of a Tucker decomposition: A is the core contracted with `down`, (r, in * kernel)."""
    core = mid.reshape(*mid.shape[:2], -1).wide()  # (r, r, k)
    return up.wide(), (core.swapaxes(1, 2) @ down.wide()).swapaxes(1, 2).reshape(len(core), -1)


def transposed_terms(terms: Sequence[Term]) -> list[Term]:
    """Return the terms of the transposed product."""
    from ...numerics.products import Term

    return [Term(term.right.T, term.left.T, term.scale) for term in terms]


def sum_terms(terms: Sequence[Term], transposed: bool) -> Products:
    """Return the sum of terms, or of their transposes."""
    from ...numerics.products import Products

    return Products(transposed_terms(terms) if transposed else terms)
