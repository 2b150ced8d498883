"""Write and read the streams of bytes that a body of a patch consists of.

A reader knows how many bytes a stream has before it reads it, so nothing that a file says makes it take more memory. A
stream is empty if it has no bytes; else a byte says how it is stored:

- 0: as it is.
- 1: one byte, which all are.
- 2: coded (`numerics.rans`). A table of frequencies, 4 bytes with the length of the code, the code.

A table is, for each class, how many frequencies follow, of symbols from 0 on; and these, each 0 with the number of
zeros that follow it. All are numbers of 1 or 2 bytes: seven bits, the lowest first, and a bit that says that there are
more.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod

import numpy as np

from ..numerics import rans
from ..numerics.rans import Bytes, Counts, Table

_RAW, _CONSTANT, _CODED = range(3)


class Sink(ABC):
    """Where a body puts what it consists of."""

    @abstractmethod
    def put(self, data: bytes) -> None:
        """Put bytes as they are."""

    @abstractmethod
    def put_stream(
        self, symbols: Bytes, classes: Bytes | None = None, rows: int = 1, counts: Counts | None = None
    ) -> None:
        """Put a stream.

        Args:
            classes: of each symbol, which the reader will know; less than `rows`.
            counts: of the symbols in each class, if they are known.
        """


class Writer(Sink):
    """Collects bytes."""

    def __init__(self) -> None:
        self._parts = list[bytes]()

    def put(self, data: bytes) -> None:
        self._parts.append(data)

    def put_stream(
        self, symbols: Bytes, classes: Bytes | None = None, rows: int = 1, counts: Counts | None = None
    ) -> None:
        if not symbols.size:
            return
        counts = rans.count(symbols, classes, rows) if counts is None else counts
        if np.count_nonzero(counts.any(0)) == 1:
            self.put(bytes([_CONSTANT, int(symbols[0])]))
            return
        table = rans.frequencies(counts)
        head = _packed(table)
        if len(head) + 4 + 4 * rans.lanes(symbols.size) + rans.cost(counts, table) // 8 >= symbols.size:
            self.put(bytes([_RAW]) + symbols.tobytes())
            return
        code = rans.encode_symbols(symbols, classes, table)
        self.put(bytes([_CODED]) + head + struct.pack("<I", len(code)))
        self.put(code)

    def data(self) -> bytes:
        return b"".join(self._parts)


class Meter(Sink):
    """Adds up what a body would take of a longer span of the same kind: no tables, no states, no heads."""

    def __init__(self) -> None:
        self.bits = 0

    def put(self, data: bytes) -> None:
        pass

    def put_stream(
        self, symbols: Bytes, classes: Bytes | None = None, rows: int = 1, counts: Counts | None = None
    ) -> None:
        counts = rans.count(symbols, classes, rows) if counts is None else counts
        self.bits += min(8 * symbols.size, rans.cost(counts, rans.frequencies(counts)))


class Source:
    """What a body consists of, read from its start. Whatever does not fit is a ValueError."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        part = self._data[self._at : self._at + size]
        if len(part) != size:
            raise ValueError("the data is cut off")
        self._at += size
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def word(self) -> int:
        """Return 32 bits."""
        return int.from_bytes(self.take(4), "little")

    def stream(self, size: int, classes: Bytes | None = None, rows: int = 1) -> Bytes:
        """Return the bytes of a stream. The classes are less than `rows`."""
        kind = self.byte() if size else _RAW
        if kind == _RAW:
            return np.frombuffer(self.take(size), np.uint8).copy()
        if kind == _CONSTANT:
            return np.full(size, self.byte(), np.uint8)
        if kind != _CODED:
            raise ValueError(f"a stream of kind {kind}")
        table = self._table(rows)
        return rans.decode_symbols(self.take(self.word()), size, classes, table)

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError("data that is left over")

    def _table(self, rows: int) -> Table:
        table = np.zeros((rows, rans.SYMBOLS), np.uint32)
        for row in table:
            size, at = self._number(), 0
            while at < size:
                frequency = self._number()
                zeros = 0 if frequency else self._number()
                if not at + zeros < min(size, rans.SYMBOLS):
                    raise ValueError("a table of more than 256 symbols")
                row[at] = frequency
                at += 1 + zeros
        return table

    def _number(self) -> int:
        low = self.byte()
        return low if low < 0x80 else low - 0x80 + (self.byte() << 7)


def _packed(table: Table) -> bytes:
    out = bytearray()
    for row in table:
        found = np.flatnonzero(row)
        out += _number(int(found[-1]) + 1 if found.size else 0)
        at = 0
        for symbol, frequency in zip(found.tolist(), row[found].tolist(), strict=True):
            if symbol > at:
                out += _number(0) + _number(symbol - at - 1)
            out += _number(frequency)
            at = symbol + 1
    return bytes(out)


def _number(x: int) -> bytes:
    return bytes([x]) if x < 0x80 else bytes([x & 0x7F | 0x80, x >> 7])
