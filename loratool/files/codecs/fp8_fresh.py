"""Encode float8 with new scales from the largest number of each block, like the formats' own software.

All operations are elementwise or maxima, and each is rounded as torch rounds it, so the bytes are the same on every
machine.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...numerics.arrays import Numbers, floats_of, rounded_in, rounded_to
from ...numerics.forms import E4M3, F32, FORMS, Bits, Form, holding
from .codec import Parts, Piece, Quantizer

if TYPE_CHECKING:
    from .codec import Codes

Floats = npt.NDArray[Any]  # float32 or float64

Spread = Callable[[Floats], Floats]  # numbers of blocks -> one for each row and column

LARGEST = 448.0  # of e4m3

E8M0 = ("F8_E8M0", "U8")

INVERSE = ("_scale_inv", ".scale")  # suffixes of scales of DeepSeek's models, which transformers writes


class Fp8Quantizer(Quantizer):
    """e4m3 with one scale for each block of rows and columns."""

    def __init__(self, parts: Parts) -> None:
        matrices, rows, columns = parts.shape
        high, wide = parts.detail("block")
        if parts["scales"].spec.size == 1:
            matrices, rows = 1, matrices * rows
        self.height, self.high, self.wide = rows, high or rows, wide or columns  # of a matrix, and of a block
        self.down, self.across = -(-rows // self.high), -(-columns // self.wide)  # blocks of a matrix
        self.blocks = matrices * self.down
        super().__init__(parts, self.high if matrices == 1 or rows % self.high == 0 else rows)

    @np.errstate(all="ignore")
    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        blocks = self.blocks_of(start, len(rows))
        first = int(blocks[0])

        def spread(numbers: Floats) -> Floats:
            return numbers[blocks - first].repeat(self.wide, axis=1)[:, : rows.shape[1]]

        scales, largest = self.parts["scales"], self.largest(blocks, rows)
        if scales.name.endswith(INVERSE):
            scale, stored, scaled = _by_inverse(
                rows, largest, spread, scales.spec.dtype, self.parts.detail("power_of_two")
            )
        else:
            scale, stored, scaled = _by_quotient(rows, largest, spread, FORMS[scales.spec.dtype])
        if not (largest.all_finite() and np.isfinite(scale).all()):
            culprit = self.parts["codes"].name
            raise InputError("has numbers that its type of scales does not have", culprit=culprit)
        codes = rounded_to(scaled.clip(-LARGEST, LARGEST), E4M3).bits.view(np.uint8)
        return codes, [*self.kept(start), ("scales", first * self.across * stored.itemsize, stored.tobytes())]

    def kept(self, start: int) -> list[Piece]:
        """Return the companions to copy, with the first row: scales of inputs, ComfyUI's description."""
        others = [role for role in self.parts.tensors if role not in ("codes", "scales")] if start == 0 else []
        return [(role, 0, self.parts[role].integers().tobytes()) for role in others]

    def blocks_of(self, start: int, count: int) -> npt.NDArray[np.intp]:
        """Return the block of each of some rows, counted over all matrices."""
        rows = np.arange(start, start + count)
        return rows // self.height * self.down + rows % self.height // self.high

    def largest(self, blocks: npt.NDArray[np.intp], rows: Numbers) -> Numbers:
        """Return the largest absolute value of each block that these rows are in, (blocks, across)."""
        ordinals = abs(rows).bits
        if ordinals.shape[1] % self.wide:
            ordinals = np.pad(ordinals, ((0, 0), (0, -ordinals.shape[1] % self.wide)))
        ordinals = ordinals.reshape(len(rows), self.across, self.wide).max(2)
        edges = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(rows)]
        return Numbers(np.stack([ordinals[first:last].max(0) for first, last in pairwise(edges)]), rows.form)


class Fp8Whole(Fp8Quantizer):
    """e4m3 with scales that all rows of a matrix share; `see` gets the rows first."""

    sees_all = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.together, self.seen = 1, 0
        self.known: dict[int, Bits] = {}  # the largest values of a block of rows, (across), by their ordinals

    def see(self, rows: Numbers) -> None:
        blocks = self.blocks_of(self.seen, len(rows))
        for block, largest in zip(range(blocks[0], blocks[-1] + 1), super().largest(blocks, rows).bits, strict=True):
            self.known[block] = np.maximum(largest, self.known.get(block, largest))
        self.seen += len(rows)

    def largest(self, blocks: npt.NDArray[np.intp], rows: Numbers) -> Numbers:
        return Numbers(np.stack([self.known[block] for block in range(blocks[0], blocks[-1] + 1)]), rows.form)


def _by_quotient(rows: Numbers, largest: Numbers, spread: Spread, form: Form) -> tuple[Floats, Bits, Floats]:
    """Return scales, amax / 448, as numbers and as stored, and x / scale, in the type of rows and scales.

    The scale of zeros is the form's epsilon. Source: compressed-tensors, `calculate_qparams` in
    quantization/utils/helpers.py and `_quantize` in quantization/lifecycle/forward_helpers.py.
    """
    kind = holding(rows.form, form)
    scale = rounded_in(rounded_in(floats_of(largest, kind) / LARGEST, kind), form)
    scale[scale == 0] = 2.0 ** (1 - form.precision)
    scaled = rounded_in(floats_of(rows, kind) / spread(scale), kind)
    return scale, rounded_to(scale, form).bits, scaled + 0.0  # adding the zero point turns -0 into +0


def _by_inverse(
    rows: Numbers, largest: Numbers, spread: Spread, dtype: str, power_of_two: bool
) -> tuple[Floats, Bits, Floats]:
    """Return scales, 1 / (448 / amax), as numbers and as stored, and x * (448 / amax), in float32.

    The scale of zeros is 1. If scales are stored as powers of two (rounded up) or in another type, x is divided by the
    stored scale. Source: transformers, `Fp8Quantize` in integrations/finegrained_fp8.py.
    """
    factor = 1 / floats_of(largest, F32) * LARGEST  # as torch has 448 / amax
    factor[np.isinf(factor)] = 1  # of zeros, and of numbers too small for a scale
    scale = 1 / factor
    if power_of_two:
        fraction, exponent = np.frexp(scale)
        exponent = (exponent - (fraction == 0.5)).clip(-126, 127)
        scale = np.ldexp(np.ones_like(scale), exponent)
    if dtype in E8M0:
        stored = (exponent + 127).astype(np.uint8)
    else:
        scale = rounded_in(scale, FORMS[dtype])
        stored = rounded_to(scale, FORMS[dtype]).bits
    if power_of_two or dtype != "F32":
        factor = 1 / scale
    return scale, stored, floats_of(rows, F32) * spread(factor)
