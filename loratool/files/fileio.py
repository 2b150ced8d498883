"""Read and write bytes at offsets, and make outputs appear whole or not at all.

The operating system's file calls are here, each with a plain fallback, because Windows has no `pread` and only Linux
has `copy_file_range`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, MachineError, UsageError

COPY_CHUNK = 1 << 23  # bytes of a fallback copy buffer: large enough to stream, small enough for one per worker

CHECKED_CHUNK = 1 << 20  # bytes of a buffer whose CRC is computed while it is in the processor's cache

WRITE_BACK = 0.3  # seconds between two syncs of files that are being filled

POSIX = os.name == "posix"  # Windows opens no folder, neither to sync nor to lock it; its renames are journaled

_seek_lock = threading.Lock()  # the fallbacks move the file position, which threads share


def size(nbytes: float) -> str:
    """Write a number of bytes with 3 digits in decimal units: 32.8 kB, 2.92 MB; MB is 10**6."""
    if nbytes < 999.5:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        nbytes /= 1000
        if nbytes < 999.5:
            return f"{nbytes:#.3g}".rstrip(".") + f" {unit}"
    return f"{nbytes:,.0f} TB"


def read_into(file: BinaryIO, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `file` at `offset`; raise InputError if the file ends early."""
    done = 0
    while done < len(buffer):
        if hasattr(os, "preadv"):
            n = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        else:
            with _seek_lock:
                file.seek(offset + done)
                n = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not n:
            raise InputError(
                f"ends at byte {offset + done}, {len(buffer) - done} bytes too early", culprit=str(file.name)
            )
        done += n


def write_at(file: BinaryIO, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        if hasattr(os, "pwrite"):
            done += os.pwrite(file.fileno(), data[done:], offset + done)
        else:
            with _seek_lock:
                file.seek(offset + done)
                done += file.write(data[done:])


def copy_range(source: BinaryIO, source_offset: int, target: BinaryIO, target_offset: int, nbytes: int) -> None:
    """Copy `nbytes` unchanged, inside the kernel if it can, else through a buffer."""
    done = 0
    while done < nbytes and hasattr(os, "copy_file_range"):
        try:
            n = os.copy_file_range(
                source.fileno(), target.fileno(), nbytes - done, source_offset + done, target_offset + done
            )
        except OSError:
            break  # other file systems, old kernels: the buffer below works everywhere, or names the real error
        if n == 0:
            break
        done += n
    buffer = memoryview(bytearray(min(COPY_CHUNK, nbytes - done)))
    while done < nbytes:
        part = buffer[: nbytes - done]
        read_into(source, part, source_offset + done)
        write_at(target, part, target_offset + done)
        done += len(part)


def copy_checked(source: BinaryIO, source_offset: int, target: BinaryIO, target_offset: int, nbytes: int) -> int:
    """Copy `nbytes` and return their CRC-32."""
    buffer, crc = memoryview(bytearray(min(CHECKED_CHUNK, nbytes))), 0
    for done in range(0, nbytes, CHECKED_CHUNK):
        part = buffer[: nbytes - done]
        read_into(source, part, source_offset + done)
        crc = zlib.crc32(part, crc)
        write_at(target, part, target_offset + done)
    return crc


@contextmanager
def write_back_early(files: Collection[BinaryIO]) -> Iterator[None]:
    """Sync the files again and again while the block fills them, so that little is left to sync at its end.

    The system would start late, with gigabytes in memory. It reports a failure only once, so that is raised here.
    Written pages are released: a model's worth would push other programs' pages out of the cache, and a page that was
    just freed is cheaper to fill than one that a virtual machine must ask its host for.
    """
    leave = threading.Event()
    failed: list[OSError] = []

    def write_back() -> None:
        try:
            while not leave.wait(WRITE_BACK):
                for file in files:
                    os.fdatasync(file.fileno()) if hasattr(os, "fdatasync") else os.fsync(file.fileno())
                    with suppress(OSError, AttributeError):  # advice only, which not every system takes
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=write_back, daemon=True)
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join()
    if failed:
        raise failed[0]


def is_beside(name: str) -> bool:
    """Return whether a name that a file gives is that of an entry of its own folder."""
    return name == Path(name).name and not any(mark in name for mark in "\\:\0") and name not in ("", ".", "..")


