"""Merge adapters into a model where it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...binding.merge.coded_bases import plan_codes
from ...binding.merge.merge_plan import MergePlan
from ...binding.ties.tied_weights import stored_copies
from ...binding.ties.ties import find_tie
from ...durable import disk
from ...durable.fileio import open_new
from ...durable.in_place import ModelInPlace, Move
from ...errors import InputError, UsageError
from ...files.dtypes import MERGE_DTYPES
from ...files.folder.side_files import CARD, undo_path
from ...files.output.output import Output
from ...files.output.plan import plan_output
from ...files.weights_file import paths_of, require_unchanged
from ...numerics.rounding_stats import RoundingStats
from ...streaming.apply import plan_changed_tensors, restore_tensor
from ...streaming.digests import TensorHashes, hashes_of_tensors
from ...streaming.in_place import Results, RowWindows
from ...streaming.items import MapRows
from ...streaming.parallel import choose_device, worker_count
from ...streaming.rewrite import ChangedTensor, refuse_overflow
from ...streaming.segment import UpdateLoader
from ...undo.journal_records import JournalRecords
from ...undo.writer import UndoWriter, adapter_entry, largest_undo, make_entries, sort_adapters, unrestored
from ...views.merge import MergeReport
from ..arguments import parse_words
from ..in_place import (
    ELSEWHERE,
    Planned,
    PlannedChange,
    base_facts,
    change_in_place,
    choose_way,
    files_of,
    renamed_undo,
    require_layout,
    shards_of,
    stage,
    way_of,
)
from .call import Merge
from .command import PlannedMerge, check_factors, describe_merge, digests_of_merge, plan_call
from .report import build_report


def merge_in_place(call: Merge) -> MergeReport:
    """Merge adapters into a model where it is."""
    if not call.undo:
        raise UsageError("--in-place needs the undo file, which is the way back", culprit="--no-undo")
    path = Path(os.fspath(call.base))
    return change_in_place(call, path, partial(_plan, call, path), partial(prepare_merge, call))


def _plan(call: Merge, path: Path) -> Planned[MergeReport]:
    with ExitStack() as opened:
        planned = plan_call(call, opened)
        plan, output = _laid_out(planned.plan, call, path)
        _require_possible(plan, output, path)
        check_factors(plan, call.workers or worker_count())
        way = choose_way(plan.base, path, call.by)
        largest = largest_undo(plan, output) if call.dry_run else None
        report = build_report(plan, output, os.fspath(call.base), {}, largest, dry_run=True)
        return Planned(report, way, [file.name for file in output.files])


def _laid_out(plan: MergePlan, call: Merge, path: Path) -> tuple[MergePlan, Output]:
    """Return the plan, and the output with the files of the base."""
    base, dtype = plan.base, MERGE_DTYPES[call.dtype]
    plan = plan_codes(plan, call.quantized, dtype, parse_words(call.allow))
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
    files = files_of(base)
    require_layout(output, files, base)
    extras = dict(output.extras)
    if list(output.files) != files:  # a header has no room for what the output would say of its making
        extras = {name: data for name, data in extras.items() if not name.endswith(".index.json")}
    undo = undo_path(path, base.given_as_file)
    if base.outer:
        undo = path / base.folder.name / undo.name
    return plan, replace(output, files=tuple(files), extras=extras, undo=undo, left_behind=())


def _require_possible(plan: MergePlan, output: Output, path: Path) -> None:
    """Raise InputError for a merge that cannot be done in place, or whose plan is another one in the middle of it."""
    base = plan.base
    for name in sorted(plan.changed & base.weights.keys()):
        raise InputError("is stored as codes, which cannot be changed in place", culprit=name, remedy=ELSEWHERE)
    for name in unrestored(plan, output):
        raise InputError("is replaced by one without rows of numbers", culprit=name, remedy=ELSEWHERE)
    for name, placements in plan.requested.items():
        if any(p.update.base for p in placements):
            raise InputError("has an update that brings its base's weights along", culprit=name, remedy=ELSEWHERE)
    tie = find_tie(base)
    if tie and tie.embedding in plan.changed and stored_copies(base, tie):
        raise InputError("is stored twice, and both change as one", culprit=tie.embedding, remedy=ELSEWHERE)
    for adapter, _ in plan.adapters:
        for place in paths_of([adapter.file]):
            if place.resolve().is_relative_to(path.resolve()):
                message = "is inside the model, which has no name while it changes"
                raise InputError(message, culprit=str(place), remedy="move it elsewhere")


@contextmanager
def prepare_merge(call: Merge, model: ModelInPlace) -> Iterator[PlannedChange[MergeReport]]:
    """Open a model that is changed in place, and plan the merge into it."""
    with ExitStack() as opened:
        planned = plan_call(call, opened, model.model)
        plan, output = _laid_out(planned.plan, call, model.path)
        workers, device = call.workers or worker_count(), choose_device(call.device)
        entries = [adapter_entry(*pair) for pair in sort_adapters(plan.adapters)], make_entries(plan, output)
        identity = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
        files = list(output.files)
        read_hashes = partial(hashes_of_tensors, plan.base.shard_of, plan.base.stored, workers)
        _, read = base_facts(model, identity, files, read_hashes)
        load = UpdateLoader(device)
        windows = RowWindows(
            output=output,
            former=files,
            shards=shards_of(plan.base, files),
            sources=plan.stored_sources(output.specs),
            changed=plan_changed_tensors(plan, load, record=True),
            whole=_whole(plan),
            back=partial(_restored, plan, load),
            check=partial(_check, plan, output),
            by_shard=way_of(model) == "shard",
            device=device,
            workers=workers,
        )
        yield PlannedChange(windows, partial(_finish, call, model, planned, plan, output, read, workers))


def _whole(plan: MergePlan) -> set[str]:
    """Return the tensors whose rows depend on others: of DoRA's columns, of replaced ones."""
    return {
        name
        for name in plan.changed
        if plan.sources[name].file is not plan.base.shard_of[name]
        or any(not placement.update.additive for placement in plan.placements.get(name, ()))
    }


