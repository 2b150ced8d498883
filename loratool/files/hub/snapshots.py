"""Find a model's files in the local Hugging Face cache, and list the missing ones.

The layout is huggingface_hub's: `models--org--name/refs/<revision>` has the commit, and `snapshots/<commit>/` the files
as links into `blobs/`. Newer versions write `trees/<commit>.json`, the list of all files of the repository.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...durable.fileio import is_beside, open_for_reading, reading
from ...errors import InputError, LoratoolError, shell_word
from ..containers.safetensors_file import parse_json
from .choice import needed_files
from .names import HubName

SHORT_HASH = re.compile(r"[0-9a-f]{7,40}")  # a commit's hash, full or abbreviated


@dataclass(frozen=True)
class Cached:
    """A model in the cache, complete or partial."""

    snapshot: Path | None  # the folder of the revision's files; None if there is none
    missing: tuple[str, ...] = ()  # needed files that are missing or incomplete
    fault: LoratoolError | None = None  # why the missing files are unknown

    @property
    def is_complete(self) -> bool:
        return self.snapshot is not None and not self.missing and self.fault is None


def cache_folder() -> Path:
    """Return the folder of the cache, by the rules of `huggingface_hub.constants`."""
    home = os.getenv("HF_HOME", os.path.join(os.getenv("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    former = os.getenv("HUGGINGFACE_HUB_CACHE", os.path.join(_expanded(home), "hub"))
    return Path(_expanded(os.getenv("HF_HUB_CACHE", former)))


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def is_offline() -> bool:
    """Return whether the network must not be used, by the rules of `huggingface_hub.constants`."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def repository_folder(name: HubName) -> Path:
    return cache_folder() / f"models--{name.repo.replace('/', '--')}"


def look_up(name: HubName, config_alone: bool = False) -> Cached:
    """Find a model in the cache.

    Raises:
        InputError: the repository has no such folder or file, or no weights, or several hashes begin with its revision.
    """
    with reading(repository_folder(name)):
        snapshot = find_snapshot(name)
        if snapshot is None:
            return Cached(None)
        sizes = _listed_files(snapshot)
        listed: Mapping[str, int | None] = dict.fromkeys(_files_in(snapshot)) if sizes is None else sizes
        try:
            needed = needed_files(name, listed, snapshot, config_alone)
        except InputError as error:
            if sizes is not None:
                raise
            return Cached(snapshot, fault=error)
    if sizes is None and not needed.is_certain:
        what = "has a file of weights there, but it may not be the only one"
        remedy = f"name it: {shell_word(name.within(needed.weights[0]))}"
        return Cached(snapshot, fault=InputError(what, culprit=str(name), remedy=remedy))
    return Cached(snapshot, tuple(missing_files(needed.files, snapshot, sizes or {})))


def find_snapshot(name: HubName) -> Path | None:
    """Return the cached folder of a repository's revision; None if it is not cached."""
    folder, revision = repository_folder(name), name.revision or "main"
    ref = folder / "refs" / revision
    if ref.is_file():
        commit = ref.read_text(errors="replace").strip()
        commits = [commit] if is_beside(commit) else []
    elif SHORT_HASH.fullmatch(revision) and (folder / "snapshots").is_dir():
        commits = sorted(each.name for each in (folder / "snapshots").iterdir() if each.name.startswith(revision))
    else:
        commits = []
    if len(commits) > 1:
        raise InputError(
            f"{len(commits)} commits begin with {revision}", culprit=str(name), remedy="give more of the hash"
        )
    snapshots = [folder / "snapshots" / commit for commit in commits]
    return next((each for each in snapshots if each.is_dir()), None)


def _listed_files(snapshot: Path) -> Mapping[str, int] | None:
    """Return the sizes of all files of a commit; None if the cache has no list of them in a known form."""
    path = snapshot.parent.parent / "trees" / f"{snapshot.name}.json"
    if not path.is_file():
        return None
    try:
        with open_for_reading(path) as file:
            content = parse_json(file.read(), path)
    except LoratoolError:
        return None
    files = content.get("files")
    if content.get("format_version") != 1 or not isinstance(files, dict):
        return None
    sizes = {name: size for name, entry in files.items() if (size := _listed_size(entry)) is not None}
    return sizes if len(sizes) == len(files) else None


def _listed_size(entry: Any) -> int | None:
    sizes = [entry.get("lfs_size"), entry.get("size")] if isinstance(entry, dict) else []
    return next((size for size in sizes if isinstance(size, int)), None)


def _files_in(snapshot: Path) -> list[str]:
    """Return the files in a snapshot, including broken links."""
    paths = [Path(folder, file) for folder, _, files in os.walk(snapshot) for file in files]
    return sorted(each.relative_to(snapshot).as_posix() for each in paths)


def missing_files(names: Iterable[str], snapshot: Path, sizes: Mapping[str, int]) -> list[str]:
    """Return the files that are missing in a snapshot or differ from their known size."""
    return [name for name in names if not _is_whole(snapshot / name, sizes.get(name))]


def _is_whole(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)
