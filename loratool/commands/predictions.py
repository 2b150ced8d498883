"""The adapters of a patch: its spans are predicted from the base with these merged, and the patch has their files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from ..adapters.formats.find import find_adapter_file
from ..adapters.formats.peft_config import CONFIG_NAME
from ..binding.merge.merge_plan import plan_merge
from ..binding.modules.selection import Selection
from ..durable import disk
from ..durable.fileio import copy_range, open_new
from ..errors import InputError, NeedsFlag
from ..files.checkpoint import Checkpoint
from ..files.hub.cache import resolve
from ..numerics.merge import ARITHMETIC_VERSION
from ..patches.chain import PatchChain
from ..patches.patch_file import AttachedAdapter, PatchFile
from ..streaming.merged_source import MergedSource
from .adapter_requests import AdapterRequest
from .inputs import open_adapters


def merged_source(base: Checkpoint, requests: Sequence[AdapterRequest], opened: ExitStack) -> MergedSource:
    """Return a base with adapters merged, without options; `opened` closes their files.

    Raises:
        InputError: an adapter does not fit the base, or only with an option of `merge`.
    """
    try:
        adapters = open_adapters(requests, None, opened, base=base)
        weighted = tuple(zip(adapters, (each.weight for each in requests), strict=True))
        return MergedSource(plan_merge(base, weighted, Selection.parse((), (), None), "both"))
    except NeedsFlag as error:
        what = f"needs an option of merge, which a patch cannot keep: {error.message}"
        raise InputError(what, culprit=error.culprit, remedy="make the patch without --adapter") from error


def attached(requests: Sequence[AdapterRequest]) -> tuple[AttachedAdapter, ...]:
    """Return the files of adapters that a patch has to have."""
    return tuple(
        AttachedAdapter(each.weight, tuple(each.module_weights.items()), {path.name: path for path in _files_of(each)})
        for each in requests
    )


def adapter_paths(requests: Sequence[AdapterRequest]) -> list[Path]:
    """Return the paths of all files of adapters that a patch has to have."""
    return [path for each in requests for path in _files_of(each)]


def _files_of(request: AdapterRequest) -> list[Path]:
    weights = find_adapter_file(resolve(request.path))
    return [path for path in (weights, weights.with_name(CONFIG_NAME)) if path.is_file()]


@contextmanager
def opened_chain(
    base: Checkpoint, name: str, paths: Sequence[str], back: bool = False, is_old: bool = False
) -> Iterator[PatchChain]:
    """Open patches one after the other on a model; the files of their adapters are unpacked meanwhile.

    Args:
        name: of the model, as it was given.
        is_old: as in `PatchChain`.

    Raises:
        InputError: as `PatchChain`, or an adapter in a patch does not fit the base.
    """
    with ExitStack() as opened:
        unpack = partial(unpacked_source, base, opened)
        yield opened.enter_context(closing(PatchChain(base, name, paths, unpack, back, is_old)))


def unpacked_source(base: Checkpoint, opened: ExitStack, patch: PatchFile) -> MergedSource:
    """Write the adapters of a patch to the disk until `opened` ends, and return the base with them merged.

    Raises:
        InputError: they do not fit the base, or another arithmetic merged them.
    """
    if patch.arithmetic != ARITHMETIC_VERSION:
        what = f"was made with arithmetic {patch.arithmetic}; this loratool has {ARITHMETIC_VERSION}"
        raise InputError(what, culprit=str(patch.path), remedy="use the loratool that made it")
    requests, folder = [], Path(opened.enter_context(disk.temporary_folder()))
    for number, adapter in enumerate(patch.adapters):
        place = folder / str(number)
        disk.make_folder(place)
        for name, (offset, length) in adapter.places.items():
            with open_new(place / name) as target:
                copy_range(patch.file, offset, target, 0, length)
        weights = next(name for name in adapter.places if name != CONFIG_NAME)
        path = place if CONFIG_NAME in adapter.places else place / weights
        requests.append(AdapterRequest(os.fspath(path), adapter.weight, dict(adapter.module_weights)))
    return merged_source(base, requests, opened)
