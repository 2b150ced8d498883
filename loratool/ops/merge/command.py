"""`merge`: W' = round_once(W + sum of weight * change), streamed from files to files.

Plan from headers alone, refuse all that can be refused, then run independent pieces: untouched ranges are
copied inside the kernel, adapted matrices pass by blocks of rows. The result's bytes depend on nothing but
the inputs (`numerics/exact.py`); memory does not depend on the model's size.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch

from ...binding.merge_plan import MergePlan, plan_merge, widen_float8
from ...binding.selection import Selection, parse_layers
from ...binding.tied_weights import TIED
from ...errors import NeedsFlag, UsageError
from ...files.dtypes import MERGE_DTYPES
from ...files.fileio import sha256_range
from ...files.output import Output, check_output_path, check_undo_files, output_path
from ...files.output_plan import plan_output
from ...files.side_files import provenance
from ...files.tensor_ref import TensorRef, known_finite, require_finite
from ...files.undo_file import UnrecordedBytes
from ...files.weights_file import WeightsFile
from ...numerics.exact import ARITHMETIC_VERSION, RoundingStats
from ...streaming.apply import UpdateLoader, plan_changed_tensors
from ...streaming.rewrite import refuse_overflow, rewrite
from ...streaming.workers import HashBytes, Progress, choose_device, map_in_order, worker_count
from ...undo.records import RecordedBlock
from ...undo.writer import UndoWriter, adapter_entry, sort_adapters
from ..collector import uncollected
from ..denormals import keep_denormals
from ..inputs import Adapters, open_inputs, parse_adapters, require_residual_base, subtract_initial
from .report import MergeReport, build_report


@keep_denormals
def merge(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "keep",
    device: str = "auto",
    max_shard_bytes: int | None = None,
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: str | None = None,
    alpha: float | None = None,
    tied: str = "untie",
    initial: str | os.PathLike[str] | None = None,
    residual_base: bool = False,
    undo: bool = True,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> MergeReport:
    """Add adapters to a base checkpoint and write the merged model.

    base: a file, a folder, an index JSON, or `org/model` in the local Hugging Face cache.
    adapters: one or several, each a path, (path, weight) or (path, weight, weights of an image model's components, as
    {"te": 0.4}), or all as {path: weight}; they are added in one pass and rounded once.
    out: a folder, or a file if it ends in .safetensors; `merged` in the working folder by default.
    dtype: a key of MERGE_DTYPES. max_shard_bytes cuts the output anew. target, exclude: patterns of module
    paths (`targets.Selection`); layers: "0-15". alpha: for adapter files that do not say theirs.
    tied: a key of `tied.TIED`. For adapters whose initialization changed the base (PiSSA and the like): initial
    is the adapter as it was at the start, which is subtracted, or residual_base says that `base` is the changed one.
    undo: write what `unmerge` needs to give the base back.

    Raises LoratoolError's children: UsageError, InputError, NeedsFlag before anything is written; MachineError
    when the machine fails. Whatever is raised, no unfinished output stays.
    """
    with ExitStack() as opened:
        checkpoint, loaded = open_inputs(base, parse_adapters(adapters), alpha, opened)
        if initial is None:
            require_residual_base(checkpoint, loaded)
        loaded = subtract_initial(loaded, initial, residual_base, opened)
        chosen_dtype = dtype.lower().removeprefix("torch.")
        if chosen_dtype not in MERGE_DTYPES:
            raise UsageError(f"dtype {dtype!r} is none of {', '.join(MERGE_DTYPES)}")
        if tied not in TIED:
            raise UsageError(f"tied {tied!r} is none of {', '.join(TIED)}")
        path, is_file = output_path(out, checkpoint, "merged")
        where = choose_device(device)
        selection = Selection(tuple(target), tuple(exclude), parse_layers(layers))
        plan = uncollected(plan_merge)(checkpoint, loaded, selection, tied)
        return write_merged(
            plan,
            os.fspath(base),
            (path, is_file),
            _provenance(plan),
            dtype=MERGE_DTYPES[chosen_dtype],
            device=where,
            max_shard_bytes=max_shard_bytes,
            undo=undo,
            force=force,
            dry_run=dry_run,
            progress=progress,
            workers=workers,
        )


def write_merged(
    plan: MergePlan,
    base: str,
    place: tuple[Path, bool],
    provenance: str,
    *,
    dtype: str | None,
    device: torch.device,
    max_shard_bytes: int | None = None,
    undo: bool,
    force: bool,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
    beside: Mapping[str, Path] | None = None,
) -> MergeReport:
    """Carry a plan out. base: its name in the report; place: the output and whether it is a file; dtype: a safetensors
    name or None; beside: name in the output's folder -> a file that is copied there.
    """
    path, is_file = place
    edits = widen_float8(plan, dtype)
    inputs = [shard.path for shard in plan.base.shards] + [adapter.file.path for adapter, _ in plan.adapters]
    check_output_path(path, is_file, inputs, force, is_model=True)
    lay_out = uncollected(plan_output)
    output = lay_out(plan.base, path, is_file, provenance, plan.changed, dtype, max_shard_bytes, edits, undo)
    read = (*plan.base.shards, *(adapter.file for adapter, _ in plan.adapters))
    output = replace(output, travels={**output.travels, **(beside or {})}, inputs=read)
    _check_undo(plan, output)
    check_undo_files(output, inputs, force)
    _check_factors(plan)
    output.require_space()
    if dry_run:
        return build_report(plan, output, base, {}, _undo_bound(plan, output), dry_run)
    changes, size = _execute(plan, output, device, progress, workers or worker_count())
    return build_report(plan, output, base, changes, size, dry_run)


def _provenance(plan: MergePlan) -> str:
    facts = {
        "adapters": [adapter_entry(adapter, weight) for adapter, weight in sort_adapters(plan.adapters)],
        "arithmetic": ARITHMETIC_VERSION,
        "left_out": sorted(set(plan.left_out)),
    }
    return provenance("merge", facts, plan.base.metadata.get("loratool"))


def _check_factors(plan: MergePlan) -> None:
    """Read every factor and value once, so that a damaged one is refused before the first byte is written."""
    placements = {id(p.update): p for found in plan.requested.values() for p in found}.values()
    stored: dict[WeightsFile, list[str]] = {}
    for placement in placements:
        stored.setdefault(placement.adapter.file, []).extend(placement.update.stored)
    finite = {file: known_finite(file, names) for file, names in stored.items()}
    for placement in placements:
        if finite[placement.adapter.file].issuperset(placement.update.stored):
            continue
        if placement.update.base:
            require_finite(TensorRef(placement.adapter.file, placement.update.base))
        if placement.update.kind == "replace":
            require_finite(TensorRef(placement.adapter.file, placement.update.tensors["value"]))
        else:
            placement.adapter.load(placement.update)
    for name in plan.added:
        require_finite(plan.sources[name])


def _check_undo(plan: MergePlan, output: Output) -> None:
    """Raises NeedsFlag where undo cannot be written."""
    if output.undo is None:
        return
    for name, spec in plan.base.specs.items():
        if output.specs[name].dtype != spec.dtype:
            raise NeedsFlag(
                f"is {spec.dtype} in the base, and a merge into another type cannot be undone",
                culprit=name,
                remedy="add --no-undo",
            )


def _undo_bound(plan: MergePlan, output: Output) -> int | None:
    """The most bytes that an undo file can have: each changed weight whole, with the bits that say so."""
    if output.undo is None:
        return None
    most = sum(plan.base.specs[name].nbytes for name in plan.changed if name in plan.base.specs)
    return most + most // 8 + (1 << 20)


def _execute(
    plan: MergePlan, output: Output, device: torch.device, progress: Progress | None, workers: int
) -> tuple[dict[str, list[RoundingStats]], int | None]:
    """What became of each tensor, and the size of the undo file."""
    changes: dict[str, list[RoundingStats]] = defaultdict(list)
    with ExitStack() as opened:
        undo = UndoWriter(output.path.absolute().parent) if output.undo else None
        if undo:
            opened.callback(undo.close)
        tensors = plan_changed_tensors(plan, UpdateLoader(device), undo is not None)
        size = None

        def finish(targets: Mapping[str, BinaryIO]) -> None:
            nonlocal size
            if undo and output.undo:
                _hash_the_rest(undo, plan, output, targets, workers)
                size = undo.finish(targets[output.undo.name], plan, output)

        copied = [name for name in output.specs if undo and name not in plan.changed and output.specs[name].nbytes]
        runs = rewrite(output, plan.sources, tensors, device, workers, progress, finish, copied)
        for item, blocks in opened.enter_context(closing(runs)):
            if isinstance(item, HashBytes):
                if undo:
                    undo.add_untouched(item.tensor, item.part, blocks[0])
                continue
            if undo and isinstance(blocks[0], RecordedBlock):
                undo.add(item.tensor, item.start, item.stop, [b.payload for b in blocks], blocks[-1].sha256)
                blocks = [block.change for block in blocks]
            refuse_overflow(item.tensor, blocks, plan.sources, output)
            changes[item.tensor] += blocks
    return changes, size


def _hash_the_rest(
    undo: UndoWriter, plan: MergePlan, output: Output, targets: Mapping[str, BinaryIO], workers: int
) -> None:
    """What of the changed tensors is in no record, as it was written: an edit of that too shall be seen."""
    places = {name: (targets[file.name], at) for file in output.files for name, at in file.begin.items()}

    def sha256(part: UnrecordedBytes) -> str:
        file, at = places[part.tensor]
        return sha256_range(file, at + part.start, part.length)

    parts = undo.unrecorded(plan, output)
    with closing(map_in_order(sha256, parts, workers)) as hashes:
        for part, digest in zip(parts, hashes, strict=True):
            undo.add_written(part, digest)
