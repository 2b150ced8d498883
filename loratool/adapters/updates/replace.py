"""Replace a tensor by a new value: modules_to_save, trained biases, a resized vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ...files.tensor_ref import TensorRef
from ...files.weights_file import WeightsFile
from .update import Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.decide import Delta, Factor


@dataclass(frozen=True)
class ReplaceTensor(Update):
    """A new value for a tensor, read by rows when they are needed, because a vocabulary is large."""

    value: TensorRef  # it has the tensor's new shape

    kind = "replace"
    roles = ("value",)
    additive = False
    in_stored_layout = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["value"].shape

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> ReplaceTensor:
        return cls(TensorRef(file, spec.tensors["value"]))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> Update:
        raise TypeError("a replaced tensor is read by rows, in `load`, and never whole")

    def moved(self, weight: float, transposed: bool, rows: slice, columns: int) -> tuple[Delta, Factor]:
        from ...numerics.decide import Factor
        from ...numerics.stored import Stored

        count = rows.stop - rows.start
        value = self.value.read_matrix(self.value.spec.shape[0], rows.start, rows.stop).reshape(count, -1)
        return Stored(value, weight), Factor.of_rows([1 - Fraction(weight)] * count)
