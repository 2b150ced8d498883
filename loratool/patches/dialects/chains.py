"""Find the patches of other programs in a folder of versions that lead to one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...durable.fileio import reading
from ...errors import InputError
from .patch import ForeignDialect, ForeignPatch
from .table import DIALECTS, find_dialect
from .trl import FOLDERS

ONE_BY_ONE = "if BASE is that version, name the patches after it one by one: loratool apply BASE P1 P2 .. -o OUT"


@dataclass(frozen=True)
class ForeignChain:
    """The way to a version.

    Attributes:
        full: the full version that it begins with; None if it is the base that the trainer began with, version 0.
        patches: in the order in which they are applied, open.
    """

    full: Path | None
    patches: tuple[ForeignPatch, ...]

    def close(self) -> None:
        for patch in self.patches:
            patch.close()


def find_chain(folder: Path, step: int) -> ForeignChain:
    """Return the newest full version at or below a step, and the patches from there to it.

    Raises:
        InputError: a version is missing, does not name the one before it, or two places claim one number.
    """
    with reading(folder):
        entries = _entries(folder)
    patches: list[ForeignPatch] = []
    try:
        number, needed_by = step, ""
        while number in entries or number:
            if number not in entries:
                raise _missing(folder, number, needed_by, entries)
            path = entries[number]
            dialect = find_dialect(path)
            if dialect is None:
                return ForeignChain(path, tuple(reversed(patches)))
            patch = dialect.open(path)
            patches.append(patch)
            number, needed_by = _base_of(patch, number, dialect), path.name
    except BaseException:
        for patch in patches:
            patch.close()
        raise
    return ForeignChain(None, tuple(reversed(patches)))


def _base_of(patch: ForeignPatch, number: int, dialect: ForeignDialect) -> int:
    if patch.version != number:
        raise InputError(f"is named as version {number}, and is version {patch.version}", culprit=str(patch.path))
    base = number - 1 if patch.base_version is None else patch.base_version
    by_one = dialect.key != "prime-rl"  # which names a step that may be further back
    if not 0 <= base < number or (by_one and base != number - 1):
        raise InputError(f"is version {number}, and names {base} as the one before", culprit=str(patch.path))
    return base


def _missing(folder: Path, number: int, needed_by: str, entries: Mapping[int, Path]) -> InputError:
    known = f"; it has {min(entries)} to {max(entries)}" if entries else ""
    if not needed_by:
        return InputError(f"has no version {number}{known}", culprit=str(folder))
    return InputError(f"has no version {number}, on which {needed_by} builds", culprit=str(folder), remedy=ONE_BY_ONE)


def _entries(folder: Path) -> dict[int, Path]:
    """Return the versions in a folder by their names: number -> path. No file is opened, as each can cost requests."""
    found: dict[int, Path] = {}
    for path, number in _numbered(folder):
        other = found.setdefault(number, path)
        if other is not path and (other.parent.name, path.parent.name) != FOLDERS:
            raise InputError(f"has {path.name} and {other.name} as one version", culprit=str(folder))
    return found


def _numbered(folder: Path) -> Iterator[tuple[Path, int]]:
    patterns = {row.entry for row in DIALECTS.values() if row.entry}
    # an anchor comes before the delta to it: it is the same version in full
    places = [folder, *(folder / name for name in FOLDERS if (folder / name).is_dir())]
    for place in places:
        for path in sorted(place.iterdir()):
            matches = (re.fullmatch(pattern, path.name) for pattern in patterns)
            if match := next(filter(None, matches), None):
                yield path, int(match["number"])
