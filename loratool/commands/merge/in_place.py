"""Merge adapters into a model where it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...binding.merge.coded_bases import plan_codes
from ...binding.merge.merge_plan import MergePlan
from ...binding.ties.tied_weights import stored_copies
from ...binding.ties.ties import find_tie
from ...durable import disk
from ...durable.fileio import open_new
from ...durable.in_place import ModelInPlace, Move, own_path
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import MERGE_DTYPES
from ...files.folder.side_files import CARD, undo_path
from ...files.output.output import Output, OutputFile
from ...files.output.plan import plan_output
from ...files.tensor_ref import TensorRef
from ...files.weights_file import paths_of, require_unchanged
from ...numerics.rounding_stats import RoundingStats
from ...streaming.apply import merge_tensor, plan_changed_tensors, restore_tensor
from ...streaming.digests import TensorHashes, hashes_of_tensors
from ...streaming.in_place import Results, RowWindows
from ...streaming.items import MapRows
from ...streaming.parallel import choose_device, worker_count
from ...streaming.restored import RestoredRows, RestoredTensors, restored_tensors
from ...streaming.rewrite import ChangedTensor, refuse_overflow
from ...streaming.segment import UpdateLoader
from ...undo.kept_records import KeptRecords
from ...undo.reader import UndoFile
from ...undo.writer import (
    UndoWriter,
    adapter_entry,
    largest_undo,
    make_entries,
    read_placements,
    sort_adapters,
    unrestored,
)
from ...views.merge import MergeReport
from ..arguments import dtype_word, parse_words
from ..in_place import (
    ELSEWHERE,
    Hashes,
    Planned,
    PlannedChange,
    base_facts,
    change_in_place,
    choose_way,
    file_of,
    files_of,
    former_placements,
    not_recovered,
    refuse_inside,
    renamed_undo,
    require_layout,
    require_own_rows,
    shards_of,
    stage,
    way_of,
)
from ..merged_models import replaced_files, require_unedited
from .call import Merge
from .command import PlannedMerge, check_factors, describe_merge, digests_of_merge, plan_call
from .replaced import FormerMerge
from .report import build_report


def merge_in_place(call: Merge) -> MergeReport:
    """Merge adapters into a model where it is; with `replace`, in the place of those of a former merge."""
    if not call.undo:
        raise UsageError("--in-place needs the undo file, which is the way back", culprit="--no-undo")
    path = own_path(call.base)
    return change_in_place(call, path, partial(_plan, call, path), partial(prepare_merge, call))


@dataclass(frozen=True)
class _Laid:
    """A planned merge whose output has the files of the base, which are the model's files or are restored from them.

    Attributes:
        model: the model that is changed: the base, or with `former` a merged model.
        files: its files as they are.
    """

    plan: MergePlan
    output: Output
    model: Checkpoint
    files: Sequence[OutputFile]
    former: FormerMerge | None


def _plan(call: Merge, path: Path) -> Planned[MergeReport]:
    with ExitStack() as opened:
        laid = _laid_out(plan_call(call, opened), call, path)
        _require_possible(laid, path)
        workers = call.workers or worker_count()
        check_factors(laid.plan, workers)
        way = choose_way(laid.model, path, call.by, laid.output.files)
        if laid.former:
            require_unedited(laid.model, laid.former.base.undo, workers)
        largest = largest_undo(laid.plan, laid.output) if call.dry_run else None
        report = build_report(laid.plan, laid.output, os.fspath(call.base), {}, largest, dry_run=True)
        report = replace(report, replaced=laid.former.names if laid.former else ())
        return Planned(report, way, [file.name for file in laid.files])


def _laid_out(planned: PlannedMerge, call: Merge, path: Path) -> _Laid:
    """Return the output with the files of the base, whose headers have no room for what a merge says of itself."""
    base, dtype, former = planned.plan.base, MERGE_DTYPES[dtype_word(call.dtype)], planned.former
    model = former.base.tensors.merged if former else base
    plan = plan_codes(planned.plan, call.quantized, dtype, parse_words(call.allow))
    output = plan_output(
        base,
        path,
        base.given_as_file,
        describe_merge(plan),
        plan.written,
        None if base.is_gguf else dtype,
        edits=plan.edits,
        container=base.container,
    )
    now = files_of(model)
    names = {shard.place: file.name for shard, file in zip(model.shards, now, strict=True)}
    if model.given_as_file is not base.given_as_file or {shard.place for shard in base.shards} != names.keys():
        raise InputError("has other files than the base", culprit=str(path), remedy=ELSEWHERE)
    files = now if model is base else [file_of(shard, names[shard.place]) for shard in base.shards]
    require_layout(output, files, model)
    extras = dict(output.extras)
    if [(file.name, file.header) for file in output.files] != [(file.name, file.header) for file in files]:
        extras = {name: data for name, data in extras.items() if not name.endswith(".index.json")}
    undo = undo_path(path, model.given_as_file)
    if model.outer:
        undo = path / model.folder.name / undo.name
    left = tuple(replaced_files(model, former.base.undo)) if former else ()
    output = replace(output, files=tuple(files), extras=extras, undo=undo, left_behind=left)
    return _Laid(plan, output, model, now, former)


def _require_possible(laid: _Laid, path: Path) -> None:
    """Raise InputError for a merge that cannot be done in place, or whose plan is another one in the middle of it."""
    plan, base = laid.plan, laid.plan.base
    for name in sorted(plan.changed & base.weights.keys()):
        raise InputError("is stored as codes, which cannot be changed in place", culprit=name, remedy=ELSEWHERE)
    replaced = laid.former.base.undo.replaced() if laid.former else []
    for name in (*unrestored(plan, laid.output), *replaced):
        raise InputError("is replaced, and not by an update of its rows", culprit=name, remedy=ELSEWHERE)
    for name, placements in plan.requested.items():
        if any(p.update.base for p in placements):
            raise InputError("has an update that brings its base's weights along", culprit=name, remedy=ELSEWHERE)
    require_own_rows(plan.placements)
    if laid.former:
        require_own_rows(former_placements(laid.former.base.undo, laid.former.adapters))
    tie = find_tie(base)
    if tie and tie.embedding in plan.changed and stored_copies(base, tie):
        raise InputError("is stored twice, and both change as one", culprit=tie.embedding, remedy=ELSEWHERE)
    adapters = (*(adapter for adapter, _ in plan.adapters), *(laid.former.adapters if laid.former else ()))
    refuse_inside(paths_of(adapter.file for adapter in adapters), path)


@contextmanager
def prepare_merge(call: Merge, model: ModelInPlace) -> Iterator[PlannedChange[MergeReport]]:
    """Open a model that is changed in place, and plan the merge into it."""
    with ExitStack() as opened:
        planned = plan_call(call, opened, model)
        laid = _laid_out(planned, call, model.path)
        plan, output, former = laid.plan, laid.output, laid.former
        workers, device = call.workers or worker_count(), choose_device(call.device)
        entries = [adapter_entry(*pair) for pair in sort_adapters(plan.adapters)], make_entries(plan, output)
        identity = json.dumps([entries, former.described if former else {}], sort_keys=True)
        files, read = base_facts(
            model,
            hashlib.sha256(identity.encode()).hexdigest(),
            laid.files,
            partial(_hashes, laid, workers),
        )
        load = UpdateLoader(device)
        sources = plan.stored_sources(output.specs)
        changed = plan_changed_tensors(plan, load, record=True)
        windows = RowWindows(
            output=output,
            former=files,
            shards=shards_of(laid.model, laid.files),
            stored={name: laid.model.stored_ref(name) for name in laid.model.stored},
            sources=sources,
            changed={**changed, **(former.base.rest(sources, changed) if former else {})},
            whole=_whole(laid),
            back=partial(_taken_back, laid, load),
            check=partial(_check, plan, output),
            by_shard=way_of(model) == "shard",
            device=device,
            workers=workers,
        )
        yield PlannedChange(windows, partial(_finish, call, model, planned, laid, read, workers))


def _hashes(laid: _Laid, workers: int) -> tuple[Hashes, Hashes]:
    """Return the hashes of the base's tensors, which a former merge's undo file has, and of the model's that change."""
    if laid.former:
        undo = laid.former.base.undo
        old = {name: undo.merged_hashes(name) for name in {*laid.plan.written, *undo.index["tensors"]}}
        return {name: undo.base_hashes(name) for name in undo.specs}, old
    hashes = hashes_of_tensors(laid.model.shard_of, laid.model.stored, workers)
    return hashes, {name: hashes[name] for name in laid.plan.written}


