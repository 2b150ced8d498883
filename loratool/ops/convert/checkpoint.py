"""Convert a checkpoint to another container, dtype or number of shards, streamed like a merge.

Tensors that need no cast keep their bytes. Numbers that a cast makes 0 are counted for each tensor; a number that would
become infinite stops the conversion.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.dtypes import FLOAT8, MERGE_DTYPES, TensorSpec
from ...files.output import CONTAINERS, Output, OutputEdits, check_output_name, check_output_path, check_undo_files
from ...files.output_plan import plan_output
from ...files.quantized import CODED_METADATA
from ...files.side_files import provenance
from ...files.torch_reader import TorchFile
from ...numerics.rounding_stats import RoundingStats, cast_rounded
from ...numerics.workspace import Workspace
from ...streaming.rewrite import CAST_BLOCK, ChangedTensor, RowRange, refuse_overflow, rewrite
from ...streaming.workers import Progress, worker_count
from .shared_tensors import dropped_names, find_shared_storage


@dataclass(frozen=True)
class CastTensor:
    """A tensor that has another type now. flushed: numbers that became 0, None in a dry run."""

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    flushed: int | None


@dataclass(frozen=True)
class CheckpointConvertReport:
    """The result of `convert` of a checkpoint. `copied` counts the tensors that keep their bytes.

    shared: tensors that are another one -> that one: in a torch file its storage has both names; in a safetensors file
    it is written once, and its metadata says so.
    """

    checkpoint: str
    source_format: str
    out: str
    to: str
    dry_run: bool
    nbytes: int
    cast: tuple[CastTensor, ...]
    copied: int
    shared: Mapping[str, str]
    files: tuple[str, ...]
    not_copied: tuple[str, ...]
    warnings: tuple[str, ...]


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    dtype: str = "keep",
    max_shard_bytes: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: int | None = None,
) -> CheckpointConvertReport:
    """Write a checkpoint in another container, type or number of shards.

    Args:
        to: a key of CONTAINERS; by default the one that the suffix of `out` tells, else safetensors.
        dtype: a key of `dtypes.MERGE_DTYPES`, for all tensors of floats of 16 bits or more.
        max_shard_bytes: the size of the output's shards; by default those of the checkpoint.

    Raises:
        UsageError, InputError, NeedsFlag: before anything is written.
        InputError: a number would become infinite. What was written is removed.
    """
    spelling = dtype.lower().removeprefix("torch.")
    if spelling not in MERGE_DTYPES:
        raise UsageError(f"dtype {dtype!r} is none of {', '.join(MERGE_DTYPES)}")
    chosen = MERGE_DTYPES[spelling]
    with closing(open_checkpoint(checkpoint)) as base:
        to, path, is_file = _place(base, out, to)
        _refuse_quantized(base, chosen, to, checkpoint)
        decoded = {name: TensorSpec(chosen, weight.spec.shape) for name, weight in base.weights.items() if chosen}
        inputs = [shard.path for shard in base.shards]
        check_output_path(path, is_file, inputs, force, is_model=True)
        shared = find_shared_storage(base)
        edits = OutputEdits(decoded, shared=shared, left_out=dropped_names(base, shared))
        origin = provenance("convert", {"dtype": chosen, "to": to}, base.metadata.get("loratool"))
        output = plan_output(base, path, is_file, origin, (), chosen, max_shard_bytes, edits, container=to)
        check_undo_files(output, inputs, force)
        output.require_space()
        flushed = None if dry_run else _execute(base, output, edits, progress, workers or worker_count())
        return _report(os.fspath(checkpoint), base, output, edits, to, chosen, flushed)


def _refuse_quantized(base: Checkpoint, dtype: str | None, to: str, name: str | os.PathLike[str]) -> None:
    lost = [key for key in CODED_METADATA if to == "torch" and any(key in (s.metadata or {}) for s in base.shards)]
    if lost:
        raise InputError(
            f"says by its metadata {lost[0]} how it is quantized, for which a torch file has no place",
            culprit=os.fspath(name),
            remedy="keep it in safetensors",
        )
    if dtype and (base.coded or any(part.declared for part in base.models)):
        raise InputError(
            f"is quantized ({base.quantized}), and its scales must keep their types",
            culprit=os.fspath(name),
            remedy="leave out --dtype",
        )


def _place(base: Checkpoint, out: str | os.PathLike[str] | None, to: str | None) -> tuple[str, Path, bool]:
    """Return the container, the output's path, and whether it is a single file."""
    suffix = "" if out is None else Path(out).suffix
    to = to or next((key for key, suffixes in CONTAINERS.items() if suffix in suffixes), "safetensors")
    if to not in CONTAINERS:
        raise UsageError(f"a checkpoint is converted to {' or '.join(CONTAINERS)}, not to {to!r}")
    if out is None:
        return to, Path(f"converted{CONTAINERS[to][0]}" if base.given_as_file else "converted"), base.given_as_file
    return to, *check_output_name(out, to)


