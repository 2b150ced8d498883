"""Add a matrix of circulant blocks, C3A: D[x b + i, y b + j] = K[x, y, (j - i) mod b] / in (Chen et al., 2025).

Defined by `peft/tuners/c3a/layer.py`, which makes the blocks by a Fourier transform; the sum here needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.dtypes import TensorSpec
from ..config import AdapterConfig
from .lokr import with_identity
from .update import PeftMethod, RowsOfDelta, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide


@dataclass(frozen=True)
class C3A(Update):
    """C3A of a linear layer."""

    kernel: Numbers  # (out / b, in / b, b)
    scale: float  # 1 / in

    kind = "c3a"
    roles = ("c3a_kernel",)
    peft = PeftMethod("C3A", {"c3a_kernel": "c3a_kernel"})

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        down, across, size = spec.specs["c3a_kernel"].shape
        return (down * size, across * size)

    @classmethod
    def rank(cls, spec: UpdateSpec) -> int:
        return min(spec.shape)

    @classmethod
    def divisor(cls, spec: UpdateSpec) -> int:
        return 0

    @classmethod
    def check(cls, module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> None:
        shape = specs["c3a_kernel"].shape
        if len(shape) != 3 or not all(shape):
            raise InputError(f"is {shape}, not a table of circulant blocks", culprit=roles["c3a_kernel"])

    @classmethod
    def describe(cls, spec: UpdateSpec, config: AdapterConfig) -> UpdateSpec:
        return replace(spec, scale=1 / spec.shape[1], transposed=False)

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> C3A:
        return cls(tensors["c3a_kernel"], spec.scale)

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        from ...numerics.composed import multiple
        from ...numerics.stored import Stored

        scale = Fraction(self.scale) * Fraction(weight)
        return lambda start, stop: multiple(Stored(self._rows(start, stop, transposed), 1.0), scale)

    def factors(self) -> tuple[Wide, Wide]:
        down, _, size = self.kernel.shape
        B, A = with_identity(self._rows(0, down * size, False).wide())
        return B[None] * self.scale, A[None]

    def _rows(self, start: int, stop: int, transposed: bool) -> Numbers:
        """Return some rows of D, or of its transpose, without the scale."""
        import numpy as np

        down, across, size = self.kernel.shape
        rows, columns = np.arange(start, stop)[:, None], np.arange((down if transposed else across) * size)[None]
        out, inputs = (columns, rows) if transposed else (rows, columns)
        return self.kernel[out // size, inputs // size, (inputs - out) % size]