def _whole(laid: _Laid) -> set[str]:
    """Return the tensors whose rows depend on others: of DoRA's columns, replaced ones, those of other records."""
    plan = laid.plan
    whole = {
        name
        for name in plan.changed
        if plan.sources[name].file is not plan.base.shard_of[name]
        or any(not placement.update.additive for placement in plan.placements.get(name, ()))
    }
    if laid.former:
        undo = laid.former.base.undo
        for name in plan.changed & undo.index["tensors"].keys():
            edges = {edge for p in plan.placements.get(name, ()) for edge in (p.start, p.stop)}
            if edges != {edge for run in undo.runs(name) for edge in run}:
                whole.add(name)
    return whole


def _taken_back(
    laid: _Laid, load: UpdateLoader, names: Collection[str], results: Results
) -> tuple[dict[str, ChangedTensor], dict[str, TensorRef]]:
    """Return the tensors that some windows changed, as they were: restored from the records, and merged as formerly."""
    plan = laid.plan
    records = KeptRecords((name, start, stop, each.payload, each.sum) for name, start, stop, (each,) in results)
    restored = {
        name: restore_tensor(plan.base.specs[name], records, name, plan.placements.get(name, ()), load)
        for name in {tensor for tensor, *_ in results}
    }
    if laid.former is None:
        return restored, {}
    undo, adapters, model = laid.former.base.undo, laid.former.adapters, laid.model
    tensors = RestoredTensors(model, undo, restored.__getitem__, restored.keys())
    back, sources = dict(restored), dict[str, TensorRef]()
    for name in names:
        if name in undo.index["tensors"]:
            file = RestoredRows(tensors, model.shard_of[name]) if name in restored else model.shard_of[name]
            sources[name] = TensorRef(file, name)
            placements = read_placements(undo.index, name, undo.specs[name], adapters)
            back[name] = merge_tensor(sources[name], sources[name], placements, load, record=False)
    return back, sources


