"""Define what a body of a patch is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from ...numerics.steps import Patterns
from ..streams import Meter, Sink, Source, Writer

MOST = 1 << 24  # numbers in a span


class Body(ABC):
    """A way to write the numbers of a span, the target, given those that are predicted for it, the base.

    Arrays are contiguous, in one dimension and of the unsigned integer type of the numbers' width; both are of `dtype`,
    which is safetensors' name. A span has at most 2**24 numbers. The same arrays give the same data on any machine.
    """

    key: str  # as the index of a patch names it

    @abstractmethod
    def takes(self, dtype: str) -> bool:
        """Return whether the body is for numbers of a type."""

    @abstractmethod
    def write(self, base: Patterns, target: Patterns, dtype: str, sink: Sink) -> None:
        """Put the data of a span into a sink."""

    @abstractmethod
    def decode(self, base: Patterns, data: bytes | memoryview, dtype: str, out: Patterns) -> None:
        """Write the target.

        Raises:
            ValueError: this is not the data of a span of so many numbers. What `out` has then is undefined. Damage that
                is not noticed makes other numbers, never a larger array or another error.
        """

    @abstractmethod
    def back(self, base: Patterns, target: Patterns, dtype: str) -> bytes | None:
        """Return what a reader needs to have the base of the target and the data; None if it is lost."""

    @abstractmethod
    def undo(
        self, target: Patterns, data: bytes | memoryview, back: bytes | memoryview, dtype: str, out: Patterns
    ) -> None:
        """Write the base.

        Raises:
            ValueError: as of `decode`; or the data never has a way back.
        """

    def encode(self, base: Patterns, target: Patterns, dtype: str) -> bytes:
        """Return the data of a span."""
        assert target.size <= MOST
        sink = Writer()
        self.write(base, target, dtype, sink)
        return sink.data()

    def measure(self, base: Patterns, target: Patterns, dtype: str) -> int:
        """Return about how many bits a sample takes in a large span."""
        sink = Meter()
        self.write(base, target, dtype, sink)
        return sink.bits


def put_planes(
    x: Patterns, sink: Sink, classes: Patterns | None = None, rows: int = 1, width: int | None = None
) -> None:
    """Put the bytes of numbers, the lowest of all first; the others are 0 if `width` is less than the numbers have."""
    of_number = x.view(np.uint8).reshape(-1, x.itemsize)
    for i in range(width or x.itemsize):
        sink.put_stream(np.ascontiguousarray(of_number[:, i]), classes, rows)


def take_planes(
    source: Source, out: Patterns, classes: Patterns | None = None, rows: int = 1, width: int | None = None
) -> None:
    """Read numbers that `put_planes` has put; `out` is 0 before where `width` is less."""
    of_number = out.view(np.uint8).reshape(-1, out.itemsize)
    for i in range(width or out.itemsize):
        of_number[:, i] = source.stream(out.size, classes, rows)


def put_positions(positions: Patterns, sink: Sink) -> None:
    """Put rising positions in a span: how many, and the numbers between them, 3 bytes each."""
    gaps = np.diff(positions.astype(np.int64), prepend=-1) - 1
    sink.put(len(gaps).to_bytes(4, "little"))
    put_planes(gaps.astype(np.uint32), sink, width=3)


def take_positions(source: Source, n: int) -> Patterns:
    """Read positions that `put_positions` has put, in a span of n numbers."""
    count = source.word()
    if count > n:
        raise ValueError("more positions than numbers")
    gaps = np.zeros(count, np.uint32)
    take_planes(source, gaps, width=3)
    if count + int(gaps.sum(dtype=np.int64)) > n:
        raise ValueError("a position beyond the end")
    gaps += 1
    np.cumsum(gaps, out=gaps)
    gaps -= 1
    return gaps
