"""Compare a merged model and given adapters with its undo file: hashes of adapters, types and shapes of tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..binding.modules.module_weights import recorded_weights, spell_weight
from ..durable.fileio import length_of, read_file
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.dtypes import TensorSpec
from ..files.folder.sentence_transformers import DENSE
from ..files.folder.side_files import (
    CARD,
    LeftBehind,
    has_card,
    is_of_tokenizer,
    is_of_whole,
    matches,
    undo_files,
    undo_path,
)
from ..files.hub.cache import place_named
from ..files.output.model_card import is_unedited
from ..files.output.output import CONTAINERS
from ..files.output.undo_places import undo_chain
from ..files.repeated_layers import repeat_layers
from ..numerics.merge import ARITHMETIC_VERSION
from ..streaming.digests import hashes_of_tensors
from ..undo.checks import prefix_of
from ..undo.reader import UndoFile, belongs
from ..undo.records import EDITED
from .adapter_requests import AdapterRequest
from .inputs import open_adapters, share_hashes

REPLACED, OF_THE_MERGE = "replaced by the base's", "the base has none"  # a file that a merge wrote, or a user since


def find_undo(merged: Checkpoint, named: str | os.PathLike[str] | None, remedy: str) -> list[Path]:
    """Return the undo files of a merged model: that of the merge, and those of earlier merges.

    Args:
        named: the value of --undo.
        remedy: of the error.

    Raises:
        InputError: there is none.
    """
    model = merged.path if merged.given_as_file else merged.folder
    path = undo_path(model, merged.given_as_file) if named is None else place_named(named)
    chain = undo_chain(model, merged.given_as_file, belongs) if named is None else undo_files(path)
    if not chain and not path.is_file():
        raise InputError(
            f"has no undo file {path}: it was merged with --no-undo, by another tool, or the file was moved",
            culprit=str(merged.path),
            remedy=remedy,
        )
    return chain or [path]


def match_adapters(
    undo: UndoFile,
    requests: Sequence[AdapterRequest],
    alpha: float | None,
    opened: ExitStack,
    merged: Checkpoint,
) -> list[Adapter]:
    """Open the adapters, in the order of the undo file.

    Raises:
        InputError: an adapter of the merge is missing, or one that is given is not of the merge.
    """
    if undo.index["arithmetic"] != ARITHMETIC_VERSION:
        raise InputError(
            f"was written with arithmetic {undo.index['arithmetic']}; this loratool has {ARITHMETIC_VERSION}",
            culprit=str(undo.path),
            remedy="use the version of loratool that merged",
        )
    adapters = open_adapters(requests, alpha, opened, base=merged, deeper=undo.layers is not None)
    left = list(share_hashes(zip(adapters, [each.weight for each in requests], strict=True), "merged adapter"))
    matched = []
    for recorded in undo.index["adapters"]:
        same = [pair for pair in left if pair[0].sha256 == recorded["sha256"]]
        scaled = [pair for pair in same if pair[0].scales_sha256 == recorded["scales_sha256"]]
        weighed = recorded["weight"], recorded_weights(recorded)
        match = next((pair for pair in scaled if (pair[1], pair[0].module_weights) == weighed), None)
        if match is None:
            raise _missing_adapter(undo, recorded, left, same, scaled)
        left.remove(match)
        matched.append(match[0])
    if left:
        raise InputError("was not part of the merge", culprit=left[0][0].name)
    return matched


def _missing_adapter(
    undo: UndoFile,
    recorded: Mapping[str, Any],
    left: Sequence[tuple[Adapter, float]],
    same: Sequence[tuple[Adapter, float]],
    scaled: Sequence[tuple[Adapter, float]],
) -> InputError:
    name, weight = recorded["name"], spell_weight(recorded["weight"], recorded_weights(recorded))
    if scaled:
        other, its = scaled[0]
        return InputError(
            f"was merged with weight {weight}, not {spell_weight(its, other.module_weights)}", culprit=other.name
        )
    if same:
        return InputError(
            "has another rank, alpha or config than in the merge, or --drop differs",
            culprit=same[0][0].name,
        )
    missing = f"used {name} (sha256 {recorded['sha256'][:16]}...) with weight {weight}"
    of_merge = {each["sha256"] for each in undo.index["adapters"]}
    foreign = next((adapter.name for adapter, _ in left if adapter.sha256 not in of_merge), None)
    if foreign is not None:
        return InputError(f"is not an adapter of the merge, which {missing}", culprit=foreign)
    return InputError(
        f"the merge also {missing}", culprit=str(undo.path), remedy="give all adapters of the merge, with their weights"
    )


def as_in_base(merged: Checkpoint, undo: UndoFile) -> Checkpoint:
    """Return a merged model with the base's layers alone, under the base's numbers; itself if no layer is repeated.

    Raises:
        InputError: another layer has not the tensors that the merge wrote.
    """
    if undo.layers is None:
        return merged
    for name, spec in undo.copies.items():
        if merged.stored.get(name) != spec:
            raise _not_written(name, merged.stored.get(name), spec)
    for name in merged.stored:
        if undo.layers.number_of(name) not in (None, *undo.layers.numbers) and name not in undo.copies:
            raise _not_written(name)
    return repeat_layers(merged, undo.layers, merged.config)


def require_written(merged: Checkpoint, undo: UndoFile) -> None:
    """Raise InputError if a tensor has another type or shape than the merge wrote, or was added since."""
    written = undo.merged_specs
    for name in merged.stored:
        if name not in written:
            raise _not_written(name)
    for name, expected in written.items():
        if merged.stored.get(name) != expected:
            raise _not_written(name, merged.stored.get(name), expected)


def _not_written(name: str, stored: TensorSpec | None = None, expected: TensorSpec | None = None) -> InputError:
    """Return the error for a tensor that a merge did not write, or wrote with another type or shape."""
    if expected is None:
        return InputError("is not in the output of the merge: the merged model was edited since", culprit=name)
    message = f"is {stored or 'missing'}, but the merge wrote {expected}: it was edited since"
    return InputError(message, culprit=name)


def require_unedited(merged: Checkpoint, undo: UndoFile, workers: int) -> None:
    """Raise InputError unless an undo file is sound, and the tensors that the merge changed are as it wrote them."""
    undo.require_sound()
    names = [name for name in undo.index["tensors"] if name in merged.stored]
    for name, found in hashes_of_tensors(merged.shard_of, names, workers).items():
        if found != undo.merged_hashes(name):
            raise InputError(EDITED, culprit=name)


def replaced_files(merged: Checkpoint, undo: UndoFile) -> Iterator[LeftBehind]:
    """Yield the merged model's side files that differ from the base's, as a user may have edited them.

    It omits an index, which each merge rewrites, and an unedited card.
    """
    names = {*undo.side, *undo.index["new_side"], CARD} if merged.has_side_files else set()
    for name in sorted(name for name in names if not name.endswith(".index.json")):
        path, was = (merged.root if is_of_whole(name) else merged.folder) / name, undo.side.get(name)
        if not path.is_file() or (was is not None and length_of(path) == len(was) and read_file(path) == was):
            continue
        if name != CARD or not has_card(merged.root) or not is_unedited(read_file(path)):
            place = path.relative_to(merged.root).as_posix()
            yield LeftBehind(place, length_of(path), OF_THE_MERGE if was is None else REPLACED)


def require_names(merged: Checkpoint, undo: UndoFile, files: Iterable[str]) -> None:
    """Raise InputError for files that the base of this merged model cannot have had.

    Args:
        files: the names of the base's weights files.
    """
    held, ends = {shard.place for shard in merged.shards}, CONTAINERS[merged.container]
    folders = {part.prefix for part in merged.models} | {""}
    shards = [] if undo.index["file"] else [*files]
    for name in (*undo.side, *undo.index["new_side"], *shards):
        last = name.rpartition("/")[2]
        taken = name in shards and name not in held and (last.startswith(".") or not last.endswith(ends))
        fits = prefix_of(name) in folders or is_of_tokenizer(name) or _is_module(merged, name)
        if not fits or taken:
            raise InputError(f"it names {name!r}, which is not a file of a model", culprit=str(undo.path))
    if merged.given_as_file:
        return
    for name in undo.index["new_side"]:
        if name.rpartition("/")[2] == "config.json" and (merged.folder / name).exists():
            raise InputError("is not in the output of the merge: the merged model was edited since", culprit=name)


def _is_module(merged: Checkpoint, name: str) -> bool:
    """Return whether a file is that of a dense layer beside the transformer, and the merged model has it too."""
    return matches(name, DENSE) and (merged.root / name).is_file() and prefix_of(name) != f"{merged.folder.name}/"
