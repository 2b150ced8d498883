"""Make files and folders appear whole or not at all: they are built under another name and get theirs at the end.

Signals are held back while names change, and come while the caller fills the file or folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import NeedsFlag, UsageError
from . import disk
from .fileio import open_new
from .interrupts import held_back, let_in, unless_done
from .locks import locked


def partial_path(path: Path) -> Path:
    """Return the path at which an output is built. A file found there comes from a run that was killed."""
    return path.with_name(path.name + ".loratool-partial")


def former_path(path: Path) -> Path:
    """Return the path at which a folder or an undo file is set aside while it is replaced."""
    return path.with_name(path.name + ".loratool-former")


def journal_path(path: Path) -> Path:
    """Return the path of the folder with the journal of an output while it is built."""
    return path.with_name(path.name + ".loratool-journal")


def journal_head(journal: Path) -> Path:
    """Return the file of a journal without which the rest is nothing."""
    return journal / "head.json"


def scratch_path(path: Path) -> Path:
    """Return the path of the scratch folder that an output needs until it is whole."""
    return path.with_name(path.name + ".loratool-scratch")


def _unless_done(path: Path, undo: Callable[[], object]) -> AbstractContextManager[None]:
    """Undo what is unfinished of an output, unless another run can go on with it, by its journal."""
    return unless_done(undo, journal_head(journal_path(path)).exists)


@contextmanager
def partial_file(
    path: Path, kept: AbstractContextManager[object] | None = None, resume: bool = False
) -> Iterator[BinaryIO]:
    """Open a file at `partial_path` that becomes `path` if the block ends well, and is removed if it does not.

    It stays with its journal, if it has one and the run died (`interrupts.unless_done`).

    Args:
        kept: is entered when the file is locked, and left when it has its name or is removed.
        resume: leave what a run that died has written.

    Raises:
        MachineError: another process is writing it.
        NeedsFlag: another process has written it while this one waited.
    """
    partial, there = partial_path(path), os.path.lexists(path)
    if partial.is_symlink() or partial.is_dir():
        raise UsageError("is in the way", culprit=str(partial))
    with held_back(), _locked_file(partial, path), _unless_done(path, lambda: disk.unlink(partial)):
        _require_absent(path, there)
        with kept or nullcontext():
            with open_new(partial, "r+b" if resume else "w+b") as file, let_in():
                yield file
                disk.sync(file)
            disk.rename(partial, path)
            disk.sync_folder(path.parent)


def _locked_file(partial: Path, path: Path) -> AbstractContextManager[None]:
    return locked(partial, path, lambda: disk.open_file(partial, "ab").close())  # "ab" empties no other process's file


@contextmanager
def partial_folder(path: Path, resume: bool = False) -> Iterator[Path]:
    """Make a folder at `partial_path` that takes the place of `path` if the block ends well.

    A former `path` is set aside and removed after the rename, so that a kill never leaves a mixture. If a kill has
    left a folder set aside and nothing in its place, it is put back first. If the new name cannot be made safe, the
    former folder stays set aside. The folder stays with its journal, if it has one and the run died
    (`interrupts.unless_done`).

    Args:
        resume: leave what a run that died has written.

    Raises:
        MachineError: another process is writing it.
        NeedsFlag: another process has written it while this one waited.
    """
    partial, former, there = partial_path(path), former_path(path), os.path.lexists(path)
    if former.is_symlink() or former.is_file():
        raise UsageError("is in the way", culprit=str(former))
    with held_back():
        with _locked_folder(partial, path, resume), _unless_done(path, lambda: _give_up(partial, path)):
            _require_absent(path, there)
            if set_aside(path):
                if path.exists():
                    disk.remove_empty_folder(path)
                disk.rename(former, path)
            elif former.exists():  # of a run that was killed when it had replaced it
                disk.sync_folder(path.parent)
                _remove(former)
            with let_in():
                yield partial
                for folder, _, _ in os.walk(partial):
                    disk.sync_folder(Path(folder))
            if path.exists():
                disk.rename(path, former)
            disk.rename(partial, path)
            disk.sync_folder(path.parent)
        _remove(former)


def _give_up(partial: Path, path: Path) -> None:
    """Remove an unfinished folder, and put back what it was to replace."""
    try:
        disk.remove_folder(partial)
    finally:
        if former_path(path).exists() and not path.exists():
            disk.rename(former_path(path), path)


def _require_absent(path: Path, there: bool) -> None:
    """Refuse an output that was not there before, and is there when it is locked."""
    if not there and os.path.lexists(path):
        remedy = "add --force to replace it, or name another with -o"
        raise NeedsFlag("exists already: another loratool has just written it", culprit=str(path), remedy=remedy)


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
    with held_back(), _locked_folder(scratch, path), unless_done(lambda: disk.remove_folder(scratch)):
        with let_in():
            yield scratch
        _remove(scratch)


@contextmanager
def _locked_folder(place: Path, path: Path, resume: bool = False) -> Iterator[None]:
    """Make and lock a folder for what becomes `path`, and remove what a killed run has left in it, or leave it."""
    if place.is_symlink() or place.is_file():
        raise UsageError("is in the way", culprit=str(place))
    with locked(place, path, lambda: disk.make_folder(place)):
        if not resume:
            empty_folder(place)
        yield


def empty_folder(folder: Path) -> None:
    """Remove all that is in a folder."""
    for left in folder.iterdir():
        disk.remove_folder(left) if left.is_dir() and not left.is_symlink() else disk.unlink(left)


@contextmanager
def locked_journal(path: Path) -> Iterator[None]:
    """Make and lock the folder with the journal of an output, with what a run that died has left in it."""
    with held_back(), _locked_folder(journal_path(path), path, resume=True), let_in():
        yield
