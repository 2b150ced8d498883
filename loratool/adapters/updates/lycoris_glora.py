"""Add to a weight a low-rank product with itself and another one, LyCORIS's GLoRA: X = W + s (W A1 A2 + B1 B2).

A1 is (in, r), A2 (r, in), B1 (out, r), B2 (r, in), s alpha / r (`lycoris/modules/glora.py`). In a convolution A1 and A2
act on the channels at each place of the kernel. Old files have A1 as `a2` and so on, which the shapes tell
(ComfyUI, `comfy/weight_adapter/glora.py`). W A1 has numbers of 36 bits (`numerics.short_products`); an undo file has
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .update import Projected, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Bits
    from ...numerics.products import Term

ROLES = ("a1", "a2", "b1", "b2")
ROLES_OF_OLD = ("a2", "a1", "b2", "b1")


@dataclass(frozen=True)
class LycorisGLoRA(Update):
    """LyCORIS's GLoRA of a linear layer or a convolution."""

    A1: Numbers  # (in, r)
    A2: Numbers  # (r, in)
    B1: Numbers  # (out, r)
    B2: Numbers  # (r, in * kernel)
    scale: float

    kind = "lycoris_glora"
    roles = ROLES
    suffixes: ClassVar = {f".{role}.weight": role for role in ROLES}
    additive = False
    projects = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        _, _, B1, B2 = _sides(spec.specs)
        return (spec.specs[B1].shape[0], *spec.specs[B2].shape[1:])

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        return spec.specs[_sides(spec.specs)[3]].shape[0]

    @classmethod
    def change_rank(cls, spec: UpdateSpec) -> int:
        return 2 * cls.divisor(spec) if len(spec.shape) == 2 else 0

    @classmethod
    def projections(cls, spec: UpdateSpec, columns: int) -> int:
        return columns // spec.shape[1] * cls.divisor(spec)

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        shapes = ", ".join(f"{role} is {specs[role].shape}" for role in ROLES)
        fitting = [order for order in (ROLES, ROLES_OF_OLD) if _fit(*(specs[role].shape for role in order))]
        if not fitting:
            raise InputError(f"{shapes}: they cannot be multiplied", culprit=module)
        if len(fitting) > 1:
            raise InputError(f"{shapes}: nothing tells whether it is an old file of GLoRA or a new one", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        return replace(spec, transposed=False, scale=config.scale_of(spec.module, cls.divisor(spec)))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> LycorisGLoRA:
        A1, A2, B1, B2 = (tensors[role].matrix for role in _sides(spec.specs))
        return cls(A1, A2, B1, B2, spec.scale)

    def projected(self, weight: float) -> Projected:
        places = self.B2.shape[1] // len(self.A1)
        return Projected(_at_places(self.A1, places), _at_places(self.A2, places), self._scale(weight))

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        from ...numerics.products import Term

        return [Term(self.B1, self.B2, self._scale(weight))]

    def _scale(self, weight: float) -> Fraction:
        return Fraction(self.scale) * Fraction(weight)


def _fit(A1: tuple[int, ...], A2: tuple[int, ...], B1: tuple[int, ...], B2: tuple[int, ...]) -> bool:
    """Return whether shapes are those of factors; a rank above the sides would be that of the other order."""
    flat = all(math.prod(shape[2:]) == 1 for shape in (A1, A2, B1)) and min(map(len, (A1, A2, B1, B2))) > 1
    inside = flat and 0 < A1[1] <= A1[0] and 0 < B1[1] <= B1[0]
    return inside and A1[1] == A2[0] and A1[0] == A2[1] == B2[1] and B1[1] == B2[0]


def _sides(specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Return the roles of A1, A2, B1 and B2."""
    return ROLES if _fit(*(specs[role].shape for role in ROLES)) else ROLES_OF_OLD


def _at_places(x: Numbers, places: int) -> Numbers:
    """Return a matrix of channels as one of flattened kernels, which does the same at each place."""
    import numpy as np

    from ...numerics.arrays import Numbers

    if places == 1:
        return x
    p, q = x.shape
    bits: Bits = np.zeros((p, places, q, places), x.form.bits_type)
    for k in range(places):
        bits[:, k, :, k] = x.bits
    return Numbers(bits.reshape(p * places, q * places), x.form)
