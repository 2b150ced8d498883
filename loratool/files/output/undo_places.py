"""Replace the undo files beside a weights file, so that the right ones are there even if a run is killed.

`x.undo`, `x.undo.1`, ... belong to `x.safetensors`, but several files cannot be replaced at once. So the former ones
are set aside under `former_path` before the first new one is written, `x.undo` last. They are removed after the weights
are replaced, `x.undo` first. So while `x.undo` is set aside, all are, even after a power failure, since the folder is
synced between these steps. Hashes tell whether the `x.undo` set aside belongs to the weights, or the one in its place.
A folder contains its undo files and is replaced at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path

from ...durable import disk
from ...durable.fileio import copy_file
from ...durable.interrupts import unless_done
from ...durable.partial import former_path, partial_path
from ..folder.side_files import is_undo_file, undo_files, undo_path

Belongs = Callable[[Path, Path], bool]  # returns whether an undo file belongs to a weights file: `reader.belongs`


def undo_chain(model: Path, is_file: bool, belongs: Belongs) -> list[Path]:
    """Return the undo files of a merged model, the last merge first; after a kill, those set aside if they belong."""
    place = undo_path(model, is_file)
    formers = formers_of(place) if is_file else {}
    return list(formers.values()) if formers and belongs(formers[place], model) else undo_files(place)


def formers_of(first: Path) -> dict[Path, Path]:
    """Return the undo files that were set aside, path -> former path; empty unless the first is among them."""
    waiting = takewhile(lambda place: is_undo_file(former_path(place)), (_numbered(first, n) for n in count()))
    return {place: former_path(place) for place in waiting}


def numbered_undo_files(first: Path) -> list[Path]:
    """Return the existing undo files, even if the first is missing."""
    following = takewhile(is_undo_file, (_numbered(first, n) for n in count(1)))
    return [*([first] if is_undo_file(first) else []), *following]


def _numbered(first: Path, number: int) -> Path:
    return first.with_name(f"{first.name}.{number}") if number else first


@contextmanager
def kept_undo(weights: Path, mine: Collection[Path], belongs: Belongs) -> Iterator[None]:
    """Set the undo files of a weights file aside while it is replaced: put them back if it stays, else remove them.

    The weights' `partial_file` enters it. Enter `cleared_undo` before the `partial_file` of the new undo files.

    Args:
        mine: the paths of the new undo files.
    """
    first = undo_path(weights, True)
    formers = formers_of(first)
    if formers and belongs(formers[first], weights):
        changed = [place for place, former in formers.items() if identity(place) != identity(former)]
        _put_back(formers, changed, [place for place in numbered_undo_files(first) if place not in formers])
    _drop([former_path(first), *_left(first)])
    places = dict.fromkeys((*numbered_undo_files(first), *filter(is_undo_file, mine)))
    saved = {place: former_path(place) for place in places}
    before = {path: identity(path) for path in (weights, *saved)}
    with unless_done(lambda: _drop(saved.values())):
        if saved:
            _set_aside(saved)

    def put_back() -> None:
        if identity(weights) == before[weights]:  # else the rename may not be synced, and all stay set aside
            changed = [place for place in saved if identity(place) != before[place]]
            _put_back(saved, changed, [place for place in mine if place not in saved])

    with unless_done(put_back):
        yield
    with suppress(OSError):  # the next run removes what this one cannot
        _drop(saved.values())


@contextmanager
def cleared_undo(weights: Path, mine: Collection[Path]) -> Iterator[None]:
    """Remove the undo files that no new one replaces if the block succeeds, just before the weights are replaced."""
    yield
    first = undo_path(weights, True)
    if gone := [place for place in numbered_undo_files(first) if place not in mine]:
        _drop(gone)
        disk.sync_folder(first.parent)


def _set_aside(formers: Mapping[Path, Path]) -> None:
    """Link every undo file to its former path; the first is synced last, since it marks all as set aside."""
    first, *others = formers
    for places in filter(None, (others, [first])):
        for place in places:
            _copy(place, formers[place])
        disk.sync_folder(first.parent)


def _left(first: Path) -> list[Path]:
    """Return all files that killed runs have set aside, whatever their content."""
    ours = re.escape(first.name) + r"(\.\d+)?" + re.escape(former_path(first).name.removeprefix(first.name))
    return [path for path in first.parent.iterdir() if re.fullmatch(ours, path.name)]


def _put_back(formers: Mapping[Path, Path], changed: Iterable[Path], besides: Iterable[Path]) -> None:
    """Put former undo files back at the changed paths, and remove the files `besides`."""
    for place in changed:
        partial = partial_path(place)
        _copy(formers[place], partial)
        disk.rename(partial, place)
    _drop(besides)
    if formers:
        first = next(iter(formers.values()))
        disk.sync_folder(first.parent)
        disk.unlink(first)
        disk.sync_folder(first.parent)  # while its name may come back, all others must
    _drop(formers.values())


def _drop(places: Iterable[Path]) -> None:
    for place in places:
        disk.unlink(place)


def _copy(source: Path, target: Path) -> None:
    """Create a hard link to a file, or copy it if the file system has no links."""
    disk.unlink(target)
    try:
        disk.link(source, target)
    except (OSError, AttributeError):  # Android has no os.link
        copy_file(source, target)


def identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file, or of a link itself; None if nothing is there."""
    with suppress(OSError):
        status = path.lstat()
        return status.st_dev, status.st_ino
    return None
