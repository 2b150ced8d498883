"""The digests of models and adapters by their paths, for what names them: recipes, locks and attestations."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..adapters.formats import holds_adapter, open_adapter, open_other
from ..files.checkpoint import open_checkpoint
from ..files.weights_file import WeightsFile, require_unchanged
from ..streaming.digests import digest_of_files


def digest_of_path(path: str | os.PathLike[str]) -> str:
    """Read all of a model or an adapter once, and return its digest as `files.digest` defines it.

    Raises:
        InputError: it cannot be read, changes meanwhile, or has a name that has no digest.
    """
    files, close = _opened(path)
    try:
        digest = digest_of_files(files)
        require_unchanged(files)
        return digest
    finally:
        close()


def _opened(path: str | os.PathLike[str]) -> tuple[Sequence[WeightsFile], Callable[[], None]]:
    if not holds_adapter(path):
        checkpoint = open_checkpoint(path)
        return checkpoint.shards, checkpoint.close
    if other := open_other(path):
        return other[0].members, other[0].close
    file = open_adapter(path, lenient=True).file
    return file.members, file.close
