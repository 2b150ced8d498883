"""Convert a checkpoint to another container, dtype or number of shards, streamed like a merge.

Tensors that need no cast keep their bytes. With --dtype, quantized weights become plain numbers of that type, and
configs no longer mention quantization. Numbers that a cast makes 0 are counted for each tensor. A number that would
become infinite stops the conversion.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ...architectures.experts import EXPERTS
from ...architectures.mlx_names import ONE_BY_ONE, find_share, mlx_names
from ...architectures.renames import canonical
from ...binding.merge.coded_bases import decode_all, note_of_a_file, refuse_unread
from ...durable.fileio import length_of
from ...errors import InputError, NeedsFlag, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.codecs.quantized import CODED_METADATA, is_marker
from ...files.containers.gguf_file import GGUF
from ...files.containers.regrouped import RegroupedFile, StoredRows
from ...files.dtypes import FLOAT8, MERGE_DTYPES, TORCH_FLOATS, TensorSpec
from ...files.folder.side_files import LeftBehind, encode_json, find_tokenizer, provenance
from ...files.gguf_model import TransformersView, as_transformers
from ...files.hub.cache import place_named
from ...files.output.output import CONTAINERS, Output, OutputEdits
from ...files.output.paths import check_output_name, check_output_path, check_undo_files
from ...files.output.plan import plan_output
from ...files.tensor_ref import TensorRef
from ...files.weights_file import paths_of
from ...numerics.arrays import CPU, Numbers
from ...numerics.rounding_stats import RoundingStats, cast_rounded
from ...numerics.workspace import Workspace
from ...streaming.parallel import Progress, worker_count
from ...streaming.rewrite import CAST_BLOCK, ChangedTensor, RowRange, refuse_overflow, rewrite
from ...views.convert_model import CastTensor, CheckpointConvertReport
from ..arguments import dtype_word, parse_size, parse_words
from ..cards import described_call, input_word
from ..choices import DENOISER_DROP_CHOICES
from ..inputs import is_of_mlx
from ..namings import MODEL_NAMINGS
from .call import ConvertModel
from .denoiser import RenamedDenoiser, place_denoiser, rename_denoiser
from .shared_tensors import find_shared_storage, omitted_names

CONFIG = "config.json"

BESIDE = "beside a GGUF model: give the folder to copy with --tokenizer"

# model type -> what of its class GGUF does not have
LACKS = {"bert": "GGUF has no pooler: transformers initializes a random one unless you set add_pooling_layer=False"}


@dataclass(frozen=True)
class GgufFolder:
    """A GGUF model to be written as a folder of transformers."""

    view: TransformersView
    tokenizer: dict[str, Path]  # name of a file -> the file to copy

    def with_side_files(self, output: Output, dtype: str | None) -> Output:
        """Return the output with config.json and the tokenizer's files, and without files from beside the GGUF file.

        Args:
            dtype: of the output's weights, in safetensors; None keeps them.
        """
        base, nbytes = self.view.checkpoint, Counter[str]()
        for spec in base.specs.values():
            nbytes[spec.dtype] += spec.nbytes
        config = base.config | {"dtype": TORCH_FLOATS[dtype or nbytes.most_common(1)[0][0]]}
        index = {name: data for name, data in output.extras.items() if name != CONFIG}
        beside = {} if output.is_file else {CONFIG: encode_json(config)}
        side_files = {} if output.is_file else self.tokenizer
        beside_gguf = (LeftBehind(name, length_of(path), BESIDE) for name, path in output.side_files.items())
        left = (*output.left_behind, *(each for each in beside_gguf if each.name not in side_files))
        return replace(output, extras=index | beside, side_files=side_files, left_behind=left)

    def notes(self, output: Output) -> Iterator[str]:
        """Yield notes on what a loader needs besides the output."""
        if lacking := LACKS.get(self.view.checkpoint.model_type or ""):
            yield lacking
        if output.is_file:
            yield f"a file has no {CONFIG}, which transformers needs: give a folder with -o"
        elif not self.tokenizer:
            yield "no tokenizer was written, since GGUF has it in another form: --tokenizer FOLDER copies one"


def open_gguf(opened: Checkpoint, dtype: str | None, tokenizer: str | os.PathLike[str] | None) -> GgufFolder | None:
    """Return a GGUF model as a folder of transformers. None if the checkpoint is no GGUF model.

    Raises:
        UsageError: a tokenizer for another checkpoint.
        NeedsFlag: it has codes, for which transformers has no place.
        InputError: no table tells its names, a tensor is missing, or the folder has no tokenizer.
    """
    if not opened.is_gguf:
        if tokenizer is not None:
            raise UsageError("--tokenizer is only for GGUF models: others have tokenizer files beside them")
        return None
    view = as_transformers(opened)
    coded = next((name for name in opened.weights), None)
    if coded and dtype is None:
        raise NeedsFlag(
            f"is stored as {opened.stored[coded].dtype}, which transformers' files cannot hold",
            culprit=coded,
            flags="--dtype bf16",
            why="(or fp16, fp32)",
        )
    files = {} if tokenizer is None else find_tokenizer(place_named(tokenizer))
    if tokenizer is not None and not files:
        raise InputError("has no tokenizer files", culprit=os.fspath(tokenizer))
    return GgufFolder(view, files)


@dataclass(frozen=True)
class HubModel:
    """A model of MLX under the names of the hub, or under its own if it cannot get those."""

    checkpoint: Checkpoint
    renamed: int  # tensors that have become those of single experts
    notes: tuple[str, ...]


def as_on_hub(base: Checkpoint) -> HubModel:
    """Return a model of MLX with single experts instead of stacks. Other models are returned unchanged."""
    types = base.model_types
    names, stacks = mlx_names(types), {name: hub_name for name in base.stored if (hub_name := _hub_name(name, types))}
    if is_of_mlx(base) and names and (names.shifted or names.scaled):
        what = "norms plus 1" if names.shifted else "multiplied weights"
        return HubModel(base, 0, (f"mlx-lm stores this model with {what}, which transformers would misread",))
    if not stacks:
        return HubModel(base, 0, ())
    if types[0] not in ONE_BY_ONE:
        name = next(iter(stacks))
        return HubModel(base, 0, (f"it keeps mlx-lm's names, like {name}, which transformers cannot load",))
    shards = []
    for shard in base.shards:
        rows: dict[str, list[StoredRows]] = {}
        specs: dict[str, TensorSpec] = {}
        for name, spec in shard.specs.items():
            if name not in stacks:
                specs[name], rows[name] = spec, [StoredRows(shard, name, 0, (*spec.shape, 1)[0])]
                continue
            for expert in range(spec.shape[0]):
                new = stacks[name].format(expert)
                specs[new] = TensorSpec(spec.dtype, spec.shape[1:])
                rows[new] = [StoredRows(shard, name, expert, expert + 1)]
        shards.append(RegroupedFile(shard, shard.path, specs, rows, shard.metadata or {}))
    count = sum(name.endswith(".weight") for name in stacks)
    note = f"its {count} stacks of experts are split into experts, as on the hub; mlx-lm loads these too"
    return HubModel(replace(base, shards=tuple(shards)), len(stacks), (note,))


def _hub_name(name: str, types: tuple[str, ...]) -> str:
    """Return the hub's name for the experts of an MLX stack, with {} for the number. Empty for other tensors."""
    path, _, end = name.rpartition(".")
    share = find_share(canonical(path, types), types) if end in ("weight", "scales", "biases") else None
    if share is None:
        return ""
    parameter = share.stack.rpartition(".")[2]
    lasts = EXPERTS.get(types[0], {}) if types else {}
    last = next((last for last, rows in lasts.items() if rows == (parameter, share.part, share.parts)), "")
    owner = path.rpartition(".")[0].replace("switch_mlp", "experts")
    return f"{owner}.{{}}.{last}.{end}"


