"""Read, write, copy and hash bytes at offsets of files, with a fallback where a system call is missing."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import InputError, MachineError
from . import disk
from .elsewhere import REMOTE, RemoteFile, source_behind, source_of
from .interrupts import held_back, unless_done

COPY_CHUNK = 1 << 23  # bytes of a fallback copy buffer: large enough to stream, small enough for one per worker

CHECKED_CHUNK = 1 << 20  # bytes of a buffer that stays in the processor's cache while its CRC is computed

PAGE = 4096  # bytes: the least that a disk writes at once

SAMPLES = 16  # pages that are compared to tell files of one size apart

WRITE_BACK = 0.3  # seconds between two syncs of files that are being filled


def size(nbytes: float) -> str:
    """Format a number of bytes with 3 digits in decimal units: 32.8 kB, 2.92 MB; MB is 10**6."""
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
        if file.__class__ is REMOTE:
            n = cast("RemoteFile", file).read_at(buffer[done:], offset + done)
        elif hasattr(os, "preadv"):
            n = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        else:
            with disk.seek_lock:
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
        n = disk.write_some(file, data[done:], offset + done)
        if not n:  # a loop without end otherwise
            raise OSError(errno.EIO, "the system wrote nothing and reported no error")
        done += n


def copy_range(source: BinaryIO, source_offset: int, target: BinaryIO, target_offset: int, nbytes: int) -> None:
    """Copy `nbytes` unchanged, inside the kernel if possible, else through a buffer."""
    done = 0
    with suppress(OSError):  # some file systems, old kernels: the buffer below works everywhere, or raises the error
        while done < nbytes:
            n = disk.copy_some(source, source_offset + done, target, target_offset + done, nbytes - done)
            if not n:
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


def has_bytes(file: BinaryIO, offset: int, nbytes: int, read: Callable[[int, memoryview], None]) -> bool:
    """Return whether `nbytes` of a file from `offset` on equal those of `read(first, buffer)`, which fills a buffer."""
    buffers = [memoryview(bytearray(min(CHECKED_CHUNK, nbytes))) for _ in range(2)]
    for done in range(0, nbytes, CHECKED_CHUNK):
        first, second = (buffer[: nbytes - done] for buffer in buffers)
        read_into(file, first, offset + done)
        read(done, second)
        if first != second:
            return False
    return True


@contextmanager
def write_back_early(files: Collection[BinaryIO]) -> Iterator[None]:
    """Sync the files repeatedly while the block fills them, so that little is left to sync at its end.

    The system would start late, with gigabytes in memory. It reports a write error only once, so this raises it.
    Written pages are released. A model's worth of them would push other programs' pages out of the cache, and a page
    that was just freed is cheaper to fill than one that a virtual machine must request from its host.
    """
    leave = threading.Event()
    failed: list[Exception] = []

    def write_back() -> None:
        try:
            while not leave.wait(WRITE_BACK):
                for file in files:
                    disk.sync_early(file)
        except (OSError, InputError) as error:  # InputError: the file was replaced, see `descriptors`
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
    """Return whether a name from a file's content is a plain file name, so that it stays in the file's folder."""
    return name == Path(name).name and not any(mark in name for mark in "\\:\0") and name not in ("", ".", "..")


def file_length(file: BinaryIO) -> int:
    """Return the bytes of an open file."""
    source = source_behind(file)
    return source.nbytes if source else os.fstat(file.fileno()).st_size


def length_of(path: Path) -> int:
    """Return the bytes of a file, or of what a path stands in for."""
    source = source_of(path)
    return source.nbytes if source else path.stat().st_size


def open_for_reading(path: Path) -> BinaryIO:
    if source := source_of(path):
        return cast("BinaryIO", RemoteFile(source))
    with reading(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError("is a pipe or a device, which cannot be read in any order", culprit=str(path))
        return open(path, "rb", buffering=0)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert an OSError into an InputError that names `path`, or a MachineError if the machine failed."""
    try:
        yield
    except OSError as error:
        kind = MachineError if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO) else InputError
        raise kind(error.strerror or str(error), culprit=str(error.filename or path)) from error


