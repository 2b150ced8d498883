"""Open more files than the system's limit of descriptors: those beyond a share of it are reopened for each use.

Three hundred adapters, or a model and an output of three hundred shards, are more files than `ulimit -n` may allow.
POSIX gives a new file the lowest free number, so the number shows how many descriptors are in use.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import BinaryIO, cast

from ..errors import InputError
from .elsewhere import source_behind

LIMIT = 512  # of Windows, whose C library does not tell it

SHARE = 4  # a fourth of the limit is kept open; libraries, worker processes and short reads use the rest

RECENT = 2  # reopened files that a thread keeps open: a copy has a source and a target

REPLACED = "was written to or replaced while it was read"

WAIT = "run the command again when no program writes to it"


def kept_open(file: BinaryIO, again: Callable[[], BinaryIO]) -> BinaryIO:
    """Return the open file, or one that is opened for each use if descriptors are short; the data are the same.

    Args:
        again: opens the same file without emptying it.
    """
    if source_behind(file) or file.fileno() < _limit() // SHARE:
        return file
    return cast("BinaryIO", _Reopened(file, again))


def _limit() -> int:
    try:
        import resource
    except ImportError:
        return LIMIT
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return LIMIT if soft == resource.RLIM_INFINITY else soft


class _Recent(dict["_Reopened", BinaryIO]):
    """The files that a thread used last. They close when the thread ends; no other thread closes them."""

    def __del__(self) -> None:
        for file in self.values():
            file.close()


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.recent = _Recent()


_of_thread = _OfThread()


class _Reopened:
    """A file read and written by offset; it has a descriptor only while it is one of a thread's last files."""

    def __init__(self, file: BinaryIO, again: Callable[[], BinaryIO]) -> None:
        self.name, self.closed, self._again, self._found = file.name, False, again, os.fstat(file.fileno())
        file.close()

    def __enter__(self) -> _Reopened:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True
        if file := _of_thread.recent.pop(self, None):
            file.close()

    def fileno(self) -> int:
        return self._file().fileno()

    def truncate(self, nbytes: int) -> int:
        return self._file().truncate(nbytes)

    def seek(self, offset: int) -> int:
        return self._file().seek(offset)

    def readinto(self, buffer: memoryview) -> int:
        return self._file().readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def write(self, data: memoryview) -> int:
        return self._file().write(data)

    def _file(self) -> BinaryIO:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        recent = _of_thread.recent
        file = recent.pop(self, None) or self._open()
        recent[self] = file
        while len(recent) > RECENT:
            recent.pop(next(iter(recent))).close()
        return file

    def _open(self) -> BinaryIO:
        file = self._again()
        if not os.path.samestat(os.fstat(file.fileno()), self._found):
            file.close()
            raise InputError(REPLACED, culprit=str(self.name), remedy=WAIT)
        return file
