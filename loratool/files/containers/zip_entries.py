"""Locate the entries of zip archives that hold tensors uncompressed, without trusting any length in them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipInfo

from ...durable.fileio import read_into
from ...errors import InputError, LoratoolError
from .torch_pickle import MAX_PICKLE

MAX_PART = 1 << 24  # bytes of a header read at once: a zip's list of 150,000 entries; it takes 20 times the memory

CODED = 1 | 32 | 64  # flags of a zip's entry: encrypted, a patch of other data, strongly encrypted


class FileRange(io.RawIOBase):
    """A range of a file as a stream."""

    def __init__(self, file: BinaryIO, begin: int, nbytes: int) -> None:
        self._source, self._begin, self._nbytes, self._at = file, begin, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        if self._at < 0:
            raise ValueError("a place before the first byte")
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = memoryview(buffer).cast("B")[: max(0, self._nbytes - self._at)]
        read_into(self._source, part, self._begin + self._at)
        self._at += len(part)
        return len(part)


class _Bounded(io.BufferedReader):
    """A stream whose reads never allocate more than a header needs, even if the file claims a larger length."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_PART:
            raise ValueError(f"a header with one part of {size} bytes")
        return super().read(1 << 17 if size is None or size < 0 else size)  # zipfile reads the end without a size

    def readline(self, size: int | None = -1) -> bytes:
        return super().readline(MAX_PICKLE)


def bounded_stream(file: BinaryIO, begin: int, nbytes: int) -> io.BufferedReader:
    """Return a range of a file as a stream for zipfile or a pickle."""
    return _Bounded(FileRange(file, begin, nbytes))


@contextmanager
def damage_named(path: Path, kind: str = "a file of torch.save") -> Iterator[None]:
    """Convert every error of the block into an InputError that names the file: damage can cause any error."""
    try:
        yield
    except (LoratoolError, OSError):
        raise
    except Exception as error:
        why = (str(error) or type(error).__name__)[:200]
        raise InputError(f"is damaged, cut off or not {kind}: {why}", culprit=str(path)) from error


def is_coded(entry: ZipInfo) -> bool:
    """Return whether an entry is compressed or encrypted."""
    return bool(entry.compress_type or entry.flag_bits & CODED)


def entry_place(entry: ZipInfo, read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """Return the first byte and the length of an entry that is not coded.

    The list at the archive's end names the place of the entry's own header, whose extra field may differ.

    Args:
        read: returns the bytes of the archive at (offset, count).

    Raises:
        ValueError: list and header contradict each other.
    """
    header = read(entry.header_offset, 30)
    if header[:4] != b"PK\x03\x04" or entry.compress_size != entry.file_size or entry.external_attr & 16:
        name = entry.filename
        raise ValueError(f"{name} is not where the list of entries puts it, has two lengths or is a folder")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:])), entry.file_size
