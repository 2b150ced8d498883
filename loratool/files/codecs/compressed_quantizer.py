"""Encode weights as compressed-tensors' integers, with new scales and zero points by its rule.

Everything is computed in the type of the scales, which is the type of weights in the package. Source:
compressed-tensors 0.20, quantization/utils/helpers.py (calculate_qparams), quantization/lifecycle/forward_helpers.py
(_quantize).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ..dtypes import DTYPE_NAMES
from .codec import Parts, Piece, Quantizer
from .packing import Words, matrices

if TYPE_CHECKING:
    from .codec import CodeFormat, Codes

KEPT = ("codes", "scales", "zeros")  # the computed tensors; other companions are copied from the imitated model


class IntQuantizer(Quantizer):
    """Encodes with scales of groups of columns, of rows, or of blocks.

    Args:
        codec: of the layout; it determines the width and type of rows of codes.
    """

    def __init__(self, codec: CodeFormat, parts: Parts) -> None:
        self.codec, self.bits, self.block = codec, parts.detail("bits"), parts.detail("block")
        self.dtype = getattr(torch, DTYPE_NAMES[parts["scales"].spec.dtype])
        self.is_symmetric = parts.get("zeros") is None
        count, rows, _ = parts.shape
        together = 32 if self.packs_zeros(parts) else self.block[0]
        super().__init__(parts, together if count == 1 or rows % together == 0 else rows)

    @staticmethod
    def packs_zeros(parts: Parts) -> bool:
        zeros = parts.get("zeros")
        return zeros is not None and zeros.spec.dtype == "I32"

    def rows(self, start: int, rows: Tensor) -> tuple[Codes, list[Piece]]:
        _, height, columns = self.parts.shape
        pieces = self.kept() if start == 0 else []
        codes = np.zeros((len(rows), self.codec.width(self.parts)), self.codec.code)
        done = 0
        for which, first, last in matrices(start, start + len(rows), height):
            numbers = rows[done : done + last - first].to(self.dtype)
            scale, zero = self.qparams(numbers)
            if not torch.isfinite(scale).all():
                raise InputError("has numbers that its type of scales does not have", culprit=self.parts["codes"].name)
            codes[done : done + last - first, :columns] = self.coded(numbers, scale, zero)
            pieces += self.companions(which, first, scale, zero)
            done += last - first
        return codes, pieces

    def qparams(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scales and zero points of each block, (blocks down, blocks across)."""
        high, wide = self.block[0], self.block[1] or numbers.shape[1]
        below, beside = -len(numbers) % high, -numbers.shape[1] % wide
        padded = torch.nn.functional.pad(numbers, (0, beside, 0, below)) if below or beside else numbers
        tiles = padded.reshape(len(padded) // high, high, -1, wide)
        return qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), self.bits, self.is_symmetric)

    def coded(self, numbers: Tensor, scale: Tensor, zero: Tensor | None) -> Codes:
        """Return the codes of numbers in the stored type, (rows, columns)."""

        def spread(blocks: Tensor) -> Tensor:
            high, wide = self.block[0], self.block[1] or numbers.shape[1]
            full = blocks.repeat_interleave(high, 0)[: len(numbers)]
            return full.repeat_interleave(wide, 1)[:, : numbers.shape[1]] if full.shape[1] > 1 else full

        codes = numbers / spread(scale)
        if zero is not None:
            codes += spread(zero.to(self.dtype))
        half = 1 << (self.bits - 1)
        codes = codes.clamp_(-half, half - 1).round_()
        offset = half if self.codec.code == "uint8" else 0
        return (codes.to(torch.int16) + offset).numpy().astype(self.codec.code)

    def companions(self, which: int, first: int, scale: Tensor, zero: Tensor | None) -> list[Piece]:
        """Return scales and zero points of rows of the matrix `which`, from `first` on."""
        groups = scale.shape[1]
        high = -(-self.parts.shape[1] // self.block[0])
        place = (which * high + first // self.block[0]) * groups
        pieces = [("scales", place * scale.itemsize, scale.contiguous().view(torch.uint8).numpy().tobytes())]
        if zero is None:
            return pieces
        if not self.packs_zeros(self.parts):
            return [*pieces, ("zeros", place, zero.numpy().tobytes())]
        stream = Words(len(zero), self.bits)
        codes = np.zeros((groups, stream.width), np.uint8)
        codes[:, : len(zero)] = zero.numpy().T + np.int16(1 << (self.bits - 1))
        words = stream.pack(codes).view(np.uint32).T
        above = which * -(-self.parts.shape[1] * self.bits // 32) + first * self.bits // 32
        return [*pieces, ("zeros", above * groups * 4, np.ascontiguousarray(words).tobytes())]

    def kept(self) -> list[Piece]:
        """Return the other companions, copied from the imitated model."""
        others = {role: tensor for role, tensor in self.parts.tensors.items() if role not in KEPT}
        return [(role, 0, tensor.integers().tobytes()) for role, tensor in others.items()]


class OneScaleQuantizer(IntQuantizer):
    """Encodes with one scale for a matrix."""

    sees_all = True

    def __init__(self, codec: CodeFormat, parts: Parts) -> None:
        super().__init__(codec, parts)
        self.block, self.together = (parts.shape[1], 0), 1
        self.least, self.most = torch.zeros((), dtype=self.dtype), torch.zeros((), dtype=self.dtype)

    def see(self, rows: Tensor) -> None:
        numbers = rows.to(self.dtype)
        self.least, self.most = torch.minimum(self.least, numbers.amin()), torch.maximum(self.most, numbers.amax())

    def qparams(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        scale, zero = qparams(self.least, self.most, self.bits, self.is_symmetric)
        return scale.view(1, 1), None if zero is None else zero.view(1, 1)


def qparams(least: Tensor, most: Tensor, bits: int, is_symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return the scales of blocks with these bounds, in their type, and zero points as int8, or None.

    A block of zeros has the type's epsilon as its scale, and 0 as its zero point. For bounds without dimensions the
    zero point is computed in float32, as in the package, because torch widens them.
    """
    least, most, low = least.clamp(max=0), most.clamp(min=0), torch.tensor(-(1 << (bits - 1)), dtype=torch.float32)
    range_ = torch.tensor(2**bits - 1, dtype=least.dtype)
    scale, zero = torch.maximum(-least, most) / (range_ / 2), None
    if not is_symmetric:
        scale = (most - least) / range_
        zero = (low - least / scale).clamp(low, -low - 1).round().nan_to_num(0).to(torch.int8)
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale), zero
