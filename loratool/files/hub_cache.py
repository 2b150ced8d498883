"""Resolve `org/model` in the local Hugging Face cache; nothing is ever downloaded.

The layout is huggingface_hub's: `models--org--model/refs/<revision>` has the commit, and `snapshots/<commit>/` the
files as links into `blobs/`.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

from ..errors import InputError
from .fileio import reading, set_aside

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def cache_folder() -> Path:
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser() / "hub"


def _similar_names(path: Path) -> str | None:
    """Return a remedy that names a file or folder beside it with a similar name, None if there is none."""
    try:
        there = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return None
    similar = get_close_matches(path.name, [name for name in there if name != path.name], 1)
    return f"did you mean {path.with_name(similar[0])}?" if similar else None


def resolve(name: str | os.PathLike[str]) -> Path:
    """Return the path that `name` means: itself if it exists, else the cached snapshot of `org/model[@revision]`.

    A folder that a killed run has set aside is found by its former name.

    Raises:
        InputError: there is no such path and no such snapshot; the remedy is the download command.
    """
    path, text = Path(name), os.fspath(name)
    if not text:
        raise InputError("a path is empty")
    with reading(path):
        if path.exists():
            return path
        if former := set_aside(path):
            return former
    if path.is_symlink():
        raise InputError(f"is a link to {os.readlink(path)}, which is not there", culprit=text)
    if not _NAME.fullmatch(text) or path.parent.is_dir():
        raise InputError("no such file or folder", culprit=text, remedy=_similar_names(path))
    repo, _, revision = text.partition("@")
    folder = cache_folder() / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text(errors="replace").strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if commit and snapshot.is_dir():
        return snapshot
    flag = f" --revision {revision}" if revision else ""
    raise InputError(
        "no such file or folder, and not in the local Hugging Face cache",
        culprit=text,
        remedy=f"download it first: hf download {repo}{flag}",
    )
