"""Compress and decompress streams in bounded memory: Zstandard (RFC 8878) and zlib (RFC 1950).

Python has Zstandard since 3.14; before, PyPI's backports.zstd, of the extra `delta`, is the same module. A frame's
declared size is checked before a byte of it is decompressed, and the size that comes out afterwards.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from ...errors import InputError, MachineError, install_remedy

ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of a frame

HEAD = 18  # bytes of the longest header of a frame

PIECE = 1 << 20  # bytes that are decompressed at a time

LEVEL = 1  # of slime and SkyRL


def optional_module(names: Iterable[str], what: str) -> Any:
    """Return the first of some modules that is installed.

    Args:
        what: what needs it, for the error.

    Raises:
        MachineError: none is; the extra `delta` has them.
    """
    for name in names:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise MachineError(f"{what} needs a package that is not installed", remedy=install_remedy("delta"))


def zstd_module() -> Any:
    """Return Python's module of Zstandard, or its backport.

    Raises:
        MachineError: neither is installed.
    """
    return optional_module(("compression.zstd", "backports.zstd"), "Zstandard, which this patch is compressed by,")


def frame_size(head: bytes, culprit: str) -> int | None:
    """Return the size that the header of a Zstandard frame declares; None if it declares none.

    Args:
        head: the first HEAD bytes of the frame, or all if it has fewer.

    Raises:
        InputError: it is no frame, or needs a dictionary.
    """
    zstd = zstd_module()
    try:
        info = zstd.get_frame_info(head)
    except zstd.ZstdError as error:
        raise InputError("is not a frame of Zstandard", culprit=culprit) from error
    if info.dictionary_id:
        raise InputError("is compressed with a dictionary, which is not in the patch", culprit=culprit)
    size: int | None = info.decompressed_size
    return size


def decompressed(parts: Iterable[memoryview], nbytes: int, culprit: str) -> Iterator[bytes]:
    """Yield the bytes of one frame of Zstandard, or of one stream of zlib, in pieces of at most PIECE.

    Args:
        parts: the compressed bytes in order; each may be overwritten once the next is asked for.
        nbytes: how many bytes come out.

    Raises:
        InputError: it is damaged, another number of bytes comes out, or bytes follow it.
    """
    iterator = iter(parts)
    first = bytes(next(iterator, b""))
    while len(first) < HEAD and (more := next(iterator, None)) is not None:
        first += more
    opened: _Zstd | _Zlib
    if first[:4] == ZSTD:
        declared = frame_size(first[:HEAD], culprit)
        if declared is not None and declared != nbytes:
            raise InputError(f"declares {declared} bytes instead of {nbytes}", culprit=culprit)
        opened, failure = _Zstd(), zstd_module().ZstdError
    else:
        opened, failure = _Zlib(), zlib.error
    done = 0
    try:
        for part in _after(first, iterator):
            for piece in opened.pieces(part):
                done += len(piece)
                if done > nbytes:
                    raise InputError(f"has more than the {nbytes} bytes that it should have", culprit=culprit)
                yield piece
    except (failure, EOFError) as error:
        raise InputError(f"is damaged: {error}", culprit=culprit) from error
    if done < nbytes or not opened.ended:
        raise InputError(f"ends after {done} of {nbytes} bytes", culprit=culprit)
    if opened.rest:
        raise InputError("is followed by other bytes", culprit=culprit)


def _after(first: bytes, others: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    yield first
    yield from others


class _Zstd:
    """A frame of Zstandard that is being decompressed."""

    def __init__(self) -> None:
        self._stream = zstd_module().ZstdDecompressor()
        self.rest = False  # bytes followed the frame

    @property
    def ended(self) -> bool:
        return bool(self._stream.eof)

    def pieces(self, part: bytes | memoryview) -> Iterator[bytes]:
        if self.ended:
            self.rest |= bool(len(part))
            return
        piece = self._stream.decompress(part, PIECE)
        while piece or not (self._stream.needs_input or self._stream.eof):
            if piece:
                yield piece
            if self._stream.eof:
                break
            piece = self._stream.decompress(b"", PIECE)
        self.rest |= bool(self._stream.unused_data)


class _Zlib:
    """A stream of zlib that is being decompressed."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj()
        self.rest = False

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def pieces(self, part: bytes | memoryview) -> Iterator[bytes]:
        if self.ended:
            self.rest |= bool(len(part))
            return
        left: bytes | memoryview = part
        while piece := self._stream.decompress(left, PIECE):
            yield piece
            left = self._stream.unconsumed_tail
        self.rest |= bool(self._stream.unused_data)


def compressed(pieces: Iterable[bytes | memoryview], nbytes: int, level: int = LEVEL) -> Iterator[bytes]:
    """Yield a frame of Zstandard that declares its size. The library's version decides on its bytes.

    Args:
        nbytes: the bytes of all pieces.
    """
    stream = zstd_module().ZstdCompressor(level=level)
    stream.set_pledged_input_size(nbytes)
    for piece in pieces:
        if data := stream.compress(piece):
            yield data
    yield stream.flush()
