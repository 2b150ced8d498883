"""The journal beside a partial output, from which `--resume` continues a run that died.

    head.json      inputs, options and output by name: `--resume` with any others is refused
    0, 1, ...      the records of each rank

A record marks one item of the plan as finished. It has the item's number, where it wrote, the digest of the bytes it
wrote (sums of its pages), and its results. Bytes among the results, such as undo records, follow the record's text:
they stay in the journal until the undo file is written, and rank 0 reads the results of the other ranks here.

    20 bytes       `lora`, bytes of the text (u32), bytes of data (u64), CRC-32 of both (u32), little-endian
    text           JSON
    data

A kill may truncate the last record; an item without a record is done again. An item's results depend on the inputs
alone, so a record is valid whichever run wrote it. The bytes it wrote may be lost, so the digest verifies them.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, MachineError, UsageError, brief
from . import disk
from .descriptors import kept_open
from .fileio import open_for_reading, open_scratch, read_into, write_at, write_file
from .partial import journal_head, journal_path

VERSION = 2  # of the layout, of what results mean, and of how a plan is divided into items

HEAD = struct.Struct("<4sIQI")  # of a record

MARK = b"lora"

LONGEST = 1 << 28  # bytes of a record's text

ANEW = "leave out --resume to begin again"

SCALARS = (type(None), bool, int, float, str)

Place = tuple[str, int, int]  # what an item writes: the file's name, the first byte there, the number of bytes


@dataclass(frozen=True)
class StoredBytes:
    """Bytes in a journal."""

    file: BinaryIO
    offset: int
    nbytes: int

    def read(self) -> bytes:
        data = bytearray(self.nbytes)
        read_into(self.file, memoryview(data), self.offset)
        return bytes(data)


@dataclass(frozen=True)
class FinishedRecord:
    """The record of a finished item: what it wrote, and where its results are."""

    place: Place
    digest: str
    file: BinaryIO
    offset: int
    nbytes: int  # of the text


class Journal:
    """The journal of an output. This process writes the records of one rank.

    Args:
        path: the output's.
        kinds: name -> the dataclass, without slots, of results that a record may have.
    """

    def __init__(self, path: Path, kinds: Mapping[str, type], rank: int = 0) -> None:
        self.path, self._folder, self._kinds, self._rank = path, journal_path(path), kinds, rank
        self._opened = ExitStack()
        self._file: BinaryIO | None = None
        self._end = 0
        self.finished: dict[int, FinishedRecord] = {}  # by item: those of runs that died, and those read by `read_all`

    def begin(self, head: Mapping[str, Any] | None) -> None:
        """Create a journal unless this run resumes one. A journal without a head cannot be resumed."""
        if journal_head(self.path).exists():
            return
        disk.make_folder(self._folder)
        if head is not None:
            new = self._folder / "head"  # renamed when it is complete
            write_file(new, json.dumps({"version": VERSION, **head}, sort_keys=True).encode())
            disk.rename(new, journal_head(self.path))

    def open(self, is_complete: bool = False) -> None:
        """Read the records of runs that died, and open this rank's file to add records.

        Args:
            is_complete: each record was synced before the next was begun, so that no record follows a broken one.

        Raises:
            InputError: one does.
        """
        own_file = self.file_of(self._rank)
        for path in sorted(self._folder.iterdir()):
            if path.name.isdecimal():
                end = self._read(path, is_checked=False)
                if is_complete and _has_record(path, end):
                    raise InputError("is damaged", culprit=str(path), remedy="bring it back as it was")
                self._end = end if path == own_file else self._end
        self._file = self._opened.enter_context(disk.open_file(own_file, "r+b" if own_file.exists() else "w+b"))
        disk.truncate(self._file, self._end)

    def open_nameless(self) -> None:
        """Open a temporary file beside the output for the records; no run can resume from it."""
        self._file = self._opened.enter_context(open_scratch(self._folder.parent))

    def read_all(self, ranks: int) -> None:
        """Read the records of `ranks` ranks, which have opened the journal and synced it."""
        for rank in range(ranks):  # by name: another machine may still see an older listing of the folder
            self._read(self.file_of(rank), is_checked=True)

    def read_copy(self, path: Path) -> None:
        """Read the records in a copy of another rank's file. The copy stays open."""
        self._read(path, is_checked=False)

    def file_of(self, rank: int | str) -> Path:
        """Return the path of a rank's records."""
        return self._folder / str(rank)

    def _read(self, path: Path, is_checked: bool) -> int:
        """Read the records of a file and return where they end. The last record of an item counts."""
        opened = self._opened.enter_context(open_for_reading(path))
        file = kept_open(opened, partial(open_for_reading, path))
        place, size = 0, os.fstat(file.fileno()).st_size
        with suppress(InputError):  # another rank may be truncating its own file
            while place + HEAD.size <= size:
                head = memoryview(bytearray(HEAD.size))
                read_into(file, head, place)
                mark, length, data, crc = HEAD.unpack(head)
                start, end = place + HEAD.size, place + HEAD.size + length + data
                if mark != MARK or length > LONGEST or end > size or not (is_checked or _crc(file, start, end) == crc):
                    break
                parsed = self._text(file, start, length)
                if parsed is None:
                    break
                self.finished[parsed["item"]] = FinishedRecord(
                    tuple(parsed["place"]), parsed["digest"], file, start, length
                )
                place = end
        return place

    @staticmethod
    def _text(file: BinaryIO, offset: int, length: int) -> Any:
        """Return the parsed text of a record; None if it is not a record."""
        text = memoryview(bytearray(length))
        read_into(file, text, offset)
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(bytes(text))
            name, first, nbytes = record["place"]
            types = [(record["item"], int), (record["digest"], str), (name, str), (first, int), (nbytes, int)]
            if all(isinstance(value, kind) for value, kind in types):
                return record
        return None

    def add(self, item: int, place: Place, digest: str, results: Any) -> Any:
        """Add the record of a finished item, and return its results as `results` does."""
        assert self._file, "it is open"
        data: list[bytes | memoryview] = []
        record = {"item": item, "place": place, "digest": digest, "results": self._encode(results, data)}
        text = json.dumps(record, separators=(",", ":")).encode()
        body = b"".join((text, *data))
        start = self._end + HEAD.size
        head = HEAD.pack(MARK, len(text), len(body) - len(text), zlib.crc32(body))
        write_at(self._file, memoryview(head + body), self._end)
        self._end = start + len(body)
        return self._decode(record["results"], _Data(self._file, start + len(text))) if data else results

    def results(self, item: int) -> Any:
        """Return the results of a finished item, with bytes as `StoredBytes`."""
        record = self.finished.get(item)
        if record is None:
            raise MachineError("a rank has ended before its work", culprit=str(self._folder), remedy="add --resume")
        parsed = self._text(record.file, record.offset, record.nbytes)
        try:
            return self._decode(parsed["results"], _Data(record.file, record.offset + record.nbytes))
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            message = "is damaged, or written by another version of loratool"
            raise InputError(message, culprit=str(self._folder), remedy=ANEW) from error

    def sync(self) -> None:
        """Wait until the records of this rank are on the disk."""
        if self._file:
            disk.sync(self._file)

    def close(self) -> None:
        self._opened.close()

    def _encode(self, value: Any, data: list[bytes | memoryview]) -> Any:
        """Return a result as JSON values; its bytes are appended to `data`."""
        kind, values = value.__class__, value
        if kind in SCALARS:
            return value
        if kind in (bytes, memoryview):
            data.append(value)
            return {"bytes": len(value)}
        if kind is Counter:
            return {"Counter": dict(value)}
        if kind not in (list, tuple):
            if self._kinds.get(kind.__name__) is not kind:
                raise TypeError(f"{kind.__name__} is no kind of result")
            values = value.__dict__.values()
        return {kind.__name__: [each if each.__class__ in SCALARS else self._encode(each, data) for each in values]}

    def _decode(self, value: Any, data: _Data) -> Any:
        """Return the result that `_encode` encoded."""
        if value.__class__ in SCALARS:
            return value
        ((name, content),) = value.items()
        if name == "bytes":
            return data.take(content)
        if name == "Counter":
            return Counter(content)
        values = [each if each.__class__ in SCALARS else self._decode(each, data) for each in content]
        if name in ("list", "tuple"):
            return values if name == "list" else tuple(values)
        return self._kinds[name](*values)


