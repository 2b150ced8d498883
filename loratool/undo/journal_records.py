"""Restore rows from the undo records of a change that is not complete: they are still in its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Protocol

from ..durable.fileio import read_into
from ..files.codecs.codec import Parts, StoredWeight
from .reader import Record


class RecordSource(Protocol):
    """What rows are restored from: an undo file, or a journal."""

    @property
    def file(self) -> BinaryIO: ...

    @property
    def weights(self) -> Mapping[str, StoredWeight]: ...

    def records(self, tensor: str) -> list[Record]: ...

    def bytes(self, offset: int, length: int) -> bytes: ...

    def parts_of(self, name: str) -> Parts: ...

    def copied_rows(self, name: str) -> tuple[int, int] | None: ...


class JournalRecords:
    """The undo records of some rows of plain tensors.

    Args:
        results: of each run of rows: the tensor, the first row, the row after the last, and its `RecordedBlock`.
    """

    def __init__(self, results: Sequence[Sequence[Any]]) -> None:
        self.weights: Mapping[str, StoredWeight] = {}
        self._records: dict[str, list[Record]] = {}
        for tensor, start, stop, (block,) in results:
            stored, self.file = block.payload, block.payload.file
            self._records.setdefault(tensor, []).append(Record(stored.offset, stored.nbytes, block.sum, start, stop))

    def records(self, tensor: str) -> list[Record]:
        """Return the records of a tensor's rows, rising."""
        return sorted(self._records.get(tensor, ()), key=lambda record: record.start)

    def bytes(self, offset: int, length: int) -> bytes:
        """Return the bytes of a record."""
        data = bytearray(length)
        read_into(self.file, memoryview(data), offset)
        return bytes(data)

    def parts_of(self, name: str) -> Parts:
        """Raise KeyError: no tensor is of codes."""
        raise KeyError(name)

    def copied_rows(self, name: str) -> None:
        """Return None: no rows are stored unchanged."""
