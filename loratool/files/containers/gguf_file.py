"""Read a GGUF file's header: typed fields, and each tensor's type, shape and place; tensors by offset.

The format is in ggml/src/gguf.cpp and gguf-py/gguf/gguf_reader.py of llama.cpp. Most of a header is the list of tokens,
so arrays are skipped when the file is opened, and read on access.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, overload

from ...durable.fileio import read_into
from ...errors import InputError
from ..dtypes import BLOCK_TYPES, GGML_TYPES, TensorSpec
from ..weights_file import WeightsFile

MAGIC = b"GGUF"

GGUF = "gguf"  # a key of `output.CONTAINERS`

VERSIONS = (2, 3)  # 1 had lengths of 32 bits

# A field's type -> struct's letter; the other two types have values of any length.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

STRING, ARRAY = 8, 9

ALIGNMENT, DEFAULT_ALIGNMENT = "general.alignment", 32

DIMENSIONS = 4  # GGML_MAX_DIMS

# No model has more; they bound the memory that a damaged header can take.
MAX_TENSORS, MAX_FIELDS, MAX_NAME, MAX_TEXT, MAX_ITEMS = 1 << 18, 1 << 16, 1 << 16, 1 << 24, 1 << 22

SHORT_ARRAY, SHORT_TEXT = 6, 80  # elements and characters that `described_fields` returns in full

WINDOW = 1 << 20  # bytes of the header in memory

TYPES = {number: name for name, (number, _, _) in GGML_TYPES.items()}

_length = struct.Struct("<Q").unpack_from


class GgufFile(WeightsFile):
    """A GGUF file of version 2 or 3, little-endian; opening reads only the header.

    Attributes:
        version: of the format.
        fields: key -> number, bool, string, or `GgufArray`.
        places: key -> the first byte of its entry in the file, and the byte after it.
        alignment: of each tensor's first byte in the data section.
        data_start: the first byte of the data section.

    Raises:
        InputError: the file breaks the format.
    """

    file_format = GGUF

    def __init__(self, path: Path) -> None:
        self._open(path)
        try:
            head = _read_head(_Cursor(self.file, path, self.nbytes), self.nbytes)
        except BaseException:
            self.file.close()
            raise
        self.version, self.fields, self.places = head.version, head.fields, head.places
        self.alignment, self.data_start, self.specs, self.begin = (
            head.alignment,
            head.data_start,
            head.specs,
            head.begin,
        )
        provenance = self.fields.get("loratool")
        self.metadata = {"loratool": provenance} if isinstance(provenance, str) else None

    @property
    def header(self) -> bytes:
        """Read all bytes before the data section."""
        data = memoryview(bytearray(self.data_start))
        read_into(self.file, data, 0)
        return bytes(data)

    def is_plain(self) -> bool:
        """Return whether the file has only its header, its tensors and zero padding, as llama.cpp writes it.

        Zeros pad every tensor, including the last, to the next multiple of the alignment.
        """
        end = self.data_start
        for name in (*self.specs, None):
            begin = self.nbytes if name is None else self.begin[name]
            gap = memoryview(bytearray(begin - end if begin - end < self.alignment else 0))
            read_into(self.file, gap, end)
            if (-end % self.alignment) != begin - end or any(gap):
                return False
            end = begin + (self.specs[name].nbytes if name is not None else 0)
        return True

    @property
    def architecture(self) -> str | None:
        """Return the name of the model's architecture, the prefix of its fields' keys."""
        value = self.fields.get("general.architecture")
        return value if isinstance(value, str) else None

    def described_fields(self) -> dict[str, str]:
        """Return each field as text; a long text or array only as its length."""
        return {key: _described(value) for key, value in self.fields.items()}

    def entry(self, key: str) -> bytes:
        """Read the bytes of a field: key, type and value."""
        start, stop = self.places[key]
        data = memoryview(bytearray(stop - start))
        read_into(self.file, data, start)
        return bytes(data)


@dataclass(frozen=True)
class _Head:
    """The facts of a header, as the attributes of `GgufFile`."""

    version: int
    fields: dict[str, Any]
    places: dict[str, tuple[int, int]]
    alignment: int
    data_start: int
    specs: dict[str, TensorSpec]
    begin: dict[str, int]


def _read_head(cursor: _Cursor, file_size: int) -> _Head:
    version, tensors, count = _read_counts(cursor)
    fields, places = _read_fields(cursor, count)
    alignment = _alignment(fields, cursor.path)
    tensor_places = _read_tensors(cursor, tensors)
    data_start = -(-cursor.place // alignment) * alignment
    specs, begin = _locate(tensor_places, cursor.path, data_start, alignment, file_size)
    return _Head(version, fields, places, alignment, data_start, specs, begin)


def read_gguf_layout(header: bytes, path: Path) -> tuple[dict[str, TensorSpec], dict[str, int], int]:
    """Return the specs, each tensor's first byte, and the length of the file that begins with this header.

    Errors name `path`.
    """
    head = _read_head(_Cursor(None, path, len(header), window=header), 1 << 63)
    if head.data_start != len(header):
        raise InputError("has a header that does not end where its data begin", culprit=str(path))
    end = max((begin + head.specs[name].nbytes for name, begin in head.begin.items()), default=len(header))
    return head.specs, head.begin, end + -end % head.alignment


class GgufArray(Sequence[Any]):
    """A field's array of numbers or strings, read when an element is first accessed."""

    def __init__(self, path: Path, file: BinaryIO | None, kind: int, count: int, start: int, stop: int) -> None:
        self._path, self._file, self._start, self._stop = path, file, start, stop
        self.kind, self._count = kind, count  # kind: a key of NUMBERS, or STRING

    @cached_property
    def items(self) -> tuple[Any, ...]:
        """The elements; bytes of a string that are not UTF-8 are escaped.

        Raises:
            InputError: there are more than any field has.
        """
        if self._count > MAX_ITEMS:
            message = f"has an array of {self._count} elements, where at most {MAX_ITEMS} belong"
            raise InputError(message, culprit=str(self._path), remedy="download the file again")
        cursor = _Cursor(self._file, self._path, self._stop, self._start)
        if self.kind == STRING:
            return tuple(cursor.text(MAX_TEXT) for _ in range(self._count))
        letter = NUMBERS[self.kind]
        return struct.unpack(f"<{self._count}{letter}", cursor.take(self._stop - self._start))

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return _described(self)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self.items[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _described(value: Any) -> str:
    if isinstance(value, GgufArray):
        kind = "strings" if value.kind == STRING else "numbers"
        return f"[{', '.join(map(_described, value))}]" if len(value) <= SHORT_ARRAY else f"{len(value)} {kind}"
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return text if len(text) <= SHORT_TEXT and text.isprintable() else f"{len(text)} characters"


class _Cursor:
    """Reads a header from front to back, with one window of it in memory.

    Raises:
        InputError: the requested bytes would end after the end of the file.
    """

    def __init__(self, file: BinaryIO | None, path: Path, end: int, start: int = 0, window: bytes = b"") -> None:
        self.file, self.path, self.end = file, path, end
        self.window, self.first, self.offset = window, start, 0  # first: the window's place in the file

    @property
    def place(self) -> int:
        return self.first + self.offset

    def require(self, nbytes: int, what: str) -> None:
        """Raise InputError unless `nbytes` bytes follow."""
        if nbytes > self.end - self.place:
            raise InputError(
                f"is cut off or damaged: {what} at byte {self.place} should take {nbytes} bytes, "
                f"and the file has {self.end}",
                culprit=str(self.path),
                remedy="download the file again",
            )

    def take(self, nbytes: int, what: str = "what stands") -> bytes:
        self.require(nbytes, what)
        if self.offset + nbytes > len(self.window):
            self.first, self.offset = self.place, 0
            data = memoryview(bytearray(min(max(nbytes, WINDOW), self.end - self.first)))
            assert self.file  # without a file, the window has everything
            read_into(self.file, data, self.first)
            self.window = bytes(data)
        self.offset += nbytes
        return self.window[self.offset - nbytes : self.offset]

    def skip(self, nbytes: int, what: str) -> None:
        self.require(nbytes, what)
        self.offset += nbytes

    def skip_strings(self, count: int) -> None:
        """Skip strings; a million take a fraction of a second."""
        self.require(8 * count, f"an array of {count} strings")
        while count:
            window, place, last = self.window, self.offset, len(self.window) - 8
            while count and place <= last:
                place += 8 + _length(window, place)[0]
                count -= 1
            self.skip(place - self.offset, "a string")
            if count:
                self.take(8, "a string's length")
                self.offset -= 8

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self, most: int, what: str = "a string", is_name: bool = False) -> str:
        """Read a string. Bytes that are not UTF-8 are escaped, or are an error in a name."""
        length = self.number("Q")
        self.require(length, what)
        if length > most:
            raise InputError(f"has {what} of {length} bytes, where at most {most} belong", culprit=str(self.path))
        data = self.take(length)
        try:
            return data.decode("utf-8", "strict" if is_name else "backslashreplace")
        except UnicodeDecodeError as error:
            raise InputError(f"has {what} that is not UTF-8: {data[:40]!r}", culprit=str(self.path)) from error


