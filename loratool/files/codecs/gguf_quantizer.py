"""Encode rows as ggml's blocks of Q8_0, Q4_0 and Q4_1 like llama.cpp's reference functions, in float32.

Source: quantize_row_q8_0_ref, quantize_row_q4_0_ref and quantize_row_q4_1_ref in ggml/src/ggml-quants.c. Other types
search for their scales, or weigh their errors by data.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...numerics.arrays import Numbers
from ...numerics.code_levels import Codes
from ...numerics.forms import F32, Single
from .codec import Parts, Piece, Quantizer
from .gguf_blocks import LAYOUTS

Encoder = Callable[[Single], tuple[Codes, Single]]  # numbers (n, block) -> codes in their shape, scales (n, 1 or 2)


def _first(numbers: Single, place: npt.NDArray[np.intp]) -> Single:
    """Return the number at a place of each row, (n, 1)."""
    chosen: Single = np.take_along_axis(numbers, place[:, None], axis=1)
    return chosen


def _inverse(scale: Single) -> Single:
    """Return 1 / scale, or 0 where it is infinite: the scale is 0 in float16 there."""
    inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _q8_0(numbers: Single) -> tuple[Codes, Single]:
    """Encode Q8_0; halves round away from 0."""
    scale = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)
    quotients = numbers * _inverse(scale)
    codes = np.trunc(quotients)
    codes += np.sign(quotients) * (np.abs(quotients - codes) >= 0.5)
    return (codes + 128).astype(np.uint8), scale


def _q4_0(numbers: Single) -> tuple[Codes, Single]:
    """Encode Q4_0: the first number of largest size is -8 times the scale; the scale for -0 is +0."""
    scale = (_first(numbers, np.abs(numbers).argmax(axis=1)) + np.float32(0)) / np.float32(-8)
    return (numbers * _inverse(scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8), scale


def _q4_1(numbers: Single) -> tuple[Codes, Single]:
    least = _first(numbers, numbers.argmin(axis=1))  # of -0 and +0 the first
    scale = (_first(numbers, numbers.argmax(axis=1)) - least) / np.float32(15)
    quotients = (numbers - least) * _inverse(scale) + np.float32(0.5)
    return quotients.clip(0, 15).astype(np.uint8), np.concatenate((scale, least), axis=1)


ENCODERS: dict[str, Encoder] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}


class BlockQuantizer(Quantizer):
    """Encodes a tensor of a type in ENCODERS; the scales follow a row's codes as padding."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._encode, self._block = ENCODERS[parts.codes_spec.dtype], LAYOUTS[parts.codes_spec.dtype].numbers

    @np.errstate(all="ignore")
    def rows(self, start: int, rows: Numbers) -> tuple[Codes, list[Piece]]:
        numbers = self.rounded(rows, F32).reshape(-1, self._block)
        codes, scales = self._encode(numbers)
        halves = scales.astype("<f2")
        if not np.isfinite(halves).all():
            message = "has weights too large for the float16 scales of its blocks"
            raise InputError(message, culprit=self.parts["codes"].name, remedy="leave it as numbers, with --dtype f32")
        heads = halves.view(np.uint8).reshape(len(rows), -1)
        return np.concatenate((codes.reshape(len(rows), -1), heads), axis=1), []
