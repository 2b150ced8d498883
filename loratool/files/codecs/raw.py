"""Read a float tensor, which needs no dequantization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import InputError
from ..dtypes import FLOATS, TensorSpec
from .codec import Codec, Parts

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


class Raw(Codec):
    """Every tensor that no other codec claims. Only this codec's bytes are its numbers, so they can be copied."""

    key = "raw"

    def columns(self, spec: TensorSpec) -> int:
        return 1

    def read_rows(self, parts: Parts, start: int, out: Numbers) -> None:
        tensor = parts["codes"]
        if tensor.spec.dtype not in FLOATS:
            raise InputError(f"has dtype {tensor.spec.dtype}, not a floating-point type", culprit=tensor.name)
        tensor.read(start, out.bits)
