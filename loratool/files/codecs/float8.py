"""Read 8-bit floats without scales, like ComfyUI's: each code is its own value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dtypes import FLOAT8, TensorSpec
from .codec import Codec, Parts

if TYPE_CHECKING:
    import torch


class Float8(Codec):
    """A float8 tensor; a merge that keeps the type reads the stored bits (`TensorRef.as_stored`)."""

    key = "float8"
    dtypes = frozenset(FLOAT8)
    numbers = "float32"  # holds them all; torch has few operations on 8 bits

    def columns(self, spec: TensorSpec) -> int:
        return 1

    def read_rows(self, parts: Parts, start: int, out: torch.Tensor) -> None:
        import torch

        tensor = parts["codes"]
        codes = torch.empty(out.shape, dtype=getattr(torch, FLOAT8[tensor.spec.dtype]))
        tensor.read(start, codes)
        out.copy_(codes)
