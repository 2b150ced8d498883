"""Read and write a file of payload, blobs and an index: an undo file or a patch.

    first line    `loratool KIND VERSION`: the kind of file, and the version of its layout
    payload       stretches, one after the other
    blobs         pieces of data whose places are in the index, each with its sha256
    index         a JSON object, in ASCII with sorted keys and no spaces
    last 56       the index's offset and length, little-endian u64, its sha256, then the kind's eight letters

The reader trusts nothing, since anybody can have written the file: blobs and payload must tile it without gap or
overlap, every hash is checked, and no size is believed before it is compared with that of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from ...durable.descriptors import kept_open
from ...durable.fileio import file_length, open_for_reading, read_into, write_at
from ...errors import InputError, MachineError
from .file_kinds import FIRST, kind_of
from .safetensors_file import memory_of, parse_json

MOST_INDEX = 1_000_000_000  # bytes of memory, about, that an index may take: enough for 300,000 changed tensors

MOST_BLOBS = 1 << 28  # bytes of all blobs; a trillion weights need a fifth of it

SMALL = 1 << 22  # bytes of an index that is parsed without a check of its memory

TRAILER = struct.Struct("<QQ32s8s")  # the index's offset, length and sha256, the kind's letters

_WRONG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error, EOFError)


@dataclass(frozen=True)
class FileKind:
    """A kind of indexed file, and the version of its layout that this loratool writes and reads."""

    mark: bytes  # before the version
    version: int
    end: bytes  # eight letters
    noun: str
    remedy: str  # for a damaged file
    other_version: str  # the remedy for one of another version

    @property
    def first_line(self) -> bytes:
        return self.mark + f"{self.version}\n".encode()


def require(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def are_hashes(values: object, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in values)
    )


def is_place(name: str) -> bool:
    """Return whether a text is, on every system, the name of a file in the output or a component's folder."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and not set(part) & set("\\:\0") for part in parts)
    is_text = not any("\ud800" <= letter <= "\udfff" for letter in name)
    return plain and is_text and len(parts) <= 2 and len(name.encode()) <= 255


def check_extents(extents: Iterable[tuple[int, int]], start: int, end: int) -> None:
    """Raise ValueError unless parts of a file, as (first byte, length), tile the bytes start:end."""
    done = start
    for first, length in sorted(extents):
        require(first == done, f"nothing, or two records, are at byte {done}")
        done += length
    require(done == end, f"nothing, or two records, are at byte {done}")


def is_readable(text: bytes, blobs: int) -> bool:
    """Return whether a reader accepts a file with this index and `blobs` bytes of blobs."""
    return memory_of(text) <= MOST_INDEX and blobs <= MOST_BLOBS


def index_text(index: Mapping[str, Any]) -> bytes:
    return json.dumps(index, sort_keys=True, separators=(",", ":")).encode()


def packer() -> ModuleType:
    """Return the module that compresses text in blobs: bzip2 has one library, whose versions write the same bytes.

    Raises:
        MachineError: this Python was built without it.
    """
    try:
        import bz2
    except ImportError as error:
        what = "this Python has no module bz2, by which texts are kept"
        raise MachineError(what, remedy="use a Python that was built with libbz2") from error
    return bz2


def write_end(
    target: BinaryIO, position: int, index: dict[str, Any], blobs: Iterable[tuple[Any, Any]], kind: FileKind
) -> int:
    """Write the blobs from `position` on, then the index and the last bytes; return the file's size.

    Args:
        blobs: where each blob's content is in the index, as (mapping or list, key); its place replaces it there.
    """
    for owner, key in blobs:
        data = owner[key]
        owner[key] = [position, len(data), hashlib.sha256(data).hexdigest()]
        write_at(target, memoryview(data), position)
        position += len(data)
    text = index_text(index)
    end = TRAILER.pack(position, len(text), hashlib.sha256(text).digest(), kind.end)
    write_at(target, memoryview(text + end), position)
    return position + len(text) + len(end)


