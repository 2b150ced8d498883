"""Read the table of an undo file, which has a row for each stretch of its payload, in the payload's order.

A stretch is the record of some rows of W, or bytes of the base as they are, at most 64 MiB of these. A row is of 48
bytes: the stretch's length (u64), the sha256 of what it restores, and of a record the sum of the rows of W' (u64, else
0), little-endian. So nothing says where a stretch begins: it begins where the one before it ends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checks import require

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ROW = struct.Struct("<Q32sQ")

HASH_PART = 1 << 26  # bytes per hash, fixed by the layout


def hashed_parts(nbytes: int) -> range:
    """Return where each part of so many bytes begins that has a hash of its own."""
    return range(0, nbytes, HASH_PART)


@dataclass(frozen=True)
class Stretch:
    """A stretch of the payload.

    Attributes:
        at: its first byte in the undo file.
        length: in bytes.
        sha256: of the bytes that it restores.
        sum: of the bytes of W' (`fileio.word_sum`); 0 if it is no record.
    """

    at: int
    length: int
    sha256: str
    sum: int


class UndoTable:
    """The rows of a table.

    Args:
        rows: as they are in the file.
        at: the first byte of each stretch.
    """

    def __init__(self, rows: bytes, at: npt.NDArray[np.int64]) -> None:
        self._rows, self._at = rows, at

    @classmethod
    def one_after_another(cls, rows: bytes, start: int) -> tuple[UndoTable, int]:
        """Return the table of stretches from a byte on, and the byte behind the last one.

        Raises:
            ValueError: its size is no table's, or lengths are beyond any file's.
        """
        import numpy as np

        require(len(rows) % ROW.size == 0, "its table is cut off")
        lengths = np.frombuffer(rows, "<u8").reshape(-1, ROW.size // 8)[:, 0]
        require(float(lengths.sum(dtype=np.float64)) < 1 << 62, "its table has stretches beyond any file")
        ends = start + np.cumsum(lengths, dtype=np.int64)
        return cls(rows, ends - lengths.astype(np.int64)), int(ends[-1]) if len(ends) else start

    def at(self, number: int) -> int:
        """Return the first byte of a stretch.

        Raises:
            IndexError: there is no such row.
        """
        return int(self._at[number])

    def __len__(self) -> int:
        return len(self._at)

    def rows(self, first: int, count: int) -> Iterator[Stretch]:
        """Yield so many stretches from a number on."""
        part = memoryview(self._rows)[first * ROW.size : (first + count) * ROW.size]
        for number, (length, sha256, total) in enumerate(ROW.iter_unpack(part), first):
            yield Stretch(self.at(number), length, sha256.hex(), total)
