"""Restore the base of a merge where the merged model is."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ...adapters.adapter import Adapter
from ...binding.modules.placement import Placement
from ...durable.fileio import open_for_reading, sampled
from ...durable.in_place import ModelInPlace, Move, own_path
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint
from ...files.folder.side_files import CARD, has_card, undo_path
from ...files.hub.cache import place_named
from ...files.output.model_card import is_unedited
from ...files.output.output import Output
from ...files.tensor_ref import TensorRef
from ...files.weights_file import PlacedTensors, WeightsFile, paths_of
from ...streaming.apply import merge_tensor
from ...streaming.digests import hashes_of_tensors
from ...streaming.in_place import Results, RowWindows
from ...streaming.parallel import choose_device, worker_count
from ...streaming.rewrite import ChangedTensor
from ...streaming.segment import UpdateLoader
from ...undo.reader import UndoFile
from ...undo.records import NOT_RESTORED
from ...undo.writer import read_placements
from ...views.unmerge import UnmergeReport
from ..adapter_requests import parse_adapters
from ..arguments import parse_words
from ..in_place import (
    ELSEWHERE,
    Hashes,
    Planned,
    PlannedChange,
    base_facts,
    change_in_place,
    choose_way,
    files_of,
    former_placements,
    refuse_inside,
    renamed_undo,
    require_layout,
    require_own_rows,
    shards_of,
    stage,
    way_of,
)
from ..merged_models import find_undo, match_adapters, replaced_files, require_names, require_unedited
from .call import Unmerge
from .command import (
    base_files,
    digests_of_unmerge,
    open_merged,
    plan_restored,
    plan_tensors,
    report_unmerge,
)


@dataclass(frozen=True)
class _Opened:
    """The inputs of an unmerge, and the base's files that it makes of the merged model's."""

    merged: Checkpoint
    undo: UndoFile
    adapters: Sequence[Adapter]
    output: Output


def unmerge_in_place(call: Unmerge) -> UnmergeReport:
    """Restore the base of a merge where the merged model is."""
    if call.approximate:
        raise UsageError("--approximate is not exact, so --in-place does not take it", culprit="--approximate")
    path = own_path(call.merged)
    return change_in_place(call, path, partial(_plan, call, path), partial(prepare_unmerge, call))


def _plan(call: Unmerge, path: Path) -> Planned[UnmergeReport]:
    with ExitStack() as opened:
        each = _open(call, path, opened)
        undo = each.undo
        named = [place_named(call.undo)] if call.undo is not None and not each.merged.given_as_file else []
        refuse_inside([*paths_of(adapter.file for adapter in each.adapters), *named], path)
        require_layout(each.output, each.output.files, each.merged)
        for name in undo.replaced():
            raise InputError("was replaced by the merge", culprit=name, remedy=ELSEWHERE)
        require_own_rows(former_placements(undo, each.adapters))
        way = choose_way(each.merged, path, call.by, each.output.files)
        require_unedited(each.merged, undo, call.workers or worker_count())
        report = report_unmerge(undo, os.fspath(call.merged), each.adapters, each.output, dry_run=True)
        return Planned(report, way, [file.name for file in each.output.files])


def _open(call: Unmerge, path: Path, opened: ExitStack, model: ModelInPlace | None = None) -> _Opened:
    """Open the inputs of a call; the merged model may be open already, away from its place."""
    requests = parse_adapters(call.adapters, parse_words(call.drop))
    merged = open_merged(call, model.model if model else path, requests, opened)
    named = call.undo
    if named is None and model and merged.given_as_file:
        named = undo_path(path, is_file=True)
    chain = find_undo(merged, named, "give the undo file with --undo")
    undo = UndoFile(chain[0])
    opened.callback(undo.close)
    if undo.layers:
        message = "repeats layers of its base (layer_replication), and no change in place can remove them"
        raise InputError(message, culprit=str(path), remedy=ELSEWHERE)
    adapters = match_adapters(undo, requests, call.alpha, opened, merged)
    files = base_files(undo)
    require_names(merged, undo, [file.name for file in files])
    output = plan_restored(merged, undo, chain, files, path, merged.given_as_file)
    names = [file.name for file in files_of(merged)]
    renamed = output.files if not merged.given_as_file else (replace(output.files[0], name=names[0]),)
    stays = () if CARD in undo.side else (CARD,)  # an edited card: only the merge's own is removed
    left = tuple(file for file in replaced_files(merged, undo) if file.name not in stays)
    return _Opened(merged, undo, adapters, replace(output, files=renamed, left_behind=left, carried={}))


@contextmanager
def prepare_unmerge(call: Unmerge, model: ModelInPlace) -> Iterator[PlannedChange[UnmergeReport]]:
    """Open a model that is changed in place, and plan how it is restored."""
    with ExitStack() as opened:
        each = _open(call, model.path, opened, model)
        workers, device = call.workers or worker_count(), choose_device(call.device)
        files = files_of(each.merged)
        former, _ = base_facts(model, sampled(each.undo.file), files, partial(_hashes, each))
        load = UpdateLoader(device)
        sources, changed = plan_tensors(each.merged, each.undo, each.undo.specs, each.adapters, load)
        windows = RowWindows(
            output=each.output,
            former=former,
            shards=shards_of(each.merged, files),
            stored={name: each.merged.stored_ref(name) for name in each.merged.stored},
            sources=sources,
            changed=changed,
            whole={name for name in changed if any(not p.update.additive for p in _placements(each, name))},
            back=partial(_merged_again, each, load),
            check=lambda item, results: None,
            by_shard=way_of(model) == "shard",
            device=device,
            workers=workers,
        )
        yield PlannedChange(windows, partial(_finish, call, model, each, workers))


def _hashes(each: _Opened) -> tuple[Hashes, Hashes]:
    names = each.undo.index["tensors"].keys() & each.merged.stored.keys()
    return {}, {name: each.undo.merged_hashes(name) for name in names}


def _placements(each: _Opened, name: str) -> list[Placement]:
    return read_placements(each.undo.index, name, each.undo.specs[name], each.adapters)


def _merged_again(
    each: _Opened, load: UpdateLoader, names: Collection[str], results: Results
) -> tuple[dict[str, ChangedTensor], dict[str, TensorRef]]:
    """Return the tensors that some windows restored, as they are merged again: W' is a function of W."""
    refs = {name: each.merged.stored_ref(name) for name in names}
    merged = {name: merge_tensor(ref, ref, _placements(each, name), load, record=False) for name, ref in refs.items()}
    return merged, {}


