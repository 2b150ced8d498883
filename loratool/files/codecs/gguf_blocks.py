"""The layout of ggml's blocks: the places of codes and the formulas of scales, type by type.

A row of a matrix is a sequence of blocks. A block has codes, as planes of one or more bits each, and a head: all its
other bytes, which are the scales. Sources: ggml/src/ggml-common.h (the structs) and ggml/src/ggml-quants.c
(dequantize_row_*) of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ...numerics.code_levels import Codes, Integers, Levels, Table
from ...numerics.forms import Wide
from ..dtypes import BLOCK_TYPES
from .codec import StoredTensor

Head = Callable[[Codes], tuple[Wide, Wide | None]]  # heads (n, bytes) -> scales (n, groups), and offsets or None


class Plane(NamedTuple):
    """A plane of bits of the codes. The lowest bits of each `run` bytes are the first `run` numbers', and so on up."""

    first: int  # byte of the block
    bits: int  # of a number
    run: int
    to: int = 0  # the position in the code of the lowest of these bits


@dataclass(frozen=True)
class Blocks:
    """The codes of rows of blocks; each row is followed by its heads as padding."""

    columns: int
    layout: BlockLayout
    row_multiple = 1

    @property
    def _count(self) -> int:
        return self.columns // self.layout.numbers

    @property
    def width(self) -> int:
        return self.columns + self._count * len(self.layout.head)

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        blocks = self.raw(tensor, start, stop)
        codes, heads = self.layout.unpack(blocks), blocks[:, self.layout.head]
        return np.concatenate((codes.reshape(stop - start, -1), heads.reshape(stop - start, -1)), axis=1)

    def raw(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        """Return the blocks of rows start:stop, (n, nbytes)."""
        row = self._count * self.layout.nbytes
        return tensor.integers(start * row, (stop - start) * row).reshape(-1, self.layout.nbytes)

    def places(self, start: int, codes: Codes) -> Iterator[tuple[int, bytes]]:
        without_padding = np.ascontiguousarray(codes[:, : self.columns]).reshape(-1, self.layout.numbers)
        heads = codes[:, self.columns :].reshape(len(without_padding), -1)
        yield start * self._count * self.layout.nbytes, self.layout.pack(without_padding, heads).tobytes()


@dataclass(frozen=True)
class BlockLayout:
    """A type's blocks. A number is `level * scale + offset`: its code's level, its group's scale and offset."""

    kind: str  # a key of BLOCK_TYPES
    levels: Levels
    planes: tuple[Plane, ...]
    scales: Head
    flip: int = 0  # bits of a code that are stored inverted

    @property
    def numbers(self) -> int:
        return BLOCK_TYPES[self.kind][0]

    @property
    def nbytes(self) -> int:
        return BLOCK_TYPES[self.kind][1]

    @cached_property
    def head(self) -> Codes:
        """The places of the bytes that are not codes."""
        taken = np.zeros(self.nbytes, np.bool_)
        for plane in self.planes:
            taken[plane.first : plane.first + self.numbers * plane.bits // 8] = True
        return np.flatnonzero(~taken)

    def unpack(self, blocks: Codes) -> Codes:
        """Return the codes, (n, numbers), of blocks, (n, nbytes)."""
        codes = np.zeros((len(blocks), self.numbers), np.uint8)
        for first, bits, run, to in self.planes:
            data = blocks[:, first : first + self.numbers * bits // 8].reshape(len(blocks), -1, 1, run)
            part = (data >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]) & np.uint8((1 << bits) - 1)
            codes |= part.reshape(codes.shape) << np.uint8(to)
        return codes ^ np.uint8(self.flip)

    def pack(self, codes: Codes, heads: Codes) -> Codes:
        """Return the blocks of codes and heads."""
        blocks = np.empty((len(codes), self.nbytes), np.uint8)
        blocks[:, self.head] = heads
        for first, bits, run, to in self.planes:
            part = ((codes ^ np.uint8(self.flip)) >> np.uint8(to)) & np.uint8((1 << bits) - 1)
            part = part.reshape(len(codes), -1, 8 // bits, run) << np.arange(0, 8, bits, dtype=np.uint8)[:, None]
            size = self.numbers * bits // 8
            blocks[:, first : first + size] = np.bitwise_or.reduce(part, axis=2).reshape(len(codes), size)
        return blocks


class Ternary(BlockLayout):
    """TQ1_0: a byte has five numbers -1, 0 or 1 as digits of a fraction in base 3; the last four bytes have four."""

    runs = ((0, 32, 5), (32, 16, 5), (48, 4, 4))  # first byte, bytes, digits of each

    @cached_property
    def head(self) -> Codes:
        return np.arange(52, 54)

    def unpack(self, blocks: Codes) -> Codes:
        parts = []
        for first, count, digits in self.runs:
            data = blocks[:, first : first + count].reshape(len(blocks), 1, count)
            shifted = data * (3 ** np.arange(digits)).astype(np.uint8)[:, None]  # modulo 256
            parts.append(((shifted.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(blocks), -1))
        return np.concatenate(parts, axis=1)

    def pack(self, codes: Codes, heads: Codes) -> Codes:
        parts, done = [], 0
        for _, count, digits in self.runs:
            part = codes[:, done : done + count * digits].reshape(len(codes), digits, count).astype(np.uint16)
            fraction = (part * (3 ** np.arange(4, 4 - digits, -1)).astype(np.uint16)[:, None]).sum(1, dtype=np.uint16)
            parts.append(((fraction * 256 + 242) // 243).astype(np.uint8))  # at most 242 * 256 + 242, of 16 bits
            done += count * digits
        return np.concatenate((*parts, heads), axis=1)


def fp16_numbers(data: Codes) -> Wide:
    """Return float16 numbers, (n, bytes / 2), as float64."""
    with np.errstate(invalid="ignore"):  # damaged ones may be signaling nan
        return np.ascontiguousarray(data).view("<f2").astype(np.float64)


def _one(head: Codes) -> tuple[Wide, None]:
    return fp16_numbers(head), None


def _with_least(head: Codes) -> tuple[Wide, Wide]:
    """A scale and the least number."""
    both = fp16_numbers(head)
    return both[:, :1], both[:, 1:]


def _q2_k(head: Codes) -> tuple[Wide, Wide]:
    both = fp16_numbers(head[:, 16:])
    return both[:, :1] * (head[:, :16] & 15), -(both[:, 1:] * (head[:, :16] >> 4))


def _q3_k(head: Codes) -> tuple[Wide, None]:
    """16 scales of 6 bits: the low four of 0..7 and of 8..15 in nibbles, then the high two of each fourth."""
    low = (head[:, None, :8] >> np.array([[0], [4]], np.uint8)) & 15
    high = (head[:, None, 8:12] >> np.array([[0], [2], [4], [6]], np.uint8)) & 3
    scales = low.reshape(-1, 16) | high.reshape(-1, 16) << 4
    return fp16_numbers(head[:, 12:]) * (scales.astype(np.float64) - 32), None


def _q45_k(head: Codes) -> tuple[Wide, Wide]:
    """8 scales and 8 mins of 6 bits: 0..3 in a byte each; the two spare bits of these are the high bits of 4..7."""
    both, scale, least, low = fp16_numbers(head[:, :4]), head[:, 4:8], head[:, 8:12], head[:, 12:]
    scales = np.concatenate((scale & 63, (low & 15) | (scale >> 6) << 4), axis=1)
    mins = np.concatenate((least & 63, low >> 4 | (least >> 6) << 4), axis=1)
    return both[:, :1] * scales, -(both[:, 1:] * mins)


def _q6_k(head: Codes) -> tuple[Wide, None]:
    return fp16_numbers(head[:, 16:]) * np.ascontiguousarray(head[:, :16]).view(np.int8), None


def _iq4_xs(head: Codes) -> tuple[Wide, None]:
    """8 scales of 6 bits: the high two in the third and fourth byte, the low four in nibbles."""
    index = np.arange(8, dtype=np.uint8)
    high = (head[:, 2 + index // 4] >> (2 * (index % 4)).astype(np.uint8)) & 3
    low = (head[:, 4 + index // 2] >> (4 * (index % 2)).astype(np.uint8)) & 15
    return fp16_numbers(head[:, :2]) * ((low | high << 4).astype(np.float64) - 32), None


def _e8m0(head: Codes) -> tuple[Wide, None]:
    """A power of two; no pattern is nan."""
    return np.ldexp(1.0, head.astype(np.intc) - 127), None


def _ue4m3(head: Codes) -> tuple[Wide, None]:
    """Floats of 4 and 3 bits without a sign; the largest pattern means 0."""
    exponent, fraction = (head >> 3 & 15).astype(np.intc), (head & 7).astype(np.float64)
    scales = np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(1 + fraction / 8, exponent - 7))
    return np.where(head == 0x7F, 0.0, scales), None


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

FP4 = Table((*_FP4, 0.0, *(-x for x in _FP4[1:])))  # e2m1 without a -0

IQ4 = Table(tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))))


def _integers(bits: int, zero: int = 0) -> Levels:
    return Integers(0, (1 << bits) - 1, offset=zero)


LAYOUTS = {
    layout.kind: layout
    for layout in (
        BlockLayout("Q8_0", _integers(8, 128), (Plane(2, 8, 32),), _one, flip=128),
        BlockLayout("Q4_0", _integers(4, 8), (Plane(2, 4, 16),), _one),
        BlockLayout("Q4_1", _integers(4), (Plane(4, 4, 16),), _with_least),
        BlockLayout("Q5_0", _integers(5, 16), (Plane(6, 4, 16), Plane(2, 1, 1, 4)), _one),
        BlockLayout("Q5_1", _integers(5), (Plane(8, 4, 16), Plane(4, 1, 1, 4)), _with_least),
        BlockLayout("Q2_K", _integers(2), (Plane(16, 2, 32),), _q2_k),
        BlockLayout("Q3_K", _integers(3, 4), (Plane(32, 2, 32), Plane(0, 1, 32, 2)), _q3_k),
        BlockLayout("Q4_K", _integers(4), (Plane(16, 4, 32),), _q45_k),
        BlockLayout("Q5_K", _integers(5), (Plane(48, 4, 32), Plane(16, 1, 32, 4)), _q45_k),
        BlockLayout("Q6_K", _integers(6, 32), (Plane(0, 4, 64), Plane(128, 2, 32, 4)), _q6_k),
        BlockLayout("IQ4_NL", IQ4, (Plane(2, 4, 16),), _one),
        BlockLayout("IQ4_XS", IQ4, (Plane(8, 4, 16),), _iq4_xs),
        BlockLayout("MXFP4", FP4, (Plane(1, 4, 16),), _e8m0),
        BlockLayout("NVFP4", FP4, (Plane(4, 4, 8),), _ue4m3),
        Ternary("TQ1_0", Integers(0, 2, offset=1), (), _one),
        BlockLayout("TQ2_0", Integers(0, 2, offset=1, readable=(0, 3)), (Plane(0, 2, 32),), _one),
        BlockLayout("Q1_0", Table((-1.0, 1.0)), (Plane(2, 1, 1),), _one),
        BlockLayout("Q2_0", _integers(2, 1), (Plane(2, 2, 1),), _one),
    )
}
