"""Read 8-bit floats without scales, like ComfyUI's: each code is its own value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dtypes import FLOAT8, TensorSpec
from .codec import Codec, Parts

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


class Float8(Codec):
    """A float8 tensor; a merge that keeps the type reads the stored bits (`TensorRef.as_stored`)."""

    key = "float8"
    dtypes = frozenset(FLOAT8)
    numbers = "F32"  # holds them all

    def columns(self, spec: TensorSpec) -> int:
        return 1

    def read_rows(self, parts: Parts, start: int, out: Numbers) -> None:
        from ...numerics.arrays import Numbers, widen
        from ...numerics.forms import FORMS

        tensor = parts["codes"]
        codes = Numbers.empty(FORMS[tensor.spec.dtype], *out.shape)
        tensor.read(start, codes.bits)
        widen(codes, out.bits.view("f4"))
