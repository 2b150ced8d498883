"""Read and write runs of a tensor's numbers in its own memory, whatever its strides."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..files.dtypes import TORCH_DTYPES, TensorSpec
from ..numerics.arrays import Array, Device

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def type_name(x: Tensor) -> str | None:
    """Return safetensors' name of a tensor's type; None if it has none."""
    return TORCH_DTYPES.get(str(x.dtype).removeprefix("torch."))


class StridedMemory:
    """The memory of a tensor, as bit patterns in the order of its numbers.

    What is written goes through the tensor: its `data_ptr` stays, and its version rises.

    Args:
        x: of a type of 1, 2, 4 or 8 bytes that safetensors names.
    """

    def __init__(self, x: Tensor) -> None:
        self.spec = TensorSpec(type_name(x) or "", tuple(x.shape))
        self.device = Device(f"cuda:{x.device.index or 0}" if x.is_cuda else "cpu")
        self._is_inference = x.is_inference()
        with torch.inference_mode(self._is_inference):
            self._bits = x.detach().view(_INTEGERS[x.element_size()])

    def read(self, first: int, out: Array) -> None:
        """Fill `out`, a flat array of integers as wide as the numbers, with numbers from `first` on."""
        with torch.inference_mode(self._is_inference):
            done = 0
            for part in _views(self._bits, first, len(out)):
                target = out[done : done + part.numel()]
                (target if isinstance(target, Tensor) else torch.from_numpy(target)).copy_(part.reshape(-1))
                done += part.numel()

    def write(self, first: int, data: Array) -> None:
        """Write bit patterns, a flat array, over the numbers from `first` on."""
        source = data if isinstance(data, Tensor) else torch.from_numpy(data)
        with torch.inference_mode(self._is_inference), torch.no_grad():
            done = 0
            for part in _views(self._bits, first, len(data)):
                part.copy_(source[done : done + part.numel()].view(part.shape))
                done += part.numel()


def _views(x: Tensor, first: int, count: int) -> Iterator[Tensor]:
    """Yield views of x that together have its numbers first:first+count, in order."""
    if not count:
        return
    if x.is_contiguous():
        yield x.view(-1)[first : first + count]
    elif x.dim() == 1:
        yield x[first : first + count]
    else:
        inner = x[0].numel()
        start, above = divmod(first, inner)
        if above:
            part = min(count, inner - above)
            yield from _views(x[start], above, part)
            start, count = start + 1, count - part
        whole, rest = divmod(count, inner)
        if whole:
            yield x[start : start + whole]
        yield from _views(x[start + whole], 0, rest) if rest else ()
