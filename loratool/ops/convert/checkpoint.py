"""Convert a checkpoint to another container, dtype or number of shards, streamed like a merge.

Tensors that need no cast keep their bytes. With a type, quantized weights become plain numbers of it, and configs no
longer speak of quantization. Numbers that a cast makes 0 are counted for each tensor; a number that would become
infinite stops the conversion.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from ...binding.merge.coded_bases import decode_all, note_of_a_file, refuse_unread
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.codecs.quantized import CODED_METADATA, is_marker
from ...files.containers.gguf_file import GGUF
from ...files.dtypes import FLOAT8, MERGE_DTYPES
from ...files.folder.side_files import provenance
from ...files.output.output import CONTAINERS, Output, OutputEdits
from ...files.output.paths import check_output_name, check_output_path, check_undo_files
from ...files.output.plan import plan_output
from ...files.tensor_ref import TensorRef
from ...files.weights_file import paths_of
from ...numerics.rounding_stats import RoundingStats, cast_rounded
from ...numerics.workspace import Workspace
from ...streaming.rewrite import CAST_BLOCK, ChangedTensor, RowRange, refuse_overflow, rewrite
from ...streaming.workers import Progress, worker_count
from ...views.convert_model import CastTensor, CheckpointConvertReport
from ..arguments import Positive, Size, StrPath, Words, checked, dtype_of, one_of, parse_size, parse_words
from ..cards import described_call, input_word
from ..choices import DENOISER_DROP_CHOICES
from ..machine import require_ieee
from ..namings import MODEL_NAMINGS
from .denoiser import RenamedDenoiser, place_denoiser, rename_denoiser
from .gguf_folder import GgufFolder, open_gguf
from .mlx_folder import HubModel, as_on_hub
from .shared_tensors import dropped_names, find_shared_storage

# A key of MODEL_DROP_CHOICES -> what the names of its tensors match as a whole, and of what a torch file has beside the
# weights, which is not read in any case. LDM: `LitEma` as `model_ema`; BasicSR: `params_ema`; timm: `state_dict_ema`.
DROPPED = {
    "ema": re.compile(r"model_ema(?:\..+)?|ema|params_ema|state_dict_ema|ema_state_dict"),
    "optimizer": re.compile(r"optimizers?|optimizer_states?|optimizer_state_dict|last_optimizer_state"),
}


# What a checkpoint is converted to; of the other containers, what writes them
ELSEWHERE = {GGUF: "llama.cpp's convert_hf_to_gguf.py writes one, and its llama-quantize changes the types of one"}


WRITTEN = tuple(key for key in CONTAINERS if key not in ELSEWHERE)


@dataclass(frozen=True)
class CheckpointOptions:
    """The options of `convert` that say what of a checkpoint is written, and how."""

    dtype: str  # a key of `dtypes.MERGE_DTYPES`, for all floats of 16 bits or more and all quantized weights
    max_shard_bytes: int | None  # the size of the output's shards; None keeps those of the checkpoint
    drop: tuple[str, ...]  # keys of DROPPED, and of DENOISER_DROP_CHOICES where tensors are renamed
    force: bool
    dry_run: bool
    tokenizer: str | os.PathLike[str] | None = None  # of a GGUF model: the folder with its files
    resume: bool = False  # go on where a run died

    @property
    def chosen(self) -> str | None:
        """The safetensors name of the dtype; None keeps the types."""
        return MERGE_DTYPES[self.dtype]


@checked
@require_ieee
def convert_model(
    source: StrPath,
    out: StrPath | None = None,
    *,
    to: Annotated[str, one_of((*CONTAINERS, *MODEL_NAMINGS))] | None = None,
    dtype: Annotated[str, dtype_of(MERGE_DTYPES)] = "keep",
    max_shard_size: Size | None = None,
    tokenizer: StrPath | None = None,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    workers: Positive | None = None,
    drop: Words = (),
) -> CheckpointConvertReport:
    """Write a model in another container, type or number of shards, or a denoiser under other names.

    Args:
        to: one of WRITTEN, or a key of MODEL_NAMINGS for a denoiser; by default the container that the suffix of `out`
            tells, else safetensors.
        dtype: a key of MERGE_DTYPES, for all floats of 16 bits or more and all quantized weights.
        max_shard_size: shards of at most this size, "5GB" or bytes; by default the model's own.
        tokenizer: of a GGUF model: the folder of which a tokenizer's files are copied.
        force: replace an output that exists.
        resume: go on where a run with the same inputs and options died, if one did.
        dry_run: check everything and write nothing.
        progress: called with the bytes done and the bytes in all.
        workers: threads that write; by default one for each core.
        drop: keys of MODEL_DROP_CHOICES, and of DENOISER_DROP_CHOICES where a denoiser's tensors get other names.

    Raises:
        UsageError, InputError, NeedsFlag: before anything is written.
        InputError: a number would become infinite. What was written is removed.
    """
    checkpoint = source
    options = CheckpointOptions(dtype, parse_size(max_shard_size), parse_words(drop), force, dry_run, tokenizer, resume)
    words = (*DROPPED, *(DENOISER_DROP_CHOICES if to in MODEL_NAMINGS else ()))
    for word in options.drop:
        if word not in words:
            raise UsageError(f"--drop {word!r} is none of {', '.join(words)}, which are those of a checkpoint")
    chosen, naming = options.chosen, to if to in MODEL_NAMINGS else None
    with closing(open_checkpoint(checkpoint)) as opened:
        gguf = open_gguf(opened, chosen, options.tokenizer)
        if naming:
            container, (path, is_file) = "safetensors", place_denoiser(out, naming)
        else:
            container, path, is_file = _place(gguf.view.checkpoint if gguf else opened, out, to)
        _refuse_quantized(opened, chosen, container, checkpoint)
        removed = {name for name in (*opened.stored, *opened.weights) if _is_dropped(name, options.drop)}
        if removed.issuperset(opened.stored):
            raise InputError("has nothing left after --drop", culprit=os.fspath(checkpoint))
        hub = as_on_hub(opened) if chosen and not gguf else HubModel(opened, 0, ())
        base, denoiser = gguf.view.checkpoint if gguf else hub.checkpoint, None
        if naming:
            denoiser = rename_denoiser(
                opened, naming, removed, not DENOISER_DROP_CHOICES.keys().isdisjoint(options.drop)
            )
            base, removed = denoiser.checkpoint, set()
        inputs = paths_of(opened.shards)
        exists = check_output_path(path, is_file, inputs, options.force, is_model=True, dry_run=options.dry_run)
        shared = find_shared_storage(base, removed)
        edits = OutputEdits(shared=shared, left_out=dropped_names(base, shared), removed=removed)
        edits, notes = _decode(base, edits, chosen)
        notes += (*hub.notes, *(note_of_a_file(edits) if is_file else ()))
        origin = provenance("convert", {"dtype": chosen, "to": naming or container}, opened.metadata.get("loratool"))
        output = plan_output(
            base, path, is_file, origin, (), chosen, options.max_shard_bytes, edits, container=container
        )
        output = gguf.with_side_files(output, chosen) if gguf else output
        output = replace(output, call=described_call([input_word(checkpoint)]), resume=options.resume)
        left = tuple(each for each in output.left_behind if each.name not in opened.weight_files)
        output = replace(output, inputs=opened.shards, left_behind=left)
        check_undo_files(output, inputs, options.force or options.dry_run)
        if options.dry_run:
            output.require_own_journal()
            flushed, notes = None, (*notes, *output.space_warning())
        else:
            flushed = _execute(base, output, edits, progress, workers or worker_count())
        report = _report(os.fspath(checkpoint), base, output, edits, container, options, flushed)
        report = replace(report, warnings=(*report.warnings, *notes), exists=exists)
        report = _with_gguf(report, gguf, opened, output) if gguf else report
        return _with_denoiser(report, denoiser, opened, naming, options) if denoiser and naming else report


def _is_dropped(name: str, drop: Collection[str]) -> bool:
    return any(DROPPED[word].fullmatch(name) for word in drop if word in DROPPED)


def _refuse_quantized(base: Checkpoint, dtype: str | None, to: str, name: str | os.PathLike[str]) -> None:
    """Raise InputError for codes that cannot be read, or that a container could not say the meaning of."""
    if dtype:
        refuse_unread(base, "without --dtype")
        return
    lost = [key for key in CODED_METADATA if to == "torch" and any(key in (s.metadata or {}) for s in base.shards)]
    if lost:
        raise InputError(
            f"says by its metadata {lost[0]} how it is quantized, for which a torch file has no place",
            culprit=os.fspath(name),
            remedy="keep it in safetensors, or make it plain numbers with --dtype",
        )


def _decode(base: Checkpoint, edits: OutputEdits, dtype: str | None) -> tuple[OutputEdits, tuple[str, ...]]:
    """Return the edits with all quantized weights as numbers and without marks, and notes; companions are checked.

    Args:
        dtype: None keeps the codes.
    """
    if dtype is None or not (base.weights or any(part.declared for part in base.models)):
        return edits, ()
    for name in base.weights.keys() - edits.removed:
        base.parts_of(name).require_sound()
    marks = {name for name in base.specs if is_marker(name)}  # not those of weights
    return decode_all(base, replace(edits, removed={*edits.removed, *marks}), dtype)


def _place(base: Checkpoint, out: str | os.PathLike[str] | None, to: str | None) -> tuple[str, Path, bool]:
    """Return the container, the output's path, and whether it is a single file."""
    suffix = "" if out is None else Path(out).suffix
    to = to or next((key for key, suffixes in CONTAINERS.items() if suffix in suffixes), "safetensors")
    if to not in WRITTEN:
        raise UsageError(
            f"a checkpoint is converted to {' or '.join(WRITTEN)}, not to {to!r}", remedy=ELSEWHERE.get(to)
        )
    if out is None:
        return to, Path(f"converted{CONTAINERS[to][0]}" if base.given_as_file else "converted"), base.given_as_file
    return to, *check_output_name(out, to)


