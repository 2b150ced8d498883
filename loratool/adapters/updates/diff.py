"""Add a stored difference: the `diff` and `diff_b` of full fine-tunes, `w_norm` and `b_norm` (LyCORIS, ComfyUI).

Defined by LyCORIS (`lycoris/modules/full.py`, `norms.py`) and ComfyUI (`comfy/lora.py`); it has no scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .update import RowsOfDelta, Update, UpdateSpec

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


@dataclass(frozen=True)
class Diff(Update):
    """The full difference of a weight or a vector."""

    value: Numbers  # (out, in, *kernel), or (n,)

    kind = "diff"
    roles = ("diff",)
    suffixes: ClassVar = {".diff": "diff", ".w_norm": "diff", ".diff_b": "diff_b", ".b_norm": "diff_b"}

    @classmethod
    def shape(cls, spec: UpdateSpec) -> tuple[int, ...]:
        return spec.specs["diff"].shape

    @classmethod
    def make(cls, spec: UpdateSpec, tensors: Mapping[str, Numbers]) -> Diff:
        return cls(tensors["diff"])

    def delta(self, weight: float, transposed: bool) -> RowsOfDelta:
        from ...numerics.stored import Stored

        matrix = self.value.matrix
        oriented = matrix.T if transposed else matrix
        return lambda start, stop: Stored(oriented[start:stop], weight)
