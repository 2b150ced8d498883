"""Streams of a tensor's bytes: two of them side by side, and numbers put into one at rising positions.

Pieces are memoryviews of any length, and each may be overwritten once the next is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from ...errors import InputError

Pieces = Iterable[bytes | memoryview]
Bytes = npt.NDArray[np.uint8]
Block = tuple[npt.NDArray[np.int64], Bytes]  # positions, and at each the bytes of a number: (k), (k, width)

PART = 1 << 20  # bytes that are combined at a time: they stay in the processor's cache


def paired(left: Pieces, right: Pieces, culprit: str) -> Iterator[tuple[Bytes, Bytes]]:
    """Yield two streams of one length side by side, in parts of equal length.

    Raises:
        InputError: one stream ends before the other.
    """
    ones, twos = _parts(left), _parts(right)
    one = two = np.empty(0, np.uint8)
    while True:
        if not one.size:
            one = next(ones, one)
        if not two.size:
            two = next(twos, two)
        size = min(one.size, two.size)
        if not size:
            break
        yield one[:size], two[:size]
        one, two = one[size:], two[size:]
    if one.size or two.size:
        raise InputError("has another length than the tensor of the base", culprit=culprit)


def _parts(pieces: Pieces) -> Iterator[Bytes]:
    for piece in pieces:
        for first in range(0, len(piece), PART):
            yield np.frombuffer(piece, np.uint8)[first : first + PART]


def xored(base: Pieces, difference: Pieces, culprit: str) -> Iterator[memoryview]:
    """Yield the exclusive or of two streams of one length."""
    return (np.bitwise_xor(one, two).data for one, two in paired(base, difference, culprit))


def aligned(pieces: Pieces, width: int) -> Iterator[memoryview]:
    """Yield a stream in pieces that are whole numbers of `width` bytes; bytes that are left over come last."""
    rest = b""
    for piece in pieces:
        data = memoryview(rest + bytes(piece) if rest else piece)
        whole = len(data) // width * width
        rest = bytes(data[whole:])
        if whole:
            yield data[:whole]
    if rest:
        yield memoryview(rest)


def scattered(
    pieces: Pieces, blocks: Iterable[Block], spec_bytes: int, width: int, culprit: str
) -> Iterator[memoryview]:
    """Yield a tensor's bytes with numbers of `width` bytes put at positions, counted in numbers.

    Args:
        pieces: the bytes of the base's tensor.
        blocks: the positions, rising from block to block too, and the numbers there.
        spec_bytes: the length of the tensor.

    Raises:
        InputError: positions do not rise, or one is beyond the end.
    """
    sorted_blocks = _rising(blocks, spec_bytes // width, culprit)
    positions, values = np.empty(0, np.int64), np.empty((0, width), np.uint8)
    first = 0
    for piece in aligned(pieces, width):
        out = np.frombuffer(piece, np.uint8).copy()
        numbers, end = out.reshape(-1, width), first + len(out) // width
        while True:
            if not positions.size:
                positions, values = next(sorted_blocks, (positions, values))
            count = int(np.searchsorted(positions, end))
            numbers[positions[:count] - first] = values[:count]
            whole = count == positions.size and count
            positions, values = positions[count:], values[count:]
            if not whole:
                break
        first = end
        yield out.data
    if positions.size or next(sorted_blocks, None) is not None:
        raise InputError("has positions beyond the end of the base's tensor", culprit=culprit)


def _rising(blocks: Iterable[Block], size: int, culprit: str) -> Iterator[Block]:
    last = -1
    for positions, values in blocks:
        if not positions.size:
            continue
        if positions[0] <= last or (np.diff(positions) <= 0).any():
            raise InputError("has positions that do not rise, or repeat", culprit=culprit)
        last = int(positions[-1])
        if last >= size:
            raise InputError(f"has the position {last} of a tensor of {size}", culprit=culprit)
        yield positions, values


def differing_numbers(base: Pieces, target: Pieces, width: int, culprit: str) -> Iterator[Block]:
    """Yield the positions of numbers of `width` bytes, 1 to 8, whose bits differ, and the target's numbers."""
    first = 0
    for one, two in paired(aligned(base, width), aligned(target, width), culprit):
        old, new = one.view(f"u{width}"), two.view(f"u{width}")
        (places,) = (old != new).nonzero()
        yield places + first, new[places].view(np.uint8).reshape(-1, width)
        first += new.size


class ByteStream:
    """Takes exact numbers of bytes from a stream."""

    def __init__(self, pieces: Iterable[bytes], culprit: str) -> None:
        self._pieces, self._culprit, self._left = iter(pieces), culprit, memoryview(b"")

    def take(self, count: int) -> bytes:
        """Return the next bytes; they are as many as wanted, for the stream ends with an error else."""
        return b"".join(self.parts(count))

    def parts(self, count: int) -> Iterator[memoryview]:
        """Yield the next `count` bytes in parts."""
        while count:
            if not self._left:
                piece = next(self._pieces, None)
                if piece is None:
                    raise InputError(f"ends {count} bytes too early", culprit=self._culprit)
                self._left = memoryview(piece)
            part, self._left = self._left[:count], self._left[count:]
            count -= len(part)
            yield part

    def skip(self, count: int) -> None:
        for _ in self.parts(count):
            pass

    def finish(self) -> None:
        """Read to the end, where the stream checks itself."""
        if self._left or any(self._pieces):
            raise InputError("is followed by other bytes", culprit=self._culprit)
