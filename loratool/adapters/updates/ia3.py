"""Multiply the inputs or the outputs of a layer by a vector, (IA)3 (Liu et al., NeurIPS 2022).

PEFT's vector l is the factor itself, W' = W * l (`peft/tuners/ia3/layer.py`); LyCORIS's is what is added to 1,
W' = W * (1 + v) (`lycoris/modules/ia3.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from .update import Detail, Update, UpdateSpec

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.decide import Factor


@dataclass(frozen=True)
class Side(Detail):
    """The side that a vector multiplies, and how."""

    inputs: bool
    difference: bool  # 1 has to be added to it


@dataclass(frozen=True)
class IA3(Update):
    """(IA)3 of a weight, or of the bias of a layer whose outputs it multiplies."""

    vector: Tensor  # (n,)
    side: Side

    kind = "ia3"
    roles = ("vector",)
    additive = False

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        size = spec.specs["vector"].size
        return (1, size) if _side_of(spec).inputs else (size,)

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        axis = int(_side_of(spec).inputs)
        return len(shape) > axis and shape[axis] == spec.specs["vector"].size

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return (None, None) if _side_of(spec).inputs else (spec.specs["vector"].size, None)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Tensor]) -> IA3:
        return cls(tensors["vector"].flatten(), _side_of(spec))

    def moved(self, weight: float, transposed: bool, rows: slice, columns: int) -> tuple[None, Factor]:
        from ...numerics.decide import Factor

        w, one = Fraction(weight), Fraction(int(self.side.difference))
        numbers = [1 + w * (Fraction(x) + one - 1) for x in self.vector.double().tolist()]
        if self.side.inputs is not transposed:
            return None, Factor.of_columns(numbers).repeated(columns // len(numbers))
        return None, Factor.of_rows(numbers[rows])


def _side_of(spec: UpdateSpec) -> Side:
    assert isinstance(spec.detail, Side)
    return spec.detail
