"""Outputs that appear complete or not at all: they are built under another name and renamed at the end.

Signals are delayed during renames, and delivered while the caller fills the file or folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import MachineError, NeedsFlag, UsageError
from . import disk
from .fileio import open_new
from .interrupts import held_back, let_in, unless_done
from .locks import locked


def partial_path(path: Path) -> Path:
    """Return the path at which an output is built. A file there is from a run that was killed."""
    return path.with_name(path.name + ".loratool-partial")


def former_path(path: Path) -> Path:
    """Return the path at which a folder or an undo file is set aside while it is replaced."""
    return path.with_name(path.name + ".loratool-former")


def journal_path(path: Path) -> Path:
    """Return the folder with the journal of an output that is being built."""
    return path.with_name(path.name + ".loratool-journal")


def scratch_path(path: Path) -> Path:
    """Return the scratch folder that an output needs until it is complete."""
    return path.with_name(path.name + ".loratool-scratch")


def journal_head(path: Path) -> Path:
    """Return the head of an output's journal, without which no run can resume."""
    return journal_path(path) / "head.json"


def what_stays(path: Path) -> str:
    """Return, for a message, the names of the partial output and journal that a run can resume; empty without them."""
    partial, journal = partial_path(path), journal_path(path)
    return f"{partial} and {journal.name}" if partial.exists() and journal_head(path).is_file() else ""


def void_journal(path: Path) -> None:
    """Remove the head of an output's journal, so that no run resumes it."""
    disk.unlink(journal_head(path))


def nothing_left() -> Collection[Path]:
    """Return no files: this run starts again and resumes nothing."""
    return ()


@contextmanager
def partial_file(
    path: Path,
    around: AbstractContextManager[object] | None = None,
    left: Callable[[], Collection[Path]] = nothing_left,
) -> Iterator[BinaryIO]:
    """Open a file at `partial_path`. It becomes `path` if the block succeeds, else it is removed.

    The block's journal is removed with it; both stay if the run dies (`interrupts.unless_done`).

    Args:
        around: is entered when the file is locked, and exited when it is renamed or removed.
        left: is called when the file is locked. It returns the file if this run resumes it.

    Raises:
        MachineError: another process is writing it.
        NeedsFlag: another process has written it while this one waited.
    """
    partial, existed = partial_path(path), os.path.lexists(path)
    if partial.is_symlink() or partial.is_dir():
        raise UsageError("is in the way", culprit=str(partial))
    with held_back(), _locked_file(partial, path):
        mode = "r+b" if left() else "w+b"
        with _left_to_another(path, lambda: disk.unlink(partial)):
            _require_absent(path, existed)
            if mode == "w+b":
                _remove_journal(path)
            with around or nullcontext():
                with open_new(partial, mode) as file, let_in():
                    yield file
                    disk.sync(file)
                disk.rename(partial, path)
                disk.sync_folder(path.parent)
        if journal_path(path).exists():
            with suppress(OSError, MachineError), _locked_file(partial, path, waits=False):
                try:
                    _remove_journal(path)
                finally:
                    disk.unlink(partial)


@contextmanager
def _left_to_another(path: Path, undo: Callable[[], object]) -> Iterator[None]:
    """Undo an unfinished output and remove its journal, unless the run dies and another can resume it."""

    def give_up() -> None:
        try:
            _remove_journal(path)
        finally:
            undo()

    with unless_done(give_up, lambda: what_stays(path)):
        yield


def _remove_journal(path: Path) -> None:
    """Remove the journal of an output, its head first.

    Call it under the lock of `partial_path`: once the output has its name, the journal may be another process's. What
    cannot be removed then, the next run removes.
    """
    if journal_path(path).exists():
        void_journal(path)
        disk.remove_folder(journal_path(path))


def _locked_file(partial: Path, path: Path, waits: bool = True) -> AbstractContextManager[None]:
    """Create and lock a file for the output `path`."""
    # "ab" empties no other process's file
    return locked(partial, path, lambda: disk.open_file(partial, "ab").close(), waits)


