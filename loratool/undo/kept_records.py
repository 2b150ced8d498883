"""Restore rows from undo records outside of an undo file: of a live merge, or of a change that is not complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import BinaryIO, Protocol

from ..durable.journal import StoredBytes
from ..files.codecs.codec import Parts, StoredWeight
from .reader import Record


class RecordSource(Protocol):
    """What rows are restored from: an undo file, or `KeptRecords`."""

    @property
    def file(self) -> BinaryIO: ...

    @property
    def weights(self) -> Mapping[str, StoredWeight]: ...

    def records(self, tensor: str) -> list[Record]: ...

    def bytes(self, offset: int, length: int) -> bytes: ...

    def parts_of(self, name: str) -> Parts: ...

    def copied_rows(self, name: str) -> tuple[int, int] | None: ...


class KeptRecords:
    """The undo records of some rows of plain tensors, in memory or in a journal.

    Args:
        records: of each: the tensor, the first row, the row after the last, the record, and `RecordedBlock.sum`.
    """

    def __init__(self, records: Iterable[tuple[str, int, int, bytes | StoredBytes, int]]) -> None:
        self.weights: Mapping[str, StoredWeight] = {}
        self._payloads: list[bytes | StoredBytes] = []  # a record's offset is its number here
        self._records: dict[str, list[Record]] = {}
        for tensor, start, stop, payload, total in records:
            length = payload.nbytes if isinstance(payload, StoredBytes) else len(payload)
            self._records.setdefault(tensor, []).append(Record(len(self._payloads), length, total, start, stop))
            self._payloads.append(payload)

    def records(self, tensor: str) -> list[Record]:
        """Return the records of a tensor's rows, rising."""
        return sorted(self._records.get(tensor, ()), key=lambda record: record.start)

    def bytes(self, offset: int, length: int) -> bytes:
        """Return a record."""
        payload = self._payloads[offset]
        return payload.read() if isinstance(payload, StoredBytes) else payload

    @property
    def file(self) -> BinaryIO:
        """Raise KeyError: no rows are stored unchanged."""
        raise KeyError("file")

    def parts_of(self, name: str) -> Parts:
        """Raise KeyError: no tensor is of codes."""
        raise KeyError(name)

    def copied_rows(self, name: str) -> None:
        """Return None: no rows are stored unchanged."""
