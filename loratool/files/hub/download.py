"""Download the needed files of a hub model into the local Hugging Face cache, using huggingface_hub.

This is the only module that uses the network, and only for names that the user gives, never for names in files. Locks,
resuming, progress bars, the token and HF_ENDPOINT are huggingface_hub's, which the extra `hub` installs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, hf_hub_url, snapshot_download
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from ...durable import disk
from ...durable.elsewhere import forget_stand_ins, stand_in
from ...durable.fileio import reading, sha256_file, size
from ...errors import InputError, LoratoolError, MachineError, show_as
from ..stores.links import at_end
from .choice import Needed, needed_files
from .names import HubName, is_inside
from .snapshots import SHORT_HASH, cache_folder, missing_files, repository_folder

utils: Any = import_module("huggingface_hub.utils")
stream: Any = getattr(utils, "http_stream_backoff", None)  # None before version 1: files are downloaded whole

COMMIT = re.compile("[0-9a-f]{40}")

# Files beside the weights that tell what these are
CONFIGS = ("config.json", "model_index.json", "modules.json", ".safetensors.index.json")

HASHED_AT_ONCE = 4  # files; reading takes most of the time

_placed: dict[HubName, Path | None] = {}  # name -> where it stands

AGAIN = "check the connection and run the command again: complete files are not downloaded twice"


def download(name: HubName, config_alone: bool = False) -> Path:
    """Download the files for a hub name, and return the path of its folder or file in the cache.

    Args:
        config_alone: as in `cache.resolve`.

    Raises:
        InputError: the hub has no such model, revision, folder or file, or requires a login for it.
        MachineError: the disk is too small, the hub was not reached, or a downloaded file is damaged.
    """
    found = _find_commit(name)
    with reading(found.folder):
        while missing := found.missing(found.needed(config_alone).files):
            found.fetch(missing)
    return found.folder / name.path


def place_by_ranges(name: HubName) -> Path | None:
    """Put empty files in the places of a model's, to be read by ranges; its configs are downloaded.

    Returns:
        The path of its folder or file, until the commands that run have ended; None if the hub sends whole files, or
        does not tell their sizes.

    Raises:
        InputError, MachineError: as `download`.
    """
    if name not in _placed:
        folder: Any = disk.temporary_folder()
        at_end.append(partial(_forget, name, folder))
        _placed[name] = _place(name, Path(folder.name)) if stream else None
    return _placed[name]


def _forget(name: HubName, folder: Any) -> None:
    _placed.pop(name, None)
    forget_stand_ins()
    folder.cleanup()


def _place(name: HubName, into: Path) -> Path | None:
    """Do what `place_by_ranges` says, in a folder for a folder of the form of the cache's."""
    found = _find_commit(name)
    with reading(found.folder):
        while True:
            needed = found.needed()
            small = [file for file in needed.files if file.endswith(CONFIGS)]
            if not (missing := found.missing(small)):
                break
            found.fetch(missing)
        others = [file for file in needed.files if file not in small]
        _require_there(others, found.listed, name)
        if not all(found.sizes.get(file) for file in others):
            return None
        place = into / found.folder.relative_to(cache_folder())
        for file in small:
            disk.make_folder((place / file).parent)
            disk.symlink(found.folder / file, place / file)
    weights = [file for file in needed.weights if file in others]
    if weights and _read_range(name, found, weights[0], 0, 1) is None:
        return None
    show_as(str(place), name.repo)
    for file in others:
        disk.make_folder((place / file).parent)
        disk.open_file(place / file, "w+b").close()
        stand_in(place / file, _HubFile(name, found, file))
    return place / name.path


class _HubFile:
    """The bytes of a file of a commit, which stays as it is."""

    def __init__(self, name: HubName, commit: _Commit, file: str) -> None:
        self.name, self.nbytes, self.identity = name.within(file), commit.sizes[file], commit.folder.name
        self._name, self._commit, self._file = name, commit, file

    def fetch(self, first: int, end: int) -> bytes:
        data = _read_range(self._name, self._commit, self._file, first, end)
        if data is None:
            raise MachineError("the hub sends all of it for a part", culprit=self.name, remedy=AGAIN)
        return data

    def require_same(self) -> None:
        pass