def _execute(
    base: Checkpoint, output: Output, edits: OutputEdits, progress: Progress | None, workers: int
) -> dict[str, int]:
    """Write the output; return for each tensor that is cast how many numbers became 0."""
    sources = {name: base.ref(name) if name in edits.specs else base.stored_ref(name) for name in output.specs}
    cast = {
        name: ChangedTensor(spec.size, partial(_all_numbers, spec.size))
        for name, spec in output.specs.items()
        if spec.size and spec.dtype != sources[name].spec.dtype
    }
    flushed: dict[str, int] = defaultdict(int)
    with closing(rewrite(output, sources, cast, torch.device("cpu"), workers, progress)) as runs:
        for item, blocks in runs:
            refuse_overflow(item.tensor, [stats for stats, _ in blocks], sources, output)
            flushed[item.tensor] += sum(zeros for _, zeros in blocks)
    return flushed


def _all_numbers(size: int) -> list[RowRange]:
    return [RowRange(0, size, lambda start, stop: _cast, CAST_BLOCK)]


def _cast(base: Tensor, row: int, out: Tensor, work: Workspace) -> tuple[RoundingStats, int]:
    """Cast a block into `out`; return its rounding statistics, and how many numbers became 0."""
    stats = cast_rounded(base, out, work)
    least, former = (torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps for x in (out, base))
    return stats, _count_nonzero(base) - _count_nonzero(out) if least > former else 0


def _count_nonzero(x: Tensor) -> int:
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]).numpy()
    return int(np.count_nonzero(bits << 1))  # less the sign; numpy counts integers in a quarter of torch's time


def _report(
    name: str,
    base: Checkpoint,
    output: Output,
    edits: OutputEdits,
    to: str,
    dtype: str | None,
    flushed: dict[str, int] | None,  # tensor -> numbers that became 0; None in a dry run
) -> CheckpointConvertReport:
    former = {name: spec.dtype for name, spec in base.stored.items()}
    former |= {name: base.weights[name].codec.key for name in edits.specs}
    cast = tuple(
        CastTensor(each, spec.shape, former[each], spec.dtype, None if flushed is None else flushed[each])
        for each, spec in output.specs.items()
        if spec.dtype != former[each]
    )
    apart = [name for name in edits.shared if to == "safetensors" and name not in edits.left_out]
    return CheckpointConvertReport(
        name,
        "torch" if any(isinstance(shard, TorchFile) for shard in base.shards) else "safetensors",
        str(output.path),
        to,
        flushed is None,
        output.nbytes,
        cast,
        len(output.specs) - len(cast),
        {each: kept for each, kept in edits.shared.items() if each not in apart},
        tuple(file.name for file in output.files),
        output.not_copied,
        tuple(_warnings(base, output, edits, to, apart, dtype)),
    )


def _warnings(
    base: Checkpoint, output: Output, edits: OutputEdits, to: str, apart: list[str], dtype: str | None
) -> Iterator[str]:
    for shard in base.shards:
        if shard.ignored:
            yield f"{shard.place} also holds {', '.join(shard.ignored)}, which is not read"
    for name in apart:
        kept = edits.shared[name]
        yield f"{name} is one storage with {kept}, but not one that loaders are known to tie: both are written"
    coarse = [name for name, spec in output.specs.items() if spec.dtype in FLOAT8]
    if coarse and dtype:
        yield f"--dtype is for floats of 16 bits or more: {len(coarse)} tensors of 8 keep theirs, {coarse[0]} the first"
    if to == "torch":
        not_lost = {"format", *(name.removeprefix(part.prefix) for part in base.models for name in edits.shared)}
        not_lost |= {"loratool"} if any(name.endswith(".index.json") for name in output.extras) else set()
        lost = sorted({key for shard in base.shards for key in shard.metadata or {}} - not_lost)
        if lost:
            yield f"a torch file has no metadata; what stays behind: {', '.join(lost)}"