def _read_counts(cursor: _Cursor) -> tuple[int, int, int]:
    """Return the version and the numbers of tensors and fields."""
    path = str(cursor.path)
    if cursor.end < 8 or cursor.take(4) != MAGIC:
        raise InputError("does not begin with GGUF: it is of another format, or cut off", culprit=path)
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        message = "is a big-endian GGUF file, or damaged"
        raise InputError(message, culprit=path, remedy="convert it with gguf_convert_endian.py of gguf-py")
    if version not in VERSIONS:
        remedy = "write it again with llama-quantize of llama.cpp" if version < VERSIONS[0] else "update loratool"
        raise InputError(f"is GGUF version {version}, not 2 or 3", culprit=path, remedy=remedy)
    tensors, fields = cursor.number("Q"), cursor.number("Q")
    if tensors > MAX_TENSORS or fields > MAX_FIELDS:
        message = f"claims {tensors} tensors and {fields} fields: it is damaged"
        raise InputError(message, culprit=path, remedy="download the file again")
    return version, tensors, fields


def _read_fields(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    fields: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        start = cursor.place
        key = cursor.text(MAX_NAME, "a key", is_name=True)
        if key in fields or not key:
            problem = f"has the key {key} twice" if key else "has an empty key"
            raise InputError(problem, culprit=str(cursor.path))
        fields[key] = _read_value(cursor, key)
        places[key] = start, cursor.place
    return fields, places


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.number("I")
    if kind == STRING:
        return cursor.text(MAX_TEXT, f"in {key} a string")
    if kind in NUMBERS:
        return cursor.number(NUMBERS[kind])
    if kind != ARRAY:
        raise InputError(f"gives {key} the unknown type {kind}", culprit=str(cursor.path))
    kind, count = cursor.number("I"), cursor.number("Q")
    start = cursor.place
    if kind == STRING:
        cursor.skip_strings(count)
    elif kind in NUMBERS:
        cursor.skip(count * struct.calcsize(f"<{NUMBERS[kind]}"), f"the array {key}")
    else:
        what = (
            "arrays in an array, which llama.cpp refuses" if kind == ARRAY else f"elements of the unknown type {kind}"
        )
        raise InputError(f"gives {key} {what}", culprit=str(cursor.path))
    return GgufArray(cursor.path, cursor.file, kind, count, start, cursor.place)


def _alignment(fields: dict[str, Any], path: Path) -> int:
    value = fields.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    if type(value) is not int or value <= 0 or value & (value - 1):
        raise InputError(f"has a {ALIGNMENT} of {value!r}, which is not a power of two", culprit=str(path))
    return value


def _read_tensors(cursor: _Cursor, count: int) -> dict[str, tuple[int, TensorSpec]]:
    """Return each tensor's first byte in the data section and its spec, by name."""
    places: dict[str, tuple[int, TensorSpec]] = {}
    for _ in range(count):
        name = cursor.text(MAX_NAME, "a tensor's name", is_name=True)
        if name in places:
            raise InputError(f"is twice in {cursor.path.name}", culprit=name)
        dimensions = cursor.number("I")
        if dimensions > DIMENSIONS:
            raise InputError(f"has {dimensions} dimensions in {cursor.path.name}, more than 4", culprit=name)
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]  # in the file the fastest is first
        number, start = cursor.number("I"), cursor.number("Q")
        if max(shape, default=0) >> 62 or start >> 62:
            raise InputError(
                f"has a size or a place in {cursor.path.name} that no file can have: {shape}", culprit=name
            )
        if number not in TYPES:
            message = f"is of the unknown ggml type {number} in {cursor.path.name}"
            raise InputError(message, culprit=name, remedy="quantize the model again with llama-quantize of llama.cpp")
        kind, row = TYPES[number], shape[-1] if shape else 1
        if row % BLOCK_TYPES.get(kind, (1, 0))[0]:
            message = (
                f"has rows of {row} numbers in {cursor.path.name}, and {kind} has blocks of {BLOCK_TYPES[kind][0]}"
            )
            raise InputError(message, culprit=name)
        places[name] = start, TensorSpec(kind, shape)
    return places


def _locate(
    places: dict[str, tuple[int, TensorSpec]], path: Path, data_start: int, alignment: int, file_size: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Return the specs and first bytes in file order; raise InputError for tensors outside the file or overlapping."""
    specs: dict[str, TensorSpec] = {}
    begin: dict[str, int] = {}
    end = 0
    for start, nbytes, name in sorted(((s, spec.nbytes, n) for n, (s, spec) in places.items()), key=itemgetter(0, 1)):
        spec = places[name][1]
        if start % alignment or start < end:
            problem = f"which is not a multiple of {alignment}" if start % alignment else "where another tensor is"
            raise InputError(f"{path.name} puts it at byte {start} of the data, {problem}", culprit=name)
        end = start + nbytes
        if data_start + end > file_size:
            long = f"is {spec}" if nbytes < 1 << 62 else "has more bytes than any file"
            message = f"{long} and would end behind {path.name}, which has {file_size} bytes: it is cut off or damaged"
            raise InputError(message, culprit=name, remedy="download the file again")
        specs[name], begin[name] = spec, data_start + start
    return specs, begin