def _check(plan: MergePlan, output: Output, item: MapRows, blocks: Sequence[Any]) -> None:
    refuse_overflow(item.tensor, [block.change for block in blocks], plan.sources, output)


def _require_new(model: ModelInPlace, laid: _Laid, place: Path, read: Hashes, workers: int) -> None:
    """Raise InputError unless the base can be restored from the model: so each window was merged once."""
    with closing(UndoFile(place)) as undo:
        tensors = restored_tensors(laid.model, undo, [adapter for adapter, _ in sort_adapters(laid.plan.adapters)])
        files = {name: RestoredRows(tensors, laid.model.shard_of[name]) for name in undo.index["tensors"]}
        try:
            found = hashes_of_tensors(files, files, workers)
        except InputError as error:  # rows that no record restores
            raise not_recovered(model, error.culprit) from error
        for name in files:
            if found[name] != read[name]:
                raise not_recovered(model, name)


def _finish(
    call: Merge,
    model: ModelInPlace,
    planned: PlannedMerge,
    laid: _Laid,
    read: Hashes,
    workers: int,
) -> tuple[MergeReport, list[Move]]:
    """Write the undo file and the small files; return the report, and the moves that put them into their places."""
    plan, output, former = laid.plan, laid.output, laid.former
    undo = UndoWriter()
    changes: dict[str, list[RoundingStats]] = defaultdict(list)
    for _, results in model.results():
        for tensor, start, _, (block,) in results:
            undo.add(tensor, start, block.payload, block.sum)
            changes[tensor].append(block.change)
    require_unchanged(adapter.file for adapter, _ in plan.adapters)
    hashes = TensorHashes({}, output.specs)
    hashes.of_read.update(read)
    hashes.of_written.update(hashes_of_tensors(laid.model.shard_of, plan.written, workers))
    assert output.undo
    place = model.folder / "new" / output.undo.name
    model.make_folder(place.parent)
    with open_new(place) as target:
        size = undo.finish(target, plan, output, hashes.of_read, hashes.of_written)
        disk.sync(target)
    disk.sync_folder(place.parent)
    if model.is_resumed:
        _require_new(model, laid, place, read, workers)
    report = build_report(plan, output, os.fspath(call.base), changes, size, dry_run=False)
    report = replace(report, digests=digests_of_merge(plan, output, call, hashes))
    report = replace(report, replaced=former.names if former else ())
    small: dict[str, bytes | Path | None] = {}
    if not output.is_file:
        if former:
            small |= dict.fromkeys(former.base.undo.index["new_side"])
        small |= output.extras
        small |= output.side_files
        if planned.card:
            small[CARD] = planned.card(report)
    return report, [*stage(model, small), *renamed_undo(model, output.undo, place, replaces=former is not None)]