def open_for_reading(path: Path) -> BinaryIO:
    with reading(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError("is a pipe or a device, and its bytes are asked for in any order", culprit=str(path))
        return open(path, "rb", buffering=0)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into an InputError that names `path`, or a MachineError if the machine ran out of something."""
    try:
        yield
    except OSError as error:
        kind = MachineError if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO) else InputError
        raise kind(error.strerror or str(error), culprit=str(error.filename or path)) from error


def open_scratch(folder: Path) -> BinaryIO:
    """Open a nameless file in `folder` that is gone when it is closed; an OSError names the folder."""
    try:
        return tempfile.TemporaryFile(dir=folder, buffering=0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def require_free_space(folder: Path, nbytes: int) -> None:
    """Raise MachineError unless the disk of `folder` has `nbytes` free."""
    free = free_bytes(folder)
    if free < nbytes:
        raise MachineError(
            f"{size(nbytes)} are needed and {size(free)} are free",
            culprit=str(folder),
            remedy="free some space, or name another disk with -o",
        )


def sync_folder(folder: Path) -> None:
    if not POSIX:
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(file: Any, path: Path) -> None:
    """Lock `path` for this process, so that two commands with one output cannot mix their bytes."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError("another loratool is writing this output now", culprit=str(path)) from error


def partial_path(path: Path) -> Path:
    """Return the path at which an output is built. A file found there comes from a run that was killed."""
    return path.with_name(path.name + ".loratool-partial")


def former_path(path: Path) -> Path:
    """Return the path at which a folder or an undo file is set aside while it is replaced."""
    return path.with_name(path.name + ".loratool-former")


def scratch_path(path: Path) -> Path:
    """Return the path of the scratch folder that an output needs until it is whole."""
    return path.with_name(path.name + ".loratool-scratch")


@contextmanager
def partial_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file at `partial_path` that becomes `path` if the block ends well, and is removed if it does not."""
    partial = partial_path(path)
    if partial.is_symlink() or partial.is_dir():
        raise UsageError("is in the way", culprit=str(partial))
    with open(partial, "ab", buffering=0) as lock:  # "ab" creates it, and leaves alone what another process holds
        _lock(lock, path)
        try:
            with open(partial, "r+b", buffering=0) as file:
                file.truncate(0)
                yield file
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Make a folder at `partial_path` that takes the place of `path` if the block ends well.

    A former `path` is set aside and removed after the rename, so that a kill never leaves a mixture. If a kill has
    left a folder set aside and nothing in its place, it is put back first.
    """
    partial, former = partial_path(path), former_path(path)
    if former.is_symlink() or former.is_file():
        raise UsageError("is in the way", culprit=str(former))
    with _locked_folder(partial, path):
        if set_aside(path):
            if path.exists():
                path.rmdir()  # empty
            os.replace(former, path)
        try:
            yield partial
            sync_folder(partial)
            shutil.rmtree(former, ignore_errors=True)
            if path.exists():
                os.replace(path, former)
            os.replace(partial, path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if former.exists() and not path.exists():
                os.replace(former, path)
            raise
    shutil.rmtree(former, ignore_errors=True)


def set_aside(path: Path) -> Path | None:
    """Return the path at which a kill between two renames left the folder `path`, None if there is none."""
    former = former_path(path)
    if not former.is_dir() or former.is_symlink() or not any(former.iterdir()):
        return None
    gone = not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
    return former if gone else None


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside the output `path` that is removed when the block ends."""
    scratch = scratch_path(path)
    with _locked_folder(scratch, path):
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked_folder(place: Path, path: Path) -> Iterator[None]:
    """Make and lock an empty folder for what becomes `path`, and remove what a killed run has left in it."""
    if place.is_symlink() or place.is_file():
        raise UsageError("is in the way", culprit=str(place))
    place.mkdir(exist_ok=True)
    lock = os.open(place, os.O_RDONLY) if POSIX else None
    try:
        _lock(lock, path)
        for left in place.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield
    finally:
        if lock is not None:
            os.close(lock)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and sync it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sha256_range(file: BinaryIO, offset: int, nbytes: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(1 << 20, nbytes)))
    for start in range(0, nbytes, 1 << 20):
        part = buffer[: nbytes - start]
        read_into(file, part, offset + start)
        digest.update(part)
    return digest.hexdigest()


def sum_range(file: BinaryIO, offset: int, nbytes: int) -> int:
    """Return the `word_sum` of some bytes of a file."""
    total, buffer = 0, memoryview(bytearray(min(1 << 20, nbytes)))
    for start in range(0, nbytes, 1 << 20):
        part = buffer[: nbytes - start]
        read_into(file, part, offset + start)
        total += word_sum(part)
    return total % (1 << 64)


def word_sum(data: memoryview) -> int:
    """Return the sum of bytes as little-endian 64-bit words, zeros appended, modulo 2**64.

    It tells one file from another at a twentieth of the cost of a hash, if nobody means to deceive.
    """
    import numpy as np

    whole = len(data) // 8 * 8
    words = np.frombuffer(data[:whole], "<u8")
    return (int(words.sum(dtype=np.uint64)) + int.from_bytes(data[whole:], "little")) % (1 << 64)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open_for_reading(path) as file:
        while n := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:n])
    return digest.hexdigest()