def _execute(
    base: Checkpoint, output: Output, edits: OutputEdits, progress: Progress | None, workers: int
) -> dict[str, int]:
    """Write the output; return for each tensor that is cast how many numbers became 0."""
    sources = {name: base.ref(name) if name in edits.specs else base.stored_ref(name) for name in output.specs}
    cast = {
        name: _cast_tensor(sources[name])
        for name, spec in output.specs.items()
        if spec.size and spec.dtype != sources[name].spec.dtype
    }
    flushed: dict[str, int] = defaultdict(int)
    with closing(rewrite(output, sources, cast, torch.device("cpu"), workers, progress)) as runs:
        for item, blocks in runs:
            refuse_overflow(item.tensor, [stats for stats, _ in blocks], sources, output)
            flushed[item.tensor] += sum(zeros for _, zeros in blocks)
    return flushed


def _cast_tensor(source: TensorRef) -> ChangedTensor:
    columns = source.codec.columns(source.spec) if source.weight else 1
    return ChangedTensor(source.spec.size // columns, partial(_all_rows, source.spec.size // columns, columns))


def _all_rows(rows: int, columns: int) -> list[RowRange]:
    return [RowRange(0, rows, lambda start, stop: _cast, max(1, CAST_BLOCK // columns))]


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
    options: CheckpointOptions,
    flushed: dict[str, int] | None,  # tensor -> numbers that became 0; None in a dry run
) -> CheckpointConvertReport:
    former = {name: spec.dtype for name, spec in base.stored.items()}
    former |= {name: base.weights[name].kind for name in edits.specs}
    cast = tuple(
        CastTensor(each, spec.shape, former[each], spec.dtype, None if flushed is None else flushed[each])
        for each, spec in output.specs.items()
        if spec.dtype != former[each]
    )
    apart = [name for name in edits.shared if to == "safetensors" and name not in edits.left_out]
    return CheckpointConvertReport(
        checkpoint=name,
        source_format=_container_of(base),
        out=str(output.path),
        to=to,
        dry_run=flushed is None,
        nbytes=output.nbytes,
        cast=cast,
        copied=len(output.specs) - len(cast),
        shared={each: kept for each, kept in edits.shared.items() if each not in apart},
        files=tuple(file.name for file in output.files),
        not_copied=output.not_copied,
        warnings=tuple(_warnings(base, output, edits, to, apart, options)),
        left_out=(*(name for name in base.stored if name in edits.removed), *_dropped_beside(base, options)),
        left_behind=output.left_behind,
    )


def _with_denoiser(
    report: CheckpointConvertReport,
    denoiser: RenamedDenoiser,
    opened: Checkpoint,
    to: str,
    options: CheckpointOptions,
) -> CheckpointConvertReport:
    """Return the report on a denoiser's new file with what only the files that it is made of tell."""
    return replace(
        report,
        to=to,
        source_format=_container_of(opened),
        warnings=(*_unread(opened, options), *report.warnings, *denoiser.notes(to)),
        left_out=(*denoiser.left_out, *_dropped_beside(opened, options)),
        family=denoiser.family.key,
        renamed=denoiser.renamed,
        regrouped=denoiser.regrouped,
    )


def _with_gguf(
    report: CheckpointConvertReport, gguf: GgufFolder, opened: Checkpoint, output: Output
) -> CheckpointConvertReport:
    """Return the report on a GGUF model's folder with the types that its file has."""
    (file,) = gguf.view.checkpoint.shards
    return replace(
        report,
        source_format=_container_of(opened),
        cast=tuple(replace(row, source_dtype=file.stored_type(row.name)) for row in report.cast),
        warnings=(*report.warnings, *gguf.notes(output)),
        left_out=(*gguf.view.left_out, *report.left_out),
        renamed=len(file.specs),
    )


def _container_of(base: Checkpoint) -> str:
    return next((shard.file_format for shard in base.shards if shard.file_format != "safetensors"), "safetensors")


def _dropped_beside(base: Checkpoint, options: CheckpointOptions) -> list[str]:
    """Return what --drop leaves out of what torch files have beside the weights."""
    return [name for shard in base.shards for name in shard.ignored if _is_dropped(name, options.drop)]


def _unread(base: Checkpoint, options: CheckpointOptions) -> Iterator[str]:
    for shard in base.shards:
        if ignored := [name for name in shard.ignored if not _is_dropped(name, options.drop)]:
            yield f"{shard.place} also holds {', '.join(ignored)}, which is not read"


def _warnings(
    base: Checkpoint, output: Output, edits: OutputEdits, to: str, apart: list[str], options: CheckpointOptions
) -> Iterator[str]:
    yield from _unread(base, options)
    for name in apart:
        kept = edits.shared[name]
        yield f"{name} is one storage with {kept}, but not one that loaders are known to tie: both are written"
    coarse = [name for name, spec in output.specs.items() if spec.dtype in FLOAT8]
    if coarse and options.chosen:
        yield f"--dtype is for floats of 16 bits or more: {len(coarse)} tensors of 8 keep theirs, {coarse[0]} the first"
    if to == "torch":
        not_lost = {"format", *(name.removeprefix(part.prefix) for part in base.models for name in edits.shared)}
        not_lost |= {"loratool"} if any(name.endswith(".index.json") for name in output.extras) else set()
        lost = sorted({key for shard in base.shards for key in shard.metadata or {}} - not_lost)
        if lost:
            yield f"a torch file has no metadata; what stays behind: {', '.join(lost)}"
