"""Download the needed files of a hub model into the local Hugging Face cache, using huggingface_hub.

This is the only module that uses the network, and only for names that the user gives, never for names in files. Locks,
resuming, progress bars, the token and HF_ENDPOINT are huggingface_hub's, which the extra `hub` installs.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from ...durable import disk
from ...durable.fileio import reading, sha256_file, size
from ...errors import InputError, LoratoolError, MachineError
from .choice import needed_files
from .names import HubName, is_inside
from .snapshots import SHORT_HASH, cache_folder, missing_files, repository_folder

COMMIT = re.compile("[0-9a-f]{40}")

HASHED_AT_ONCE = 4  # files; reading takes most of the time

AGAIN = "check the connection and run the command again: complete files are not downloaded twice"


def download(name: HubName, config_alone: bool = False) -> Path:
    """Download the files for a hub name, and return the path of its folder or file in the cache.

    Args:
        config_alone: as in `cache.resolve`.

    Raises:
        InputError: the hub has no such model, revision, folder or file, or requires a login for it.
        MachineError: the disk is too small, the hub was not reached, or a downloaded file is damaged.
    """
    with _explained(name):
        info = _find_revision(name)
    listed = {each.rfilename: each for each in info.siblings or () if is_inside(str(each.rfilename))}
    known_sizes = {file: entry.size for file, entry in listed.items()}
    sizes = {file: nbytes for file, nbytes in known_sizes.items() if nbytes is not None}
    if not SHORT_HASH.fullmatch(str(info.sha)):
        raise MachineError("the hub's answer names no commit", culprit=str(name))
    if COMMIT.fullmatch(name.revision or "") and info.sha != name.revision:  # pinned, so that no other will do
        raise MachineError(f"the hub answers with the commit {info.sha}", culprit=str(name))
    if not all(isinstance(each, str) for each in listed) or not all(isinstance(each, int) for each in sizes.values()):
        raise MachineError("the hub's answer is not a list of files and their sizes", culprit=str(name))
    folder = repository_folder(name) / "snapshots" / str(info.sha)
    is_hash = SHORT_HASH.fullmatch(name.revision or "") and str(info.sha).startswith(name.revision or "")
    with reading(folder):
        while missing := missing_files(needed_files(name, known_sizes, folder, config_alone).files, folder, sizes):
            _require_there(missing, listed, name)
            _require_space(sum(sizes.get(file, 0) for file in missing), name)
            with _explained(name):
                _fetch(name.repo, info.sha if is_hash else name.revision, missing)
            _require_whole(missing, folder, listed, name)
    return folder / name.path


def _find_revision(name: HubName) -> ModelInfo:
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
def _explained(name: HubName) -> Iterator[None]:
    """Convert the errors of huggingface_hub into ours."""
    page, log_in = f"{constants.ENDPOINT}/{name.repo}", "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
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
        raise _from_network(name, error, f"{log_in}, and see {page}") from error


def _from_network(name: HubName, error: Exception, remedy: str) -> LoratoolError:
    """Return the error for a failure of the hub or the network that does not concern the name."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError(f"the hub refuses it ({status})", culprit=str(name), remedy=remedy)
    first = next(filter(None, map(str.strip, str(cause).splitlines())), type(cause).__name__)
    what = f"is not here, and could not be downloaded: {first}"
    return MachineError(what, culprit=str(name), remedy=AGAIN)
