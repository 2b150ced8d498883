"""Resolve a user's name for a model: a path, or a repo id on the hub, cached or downloaded into the cache.

An existing path always wins, and a name that looks like a mistyped path is not downloaded. Cached files are used
without asking the hub for newer ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ...durable.fileio import reading
from ...durable.in_place import in_place_folder
from ...durable.partial import set_aside
from ...errors import InputError, MachineError, install_remedy, shell_word
from ..stores.links import StoreLink, here_of, parse_store_link
from .names import HubName, parse_hub_name
from .snapshots import Cached, find_snapshot, is_offline, look_up

_by_ranges: ContextVar[bool] = ContextVar("_by_ranges", default=False)

NO_SUCH = "no such file or folder"


def resolve(name: str | os.PathLike[str], config_alone: bool = False) -> Path:
    """Return the path for `name`: `name` itself if it exists, else the hub model's path in the local cache.

    Files that are not in the cache are downloaded if the extra `hub` is installed. A folder that a killed run has set
    aside is found under its former name.

    Args:
        config_alone: weights of a hub model are needed only if it has no config.json.

    Raises:
        InputError: there is no such path or model, or it may not be downloaded; the remedy tells how to allow it.
        MachineError: the download failed, or its requirements are not installed.
    """
    if _by_ranges.get():
        return by_ranges(name, config_alone)
    found = find_here(name, config_alone)
    return found if isinstance(found, Path) else import_download(found).download(found, config_alone)


def by_ranges(name: str | os.PathLike[str], config_alone: bool = False) -> Path:
    """Return what `resolve` returns, with empty files in the places of those that are not in the cache.

    Their bytes are read by ranges, as those in a store. If the hub does not send parts of files, they are downloaded.

    Raises:
        InputError, MachineError: as `resolve`.
    """
    found = find_here(name, config_alone)
    if isinstance(found, Path):
        return found
    module = import_download(found)
    place: Path = module.place_by_ranges(found) or module.download(found, config_alone)
    return place


@contextmanager
def reading_little() -> Iterator[None]:
    """Keep `resolve` from downloading weights, for a run that reads headers and few numbers."""
    token = _by_ranges.set(True)
    try:
        yield
    finally:
        _by_ranges.reset(token)


def find_here(name: str | os.PathLike[str], config_alone: bool = False) -> Path | HubName:
    """Return what `resolve` returns, or the name of what it would download.

    Raises:
        InputError: as `resolve`.
    """
    text = os.fspath(name)
    path = Path(here_of(text) or text)
    if not text:
        raise InputError("a path is empty")
    with reading(path):
        if path.exists():
            return path
        if former := set_aside(path):
            return former
        if os.path.isdir(in_place_folder(path)):
            remedy = f"wait for that, or end it with loratool recover {shell_word(path)}"
            raise InputError("is in the middle of a change in place", culprit=text, remedy=remedy)
    if path.is_symlink():
        raise InputError(f"is a link to {os.readlink(path)}, which is not there", culprit=text)
    if link := parse_store_link(text):
        return _open_store(link)
    hub_name = parse_hub_name(text)
    if hub_name is None or _is_local(hub_name):
        raise InputError(NO_SUCH, culprit=text, remedy=_similar_names(path) or _as_link(hub_name))
    cached = look_up(hub_name, config_alone)
    if cached.snapshot and cached.is_complete:
        return cached.snapshot / hub_name.path
    if hub_name.is_bare and cached.snapshot is None:
        raise InputError(NO_SUCH, culprit=text, remedy=_similar_names(path) or _as_link(hub_name))
    if is_offline():
        raise _not_in_cache(hub_name, cached)
    return hub_name


def place_named(name: str | os.PathLike[str]) -> Path:
    """Return the path for a name that is none on the hub: the name itself, which may not exist, or that of a link.

    Raises:
        InputError, MachineError: a link is to nothing, or to a store that was not reached.
    """
    text = os.fspath(name)
    link = None if os.path.lexists(text) else parse_store_link(text)
    return _open_store(link) if link else Path(here_of(text) or text)


def _open_store(link: StoreLink) -> Path:
    objects = import_module("..stores.objects", __package__)  # most runs have no use for it
    place: Path = objects.open_store(link)
    return place


def import_download(name: HubName, module: str = ".download") -> ModuleType:
    """Return the module that downloads, or that uploads; most runs have no use for them.

    Raises:
        MachineError: its requirements are not installed, or do not start.
    """
    try:
        return import_module(module, __package__)
    except ImportError as error:  # huggingface_hub is missing or too old
        what = f"{_describe_missing(look_up(name))}; to download it, install the extra `hub`"
        raise MachineError(what, culprit=str(name), remedy=install_remedy("hub")) from error
    except ValueError as error:  # huggingface_hub reads its variables when it is imported
        remedy = "look at HF_ENDPOINT and the other variables of the environment that begin with HF_"
        raise MachineError(f"huggingface_hub does not start: {error}", culprit=str(name), remedy=remedy) from error


def cached_commit(name: str | os.PathLike[str]) -> str | None:
    """Return the hash of the commit whose files `resolve` returns for a name on the hub; None for a path."""
    if os.path.lexists(name) or set_aside(Path(name)) or not (hub_name := parse_hub_name(os.fspath(name))):
        return None
    snapshot = find_snapshot(hub_name)
    return snapshot.name if snapshot else None


def _is_local(name: HubName) -> bool:
    """Return whether a name is a mistyped path: its first folder exists here."""
    return not name.is_link and "/" in name.repo and Path(name.repo).parent.is_dir()


def _as_link(name: HubName | None) -> str | None:
    """Return a remedy for a name that is not a path and could be a model's."""
    link = f"hf://{str(name).removeprefix('hf://')}"
    return f"for the hub's model of this name: {shell_word(link)}" if name and not name.path else None


def _similar_names(path: Path) -> str | None:
    """Return a remedy that names a sibling file or folder with a similar name; None if there is none."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return None
    similar = get_close_matches(path.name, [name for name in names if name != path.name], 1)
    return f"did you mean {shell_word(path.with_name(similar[0]))}?" if similar else None


def _describe_missing(cached: Cached) -> str:
    """Return the problem with a model in the cache, as a clause without the model's name."""
    if cached.snapshot is None:
        return f"{NO_SUCH}, nor in the Hugging Face cache"
    is_cut = any((cached.snapshot.parent.parent / "blobs").glob("*.incomplete"))
    cut = ", since its download was interrupted" if is_cut else ""
    if cached.fault:
        return f"is incomplete in the Hugging Face cache{cut}: it {cached.fault.message}"
    more = f" and {len(cached.missing) - 3} more" if len(cached.missing) > 3 else ""
    names = ", ".join(cached.missing[:3])
    are = "are" if len(cached.missing) > 1 else "is"
    return f"is incomplete in the Hugging Face cache{cut}: {names}{more} {are} missing"


def _not_in_cache(name: HubName, cached: Cached) -> InputError:
    """Return the error for an uncached name that may not be downloaded."""
    if cached.fault and cached.fault.remedy:
        return InputError(_describe_missing(cached), culprit=str(name), remedy=cached.fault.remedy)
    flag = f" --revision {shell_word(name.revision)}" if name.revision else ""
    return InputError(
        f"{_describe_missing(cached)}, and HF_HUB_OFFLINE is set",
        culprit=str(name),
        remedy=f"unset HF_HUB_OFFLINE, or download it first: hf download {shell_word(name.repo)}{flag}",
    )