# A key of MODEL_DROP_CHOICES -> what the names of its tensors match as a whole, and of what a torch file has beside the
# weights, which is not read in any case. LDM: `LitEma` as `model_ema`; BasicSR: `params_ema`; timm: `state_dict_ema`.
DROPPED = {
    "ema": re.compile(r"model_ema(?:\..+)?|ema|params_ema|state_dict_ema|ema_state_dict"),
    "optimizer": re.compile(r"optimizers?|optimizer_states?|optimizer_state_dict|last_optimizer_state"),
}

# What a checkpoint is converted to; of the other containers, what writes them
ELSEWHERE = {GGUF: "use llama.cpp: convert_hf_to_gguf.py writes GGUF, and llama-quantize changes its types"}

WRITTEN = tuple(key for key in CONTAINERS if key not in ELSEWHERE)


def run_convert_model(call: ConvertModel) -> CheckpointConvertReport:
    """Convert a model to other files, another dtype or other shards, or a denoiser to other names."""
    checkpoint, drop = call.source, parse_words(call.drop)
    words = (*DROPPED, *(DENOISER_DROP_CHOICES if call.to in MODEL_NAMINGS else ()))
    for word in drop:
        if word not in words:
            raise UsageError(f"--drop {word!r} is none of {', '.join(words)}, the words for a checkpoint")
    chosen, naming = MERGE_DTYPES[dtype_word(call.dtype)], call.to if call.to in MODEL_NAMINGS else None
    with closing(open_checkpoint(checkpoint)) as opened:
        gguf = open_gguf(opened, chosen, call.tokenizer)
        if naming:
            container, (path, is_file) = "safetensors", place_denoiser(call.out, naming)
        else:
            container, path, is_file = _place(gguf.view.checkpoint if gguf else opened, call.out, call.to)
        _refuse_quantized(opened, chosen, container, checkpoint)
        removed = {name for name in (*opened.stored, *opened.weights) if _is_dropped(name, drop)}
        if removed.issuperset(opened.stored):
            raise InputError("has nothing left after --drop", culprit=os.fspath(checkpoint))
        hub = as_on_hub(opened) if chosen and not gguf else HubModel(opened, 0, ())
        base, denoiser = gguf.view.checkpoint if gguf else hub.checkpoint, None
        if naming:
            denoiser = rename_denoiser(opened, naming, removed, not DENOISER_DROP_CHOICES.keys().isdisjoint(drop))
            base, removed = denoiser.checkpoint, set()
        inputs = paths_of(opened.shards)
        exists = check_output_path(path, is_file, inputs, call.force, is_model=True, dry_run=call.dry_run)
        shared = find_shared_storage(base, removed)
        edits = OutputEdits(shared=shared, skipped_tensors=omitted_names(base, shared), removed=removed)
        edits, notes = _decode(base, edits, chosen)
        notes += (*hub.notes, *(note_of_a_file(edits, base) if is_file else ()))
        origin = provenance("convert", {"dtype": chosen, "to": naming or container}, opened.metadata.get("loratool"))
        output = plan_output(
            base, path, is_file, origin, (), chosen, parse_size(call.max_shard_size), edits, container=container
        )
        output = gguf.with_side_files(output, chosen) if gguf else output
        output = replace(output, call=described_call(call, [input_word(checkpoint)]), resume=call.resume)
        left = tuple(each for each in output.left_behind if each.name not in opened.weight_files)
        output = replace(output, inputs=opened.shards, left_behind=left)
        check_undo_files(output, inputs, call.force or call.dry_run)
        if call.dry_run:
            output.require_own_journal()
            flushed, notes = None, (*notes, *output.space_warning())
        else:
            flushed = _execute(base, output, edits, call.progress, call.workers or worker_count())
        report = _report(os.fspath(checkpoint), base, output, edits, container, call, flushed)
        report = replace(report, warnings=(*report.warnings, *notes), exists=exists)
        report = _with_gguf(report, gguf, opened, output) if gguf else report
        return _with_denoiser(report, denoiser, opened, naming, call) if denoiser and naming else report