class IndexedFile:
    """An indexed file. Opening it reads the index; `checked` then reads what the index names.

    Raises:
        InputError: the file is damaged, forged or of another kind or version.
    """

    def __init__(self, path: Path, kind: FileKind) -> None:
        self.path, self.kind = path, kind
        self.file: BinaryIO = kept_open(open_for_reading(path), partial(open_for_reading, path))
        self._extents: list[tuple[int, int]] = []  # (first byte, length) of blobs
        self._held = 0  # bytes of these
        self._unpacked = 0  # bytes of those that are compressed, before that
        with self.checked():
            self.index, self._end = self._read_index()

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Close the file if the block fails, and name it in an InputError for whatever a wrong index raises."""
        try:
            yield
        except _WRONG as error:
            self.file.close()
            raise InputError(
                f"is cut off or damaged: {error}", culprit=str(self.path), remedy=self.kind.remedy
            ) from error
        except BaseException:
            self.file.close()
            raise

    def _read_index(self) -> tuple[dict[str, Any], int]:
        """Read the index, and return it with its first byte in the file."""
        kind = self.kind
        self.nbytes = size = file_length(self.file)
        start = self.bytes(0, min(size, len(kind.first_line)))
        if start[: len(kind.mark)] != kind.mark or size < len(kind.first_line) + TRAILER.size:
            raise self._of_another_kind()
        version = start[len(kind.mark) : -1].decode(errors="replace")
        if start[-1:] != b"\n" or version != str(kind.version):
            message = f"is {kind.noun} of version {version}, not {kind.version}"
            raise InputError(message, culprit=str(self.path), remedy=kind.other_version)
        first, length, digest, end = TRAILER.unpack(self.bytes(size - TRAILER.size, TRAILER.size))
        if end != kind.end or first < len(kind.first_line) or first + length + TRAILER.size != size:
            raise ValueError("its end is missing")
        require(2 * length <= MOST_INDEX, "its index is larger than any")
        text = self.bytes(first, length)
        require(hashlib.sha256(text).digest() == digest, "its index does not match its hash")
        if length > SMALL and text.count(b"[") + text.count(b"{") > length // 6:
            raise ValueError("its index is nested too deeply")  # each takes a hundred bytes of memory
        index = parse_json(text, self.path, most=MOST_INDEX)
        require(index["version"] == kind.version, "its index is of another version")
        return index, first

    def _of_another_kind(self) -> InputError:
        found = kind_of(self.bytes(0, min(self.nbytes, FIRST)), self.path.name)
        if found is None or found.what.startswith(self.kind.noun):
            return InputError(f"is not {self.kind.noun}", culprit=str(self.path))
        what = f"is {found.what.removesuffix(', not weights')}, not {self.kind.noun}"
        return InputError(what, culprit=str(self.path), remedy=found.remedy)

    def blob(self, place: Sequence[Any]) -> bytes:
        """Read a blob.

        Raises:
            ValueError: its place is wrong, or the data does not match its hash.
        """
        first, length, digest = place
        require(is_count(first) and is_count(length) and are_hashes([digest], 1), "no place of a header or a side file")
        require(first + length <= self.nbytes, "a header or a side file ends behind the file")
        self._extents.append((first, length))
        self._held += length  # counted before it is read: a thousand names could share one place
        require(self._held <= MOST_BLOBS, "its headers and side files are larger than any")
        data = self.bytes(first, length)
        require(hashlib.sha256(data).hexdigest() == digest, "a header or a side file does not match its hash")
        return data

    def packed_blob(self, what: str, place: Sequence[Any], nbytes: int, most: int) -> bytes:
        """Read a blob that was compressed from `nbytes` bytes, at most `most`. Errors name it as `what`.

        Raises:
            ValueError: as `blob`, or it is of another length.
        """
        require(is_count(nbytes) and nbytes <= most, f"{what} is larger than any")
        self._unpacked += nbytes
        require(self._unpacked <= MOST_BLOBS, "its headers and side files are larger than any")
        unpacked, packed = packer().BZ2Decompressor(), self.blob(place)
        try:
            data: bytes = unpacked.decompress(packed, nbytes + 1)
        except OSError as error:
            raise ValueError(f"{what} is damaged") from error
        require(len(data) == nbytes and unpacked.eof and not unpacked.unused_data, f"{what} does not match its hash")
        return data

    def require_tiled(self, payload: int) -> None:
        """Raise ValueError unless `payload` bytes after the first line, and the blobs, fill the file to its index."""
        start = len(self.kind.first_line)
        check_extents([(start, payload), *self._extents], start, self._end)

    def bytes(self, first: int, length: int) -> bytes:
        require(first + length <= self.nbytes, "it ends too early")
        buffer = memoryview(bytearray(length))
        read_into(self.file, buffer, first)
        return bytes(buffer)

    def close(self) -> None:
        self.file.close()
