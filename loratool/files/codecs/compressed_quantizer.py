"""Encode weights as compressed-tensors' integers, with new scales and zero points by its rule.

Everything is computed in the type of the scales, which is the type of weights in the package: each result is rounded
to it, as by torch. Source: compressed-tensors 0.20, quantization/utils/helpers.py (calculate_qparams),
quantization/lifecycle/forward_helpers.py (_quantize).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...numerics.arrays import Numbers, floats_of, rounded_in, rounded_to
from ...numerics.forms import FORMS, Form
from .codec import Parts, Piece, Quantizer
from .packing import Words, matrices

if TYPE_CHECKING:
    from .codec import CodeFormat, Codes

Floats = npt.NDArray[Any]  # float32, or float64 for scales of that type

KEPT = ("codes", "scales", "zeros")  # the computed tensors; other companions are copied from the imitated model


class IntQuantizer(Quantizer):
    """Encodes with scales of groups of columns, of rows, or of blocks.

    Args:
        codec: of the layout; it determines the width and type of rows of codes.
    """

    def __init__(self, codec: CodeFormat, parts: Parts) -> None:
        self.codec, self.bits, self.block = codec, parts.detail("bits"), parts.detail("block")
        self.form = FORMS[parts["scales"].spec.dtype]
        self.is_symmetric = parts.get("zeros") is None
        count, rows, _ = parts.shape
        together = 32 if self.packs_zeros(parts) else self.block[0]
        super().__init__(parts, together if count == 1 or rows % together == 0 else rows)

    @staticmethod
    def packs_zeros(parts: Parts) -> bool:
        zeros = parts.get("zeros")
        return zeros is not None and zeros.spec.dtype == "I32"

    @np.errstate(all="ignore")
    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        _, height, columns = self.parts.shape
        pieces = self.kept() if start == 0 else []
        codes = np.zeros((len(rows), self.codec.width(self.parts)), self.codec.code)
        done = 0
        for which, first, last in matrices(start, start + len(rows), height):
            numbers = floats_of(rows[done : done + last - first], self.form)
            scale, zero = self.qparams(numbers)
            if not np.isfinite(scale).all():
                raise InputError("has numbers that its type of scales does not have", culprit=self.parts["codes"].name)
            codes[done : done + last - first, :columns] = self.coded(numbers, scale, zero)
            pieces += self.companions(which, first, scale, zero)
            done += last - first
        return codes, pieces

    def qparams(self, numbers: Floats) -> tuple[Floats, Codes | None]:
        """Return scales and zero points of each block, (blocks down, blocks across)."""
        high, wide = self.block[0], self.block[1] or numbers.shape[1]
        below, beside = -len(numbers) % high, -numbers.shape[1] % wide
        padded = np.pad(numbers, ((0, below), (0, beside))) if below or beside else numbers
        tiles = padded.reshape(len(padded) // high, high, -1, wide)
        return qparams(tiles.min((1, 3)), tiles.max((1, 3)), self.bits, self.form, self.is_symmetric)

    def coded(self, numbers: Floats, scale: Floats, zero: Codes | None) -> Codes:
        """Return the codes of numbers in the stored type, (rows, columns)."""

        def spread(blocks: Floats) -> Floats:
            high, wide = self.block[0], self.block[1] or numbers.shape[1]
            full = blocks.repeat(high, axis=0)[: len(numbers)]
            return full.repeat(wide, axis=1)[:, : numbers.shape[1]] if full.shape[1] > 1 else full

        codes = rounded_in(numbers / spread(scale), self.form)
        if zero is not None:
            codes = rounded_in(codes + spread(zero.astype(codes.dtype)), self.form)
        half = 1 << (self.bits - 1)
        codes = np.rint(codes.clip(-half, half - 1)) + (half if self.codec.code == "uint8" else 0)
        stored: Codes = codes.astype(self.codec.code)
        return stored

    def companions(self, which: int, first: int, scale: Floats, zero: Codes | None) -> list[Piece]:
        """Return scales and zero points of rows of the matrix `which`, from `first` on."""
        groups = scale.shape[1]
        high = -(-self.parts.shape[1] // self.block[0])
        place = (which * high + first // self.block[0]) * groups
        pieces = [("scales", place * self.form.itemsize, rounded_to(scale, self.form).bits.tobytes())]
        if zero is None:
            return pieces
        if not self.packs_zeros(self.parts):
            return [*pieces, ("zeros", place, zero.tobytes())]
        stream = Words(len(zero), self.bits)
        codes = np.zeros((groups, stream.width), np.uint8)
        codes[:, : len(zero)] = zero.T + np.int16(1 << (self.bits - 1))
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
        self.least = self.most = np.zeros((1, 1))

    def see(self, rows: Numbers) -> None:
        numbers = floats_of(rows, self.form)
        self.least, self.most = np.minimum(self.least, numbers.min()), np.maximum(self.most, numbers.max())

    def qparams(self, numbers: Floats) -> tuple[Floats, Codes | None]:
        least, most = (bound.astype(numbers.dtype) for bound in (self.least, self.most))
        return qparams(least, most, self.bits, self.form, self.is_symmetric, widens=True)


def qparams(
    least: Floats, most: Floats, bits: int, form: Form, is_symmetric: bool, widens: bool = False
) -> tuple[Floats, Codes | None]:
    """Return the scales of blocks with these bounds, rounded to their form, and zero points as int8, or None.

    A block of zeros has the form's epsilon as its scale, and 0 as its zero point.

    Args:
        widens: the zero point of a form of 16 bits is computed in float32, as in the package for one scale alone: torch
            widens a tensor without dimensions.
    """
    least, most, low, steps = np.minimum(least, 0), np.maximum(most, 0), -(1 << (bits - 1)), 2**bits - 1
    if is_symmetric:
        scale, zero = rounded_in(np.maximum(-least, most) / (steps / 2), form), None
    else:
        scale = rounded_in(rounded_in(most - least, form) / steps, form)
        place = low - rounded_in(least / scale, form)
        place = place if widens else rounded_in(place, form)
        zero = np.nan_to_num(np.rint(place.clip(low, -low - 1))).astype(np.int8)
    scale[scale == 0] = 2.0 ** (1 - form.precision)
    return scale, zero
