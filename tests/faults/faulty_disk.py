"""Replace all functions of `loratool.durable.disk` by ones that fail, write too little, or end the process at a call.

A call is numbered from 0 in the order of a run. The functions are read from the module, so that none is forgotten.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

from loratool.durable import disk, fileio

NAMES = tuple(
    name for name, each in vars(disk).items() if isinstance(each, FunctionType) and each.__module__ == disk.__name__
)

# What removes something: when it fails, something may stay
REMOVES = ("unlink", "remove_folder", "remove_empty_folder")

KILLED = 9  # exit code of a process that was stopped

# What only waits for the disk, which here keeps its power: left out, as it takes most of a run's time
SYNCS = ("sync", "sync_early", "sync_folder")

# What has two halves
HALVED = ("write_some", "copy_some", "remove_folder")

# What needs space
FILLS = ("write_some", "copy_some", "open_file", "open_nameless", "make_folder")

# A call: (name, the real function, its arguments) -> its result
Call = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]


@contextmanager
def replaced(call: Call, links: bool = True) -> Iterator[None]:
    """Let all calls go through `call` during the block; no thread syncs early, so that their number is the same.

    Args:
        links: whether the file system has them.
    """
    real, lock, wait = {name: getattr(disk, name) for name in NAMES}, threading.Lock(), fileio.WRITE_BACK
    own = {**dict.fromkeys(SYNCS, _no_wait), **({} if links else {"link": _no_link})}

    def replacement(name: str) -> Callable[..., Any]:
        def do(*arguments: Any) -> Any:
            with lock:
                return call(name, own.get(name, real[name]), arguments)

        return do

    fileio.WRITE_BACK = 1e5
    for name in NAMES:
        setattr(disk, name, replacement(name))
    try:
        yield
    finally:
        fileio.WRITE_BACK = wait
        for name, function in real.items():
            setattr(disk, name, function)


def _no_wait(_: Any) -> None:
    """Stand for a sync."""


def _no_link(*paths: Path) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), *map(str, paths[:1]))


class Stopped(BaseException):
    """The process is stopped: no handler of ours takes it for an error."""


class Faulty:
    """Passes calls on, but for one, or for all from one on.

    Attributes:
        names: of the calls, in their order.
        code, said: how the run ended.
    """

    code: int
    said: str

    def __init__(self, kind: str, at: int) -> None:
        self.names: list[str] = []
        self._kind, self._at = kind, at

    def __call__(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        number = len(self.names)
        self.names.append(name)
        if number == self._at:
            return FAULTS[self._kind](name, real, arguments)
        if number > self._at >= 0 and self._kind in LASTING and (self._kind != "full" or name in FILLS):
            return FAULTS[LASTING[self._kind]](name, real, arguments)
        return real(*arguments)


def no_fault() -> Faulty:
    """Pass all calls on."""
    return Faulty("EIO", -1)


def fail(code: int, name: str, arguments: tuple[Any, ...]) -> None:
    """Raise as the system does: a call that has the file or folder open names none."""
    paths = [] if name == "sync_folder" else [str(each) for each in arguments if isinstance(each, Path)]
    raise OSError(code, os.strerror(code), *(paths[:1]), *([None, paths[1]] if len(paths) > 1 else []))


def _fails(code: int) -> Call:
    return lambda name, real, arguments: fail(code, name, arguments)


def _half(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Do half of a call: of a write, of a copy, or of the removal of a folder; else all of it."""
    if name == "write_some":
        file, data, offset = arguments
        return real(file, data[: (len(data) + 1) // 2], offset)
    if name == "copy_some":
        *places, nbytes = arguments
        return real(*places, (nbytes + 1) // 2)
    if name == "remove_folder":
        inside = sorted(path for path in arguments[0].rglob("*") if not path.is_dir())
        for path in inside[: max(1, len(inside) // 2)]:
            path.unlink()
        return None
    return real(*arguments)


def _nothing(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return 0 if name in HALVED else real(*arguments)


def _stop(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    raise Stopped


def _kill(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os._exit(KILLED)


def _full(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if name in HALVED:
        _half(name, real, arguments)
    fail(errno.ENOSPC, name, arguments)


def _first_half(then: Call) -> Call:
    def do(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        _half(name, real, arguments)
        return then(name, real, arguments)

    return do


# What happens at a call
FAULTS: dict[str, Call] = {
    "EIO": _fails(errno.EIO),
    "ENOSPC": _fails(errno.ENOSPC),
    "EINTR": _fails(errno.EINTR),
    "short": _half,  # fewer bytes than asked
    "nothing": _nothing,  # no byte, and no error
    "gone": _fails(errno.EIO),  # and so do all that follow
    "gone halfway": _first_half(_fails(errno.EIO)),
    "full": _full,  # and all that follow which need space fail too
    "stop": _stop,  # and so do all that follow, so that the files are those that a kill leaves
    "stop halfway": _first_half(_stop),
    "kill": _kill,
    "kill halfway": _first_half(_kill),
}

# A fault after which all calls have another one
LASTING = {"gone": "EIO", "gone halfway": "EIO", "full": "ENOSPC", "stop": "stop", "stop halfway": "stop"}

FAILURES = ("EIO", "ENOSPC", "EINTR", "short", "nothing", "gone", "gone halfway", "full")
STOPS = ("stop", "stop halfway")
KILLS = ("kill", "kill halfway")


def applies(kind: str, name: str) -> bool:
    """Return whether a fault of a kind does at a call of this name what no other kind does."""
    if kind == "nothing":
        return name in ("write_some", "copy_some")
    if kind == "full":
        return name in FILLS
    return name in HALVED or not (kind == "short" or kind.endswith("halfway"))