def _restored(plan: MergePlan, load: UpdateLoader, results: Results) -> dict[str, ChangedTensor]:
    """Return the tensors that some windows changed, as they are restored from the records."""
    records, specs = JournalRecords(results), plan.base.specs
    names = dict.fromkeys(tensor for tensor, *_ in results)
    return {name: restore_tensor(specs[name], records, name, plan.placements.get(name, ()), load) for name in names}


def _check(plan: MergePlan, output: Output, item: MapRows, blocks: Sequence[Any]) -> None:
    refuse_overflow(item.tensor, [block.change for block in blocks], plan.sources, output)


def _finish(
    call: Merge,
    model: ModelInPlace,
    planned: PlannedMerge,
    plan: MergePlan,
    output: Output,
    read: dict[str, list[str]],
    workers: int,
) -> tuple[MergeReport, list[Move]]:
    """Write the undo file and the small files; return the report, and the moves that put them into their places."""
    undo = UndoWriter()
    changes: dict[str, list[RoundingStats]] = defaultdict(list)
    for _, results in model.results():
        for tensor, start, _, (block,) in results:
            undo.add(tensor, start, block.payload, block.sum)
            changes[tensor].append(block.change)
    require_unchanged(adapter.file for adapter, _ in plan.adapters)
    hashes = TensorHashes(plan.base.shard_of, output.specs)
    hashes.of_read.update(read)
    hashes.of_written.update(hashes_of_tensors(plan.base.shard_of, plan.written, workers))
    assert output.undo
    place = model.folder / "new" / output.undo.name
    model.make_folder(place.parent)
    with open_new(place) as target:
        size = undo.finish(target, plan, output, hashes.of_read, hashes.of_written)
        disk.sync(target)
    disk.sync_folder(place.parent)
    report = build_report(plan, output, os.fspath(call.base), changes, size, dry_run=False)
    report = replace(report, digests=digests_of_merge(plan, output, call, hashes))
    small: dict[str, bytes | Path | None] = {**output.extras}
    if not output.is_file:
        small |= {name: origin for name, origin in output.side_files.items() if not origin.is_relative_to(model.model)}
        if planned.card:
            small[CARD] = planned.card(report)
    return report, [*stage(model, small), *renamed_undo(model, output.undo, place)]
