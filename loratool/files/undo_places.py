"""Keep beside every weights file its own undo files, whenever a run is killed.

`x.undo`, `x.undo.1`, ... belong to `x.safetensors`, but several files cannot be replaced at once. So the former ones
are set aside under `former_path` before the first new one is written, `x.undo` last, and dropped after the weights are
replaced, `x.undo` first: while `x.undo` is set aside, all are. Its hashes tell whether it belongs to the weights, or
the one in its place does. A folder contains its undo files and is replaced at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import disk
from .checkpoint import open_weights
from .fileio import copy_file
from .interrupts import at_stop
from .partial import former_path, partial_path
from .side_files import is_undo_file, undo_files, undo_path
from .undo_file import UndoFile


def undo_chain(model: Path, is_file: bool) -> list[Path]:
    """Return the undo files of a merged model, the last merge's first; after a kill they may be those set aside."""
    place = undo_path(model, is_file)
    formers = formers_of(place) if is_file else {}
    return list(formers.values()) if formers and _belongs(formers[place], model) else undo_files(place)


def formers_of(first: Path) -> dict[Path, Path]:
    """Return the undo files that were set aside, place -> former path; empty if the first is not among them."""
    waiting = takewhile(lambda place: is_undo_file(former_path(place)), (_numbered(first, n) for n in count()))
    return {place: former_path(place) for place in waiting}


def numbered_undo_files(first: Path) -> list[Path]:
    """Return the undo files that are in their places, whether the first is or not."""
    following = takewhile(is_undo_file, (_numbered(first, n) for n in count(1)))
    return [*([first] if is_undo_file(first) else []), *following]


def _numbered(first: Path, number: int) -> Path:
    return first.with_name(f"{first.name}.{number}") if number else first


def _belongs(undo: Path, model: Path) -> bool:
    """Return whether an undo file belongs to the weights of a file; false if either cannot be read."""
    try:
        weights = open_weights(model)
    except InputError:
        return False
    try:
        opened = UndoFile(undo)
    except InputError:
        weights.close()
        return False
    try:
        return opened.belongs_to(weights)
    finally:
        opened.close()
        weights.close()


class KeptUndo:
    """The undo files beside a weights file while that is replaced: they stay if it stays, else they are removed.

    It is for the weights' `partial_file`, which enters it. Call `clear` when the new undo files are there.

    Args:
        mine: the places of the new undo files.
    """

    def __init__(self, weights: Path, mine: Collection[Path]) -> None:
        self._weights, self._mine = weights, mine
        self._before: tuple[int, int] | None = None
        self._saved: dict[Path, Path] = {}

    def __enter__(self) -> KeptUndo:
        """Give every undo file its former path too, after mending what a killed run has left."""
        first = undo_path(self._weights, True)
        formers = formers_of(first)
        if formers and _belongs(formers[first], self._weights):
            _put_back(formers, [place for place in numbered_undo_files(first) if place not in formers])
        _drop([former_path(first), *_left(first)])
        self._before = identity(self._weights)
        places = dict.fromkeys((*numbered_undo_files(first), *filter(is_undo_file, self._mine)))
        self._saved = {place: former_path(place) for place in places}
        at_stop.append(self._settle)
        try:
            for place, former in reversed(self._saved.items()):
                _copy(place, former)
            disk.sync_folder(first.parent)
        except BaseException:
            self.__exit__()
            raise
        return self

    def clear(self, kind: Any, *_: Any) -> None:
        """Remove the undo files that no new one replaces, just before the weights are replaced."""
        for place in self._saved if kind is None else ():
            if place not in self._mine:
                disk.unlink(place)

    def __exit__(self, *_: Any) -> None:
        try:
            self._settle()
        finally:
            at_stop.remove(self._settle)

    def _settle(self) -> None:
        if identity(self._weights) == self._before:
            _put_back(self._saved, [place for place in self._mine if place not in self._saved])
        else:
            _drop(self._saved.values())


def _left(first: Path) -> list[Path]:
    """Return the files that killed runs have set aside, whatever their content."""
    ours = re.escape(first.name) + r"(\.\d+)?" + re.escape(former_path(first).name.removeprefix(first.name))
    return [path for path in first.parent.iterdir() if re.fullmatch(ours, path.name)]


def _put_back(formers: Mapping[Path, Path], besides: Collection[Path]) -> None:
    """Put every former undo file back in its place, and remove the files `besides`."""
    for place, former in formers.items():
        if identity(former) not in (None, identity(place)):  # None: it was not set aside yet
            partial = partial_path(place)
            _copy(former, partial)
            disk.rename(partial, place)
    for place in besides:
        disk.unlink(place)
    _drop(formers.values())


def _drop(formers: Collection[Path]) -> None:
    for former in formers:
        disk.unlink(former)


def _copy(source: Path, target: Path) -> None:
    """Link a file to a second name, or copy it if the file system has no links."""
    disk.unlink(target)
    try:
        disk.link(source, target)
    except (OSError, AttributeError):  # Android has no os.link
        copy_file(source, target)


def identity(path: Path) -> tuple[int, int] | None:
    """Return what all names of a file share, and no other file has; of a link its own, None for nothing."""
    with suppress(OSError):
        found = path.lstat()
        return found.st_dev, found.st_ino
    return None
