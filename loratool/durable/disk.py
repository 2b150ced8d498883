"""System calls that change files; no other module makes them.

Tests replace these functions with ones that fail, stop the process, or lose unsynced data. So callers write
`disk.rename(...)` and import no function from here. Windows has no `pwrite`, and only Linux has `copy_file_range`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO

POSIX = os.name == "posix"  # Windows opens no folder, neither to sync nor to lock it; its renames are journaled

# Errors of folders that cannot be synced and need not be: on some network file systems, and without read permission
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)

PUNCH_HOLE = 3  # of linux/falloc.h, with the size kept

seek_lock = threading.Lock()  # without pwrite and preadv a call moves the file position, which threads share


def open_file(path: Path, mode: str) -> BinaryIO:
    """Open a file for writing, unbuffered.

    Args:
        mode: w+b creates or empties the file, r+b requires it, ab creates it and keeps its content.
    """
    return open(path, mode, buffering=0)  # type: ignore[return-value]  # the caller closes it


def open_nameless(folder: Path) -> BinaryIO:
    """Open a file in `folder` that is removed when it is closed."""
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def write_some(file: BinaryIO, data: memoryview, offset: int) -> int:
    """Write bytes at an offset and return how many were written; it may be fewer than given."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), data, offset)
    with seek_lock:
        file.seek(offset)
        return file.write(data)


def copy_some(source: BinaryIO, source_offset: int, target: BinaryIO, target_offset: int, nbytes: int) -> int:
    """Copy bytes inside the kernel and return how many were copied; it fails with an OSError or 0."""
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source.fileno(), target.fileno(), nbytes, source_offset, target_offset)


def truncate(file: BinaryIO, nbytes: int) -> None:
    """Truncate a file, or extend it with zeros."""
    file.truncate(nbytes)


def sync(file: BinaryIO) -> None:
    """Wait until a file's bytes are on the disk."""
    os.fsync(file.fileno())


def sync_early(file: BinaryIO) -> None:
    """Wait until the bytes written so far are on the disk, and release them from memory."""
    os.fdatasync(file.fileno()) if hasattr(os, "fdatasync") else os.fsync(file.fileno())
    with suppress(OSError, AttributeError):  # only advice; not every system takes it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def release(file: BinaryIO, offset: int, nbytes: int) -> None:
    """Free the space of a range of a file, which then reads as zeros; only Linux can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).fallocate(
            file.fileno(), PUNCH_HOLE, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes)
        )


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if not POSIX:
        return
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise


def rename(path: Path, new: Path) -> None:
    """Rename a file, replacing the file at the new name; or a folder, replacing an empty one."""
    os.replace(path, new)


def link(path: Path, new: Path) -> None:
    """Create a hard link to a file."""
    os.link(path, new)


def symlink(path: Path, new: Path) -> None:
    """Create a symbolic link to a file or folder."""
    os.symlink(path, new, target_is_directory=path.is_dir())


def unlink(path: Path) -> None:
    """Remove a file if it exists."""
    path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder and its parents unless they exist."""
    path.mkdir(parents=True, exist_ok=True)


def temporary_folder() -> AbstractContextManager[str]:
    """Make a folder where the system keeps temporary files; it is removed when the block ends."""
    return tempfile.TemporaryDirectory(prefix="loratool-")


def remove_empty_folder(path: Path) -> None:
    path.rmdir()


def remove_folder(path: Path) -> None:
    """Remove a folder and its content."""
    shutil.rmtree(path)