def _finish(call: Unmerge, model: ModelInPlace, each: _Opened, workers: int) -> tuple[UnmergeReport, list[Move]]:
    """Check the restored tensors; return the report, and the moves that put the small files into their places."""
    undo = each.undo
    with ExitStack() as opened:
        placed: dict[str, WeightsFile] = {}
        for file in each.output.files:
            place = model.place(file.name)
            opened_file = opened.enter_context(closing(open_for_reading(place)))
            specs = {name: undo.specs[name] for name in file.begin}
            placed |= dict.fromkeys(specs, PlacedTensors(place, opened_file, specs, dict(file.begin)))
        names = [name for name in undo.index["tensors"] if name in undo.specs]
        for name, found in hashes_of_tensors(placed, names, workers).items():
            if found != undo.base_hashes(name):
                raise InputError(NOT_RESTORED, culprit=name)
    report = report_unmerge(undo, os.fspath(call.merged), each.adapters, each.output, dry_run=False)
    report = replace(report, digests=digests_of_unmerge(undo, report, each.adapters))
    small: dict[str, bytes | Path | None] = {}
    if not each.output.is_file:
        root = model.model
        small |= dict.fromkeys(undo.index["new_side"])
        if has_card(root) and is_unedited((root / CARD).read_bytes()):
            small[CARD] = None
        small |= each.output.extras
        small = {name: data for name, data in small.items() if data is not None or (root / name).exists()}
    moves = stage(model, small)
    if call.undo is None:
        moves += renamed_undo(model, _undo_place(each.merged, model), None)
    return report, moves


def _undo_place(merged: Checkpoint, model: ModelInPlace) -> Path:
    """Return the place of the merge's undo file, as if the model were at its own place."""
    place = undo_path(model.path, merged.given_as_file)
    return place.parent / merged.folder.name / place.name if merged.outer else place
