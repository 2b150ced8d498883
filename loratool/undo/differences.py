"""Write differences of places in few bits, and read a record's bytes from front to back.

Differences are near zero on either side. They are folded to unsigned numbers, and many share one small width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..numerics.forms import IntArray

UNIT = 1 << 12  # differences of one width
RARE = 32  # if fewer than one in RARE differ from 0, listing them with their gaps is shorter
WIDEST = 9  # bits of the folded difference of two 8-bit codes; it is never the largest number of 9 bits
IN_FULL = 20  # about the bits of a difference that is stored in full
SPARSE = 255  # marks a sparse list, where else a width is


def pack_differences(difference: IntArray) -> bytes:
    """Pack signed integers in units of UNIT numbers: a byte with a width, then each number in that many bits.

    A difference d of n bits, modulo 2**n, is stored as 2 d for d >= 0 and as -2 d - 1 for d < 0.
    """
    folded, parts = _folded(difference), []
    for start in range(0, len(folded), UNIT):
        unit = folded[start : start + UNIT]
        width = int(unit.max()).bit_length()
        parts += [bytes([width]), _in_bits(unit, width)]
    return b"".join(parts)


def _folded(difference: IntArray) -> IntArray:
    """Return 2 d for d >= 0 and -2 d - 1 for d < 0, unsigned."""
    signs = difference >> (8 * difference.itemsize - 1)
    folded: IntArray = ((difference << 1) ^ signs).view(f"u{difference.itemsize}")
    return folded


def _unfolded(numbers: IntArray) -> IntArray:
    """Return the signed integers that `_folded` folded."""
    signed = f"i{numbers.itemsize}"
    unfolded: IntArray = (numbers >> 1).view(signed) ^ -(numbers & 1).astype(signed)
    return unfolded


def _in_bits(numbers: IntArray, width: int) -> bytes:
    """Return unsigned integers in `width` bits each; zeros pad the last byte."""
    flags = (numbers[:, None] >> np.arange(width, dtype=numbers.dtype)) & 1 == 1
    return np.packbits(flags, bitorder="little").tobytes()


def pack_code_differences(difference: IntArray) -> bytes:
    """Pack int16 numbers, most of them 0 or near it: a byte for the layout, then the numbers.

    SPARSE: the numbers that are not 0, and the gaps before them. Any other byte is the width of all numbers, folded as
    in `pack_differences`. The largest number of this width marks one that is stored in full at the end.
    """
    nonzero = np.flatnonzero(difference)
    if len(nonzero) * RARE <= len(difference):
        gaps = np.diff(nonzero, prepend=-1).astype(np.int32) - 1
        numbers = pack_differences(gaps) + pack_differences(difference[nonzero])
        return bytes([SPARSE]) + len(nonzero).to_bytes(4, "little") + numbers
    folded = _folded(difference)
    several = np.cumsum(np.bincount(folded, minlength=1 << WIDEST)[::-1])[::-1]  # how many are so large, or larger
    width = min(range(1, WIDEST + 1), key=lambda w: len(folded) * w + int(several[(1 << w) - 1]) * IN_FULL)
    escape = (1 << width) - 1
    short = _in_bits(np.minimum(folded, np.uint16(escape)), width)
    return bytes([width]) + short + pack_differences(difference[folded >= escape])


class Reader:
    """Reads a record's bytes from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) < count:
            raise ValueError("ends too early")
        self._at += count
        return part

    @property
    def rest(self) -> int:
        return len(self._data) - self._at

    def bits(self) -> npt.NDArray[np.bool_]:
        """Return the bits of all remaining bytes."""
        data = np.frombuffer(self.take(self.rest), np.uint8)
        return np.unpackbits(data, bitorder="little").astype(np.bool_)

    def differences(self, count: int, code: type) -> IntArray:
        """Read `count` numbers of a signed integer type that `pack_differences` packed."""
        kind = np.dtype(code)
        numbers = np.empty(count, f"u{kind.itemsize}")
        for start in range(0, count, UNIT):
            unit = numbers[start : start + UNIT]
            width = self.take(1)[0]
            if width > 8 * kind.itemsize:
                raise ValueError(f"has numbers of {width} bits")
            self._from_bits(width, unit)
        return _unfolded(numbers)

    def _from_bits(self, width: int, out: IntArray) -> None:
        """Read unsigned integers of `width` bits each into `out`.

        Raises:
            ValueError: the bits are too few, or the padding of the last byte is not zero.
        """
        data = np.frombuffer(self.take((len(out) * width + 7) // 8), np.uint8)
        numbers, padding = np.split(np.unpackbits(data, bitorder="little"), [len(out) * width])
        if padding.any():
            raise ValueError("is longer than it should be")
        rows = numbers.reshape(len(out), width).astype(out.dtype)
        out[...] = (rows << np.arange(width, dtype=out.dtype)).sum(1, dtype=out.dtype)

    def code_differences(self, count: int) -> IntArray:
        """Read `count` numbers that `pack_code_differences` packed."""
        width, differences = self.take(1)[0], np.zeros(count, np.int16)
        if width == SPARSE:
            some = int.from_bytes(self.take(4), "little")
            if some > count:
                raise ValueError("has more places than numbers")
            places = np.cumsum(self.differences(some, np.int32).astype(np.int64) + 1) - 1
            if some and (places[0] < 0 or places[-1] >= count or (np.diff(places) < 1).any()):
                raise ValueError("has invalid places")
            differences[places] = self.differences(some, np.int16)
            return differences
        if not 1 <= width <= WIDEST:
            raise ValueError(f"has numbers of {width} bits")
        short = np.empty(count, np.uint16)
        self._from_bits(width, short)
        differences = _unfolded(short)
        escaped = np.flatnonzero(short == (1 << width) - 1)
        differences[escaped] = self.differences(len(escaped), np.int16)
        return differences
