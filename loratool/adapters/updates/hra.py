"""Reflect the inputs of a layer, HRA (Yuan et al., NeurIPS 2024): X = W H_0 H_1 ... H_(r-1), H_k = I - 2 u u.T / u.T u.

So X = W - (W U) T U.T, where the inverse of T has, above the diagonal, U.T U, and on it half of that; with `apply_GS`,
T = 2 (U.T U)^-1 (`peft/tuners/hra/layer.py`). K = -T U.T has the nearest float64 numbers, and W U numbers of 36 bits
(`numerics.short_products`), as many as U has columns for each row of W; an undo file has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .update import Detail, PeftMethod, Projected, Update, UpdateSpec, require_rank

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


@dataclass(frozen=True)
class Orthogonal(Detail):
    """Whether U's columns are made orthogonal to each other first (Gram-Schmidt)."""

    is_on: bool

    @property
    def hashed(self) -> tuple[int, ...]:
        return (int(self.is_on),)


@dataclass(frozen=True)
class HRA(Update):
    """HRA of a linear layer or a convolution."""

    U: Numbers  # (in * kernel, r)
    is_orthogonal: bool

    kind = "hra"
    roles = ("hra_u",)
    peft = PeftMethod("HRA", {"hra_u": "hra_u"})
    additive = False
    flattened = True
    projects = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["hra_u"].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and math.prod(shape[1:]) == spec.specs["hra_u"].shape[0]

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return None, spec.specs["hra_u"].shape[0]

    @classmethod
    def change_rank(cls, spec: UpdateSpec) -> int:
        return spec.specs["hra_u"].shape[1]

    @classmethod
    def projections(cls, spec: UpdateSpec, columns: int) -> int:
        return spec.specs["hra_u"].shape[1]

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        shape = specs["hra_u"].shape
        if len(shape) != 2 or not all(shape):
            raise InputError(f"is {shape}, not the inputs by the rank", culprit=roles["hra_u"])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        require_rank(spec, config, spec.specs["hra_u"].shape[1])
        if config.peft.get("peft_type") != cls.peft.type:
            raise InputError("only the config tells whether HRA makes its vectors orthogonal", culprit=spec.module)
        return replace(spec, transposed=False, detail=Orthogonal(bool(config.peft.get("apply_GS"))))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> HRA:
        assert isinstance(spec.detail, Orthogonal)
        return cls(tensors["hra_u"], spec.detail.is_on)

    def projected(self, weight: float) -> Projected:
        import numpy as np

        from ...numerics.arrays import Numbers
        from ...numerics.derived import derived_numbers

        def K(U: Any) -> Any:
            gram = U.T @ U
            if not self.is_orthogonal:
                diagonal = gram.moved(lambda x: np.tril(np.triu(x)))
                gram = gram.moved(lambda x: np.triu(x, 1)) + diagonal * Fraction(1, 2)
            return gram.inverse() @ U.T * Fraction(-2 if self.is_orthogonal else -1)

        try:
            (found,) = derived_numbers(K, [self.U.wide()[None]])
        except ValueError as error:
            raise ValueError("a vector of its U is 0, or follows from the others") from error
        return Projected(self.U, Numbers.of(found), Fraction(weight))