@dataclass
class _Data:
    """The data of a record; results take their bytes from it in order."""

    file: BinaryIO
    offset: int

    def take(self, nbytes: int) -> StoredBytes:
        self.offset += nbytes
        return StoredBytes(self.file, self.offset - nbytes, nbytes)


def _has_record(path: Path, begin: int) -> bool:
    """Return whether there is a whole record somewhere behind a byte."""
    with open_for_reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        rest = bytearray(size - begin)
        read_into(file, memoryview(rest), begin)
        place = rest.find(MARK)
        while 0 <= place <= len(rest) - HEAD.size:
            _, length, data, crc = HEAD.unpack_from(rest, place)
            end = place + HEAD.size + length + data
            is_one = 0 < length <= LONGEST and end <= len(rest)  # lost sectors are zeros, as is the sum of no bytes
            if is_one and zlib.crc32(memoryview(rest)[place + HEAD.size : end]) == crc:
                return True
            place = rest.find(MARK, place + 1)
    return False


def _crc(file: BinaryIO, start: int, end: int) -> int:
    crc, buffer = 0, memoryview(bytearray(min(1 << 20, end - start)))
    for first in range(start, end, 1 << 20):
        part = buffer[: end - first]
        read_into(file, part, first)
        crc = zlib.crc32(part, crc)
    return crc


def read_head(path: Path) -> dict[str, Any] | None:
    """Return the head of an output's journal; None without one.

    Raises:
        UsageError: it cannot be read.
    """
    place = journal_head(path)
    if not place.exists():
        return None
    with suppress(OSError, ValueError, RecursionError):
        head = json.loads(place.read_bytes())
        if isinstance(head, dict) and head.get("version") == VERSION:
            return head
    raise UsageError(
        "is damaged, or written by another version of loratool", culprit=str(journal_path(path)), remedy=ANEW
    )


def require_same(path: Path, head: Mapping[str, Any]) -> bool:
    """Return whether an output has a journal to resume from.

    Args:
        head: of this run: kind -> name -> JSON value.

    Raises:
        UsageError: the journal cannot be read, or is of other inputs or options; the message names them.
    """
    former_head = read_head(path)
    if former_head is None:
        return False
    for kind, current in json.loads(json.dumps(head)).items():
        former = former_head.get(kind)
        former = former if isinstance(former, dict) else {}
        for name in sorted({**current, **former}):
            if former.get(name) != current.get(name):
                raise UsageError(
                    f"is of a run with other {kind}: {_difference(name, former.get(name), current.get(name))}",
                    culprit=str(journal_path(path)),
                    remedy=f"repeat the former call, or {ANEW}",
                )
    return True


def _difference(name: str, was: Any, now: Any) -> str:
    if isinstance(was, list) or isinstance(now, list):
        return f"{name} {'is new' if was is None else 'is no input now' if now is None else 'has changed since'}"
    return f"{name} was {_described(was)}, and is {_described(now)}"


def _described(value: Any) -> str:
    return "not given" if value is None else value if isinstance(value, str) else brief(value)
