"""The places of a weight's codes in the bytes of a tensor: plain, in nibbles, in words, interleaved, or transposed.

A packing does not depend on the codes' numbers. The rows of a stack's matrices follow each other; a row may be padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from .codec import Codes, StoredTensor

Place = tuple[int, bytes]  # the first byte in the tensor, and the bytes from there on

OCTET = (0, 4, 1, 5, 2, 6, 3, 7)  # AWQ: column k of eight -> its nibble in a word (AutoAWQ, packing_utils.py)


class Packing(Protocol):
    """The codes of matrices of one shape, (matrices * rows, width)."""

    @property
    def width(self) -> int:
        """The number of codes in a row, with padding."""

    @property
    def row_multiple(self) -> int:
        """The number of rows that share bytes."""

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        """Return the codes of rows start:stop, (rows, width)."""

    def places(self, start: int, codes: Codes) -> Iterator[Place]:
        """Yield the bytes of codes, (rows, width), of rows from `start` on, both multiples of `row_multiple`."""


@dataclass(frozen=True)
class Plain:
    """One byte per code, row after row, whatever their tensor's type. kind: numpy's name of the code's type."""

    columns: int
    kind: str = "uint8"
    row_multiple = 1

    @property
    def width(self) -> int:
        return self.columns

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        codes = _bytes(tensor, start * self.columns, stop * self.columns)
        return codes.view(self.kind).reshape(stop - start, self.columns)

    def places(self, start: int, codes: Codes) -> Iterator[Place]:
        yield start * self.columns, np.ascontiguousarray(codes).tobytes()


