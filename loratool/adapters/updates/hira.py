"""Multiply each weight by 1 plus an entry of a low-rank product, HiRA: X = W * (1 + B A), element by element.

Huang et al., ICLR 2025; `peft/tuners/hira/layer.py`, without a scale. Of an embedding A is (r, tokens).
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
from .tucker import sum_terms
from .update import PeftMethod, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.decide import Entries

PAIRS = (("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B"))


@dataclass(frozen=True)
class HiRA(Update):
    """HiRA of a linear layer, a convolution or an embedding."""

    A: Numbers  # (r, in * kernel)
    B: Numbers  # (out, r)

    kind = "hira"
    roles = ()
    optional = (*PAIRS[0], *PAIRS[1])
    peft = PeftMethod("HIRA", {role: role for role in optional})
    additive = False
    in_turn = False

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        A, B = _pair(spec.specs)
        return (B.shape[0], *A.shape[1:])

    @classmethod
    def require(cls, module: str, roles: Mapping[str, str]) -> None:
        if {*roles} - {"base"} not in map(set, PAIRS):
            raise InputError(f"has {' and '.join(sorted(roles))}: not the two factors of HiRA", culprit=module)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        A, B = (each.shape for each in _pair(specs))
        if len(A) < 2 or len(B) < 2 or A[0] != B[1] or not A[0] or math.prod(B[2:]) != 1:
            raise InputError(f"A is {A}, B is {B}: they cannot be multiplied", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, _pair(spec.specs)[0].shape[0])
        return replace(spec, transposed=True) if PAIRS[1][0] in spec.specs else spec

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> HiRA:
        A, B = (tensors[role] for role in PAIRS[PAIRS[1][0] in tensors])
        return cls(A.matrix, B.matrix)

    def moved(self, weight: float, transposed: bool, rows: slice, columns: int) -> tuple[None, Entries]:
        from ...numerics.decide import Entries
        from ...numerics.products import Term

        products = sum_terms([Term(self.B, self.A, Fraction(weight))], transposed)
        return None, Entries(products.rows(rows.start, rows.stop))


def _pair(specs: Mapping[str, TensorSpec]) -> tuple[TensorSpec, TensorSpec]:
    A, B = PAIRS[PAIRS[1][0] in specs]
    return specs[A], specs[B]
