"""Files that are elsewhere: they are read by ranges, ahead of the reader, and from one state of the file.

An empty file stands in for each, under its name, so that folders can be listed and names be found as if the files were
here. Only this process knows where the bytes are: no folder that it reads can lead it to another machine.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future

UNIT = 1 << 18  # bytes: most headers are shorter

LONGEST = 32  # units of a request

AHEAD = 4  # requests of this length that a reader from front to back is ahead of

KEPT = 768  # units in memory, of all files

AT_ONCE = 8  # requests


class RemoteBytes(Protocol):
    """Where the bytes of a file are."""

    name: str  # for messages
    nbytes: int
    identity: str  # differs for another content

    def fetch(self, first: int, end: int) -> bytes:
        """Return the bytes first:end.

        Raises:
            InputError: the file was replaced or removed since, or may not be read.
            MachineError: it was not reached, or the answers have another length.
        """

    def require_same(self) -> None:
        """Raise InputError if the file was replaced or removed."""


_sources: dict[str, RemoteBytes] = {}

opened: set[str] = set()  # names of the files that were opened, since it was last cleared


def stand_in(path: Path, source: RemoteBytes) -> None:
    """Put an empty file in the place of a source, in this process."""
    _sources[os.path.realpath(path)] = source


def forget_stand_ins() -> None:
    """Forget what paths stand in for; files that are open stay so."""
    _sources.clear()


def source_of(path: Path) -> RemoteBytes | None:
    """Return what a path, or what it links to, stands in for; None for any other file."""
    return _sources.get(os.path.realpath(path)) if _sources else None


class RemoteFile(io.RawIOBase):
    """A file that is elsewhere, open for reading. It has no descriptor."""

    def __init__(self, source: RemoteBytes) -> None:
        self.source, self.name, self._place = source, source.name, 0
        opened.add(source.name)

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from a byte on, as far as the file goes, and return how many bytes that are."""
        nbytes = max(0, min(len(buffer), self.source.nbytes - offset))
        for done in range(0, nbytes, LONGEST * UNIT):
            _blocks().read(self.source, buffer[done : min(nbytes, done + LONGEST * UNIT)], offset + done)
        return nbytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.source.nbytes}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        done = self.read_at(memoryview(buffer).cast("B"), self._place)
        self._place += done
        return done


Request = tuple["Future[bytes]", int]  # and its first unit


REMOTE: Any = RemoteFile  # to compare with a file's class: `isinstance` takes calls for a class of io


def source_behind(file: object) -> RemoteBytes | None:
    """Return where the bytes of an open file are if it is a `RemoteFile`; None for any other."""
    return file.source if isinstance(file, RemoteFile) else None


class _Blocks:
    """The units of files that were read last or are being read, and the threads that read them."""

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor  # it loads `logging`, which most runs can do without

        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE, "elsewhere")
        # (file, unit) -> the request that it is of, and the first unit of that
        self._kept: OrderedDict[tuple[RemoteBytes, int], Request] = OrderedDict()

    def read(self, source: RemoteBytes, buffer: memoryview, offset: int) -> None:
        first, last = offset // UNIT, (offset + len(buffer) - 1) // UNIT
        with self._lock:
            self._ask(source, first, last + 1, LONGEST)
            self._ask_ahead(source, first, last)
            found = [(number, *self._kept[source, number]) for number in range(first, last + 1)]
            for number in range(first, last + 1):
                self._kept.move_to_end((source, number))
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        for number, request, begin in found:
            data = memoryview(request.result())[(number - begin) * UNIT :][:UNIT]
            start = max(offset, number * UNIT)
            part = data[start - number * UNIT :][: offset + len(buffer) - start]
            buffer[start - offset : start - offset + len(part)] = part

    def _ask(self, source: RemoteBytes, first: int, end: int, longest: int) -> None:
        """Request the units first:end that were not requested, at most so many together."""
        for start, stop in self._missing(source, first, end, longest):
            request = self._pool.submit(source.fetch, start * UNIT, min(stop * UNIT, source.nbytes))
            for number in range(start, stop):
                self._kept[source, number] = request, start

    def _missing(self, source: RemoteBytes, first: int, end: int, longest: int) -> Iterator[tuple[int, int]]:
        start = first
        for number in range(first, end + 1):
            known = number == end or (source, number) in self._kept
            if start < number and (known or number - start == longest):
                yield start, number
                start = number
            if known:
                start = number + 1

    def _ask_ahead(self, source: RemoteBytes, first: int, last: int) -> None:
        """Request what follows if the units before were read too: more, the more of them were."""
        before = first
        while before and first - before < LONGEST and (source, before - 1) in self._kept:
            before -= 1
        longest = last - before
        if first - before < 2:
            return
        longest = min(LONGEST, longest)
        end = last + 1
        while (source, end) in self._kept:
            end += 1
        if end - last <= AHEAD * longest // 2:
            units = -(-source.nbytes // UNIT)
            self._ask(source, end, min(units, last + 1 + AHEAD * longest), longest)


@cache
def _blocks() -> _Blocks:
    return _Blocks()


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads that would fill its parent's blocks
    os.register_at_fork(after_in_child=_blocks.cache_clear)
