"""Lock an output for one process, so that two commands cannot mix their bytes in it.

The lock is on the file or folder in which the output is built. The system releases it when the process ends. A killed
process may hold it a moment longer, so a run waits a little.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import MachineError
from .interrupts import let_in

PATIENCE, INTERVAL = 1.0, 0.02  # seconds

_held: set[int] = set()  # descriptors


@contextmanager
def locked(place: Path, path: Path, make: Callable[[], object], waits: bool = True) -> Iterator[None]:
    """Lock the file or folder `place`, which becomes `path`, during the block. Without locks, only create it.

    Args:
        make: creates it unless it exists.
        waits: wait a little for another process that holds it.

    Raises:
        MachineError: another process holds it.
    """
    deadline = time.monotonic() + (PATIENCE if waits else 0)
    while True:
        make()
        try:
            descriptor = _open(place)
        except FileNotFoundError:  # another process has just renamed it to `path`
            continue
        try:
            if descriptor is None or (_lock(descriptor) and _is_at(place, descriptor)):
                yield
                return
            if time.monotonic() > deadline:
                raise MachineError(
                    f"another loratool{_holder(descriptor)} is writing this output now",
                    culprit=str(path),
                    remedy="wait for it, or name another output with -o",
                )
        finally:
            _close(descriptor)
        with let_in():
            time.sleep(INTERVAL)


def _open(place: Path) -> int | None:
    """Open a file or folder to lock it; return None if this system has no such locks."""
    try:
        import fcntl  # noqa: F401
    except ImportError:  # Windows, where no open file can be renamed
        return None
    descriptor = os.open(place, os.O_RDONLY if place.is_dir() else os.O_RDWR)  # NFS locks no file that is read only
    _held.add(descriptor)
    return descriptor


def _close(descriptor: int | None) -> None:
    if descriptor in _held:  # not in a forked process
        _held.remove(descriptor)
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Return whether this process has the lock: true too where there are no locks, as on some network file systems."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_at(place: Path, descriptor: int) -> bool:
    """Return whether a file or folder is still at its path: the former holder of the lock may have moved it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(place), os.fstat(descriptor))
    return False


def _holder(descriptor: int) -> str:
    """Return the id of the process that holds the lock, as text; empty if unknown, as in another container."""
    about = os.fstat(descriptor)
    key = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    with suppress(OSError), open("/proc/locks") as locks:
        for line in locks:
            *_, pid, place, _, _ = line.split()
            if place == key and int(pid) > 0:
                return f" (pid {pid})"
    return ""


def _let_go() -> None:
    """Close the locks in a forked process, which would hold them after its parent has ended."""
    for descriptor in list(_held):
        _close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
