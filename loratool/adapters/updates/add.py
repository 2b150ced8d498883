"""Add a vector: PEFT's `lora_B.bias`, multiplied by the scale of its factors (`peft/tuners/lora/layer.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ...files.dtypes import TensorSpec
from .update import Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.products import Term


@dataclass(frozen=True)
class AddDelta(Update):
    """A scaled difference of a vector, summed exactly as a product of rank 1."""

    value: Numbers
    scale: float  # as LowRank.scale

    kind = "add"
    roles = ("value",)
    in_stored_layout = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["value"].shape

    @classmethod
    def misfit(cls, spec: UpdateSpec, base: TensorSpec, adapter: str) -> str | None:
        return None if spec.shape == base.shape else f"is {base.shape}, but {adapter} adds {spec.shape} to it"

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> AddDelta:
        return cls(tensors["value"], spec.scale)

    def terms(self, weight: float, transposed: bool) -> list[Term]:
        import numpy as np

        from ...numerics.arrays import Numbers
        from ...numerics.products import Term

        column, one = self.value.reshape(-1, 1), Numbers.of(np.ones((1, 1), np.float32))
        return [Term(column, one, Fraction(self.scale) * Fraction(weight))]
