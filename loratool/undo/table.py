"""Read the table of an undo file, and hash its payload.

The table has a row for each stretch of the payload, in the payload's order.

A stretch is a record of some rows of W, or bytes of a tensor of the base that are stored unchanged. A row has 16 bytes,
little-endian: the stretch's length (u64), and the sum of the rows of W' (u64; 0 if the stretch is not a record). A
stretch begins where the one before it ends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..files.containers.indexed_file import require
from ..files.digest import pieces_of
from ..files.dtypes import TensorSpec
from ..files.weights_file import PlacedTensors, read_parts
from ..numerics.passes.hashes import sha256_each

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np
    import numpy.typing as npt

ROW = struct.Struct("<QQ")


def hash_payload(path: Path, file: BinaryIO, start: int, nbytes: int) -> bytes:
    """Return the hashes of the pieces (`files.digest`) of a payload, of 32 bytes each, one after the other.

    Args:
        start: the payload's first byte in the file.
    """
    spec = TensorSpec("U8", (nbytes,))
    payload = PlacedTensors(path, file, {"payload": spec}, {"payload": start})
    pieces, found = pieces_of(spec), list[str]()
    for first in range(0, len(pieces), 2):
        found += sha256_each([read_parts(payload, "payload", *place) for place in pieces[first : first + 2]])
    return bytes.fromhex("".join(found))


@dataclass(frozen=True)
class Stretch:
    """A stretch of the payload.

    Attributes:
        offset: of its first byte in the undo file.
        length: in bytes.
        sum: `fileio.word_sum` of the bytes of W'; 0 if it is not a record.
    """

    offset: int
    length: int
    sum: int


class UndoTable:
    """The rows of a table.

    Args:
        rows: the bytes in the file.
        starts: the first byte of each stretch.
    """

    def __init__(self, rows: bytes, starts: npt.NDArray[np.int64]) -> None:
        self._rows, self._at = rows, starts

    @classmethod
    def one_after_another(cls, rows: bytes, start: int) -> tuple[UndoTable, int]:
        """Return a table whose first stretch begins at `start`, and the byte after its last stretch.

        Raises:
            ValueError: the size is not that of a table, or a length is impossible.
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
        """Yield `count` stretches from the number `first` on."""
        part = memoryview(self._rows)[first * ROW.size : (first + count) * ROW.size]
        for number, (length, total) in enumerate(ROW.iter_unpack(part), first):
            yield Stretch(self.at(number), length, total)