def _is_dropped(name: str, drop: Collection[str]) -> bool:
    return any(DROPPED[word].fullmatch(name) for word in drop if word in DROPPED)


def _refuse_quantized(base: Checkpoint, dtype: str | None, to: str, name: str | os.PathLike[str]) -> None:
    """Raise InputError for codes that cannot be read, or whose meaning the container cannot store."""
    if dtype:
        refuse_unread(base, "without --dtype")
        return
    unsupported = [
        key for key in CODED_METADATA if to == "torch" and any(key in (s.metadata or {}) for s in base.shards)
    ]
    if unsupported:
        raise InputError(
            f"stores its quantization as metadata {unsupported[0]}, which a torch file cannot hold",
            culprit=os.fspath(name),
            remedy="write safetensors, or dequantize it with --dtype",
        )


def _decode(base: Checkpoint, edits: OutputEdits, dtype: str | None) -> tuple[OutputEdits, tuple[str, ...]]:
    """Return notes, and the edits with all weights dequantized and without marks. Companion tensors are checked.

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
        raise UsageError(f"--to of a checkpoint is {' or '.join(WRITTEN)}, not {to!r}", remedy=ELSEWHERE.get(to))
    if out is None:
        return to, Path(f"converted{CONTAINERS[to][0]}" if base.given_as_file else "converted"), base.given_as_file
    return to, *check_output_name(out, to)


def _execute(
    base: Checkpoint, output: Output, edits: OutputEdits, progress: Progress | None, workers: int
) -> dict[str, int]:
    """Write the output. Return tensor -> how many numbers became 0, for tensors that are cast."""
    sources = {name: base.ref(name) if name in edits.specs else base.stored_ref(name) for name in output.specs}
    cast = {
        name: _cast_tensor(sources[name])
        for name, spec in output.specs.items()
        if spec.size and spec.dtype != sources[name].spec.dtype
    }
    flushed: dict[str, int] = defaultdict(int)
    with closing(rewrite(output, sources, cast, CPU, workers, progress)) as runs:
        for item, blocks in runs:
            refuse_overflow(item.tensor, [stats for stats, _ in blocks], sources, output)
            flushed[item.tensor] += sum(zeros for _, zeros in blocks)
    return flushed


def _cast_tensor(source: TensorRef) -> ChangedTensor:
    columns = source.codec.columns(source.spec) if source.weight else 1
    return ChangedTensor(source.spec.size // columns, partial(_all_rows, source.spec.size // columns, columns))


def _all_rows(rows: int, columns: int) -> list[RowRange]:
    return [RowRange(0, rows, lambda start, stop: _cast, max(1, CAST_BLOCK // columns))]


def _cast(base: Numbers, row: int, out: Numbers, work: Workspace) -> tuple[RoundingStats, int]:
    """Cast a block into `out`. Return its rounding statistics, and how many numbers became 0."""
    stats = cast_rounded(base, out, work)
    least, former = (x.form.least - x.form.precision for x in (out, base))
    return stats, _count_nonzero(base) - _count_nonzero(out) if least > former else 0


def _count_nonzero(x: Numbers) -> int:
    return int(np.count_nonzero(x.bits << 1))  # less the sign


def _report(
    name: str,
    base: Checkpoint,
    output: Output,
    edits: OutputEdits,
    to: str,
    call: ConvertModel,
    flushed: dict[str, int] | None,  # tensor -> numbers that became 0; None in a dry run
) -> CheckpointConvertReport:
    former = {name: spec.dtype for name, spec in base.stored.items()}
    former |= {name: base.weights[name].kind for name in edits.specs}
    cast = tuple(
        CastTensor(each, spec.shape, former[each], spec.dtype, None if flushed is None else flushed[each])
        for each, spec in output.specs.items()
        if spec.dtype != former[each]
    )
    apart = [name for name in edits.shared if to == "safetensors" and name not in edits.skipped_tensors]
    return CheckpointConvertReport(
        checkpoint=name,
        source_format=_container_of(base),
        out=str(output.path),
        to=to,
        dry_run=flushed is None,
        nbytes=output.nbytes,
        cast=cast,
        copied=len(output.specs) - len(cast),
        shared={name: stored for name, stored in edits.shared.items() if name not in apart},
        files=tuple(file.name for file in output.files),
        not_copied=output.not_copied,
        warnings=tuple(_warnings(base, output, edits, to, apart, call)),
        left_out=(*(name for name in base.stored if name in edits.removed), *_dropped_beside(base, call)),
        left_behind=output.left_behind,
    )


def _with_denoiser(
    report: CheckpointConvertReport,
    denoiser: RenamedDenoiser,
    opened: Checkpoint,
    to: str,
    call: ConvertModel,
) -> CheckpointConvertReport:
    """Return the report on a denoiser's new file, completed from the source files."""
    return replace(
        report,
        to=to,
        source_format=_container_of(opened),
        warnings=(*_unread(opened, call), *report.warnings, *denoiser.notes(to)),
        left_out=(*denoiser.left_out, *_dropped_beside(opened, call)),
        family=denoiser.family.key,
        renamed=denoiser.renamed,
        regrouped=denoiser.regrouped,
    )


