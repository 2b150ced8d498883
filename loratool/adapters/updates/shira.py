"""Add numbers to single elements of a weight, SHiRA: D[i0, i1] is the sum of the numbers there (Bhardwaj et al., 2024).

Defined by `peft/tuners/shira/layer.py`, without a scale. Only the base shows the size of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from .indices import read_integers, require_integers
from .update import PeftMethod, RowsOfDelta, Update, UpdateSpec, finite_numbers

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.decide import Delta
    from ...numerics.forms import Positions


@dataclass(frozen=True)
class Places:
    """The elements of a weight that an update changes, in the order of its numbers.

    Attributes:
        name: of the tensor that has them.
    """

    name: str
    rows: Positions
    columns: Positions

    def require_inside(self, outputs: int, inputs: int) -> None:
        """Raise InputError if one is not in a weight of this size."""
        outside = (self.rows >= outputs) | (self.columns >= inputs)
        if outside.any():
            first = int(outside.argmax())
            row, column = int(self.rows[first]), int(self.columns[first])
            raise InputError(
                f"names the element ({row}, {column}) of a weight of ({outputs}, {inputs})", culprit=self.name
            )


@dataclass(frozen=True)
class SHiRA(Update):
    """An update of SHiRA."""

    value: Numbers  # (n,)
    places: Places  # n
    outputs: int = 0
    inputs: int = 0

    kind = "shira"
    roles = ("shira_weight", "shira_indices")
    peft = PeftMethod("SHIRA", {role: role for role in roles})

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["shira_weight"].shape

    @classmethod
    def fits(cls, spec: UpdateSpec, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2

    @classmethod
    def flat(cls, spec: UpdateSpec) -> tuple[int | None, int | None]:
        return None, None

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        value, indices = (specs[role] for role in cls.roles)
        require_integers(indices, roles["shira_indices"])
        if len(value.shape) != 1 or indices.shape != (2, value.size):
            raise InputError(f"has {value.shape} numbers, and places {indices.shape}, not two for each", culprit=module)

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        return replace(spec, transposed=False)

    @classmethod
    def load(cls, spec: UpdateSpec, file: WeightsFile, adapter: str) -> SHiRA:
        value, indices = (spec.tensors[role] for role in cls.roles)
        rows, columns = read_integers(file, indices)
        return cls(finite_numbers({"value": value}, file, adapter)["value"], Places(indices, rows, columns))

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> SHiRA:
        raise TypeError("its places are integers, which only `load` reads")

    def sized(self, outputs: int, inputs: int) -> SHiRA:
        self.places.require_inside(outputs, inputs)
        return replace(self, outputs=outputs, inputs=inputs)

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        rows, columns = self.places.rows, self.places.columns
        places, width = ((columns, rows), self.outputs) if transposed else ((rows, columns), self.inputs)
        return sparse_rows(self.value, *places, width, weight)


def sparse_rows(value: Numbers, rows: Positions, columns: Positions, width: int, weight: float) -> RowsOfDelta:
    """Return the delta with `weight` times each number at its place, summed where several have one.

    Args:
        value: (n,).
        rows, columns: n each.
        width: how many columns there are.
    """
    import numpy as np

    from ...numerics.arrays import Numbers
    from ...numerics.stored import Stored, Sum, Zero

    order = np.lexsort((columns, rows))
    rows, columns, bits = rows[order], columns[order], value.bits[order]
    again = np.append(False, (rows[1:] == rows[:-1]) & (columns[1:] == columns[:-1]))  # it is at the place before it
    at = np.arange(len(rows))
    layer = at - np.maximum.accumulate(np.where(again, 0, at)) if len(rows) else at  # how many of its place are before

    def of_rows(start: int, stop: int) -> Delta:
        some = slice(*np.searchsorted(rows, (start, stop)))
        parts: list[Delta] = []
        for number in range(int(layer[some].max(initial=-1)) + 1):
            here = np.flatnonzero(layer[some] == number) + some.start
            dense = Numbers(np.zeros((stop - start, width), value.form.bits_type), value.form)
            dense.bits[rows[here] - start, columns[here]] = bits[here]
            parts.append(Stored(dense, weight))
        if not parts:
            return Zero((stop - start, width))
        return parts[0] if len(parts) == 1 else Sum(parts)

    return of_rows
