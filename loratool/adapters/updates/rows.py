"""Replace some rows by new values: PEFT's trainable tokens (`peft/tuners/trainable_tokens/layer.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from ...files.dtypes import TensorSpec
from .update import Detail, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.decide import Delta, Factor


@dataclass(frozen=True)
class Indices(Detail):
    """The indices of replaced rows, in the order of their values."""

    indices: tuple[int, ...]

    @property
    def hashed(self) -> tuple[int, ...]:
        return self.indices


@dataclass(frozen=True)
class ReplaceRows(Update):
    """New values for some rows."""

    value: Numbers  # (n, dimension)
    indices: tuple[int, ...]  # n, in any order

    kind = "rows"
    roles = ("value",)
    additive = False
    in_stored_layout = True

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["value"].shape

    @classmethod
    def misfit(cls, spec: UpdateSpec, base: TensorSpec, adapter: str) -> str | None:
        if len(base.shape) != 2 or spec.shape[1:] != base.shape[1:]:
            return f"is {base.shape}, but {adapter} replaces rows by {spec.shape}"
        last = max(indices_of(spec), default=0)
        return f"has {base.shape[0]} rows, but {adapter} replaces row {last}" if last >= base.shape[0] else None

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> ReplaceRows:
        return cls(tensors["value"], indices_of(spec))

    def moved(self, weight: float, transposed: bool, rows: slice, columns: int) -> tuple[Delta, Factor]:
        import numpy as np

        from ...numerics.decide import Factor
        from ...numerics.stored import Stored

        indices = np.array(self.indices, dtype=np.int64)
        inside = (indices >= rows.start) & (indices < rows.stop)
        count, left = rows.stop - rows.start, 1 - Fraction(weight)
        index, numbers = np.full(count, -1), [Fraction(1)] * count
        index[indices[inside] - rows.start] = np.flatnonzero(inside)
        for row in indices[inside] - rows.start:
            numbers[row] = left
        return Stored(self.value, weight, index), Factor.of_rows(numbers)


def indices_of(spec: UpdateSpec) -> tuple[int, ...]:
    """Return the indices of the rows that an update replaces; empty for another kind."""
    return spec.detail.indices if isinstance(spec.detail, Indices) else ()