def _with_gguf(
    report: CheckpointConvertReport, gguf: GgufFolder, opened: Checkpoint, output: Output
) -> CheckpointConvertReport:
    """Return the report on a GGUF model's folder, with the types in the GGUF file."""
    (file,) = gguf.view.checkpoint.shards
    return replace(
        report,
        source_format=_container_of(opened),
        cast=tuple(replace(row, source_dtype=file.stored_type(row.name)) for row in report.cast),
        warnings=(*report.warnings, *gguf.notes(output)),
        left_out=(*gguf.view.in_config, *report.left_out),
        renamed=len(file.specs),
    )


def _container_of(base: Checkpoint) -> str:
    return next((shard.file_format for shard in base.shards if shard.file_format != "safetensors"), "safetensors")


def _dropped_beside(base: Checkpoint, call: ConvertModel) -> list[str]:
    """Return the contents of torch files besides the weights that --drop excludes."""
    return [name for shard in base.shards for name in shard.ignored if _is_dropped(name, parse_words(call.drop))]


def _unread(base: Checkpoint, call: ConvertModel) -> Iterator[str]:
    for shard in base.shards:
        if ignored := [name for name in shard.ignored if not _is_dropped(name, parse_words(call.drop))]:
            yield f"{shard.place} also holds {', '.join(ignored)}, which is not read"


def _warnings(
    base: Checkpoint, output: Output, edits: OutputEdits, to: str, apart: list[str], call: ConvertModel
) -> Iterator[str]:
    yield from _unread(base, call)
    for name in apart:
        other = edits.shared[name]
        yield f"{name} shares its storage with {other}, but no known loader ties them: both are written"
    coarse = [name for name, spec in output.specs.items() if spec.dtype in FLOAT8]
    if coarse and call.dtype != "keep":
        yield f"--dtype keeps floats of 8 bits: {len(coarse)} tensors are not changed, first {coarse[0]}"
    if to == "torch":
        not_lost = {"format", *(name.removeprefix(part.prefix) for part in base.models for name in edits.shared)}
        not_lost |= {"loratool"} if any(name.endswith(".index.json") for name in output.extras) else set()
        unsupported = sorted({key for shard in base.shards for key in shard.metadata or {}} - not_lost)
        if unsupported:
            yield f"a torch file has no metadata; not copied: {', '.join(unsupported)}"