@dataclass(frozen=True)
class Words:
    """A row's codes as a stream of bits in 32-bit words, the lowest bit first; the last word is padded.

    The padding's remaining bits are one more code, so that they are restored too. Nibbles with the low one first are
    such a stream, whatever their tensor's type.
    """

    columns: int
    bits: int
    unit: int = 32  # a row is padded to a multiple of so many bits
    row_multiple = 1

    @property
    def nbytes(self) -> int:
        """The bytes of a row."""
        return -(-self.columns * self.bits // self.unit) * self.unit // 8

    @property
    def width(self) -> int:
        return -(-self.nbytes * 8 // self.bits)

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        return self.unpack(_bytes(tensor, start * self.nbytes, stop * self.nbytes).reshape(-1, self.nbytes))

    def places(self, start: int, codes: Codes) -> Iterator[Place]:
        yield start * self.nbytes, self.pack(codes).tobytes()

    def unpack(self, data: Codes) -> Codes:
        """Return the codes, (rows, width), of rows of bytes."""
        if self.bits == 8:
            return data
        if self.bits in (1, 2, 4):
            codes = np.empty((*data.shape, 8 // self.bits), np.uint8)
            for place in range(codes.shape[2]):
                np.right_shift(data, place * self.bits, out=codes[:, :, place])
            codes &= (1 << self.bits) - 1
            return codes.reshape(len(data), -1)
        octets = np.zeros((len(data), -(-data.shape[1] // self.bits), 8), np.uint8)  # eight codes are `bits` bytes
        for place in range(self.bits):
            part = data[:, place :: self.bits]
            octets[:, : part.shape[1], place] = part
        words = octets.view("<u8")[:, :, 0]
        codes = np.empty(octets.shape, np.uint8)
        for place in range(8):
            codes[:, :, place] = words >> (place * self.bits)
        codes &= (1 << self.bits) - 1
        return codes.reshape(len(data), -1)[:, : self.width]

    def pack(self, codes: Codes) -> Codes:
        """Return rows of bytes of codes, (rows, width)."""
        if self.bits == 8:
            return np.ascontiguousarray(codes)
        if self.bits in (1, 2, 4):
            per_byte = 8 // self.bits
            data: Codes = codes[:, ::per_byte].copy()
            for place in range(1, per_byte):
                data |= codes[:, place::per_byte] << (place * self.bits)
            return data
        octets = np.zeros((len(codes), -(-self.width // 8)), "<u8")
        for place in range(8):
            part = codes[:, place::8].astype(np.uint64)
            octets[:, : part.shape[1]] |= part << (place * self.bits)
        data = octets.view(np.uint8).reshape(*octets.shape, 8)[:, :, : self.bits].reshape(len(codes), -1)
        return np.pad(data, ((0, 0), (0, max(0, self.nbytes - data.shape[1]))))[:, : self.nbytes]


@dataclass(frozen=True)
class HighNibbles:
    """Two codes per byte, the first in the high nibble, in one run: with odd columns, two rows share a byte."""

    columns: int

    @property
    def width(self) -> int:
        return self.columns

    @property
    def row_multiple(self) -> int:
        return 1 + self.columns % 2

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        first, last = start * self.columns, stop * self.columns
        data = _bytes(tensor, first // 2, -(-last // 2))
        codes = np.empty((len(data), 2), np.uint8)
        np.right_shift(data, 4, out=codes[:, 0])
        np.bitwise_and(data, 15, out=codes[:, 1])
        rows: Codes = codes.reshape(-1)[first % 2 : first % 2 + last - first].reshape(stop - start, self.columns)
        return rows

    def places(self, start: int, codes: Codes) -> Iterator[Place]:
        flat = codes.reshape(-1)
        yield start * self.columns // 2, ((flat[::2] << 4) | flat[1::2]).tobytes()


@dataclass(frozen=True)
class TransposedNibbles:
    """Matrices that are stored transposed, (columns, rows / 2) bytes each, the first code in the low nibble."""

    rows: int
    columns: int
    row_multiple = 2

    @property
    def width(self) -> int:
        return self.columns

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        half, parts = self.rows // 2, []
        for which, first, last in matrices(start, stop, self.rows):
            low, high = first // 2, -(-last // 2)
            data = np.ascontiguousarray(tensor.box(self.columns, half, low, high, which * self.columns * half).T)
            codes = np.empty((high - low, 2, self.columns), np.uint8)
            np.bitwise_and(data, 15, out=codes[:, 0])
            np.right_shift(data, 4, out=codes[:, 1])
            parts.append(codes.reshape(-1, self.columns)[first - 2 * low : last - 2 * low])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def places(self, start: int, codes: Codes) -> Iterator[Place]:
        half, done = self.rows // 2, 0
        for which, first, last in matrices(start, start + len(codes), self.rows):
            part = codes[done : done + last - first]
            done += last - first
            data = np.ascontiguousarray((part[::2] | (part[1::2] << 4)).T)
            yield from (
                ((which * self.columns + column) * half + first // 2, row.tobytes()) for column, row in enumerate(data)
            )


@dataclass(frozen=True)
class Down:
    """GPTQ's matrix, stored transposed: the words of a row's stream are one below the other, (words, rows)."""

    rows: int
    columns: int
    bits: int
    row_multiple = 1

    @property
    def _words(self) -> Words:
        return Words(self.columns, self.bits)

    @property
    def width(self) -> int:
        return self._words.width

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        words = tensor.box(self._words.nbytes // 4, self.rows, start, stop)
        return self._words.unpack(np.ascontiguousarray(words.T).view(np.uint8))

    def places(self, start: int, codes: Codes) -> Iterator[Place]:
        words = np.ascontiguousarray(self._words.pack(codes).view(np.uint32).T)
        yield from (((word * self.rows + start) * 4, row.tobytes()) for word, row in enumerate(words))


@dataclass(frozen=True)
class Octets:
    """AWQ's matrix, stored transposed: words of eight rows' codes in the order OCTET, (columns, rows / 8)."""

    rows: int
    columns: int
    row_multiple = 8

    @property
    def width(self) -> int:
        return self.columns

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        low, high = start // 8, -(-stop // 8)
        words = np.ascontiguousarray(tensor.box(self.columns, self.rows // 8, low, high).T)
        codes = np.empty((high - low, 8, self.columns), np.uint8)
        for column, place in enumerate(OCTET):
            codes[:, column] = words >> (4 * place)
        codes &= 15
        return codes.reshape(-1, self.columns)[start - 8 * low : stop - 8 * low]

    def places(self, start: int, codes: Codes) -> Iterator[Place]:
        octets = codes.reshape(-1, 8, self.columns)
        words = np.zeros((self.columns, len(octets)), "<u4")
        for number, place in enumerate(OCTET):
            words |= octets[:, number].T.astype(np.uint32) << (4 * place)
        for column, row in enumerate(words):
            yield (column * (self.rows // 8) + start // 8) * 4, row.tobytes()


@dataclass(frozen=True)
class Interleaved:
    """A matrix in planes, which are runs of its numbers: each has its own bits of the same words.

    All rows share words, since numbers far apart do.

    Attributes:
        size: the numbers of a plane, one in each word. The last plane may be longer than what is left of the matrix.
        shifts: the lowest bit of each plane in a word.
        kind: numpy's name of the type of a word.
    """

    rows: int
    columns: int
    bits: int
    size: int
    shifts: tuple[int, ...]
    kind: str = "uint8"

    @property
    def width(self) -> int:
        return self.columns

    @property
    def row_multiple(self) -> int:
        return self.rows

    def read(self, tensor: StoredTensor, start: int, stop: int) -> Codes:
        codes = np.empty((stop - start) * self.columns, np.uint8)
        for shift, low, high in self._planes(start * self.columns, stop * self.columns):
            first, width = low % self.size, np.dtype(self.kind).itemsize
            words = _bytes(tensor, first * width, (first + high - low) * width).view(self.kind) >> shift
            codes[low - start * self.columns : high - start * self.columns] = words & ((1 << self.bits) - 1)
        return codes.reshape(stop - start, self.columns)

    def places(self, start: int, codes: Codes) -> Iterator[Place]:
        flat, words = codes.reshape(-1), np.zeros(self.size, self.kind)
        for shift, low, high in self._planes(0, len(flat)):
            words[: high - low] |= flat[low:high].astype(self.kind) << shift
        yield 0, words.tobytes()

    def _planes(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Split numbers first:last by planes: yield (shift, first number, number after the last)."""
        for plane, shift in enumerate(self.shifts):
            low, high = max(first, plane * self.size), min(last, (plane + 1) * self.size)
            if low < high:
                yield shift, low, high


def span(start: int, stop: int, bits: int) -> tuple[int, int]:
    """Return the words with codes start:stop of a stream, as (first, after the last); the first begins with a code."""
    return start // 32 * bits, -(-stop * bits // 32)


def cut(words: Codes, start: int, stop: int, bits: int) -> Codes:
    """Return codes start:stop of streams, (streams, codes), from the words of their `span`, (streams, words)."""
    data = np.ascontiguousarray(words).view(np.uint8)
    return Words(words.shape[1] * 32 // bits, bits).unpack(data)[:, start % 32 : start % 32 + stop - start]


def matrices(start: int, stop: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Split a run of rows by matrices: yield (matrix, first row in it, row after the last)."""
    edges = [start, *range((start // rows + 1) * rows, stop, rows), stop]
    for first, last in pairwise(edges):
        yield first // rows, first % rows, first % rows + last - first


def _bytes(tensor: StoredTensor, start: int, stop: int) -> Codes:
    """Return bytes of a tensor."""
    itemsize = tensor.spec.nbytes // max(1, tensor.spec.size)
    low, high = start // itemsize, -(-stop // itemsize)
    data = tensor.integers(low, high - low).view(np.uint8)
    return data[start - low * itemsize : stop - low * itemsize]