def open_scratch(folder: Path) -> BinaryIO:
    """Open a temporary file in `folder` that is removed when it is closed; an OSError names the folder."""
    try:
        with held_back():  # on some systems it has a name for a moment
            return disk.open_nameless(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder.absolute())) from error


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def lacking_space(folder: Path, nbytes: int) -> str:
    """Return a message if the disk of `folder` has less than `nbytes` free, else an empty string."""
    free = free_bytes(folder)
    return f"{size(nbytes)} are needed and {size(free)} are free" if free < nbytes else ""


def occupied(path: Path) -> int:
    """Return the bytes that a file, or the files in a folder, use on the disk; 0 if it is missing."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(getattr(file.stat(), "st_blocks", 0) * 512 for file in files if file.is_file())


def require_free_space(folder: Path, nbytes: int) -> None:
    """Raise MachineError unless the disk of `folder` has `nbytes` free."""
    if lack := lacking_space(folder, nbytes):
        raise MachineError(lack, culprit=str(folder), remedy="free some space, or name another disk with -o")


@contextmanager
def open_new(path: Path, mode: str = "w+b") -> Iterator[BinaryIO]:
    """Open a file for writing. A stop closes it, since Windows and NFS cannot remove a folder with open files.

    Args:
        mode: of `disk.open_file`; by default the file is created or emptied.
    """
    with disk.open_file(path, mode) as file, unless_done(file.close):
        yield file


def read_file(path: Path) -> bytes:
    """Read a small file."""
    with open_for_reading(path) as file:
        return file.read()


def write_file(path: Path, data: bytes) -> None:
    """Write a small file and sync it to the disk."""
    with open_new(path) as file:
        write_at(file, memoryview(data), 0)
        disk.sync(file)


def copy_file(origin: Path, path: Path) -> None:
    """Copy a file and sync the copy to the disk."""
    with open_for_reading(origin) as source, open_new(path) as target:
        copy_range(source, 0, target, 0, file_length(source))
        disk.sync(target)


def sha256_range(file: BinaryIO, offset: int, nbytes: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(1 << 20, nbytes)))
    for start in range(0, nbytes, 1 << 20):
        part = buffer[: nbytes - start]
        read_into(file, part, offset + start)
        digest.update(part)
    return digest.hexdigest()


def sampled(file: BinaryIO) -> str:
    """Return the sha256 of a file's size and of SAMPLES pages spread over it.

    It detects the weights of another training, which differ everywhere, but not an edit in one place.
    """
    size = file_length(file)
    digest, page = hashlib.sha256(str(size).encode()), memoryview(bytearray(min(PAGE, size)))
    for sample in range(SAMPLES):
        read_into(file, page, (size - len(page)) * sample // (SAMPLES - 1))
        digest.update(page)
    return digest.hexdigest()


def sum_range(file: BinaryIO, offset: int, nbytes: int) -> int:
    """Return the `word_sum` of a range of a file."""
    total, buffer = 0, memoryview(bytearray(min(1 << 20, nbytes)))
    for start in range(0, nbytes, 1 << 20):
        part = buffer[: nbytes - start]
        read_into(file, part, offset + start)
        total += word_sum(part)
    return total % (1 << 64)


def word_sum(data: memoryview) -> int:
    """Return the sum of bytes as little-endian 64-bit words, padded with zeros, modulo 2**64.

    It distinguishes files at a twentieth of the cost of a hash, but not against an attacker.
    """
    import numpy as np

    full = len(data) // 8 * 8
    words = np.frombuffer(data[:full], "<u8")
    return (int(words.sum(dtype=np.uint64)) + int.from_bytes(data[full:], "little")) % (1 << 64)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open_for_reading(path) as file:
        while n := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:n])
    return digest.hexdigest()
