"""Run `inspect --digest --files`: hash whole files, and compare them with a signature and with the hub's cache.

The signature is that of OpenSSF model-signing, `model.sig`; its digests are compared, and nobody's key is checked. In
the hub's cache a large file is a link to a blob that has its sha256 as name.
"""

from __future__ import annotations

import os
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ...durable.fileio import length_of, sha256_file
from ...errors import InputError
from ...files.hub.cache import resolve
from ...files.hub.names import pinned_name
from ...files.weights_file import paths_of, require_unchanged
from ...streaming.digests import digest_of_files
from ...streaming.parallel import Progress, map_in_order, worker_count
from ...views.inspect_files import FileHash, FilesReport
from ..digests import opened_files
from ..statements import place_of, read_statement, signed_files
from .call import InspectFiles

SIGNATURE = "model.sig"  # as model-signing names it

_BLOB = re.compile(r"[0-9a-f]{64}")  # of a large file; others have the 40 digits of git


def run_inspect_files(call: InspectFiles) -> FilesReport:
    """Hash all files of a model or an adapter, and its tensors, and compare them with what is beside."""
    found = resolve(call.path)
    with opened_files(call.path) as opened:
        weights = paths_of(opened)
        places = _files_in(found, weights)
        signature = _find_signature(found, places)
        named = sorted({*places, *(signature.files if signature else ())})
        places |= {name: signature.places[name] for name in named if signature and name not in places}
        sizes = {name: length_of(places[name]) if places[name].is_file() else None for name in named}
        total = sum(filter(None, sizes.values()))
        hashes = _hashes({name: places[name] for name in named}, call.progress, total + sum(f.nbytes for f in opened))
        digest = digest_of_files(opened, _after(call.progress, total))
        require_unchanged(opened)
    hub = pinned_name(found)
    return FilesReport(
        path=os.fspath(call.path),
        digest=digest,
        files=tuple(
            FileHash(
                name,
                sizes[name],
                hashes[name],
                _compared(signature.files.get(name) if signature else None, hashes[name]),
                _compared(_blob_of(places[name]) if hub else None, hashes[name]),
            )
            for name in named
        ),
        signature=str(signature.path) if signature else None,
        hub=str(hub).removeprefix("hf://") if hub else None,
    )


def _files_in(found: Path, weights: list[Path]) -> dict[str, Path]:
    """Return the files of an input by their names in its folder: all but hidden ones and a signature."""
    if not found.is_dir():
        return {Path(os.path.relpath(place, found.parent)).as_posix(): place for place in (found, *weights)}
    files = {}
    for folder, inner, names in os.walk(found):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for place in (Path(folder, name) for name in names if not name.startswith(".")):
            if place.is_file() and place != found / SIGNATURE:
                files[place.relative_to(found).as_posix()] = place
    return files


@dataclass(frozen=True)
class _Signature:
    """A signature: the sha256 of each file that it is about, and where that file would be."""

    path: Path
    files: dict[str, str]
    places: dict[str, Path]


def _find_signature(found: Path, places: dict[str, Path]) -> _Signature | None:
    """Return the signature in the folder, else the one beside it that is about something of this name."""
    folder = found if found.is_dir() else found.parent
    for path in (folder / SIGNATURE, found.parent / SIGNATURE):
        if not path.is_file():
            continue
        try:
            statement = read_statement(path)
            files, about = signed_files(statement), [*statement.subjects]
        except InputError:
            if path.parent == folder:
                raise
            continue  # it may be of anything else
        if "." in files:  # the signed model is one file
            files = {about[0]: files["."]}
        elif path.parent != folder and about != [folder.name]:
            continue
        kept = {name: digest for name, digest in files.items() if found.is_dir() or name in places}
        if kept:
            return _Signature(path, kept, {name: place_of(statement, name, folder) for name in kept})
    return None


def _hashes(places: dict[str, Path], progress: Progress | None, total: int) -> dict[str, str | None]:
    done, hashes = 0, dict[str, str | None]()
    with closing(map_in_order(_hash, places.values(), worker_count())) as results:
        for (name, place), found in zip(places.items(), results, strict=True):
            hashes[name] = found
            done += length_of(place) if found else 0
            if progress:
                progress(done, total)
    return hashes


def _hash(place: Path) -> str | None:
    return sha256_file(place) if place.is_file() else None


def _after(progress: Progress | None, before: int) -> Progress | None:
    """Return a progress that goes on after `before` bytes."""
    return None if progress is None else lambda done, total: progress(before + done, before + total)


def _blob_of(place: Path) -> str | None:
    """Return the sha256 that the hub lists for a file in its cache. None if it does not list one."""
    target = Path(os.readlink(place)) if place.is_symlink() else Path()
    return target.name if target.parent.name == "blobs" and _BLOB.fullmatch(target.name) else None


def _compared(stated: str | None, found: str | None) -> str | None:
    if stated is None:
        return None
    return "same" if stated == found else "differs"
