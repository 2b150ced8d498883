"""The model that a patch is to make: on disk, or what a chain of patches makes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from ...files.checkpoint import Checkpoint, classify_checkpoint, open_checkpoint
from ...files.folder.side_files import LeftBehind
from ...files.weights_file import WeightsFile, paths_of
from ...patches.model_files import ModelFiles
from ...patches.side import read_side_file, side_names
from ...patches.sources import ModelSource, TensorSource
from ..arguments import parse_paths
from ..predictions import opened_chain
from .call import Patch


@dataclass(frozen=True)
class PatchTarget:
    """An open target.

    Attributes:
        name: as it was given.
        side: its side files.
        left: files beside it that stay behind.
        digest: None if it is not known yet.
        opened: its weights files, or those of the patches' base.
    """

    name: str
    files: ModelFiles
    source: TensorSource
    side: Mapping[str, bytes]
    left: tuple[LeftBehind, ...]
    digest: str | None
    opened: tuple[WeightsFile, ...]
    paths: tuple[Path, ...]


def open_target(call: Patch, base: Checkpoint, opened: ExitStack) -> PatchTarget:
    """Open what a call names as TUNED; `opened` closes it.

    Raises:
        UsageError: it names nothing, or several models without --fold.
    """
    paths = parse_paths(call.tuned)
    if not paths:
        raise UsageError("no model given", culprit="tuned")
    if call.fold:
        chain = opened.enter_context(opened_chain(base, os.fspath(call.base), paths))
        places = tuple(patch.path for patch in chain.patches)
        return PatchTarget(paths[-1], chain.files, chain.source, chain.side(), (), chain.digest, base.shards, places)
    if len(paths) > 1:
        raise UsageError("one TUNED, or patches with --fold", culprit=paths[1], remedy="give one model, or add --fold")
    tuned = opened.enter_context(closing(open_checkpoint(paths[0])))
    names = side_names(tuned)
    side = {name: read_side_file(tuned, name) for name in names}
    left = () if tuned.given_as_file else classify_checkpoint(tuned)[1]
    rest = tuple(each for each in left if each.name not in names)
    files = ModelFiles.of(tuned)
    return PatchTarget(paths[0], files, ModelSource(tuned), side, rest, None, tuned.shards, (*paths_of(tuned.shards),))