@contextmanager
def partial_folder(path: Path, left: Callable[[], Collection[Path]] = nothing_left) -> Iterator[Path]:
    """Create a folder at `partial_path` that replaces `path` if the block succeeds.

    A former `path` is set aside and removed after the rename, so a kill never leaves a mixture. If a kill has left a
    folder set aside and nothing in its place, it is put back first. If the rename cannot be synced, the former folder
    stays set aside. The block's journal is removed with the folder; both stay if the run dies
    (`interrupts.unless_done`).

    Args:
        left: is called when the folder is locked. It returns the files in it that this run resumes; other files are
            removed.

    Raises:
        MachineError: another process is writing it.
        NeedsFlag: another process has written it while this one waited.
    """
    partial, former, existed = partial_path(path), former_path(path), os.path.lexists(path)
    if former.is_symlink() or former.is_file():
        raise UsageError("is in the way", culprit=str(former))
    with held_back():
        with _locked_folder(partial, path):
            stay = left()
            with _left_to_another(path, lambda: disk.remove_folder(partial)), unless_done(lambda: _put_back(path)):
                _require_absent(path, existed)
                if not stay:
                    _remove_journal(path)
                _clear(partial, stay)
                if set_aside(path):
                    if path.exists():
                        disk.remove_empty_folder(path)
                    disk.rename(former, path)
                elif former.exists():  # from a run that was killed after it replaced `path`
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
        if journal_path(path).exists():
            with suppress(OSError, MachineError), _locked_folder(partial, path, waits=False):
                try:
                    _remove_journal(path)
                finally:
                    disk.remove_empty_folder(partial)
        _remove(former)


def partial_place(
    path: Path, is_file: bool, left: Callable[[], Collection[Path]] = nothing_left
) -> AbstractContextManager[Path | BinaryIO]:
    """Open a file as `partial_file` does, or create a folder as `partial_folder` does."""
    return partial_file(path, left=left) if is_file else partial_folder(path, left)


def _put_back(path: Path) -> None:
    """Put back the folder that was set aside, if nothing is in its place."""
    if former_path(path).exists() and not path.exists():
        disk.rename(former_path(path), path)


def _clear(folder: Path, stay: Collection[Path] = ()) -> None:
    """Remove the content of a folder except for the files `stay` and the folders around them."""
    around = {parent for path in stay for parent in path.parents}
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_dir():
            if path.is_symlink() or path not in stay:
                disk.unlink(path)
        elif path in around:
            _clear(path, stay)
        else:
            disk.remove_folder(path)


def _require_absent(path: Path, existed: bool) -> None:
    """Raise NeedsFlag for an output that another process has written before this one got the lock."""
    if not existed and os.path.lexists(path):
        remedy = "run it again with --force to replace it, or name another with -o"
        raise NeedsFlag("exists already: another loratool has just written it", culprit=str(path), remedy=remedy)


def _remove(folder: Path) -> None:
    """Remove a folder; the next run removes what this one cannot."""
    with suppress(OSError):
        disk.remove_folder(folder)


def set_aside(path: Path) -> Path | None:
    """Return where a kill between two renames left the folder `path`; None if it did not."""
    former = former_path(path)
    if not former.is_dir() or former.is_symlink() or not any(former.iterdir()):
        return None
    gone = not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
    return former if gone else None


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Create a folder beside the output `path` that is removed when the block ends."""
    scratch = scratch_path(path)
    with held_back(), _locked_folder(scratch, path), unless_done(lambda: disk.remove_folder(scratch)):
        _clear(scratch)
        with let_in():
            yield scratch
        _remove(scratch)


def _locked_folder(place: Path, path: Path, waits: bool = True) -> AbstractContextManager[None]:
    """Create and lock a folder for the output `path`."""
    if place.is_symlink() or place.is_file():
        raise UsageError("is in the way", culprit=str(place))
    return locked(place, path, lambda: disk.make_folder(place), waits)