@dataclass(frozen=True)
class _Commit:
    """A commit of a repository as the hub lists it, and its folder in the cache."""

    name: HubName
    listed: Mapping[str, RepoSibling]
    sizes: Mapping[str, int]
    revision: str | None  # to ask for
    folder: Path

    def needed(self, config_alone: bool = False) -> Needed:
        sizes = {file: entry.size for file, entry in self.listed.items()}
        return needed_files(self.name, sizes, self.folder, config_alone)

    def missing(self, files: Iterable[str]) -> list[str]:
        return missing_files(files, self.folder, self.sizes)

    def fetch(self, missing: list[str]) -> None:
        _require_there(missing, self.listed, self.name)
        _require_space(sum(self.sizes.get(file, 0) for file in missing), self.name)
        with hub_errors(self.name):
            _fetch(self.name.repo, self.revision, missing)
        _require_whole(missing, self.folder, self.listed, self.name)


def _find_commit(name: HubName) -> _Commit:
    """Ask the hub for a revision's files.

    Raises:
        InputError: the hub has no such model or revision, or requires a login for it.
        MachineError: the hub was not reached, or its answer is none.
    """
    with hub_errors(name):
        info = find_revision(name)
    listed = {each.rfilename: each for each in info.siblings or () if is_inside(str(each.rfilename))}
    sizes = {file: entry.size for file, entry in listed.items() if entry.size is not None}
    if not SHORT_HASH.fullmatch(str(info.sha)):
        raise MachineError("the hub's answer names no commit", culprit=str(name))
    if COMMIT.fullmatch(name.revision or "") and info.sha != name.revision:  # pinned, so that no other will do
        raise MachineError(f"the hub answers with the commit {info.sha}", culprit=str(name))
    if not all(isinstance(each, str) for each in listed) or not all(isinstance(each, int) for each in sizes.values()):
        raise MachineError("the hub's answer is not a list of files and their sizes", culprit=str(name))
    folder = repository_folder(name) / "snapshots" / str(info.sha)
    is_hash = SHORT_HASH.fullmatch(name.revision or "") and str(info.sha).startswith(name.revision or "")
    return _Commit(name, listed, sizes, info.sha if is_hash else name.revision, folder)


