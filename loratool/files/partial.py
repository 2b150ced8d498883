"""Make files and folders appear whole or not at all: they are built under another name and get theirs at the end.

Signals are held back while names change, and come while the caller fills the file or folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError
from . import disk
from .interrupts import held_back, let_in
from .locks import lock


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
    with held_back(), disk.open_file(partial, "ab") as locked:  # "ab" leaves alone what another process holds
        lock(locked, path)
        try:
            with disk.open_file(partial, "r+b") as file:
                disk.truncate(file, 0)
                with let_in():
                    yield file
                disk.sync(file)
            disk.rename(partial, path)
        except BaseException:
            disk.unlink(partial)
            raise
        disk.sync_folder(path.parent)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Make a folder at `partial_path` that takes the place of `path` if the block ends well.

    A former `path` is set aside and removed after the rename, so that a kill never leaves a mixture. If a kill has
    left a folder set aside and nothing in its place, it is put back first.
    """
    partial, former = partial_path(path), former_path(path)
    if former.is_symlink() or former.is_file():
        raise UsageError("is in the way", culprit=str(former))
    with held_back():
        with _locked_folder(partial, path):
            if set_aside(path):
                if path.exists():
                    disk.remove_empty_folder(path)
                disk.rename(former, path)
            try:
                with let_in():
                    yield partial
                disk.sync_folder(partial)
                _remove(former)
                if path.exists():
                    disk.rename(path, former)
                disk.rename(partial, path)
                disk.sync_folder(path.parent)
            except BaseException:
                _remove(partial)
                if former.exists() and not path.exists():
                    disk.rename(former, path)
                raise
        _remove(former)


def _remove(folder: Path) -> None:
    """Remove what is left of a folder; what cannot be removed now, the next run removes."""
    with suppress(OSError):
        disk.remove_folder(folder)


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
    with held_back(), _locked_folder(scratch, path):
        try:
            with let_in():
                yield scratch
        finally:
            _remove(scratch)


@contextmanager
def _locked_folder(place: Path, path: Path) -> Iterator[None]:
    """Make and lock an empty folder for what becomes `path`, and remove what a killed run has left in it."""
    if place.is_symlink() or place.is_file():
        raise UsageError("is in the way", culprit=str(place))
    disk.make_folder(place)
    descriptor = os.open(place, os.O_RDONLY) if disk.POSIX else None
    try:
        if descriptor is not None:
            lock(descriptor, path)
        for left in place.iterdir():
            disk.remove_folder(left) if left.is_dir() and not left.is_symlink() else disk.unlink(left)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