def _read_range(name: HubName, found: _Commit, file: str, first: int, end: int) -> bytes | None:
    """Get bytes first:end of a file of a commit; None if the hub sends whole files.

    Raises:
        MachineError: it sends other bytes.
    """
    url = hf_hub_url(name.repo, file, revision=found.folder.name)
    headers: dict[str, str] = utils.build_hf_headers(library_name="loratool")
    headers |= {"Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with hub_errors(name), stream("GET", url, headers=headers, follow_redirects=True) as answer:
        utils.hf_raise_for_status(answer)
        if answer.status_code == 200:
            return None
        stated = answer.headers.get("content-range")
        if stated == f"bytes {first}-{end - 1}/{found.sizes[file]}":
            for part in answer.iter_bytes():
                data += part
                if len(data) > end - first:
                    break
    if len(data) != end - first:
        what = f"the hub does not send the bytes {first} to {end} of {file} that were asked for"
        raise MachineError(what, culprit=str(name), remedy=AGAIN)
    return bytes(data)


def find_revision(name: HubName) -> ModelInfo:
    """Get a revision's commit and files from the hub. A short hash is searched for among the commits."""
    api = HfApi(library_name="loratool")
    try:
        return api.model_info(name.repo, revision=name.revision, files_metadata=True)
    except errors.RevisionNotFoundError:
        if not (name.revision and SHORT_HASH.fullmatch(name.revision)):
            raise
        commits = [each.commit_id for each in api.list_repo_commits(name.repo)]
        matching = [commit for commit in commits if commit.startswith(name.revision)]
        if len(matching) != 1:
            raise
        return api.model_info(name.repo, revision=matching[0], files_metadata=True)


def _fetch(repo: str, revision: str | None, files: list[str]) -> None:
    """Download files into the cache, in a thread of its own.

    huggingface_hub's threads end only when their files are complete, and it waits for them even on Ctrl-C.
    """
    fetcher = ThreadPoolExecutor(1)
    patterns = [escape(file) for file in files]
    done = fetcher.submit(
        snapshot_download,
        repo,
        revision=revision,
        cache_dir=cache_folder(),
        allow_patterns=patterns,
        library_name="loratool",
    )
    fetcher.shutdown(wait=False)
    done.result()


def _require_there(files: list[str], listed: Mapping[str, object], name: HubName) -> None:
    """Raise InputError for a file that an index names and that is missing in the repository."""
    if absent := [file for file in files if file not in listed]:
        raise InputError(f"is incomplete on the hub: {absent[0]} is missing", culprit=str(name))


def _require_whole(files: list[str], folder: Path, listed: Mapping[str, RepoSibling], name: HubName) -> None:
    """Remove files whose size or sha256 differs from the hub's list, and raise MachineError for them.

    huggingface_hub does not compare them all, and the next run would treat such a file as complete.
    """
    with ThreadPoolExecutor(HASHED_AT_ONCE) as hashers:
        checks = list(hashers.map(lambda file: _is_as_listed(folder / file, listed[file]), files))
    if all(checks):
        return
    broken = [file for file, is_whole in zip(files, checks, strict=True) if not is_whole]
    for file in broken:
        if (folder / file).is_symlink():  # a link to anything other than a blob is the user's
            disk.unlink(folder.parent.parent / "blobs" / Path(os.readlink(folder / file)).name)
        disk.unlink(folder / file)
    raise MachineError(f"{broken[0]} is not as the hub lists it", culprit=str(name), remedy=AGAIN)


def _is_as_listed(path: Path, listed: RepoSibling) -> bool:
    if not path.is_file() or listed.size not in (None, path.stat().st_size):
        return False
    return not listed.lfs or sha256_file(path) == listed.lfs.sha256


def _require_space(nbytes: int, name: HubName) -> None:
    """Raise MachineError unless the cache's disk has `nbytes` free."""
    folder = cache_folder()
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    if (free := shutil.disk_usage(existing).free) < nbytes:
        raise MachineError(
            f"has {size(nbytes)} to download, and {size(free)} are free in {folder}",
            culprit=str(name),
            remedy="free some space, or set HF_HUB_CACHE to a folder on another disk",
        )


@contextmanager
def hub_errors(name: HubName, failed: str = "is not here, and could not be downloaded") -> Iterator[None]:
    """Convert the errors of huggingface_hub into ours; `failed` says so of the network's."""
    page, log_in = f"{constants.ENDPOINT}/{name.repo}", "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except LoratoolError:
        raise
    except errors.GatedRepoError as error:
        what = "is gated: the hub gives it to those who have accepted its terms"
        raise InputError(what, culprit=str(name), remedy=f"accept them at {page}, and {log_in}") from error
    except errors.RepositoryNotFoundError as error:
        what = "no such file or folder, and the hub has no such model, or keeps it private"
        raise InputError(what, culprit=str(name), remedy=f"check the name; for a private model {log_in}") from error
    except errors.RevisionNotFoundError as error:
        what = f"{name.repo} has no revision {name.revision or 'main'} on the hub"
        remedy = f"look at {page}/commits/main; a slash in a branch's name is written %2F"
        raise InputError(what, culprit=str(name), remedy=remedy) from error
    except Exception as error:  # of the network library too, which changes with huggingface_hub's version
        raise _from_network(name, error, failed, f"{log_in}, and see {page}") from error


def _from_network(name: HubName, error: Exception, failed: str, remedy: str) -> LoratoolError:
    """Return the error for a failure of the hub or the network that does not concern the name."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError(f"the hub refuses it ({status})", culprit=str(name), remedy=remedy)
    first = next(filter(None, map(str.strip, str(cause).splitlines())), type(cause).__name__)
    return MachineError(f"{failed}: {first}", culprit=str(name), remedy=AGAIN)
