"""Decide which quantized weights of a base a merge dequantizes, and the resulting configs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...architectures.fusion_groups import close_under_fusion
from ...architectures.prefixes import module_path
from ...errors import InputError, NeedsFlag
from ...files.checkpoint import Checkpoint, plain_dtype
from ...files.codecs import RAW, codec_of
from ...files.codecs.codec import StoredWeight
from ...files.codecs.quantized import (
    CONFIG_FILES,
    QUANTIZERS,
    SCALED_FILE,
    declared_method,
    find_declared,
    remedy_of,
)
from ...files.codecs.skip_lists import (
    BITNET,
    extend_skip_lists,
    mixed_notes,
    quantizes_kv_cache,
    without_quantization,
)
from ...files.dtypes import DTYPES, TORCH_FLOATS, TensorSpec
from ...files.folder.model_folder import read_json_file
from ...files.output.output import OutputEdits
from ..ties.ties import find_tie
from .choices import LOSSY, WAYS
from .merge_plan import MergePlan

MANY = 3  # dequantized weights per changed weight; from this ratio on another way is better

# ComfyUI's scaled_fp8_ops (comfy/ops.py until it read quantization by layer) makes all linear weights float8
OLD_COMFY = f"older versions of ComfyUI cast all linear weights of a file with {SCALED_FILE} to float8, plain ones too"

ONLINE = "layers of this model round their weights to -1, 0 and 1 times a scale when they run, and so the merged ones"

COARSE = 8  # a code of fewer bits rounds away nearly all of a LoRA's change


def code_bits(weight: StoredWeight) -> int:
    """Return the number of bits of a weight's codes."""
    return int(weight.detail.get("bits", weight.format.bits))


def plan_codes(plan: MergePlan, way: str, dtype: str | None, allow: Collection[str] = ()) -> MergePlan:
    """Return the plan with the weights that are dequantized, and with the output's configs.

    Args:
        way: a key of WAYS.
        dtype: the safetensors name of the type of all plain weights; None for the base's types.
        allow: keys of LOSSY that are not refused.

    Raises:
        NeedsFlag, InputError: a weight cannot be written in this way.
    """
    base = plan.base
    plan = replace(plan, warnings=(*plan.warnings, *(ONLINE for part in base.models if _rounds_when_run(part))))
    touched = _touched(plan)
    edits = _retype(plan, dtype) if base.is_gguf else _widen_float8(plan, dtype)
    tie = find_tie(base)
    untied = {name for name in plan.untied if tie and tie.stored_as(name) in base.weights}
    copies = [n for n in plan.changed - base.weights.keys() if n in untied or plan.sources[n].weight]
    plain = {name: TensorSpec(dtype or plain_dtype(base), plan.sources[name].spec.shape) for name in copies}
    edits = replace(edits, specs={**edits.specs, **plain})
    if way == "requantize" and touched:
        _refuse_lossy(plan, touched, allow)
        return replace(plan, edits=edits, recoded=frozenset(touched), way=way)
    if way == "requantize":
        note = "no quantized weight is changed, so --quantized requantize has nothing to do"
        return replace(plan, edits=edits, warnings=(*plan.warnings, note))
    if way == "dequantize":
        refuse_unread(base, "with --quantized mixed")
    decoded = decoded_weights(plan, way)
    if not decoded and not (way == "dequantize" and base.quantized):
        return replace(plan, edits=edits)
    edits = _decode(base, edits, decoded, dtype)
    others = {name: why for name, why in decoded.items() if name not in plan.changed}  # not changed by an adapter
    notes = _notes(base, decoded, others)
    notes += (OLD_COMFY,) if _is_scaled_file(base) else ()
    return replace(plan, edits=edits, decoded=others, way=way, warnings=(*plan.warnings, *notes))


def _rounds_when_run(base: Checkpoint) -> bool:
    """Return whether the config says that layers of BitNet round plain weights when they run."""
    declared, online = base.declared, ("autobitlinear", "online")
    is_online = (declared.get("linear_class"), declared.get("quantization_mode")) == online
    return declared_method(declared) == "bitnet" and is_online


def decode_all(base: Checkpoint, edits: OutputEdits, dtype: str) -> tuple[OutputEdits, tuple[str, ...]]:
    """Return the edits of an output with all weights as plain numbers of one type, and notes for the user."""
    decoded = dict.fromkeys(base.weights, "")
    return _decode(base, edits, decoded, dtype), _notes(base, decoded, {})


def _decode(base: Checkpoint, edits: OutputEdits, decoded: Mapping[str, str], dtype: str | None) -> OutputEdits:
    """Return the edits with quantized weights as numbers of `dtype` (by default the model's), and updated configs."""
    specs = dict(edits.specs)
    for part in base.models:
        in_part = [name for name in decoded if name.startswith(part.prefix)]
        kind = dtype or plain_dtype(part)
        shapes = {name: (specs.get(name) or base.specs[name]).shape for name in in_part}
        alike = {shape: TensorSpec(kind, shape) for shape in shapes.values()}  # few, even in a mixture of experts
        specs |= {name: alike[shape] for name, shape in shapes.items()}
    return _edit_configs(base, replace(edits, specs=specs), decoded)


def decoded_weights(plan: MergePlan, way: str) -> dict[str, str]:
    """Return the weights that are dequantized -> the touched module that causes it."""
    base = plan.base
    if way == "dequantize":
        return dict.fromkeys(base.weights, "")
    return {} if way == "requantize" else with_siblings(base, _touched(plan))


def _touched(plan: MergePlan) -> list[str]:
    """Return the quantized weights that an adapter changes, also in a plan with `decoded`."""
    return [name for name in plan.base.weights if name in plan.changed and name not in plan.decoded]


def with_siblings(base: Checkpoint, touched: Collection[str]) -> dict[str, str]:
    """Return touched quantized weights and those that runtimes fuse with them -> the module that causes it."""
    if base.is_gguf or not touched:  # each tensor of GGUF has its own type
        return dict.fromkeys(touched, "")
    groups = close_under_fusion([module_path(name) for name in touched], [module_path(name) for name in base.weights])
    siblings = {name: groups[module_path(name)] for name in base.weights if module_path(name) in groups}
    return {**dict.fromkeys(touched, ""), **siblings}


def sizes_of_ways(plan: MergePlan) -> dict[str, int]:
    """Return the bytes of the output's tensors in each possible way; empty if the merge touches no codes."""
    base = plan.base
    if plan.way is None:
        return {}
    stored = sum(spec.nbytes for spec in base.stored.values())
    grown: dict[str, int] = {}
    for part in base.models:
        width = DTYPES[plain_dtype(part)] // 8
        grown |= {name: base.specs[name].size * width - base.nbytes_of(name) for name in part.weights}
    ways = [way for way in WAYS if way != "dequantize" or not base.coded]
    return {way: stored + sum(grown[name] for name in decoded_weights(plan, way)) for way in ways}


def _retype(plan: MergePlan, dtype: str | None) -> OutputEdits:
    """Return the edits of a GGUF model with changed plain matrices in `dtype`, if given; others keep their types.

    Raises:
        InputError: a changed matrix has a separate scale that multiplies it at run time.
    """
    specs, base = dict(plan.edits.specs), plan.base
    for name in sorted(plan.changed - base.weights.keys()):
        spec, scale = specs.get(name) or plan.sources[name].spec, f"{name.removesuffix('.weight')}.scale"
        if scale in base.stored and scale != name:
            message = f"is multiplied by {scale}, which only quantized weights support"
            raise InputError(message, culprit=name, remedy="merge into the model that this one was converted from")
        if dtype and spec.dtype in TORCH_FLOATS and len(spec.shape) > 1:
            specs[name] = TensorSpec(dtype, spec.shape)
    return replace(plan.edits, specs=specs)


def _widen_float8(plan: MergePlan, dtype: str | None) -> OutputEdits:
    """Return the edits with changed plain weights of 8 bits in `dtype`.

    Raises:
        NeedsFlag: `dtype` is None, and such a weight is among scaled weights.
    """
    specs, base = dict(plan.edits.specs), plan.base
    scaled = _is_scaled_file(base)
    for name in sorted(plan.changed):
        spec = specs.get(name) or base.specs[name]
        if name in base.weights or codec_of(spec) is RAW:
            continue
        if dtype is None and scaled:
            message = f"is {spec.dtype}, but the other weights of the file have scales"
            raise NeedsFlag(message, culprit=name, flags="--dtype bf16 --no-undo")
        if dtype is not None:
            specs[name] = TensorSpec(dtype, spec.shape)
    return replace(plan.edits, specs=specs)


def _is_scaled_file(base: Checkpoint) -> bool:
    return any(name.rpartition(".")[2] == SCALED_FILE for name in base.stored)


def refuse_unread(base: Checkpoint, how: str) -> None:
    """Raise InputError for a weight in a format without a codec; `how` is a remedy that keeps its codes."""
    for name, coded in base.coded.items():
        raise InputError(
            f"is quantized ({coded.format}), which cannot be read{': ' + coded.fault if coded.fault else ''}",
            culprit=name,
            remedy=f"{remedy_of(coded.format)}, or keep its codes unchanged {how}",
        )


def _refuse_lossy(plan: MergePlan, touched: Collection[str], allow: Collection[str]) -> None:
    """Raise an error for codes that round away nearly all of a delta, or cannot represent it."""
    for name in touched:
        weight = plan.base.weights[name]
        source = plan.sources[name]
        if source != plan.base.ref(name):
            message = "is replaced by an adapter's own values, which have no codes"
            raise InputError(message, culprit=name, remedy="use --quantized mixed")
        _require_whole_bytes(plan, name, "add --quantized mixed --no-undo")
        if not weight.format.rounds_alone(weight):
            message = (
                f"has codes for runs of numbers ({weight.kind}), so that no number can be rounded to its nearest code"
            )
            raise InputError(message, culprit=name, remedy="use --quantized mixed")
        if code_bits(weight) < COARSE and LOSSY not in allow:
            raise NeedsFlag(
                f"has codes of {code_bits(weight)} bits ({weight.kind}), in which almost nothing of a delta "
                "survives: merge into the 16-bit original with --like, or with --quantized mixed",
                culprit=name,
                flags="--allow lossy",
            )


def require_undoable(plan: MergePlan) -> None:
    """Raise NeedsFlag if codes cannot be restored."""
    for name in plan.placements:
        if name in plan.base.weights:
            _require_whole_bytes(plan, name, "add --no-undo")


def _require_whole_bytes(plan: MergePlan, name: str, remedy: str) -> None:
    """Raise NeedsFlag for an update of rows whose codes share bytes with other rows."""
    parts = plan.base.parts_of(name)
    together, rows = parts.weight.format.row_multiple(parts), parts.weight.spec.size // parts.weight.spec.shape[-1]
    for placement in plan.placements[name]:
        if any(
            edge * (rows // placement.rows) % together
            for edge in (placement.start, placement.stop)
            if edge != placement.rows
        ):
            message = (
                f"has rows {placement.start} to {placement.stop} changed, and {together} rows of its codes share bytes"
            )
            raise NeedsFlag(message, culprit=name, remedy=remedy)


def _edit_configs(base: Checkpoint, edits: OutputEdits, decoded: Mapping[str, str]) -> OutputEdits:
    """Return the edits with configs that list the weights that are plain now."""
    configs: dict[str, Mapping[str, Any]] = {}
    extras: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    for part in base.models:
        present = [name for name in QUANTIZERS if part.declared and (part.folder / name).is_file()]
        if is_decoded(part, decoded):
            configs[part.prefix] = without_quantization(part.config)
            skipped |= {part.prefix + name: "the output has no codes" for name in present}
        elif part.declared and any(name.startswith(part.prefix) for name in decoded):
            contents = {"config.json": part.config} if find_declared(part.config) else {}
            contents |= {name: read_json_file(part.folder / name) for name in present if name in CONFIG_FILES}
            for name, content in contents.items():
                extras[part.prefix + name] = _extended(part, content, decoded)
            configs[part.prefix] = extras.pop(f"{part.prefix}config.json", part.config)
    paths = {module_path(name) for name in decoded}
    return replace(
        edits,
        configs=configs,
        extras=extras,
        skipped_files={**edits.skipped_files, **skipped},
        decoded_modules=frozenset(paths),
    )


def is_decoded(base: Checkpoint, decoded: Collection[str]) -> bool:
    """Return whether all quantized weights of a model are dequantized."""
    return bool(base.declared) and not [name for name in (*base.weights, *base.coded) if name not in decoded]


def _extended(base: Checkpoint, content: Mapping[str, Any], decoded: Collection[str]) -> dict[str, Any]:
    """Return a model's config with the weights that are plain now."""

    def paths(names: Iterable[str]) -> list[str]:
        return [module_path(name).removeprefix(base.prefix) for name in names if name.startswith(base.prefix)]

    coded = (name for name in (*base.weights, *base.coded) if name not in decoded)
    method = declared_method(base.declared) or ""
    return extend_skip_lists(
        content, method, paths(decoded), paths(_plain_matrices(base)), paths(coded), base.model_types
    )


def _plain_matrices(base: Checkpoint) -> list[str]:
    """Return the matrices that the files store as numbers."""
    coded = base.weights.keys() | base.formats.keys()
    return [n for n, spec in base.specs.items() if n.endswith(".weight") and len(spec.shape) > 1 and n not in coded]


def _better(base: Checkpoint, touched: int, pulled: Sequence[str]) -> str:
    """Return a better way for a mixture of experts, where a few touched experts would dequantize full layers."""
    if len(pulled) < MANY * touched:
        return ""
    fine = all(code_bits(base.weights[name]) >= COARSE for name in pulled)
    what = "--quantized requantize keeps their size" if fine else "merging the original with --like keeps their size"
    return f"; {what}"


def note_of_a_file(edits: OutputEdits, base: Checkpoint) -> tuple[str, ...]:
    """Return a note for an output that is a single file without its config."""
    wrong = [
        *(["the layers"] if base.layers else []),
        *(["what is quantized"] if any(edits.configs.values()) else []),
        *(["the class and its labels"] if edits.top else []),
    ]
    note = f"a single file has no config, and the base's config is wrong about {' and '.join(wrong)}: "
    return (f"{note}name a folder with -o",) if wrong else ()


def _notes(base: Checkpoint, decoded: Mapping[str, str], others: Mapping[str, str]) -> tuple[str, ...]:
    """Return notes for the user on weights that are dequantized."""
    notes = sorted({base.weights[name].note for name in decoded} - {""})
    pulled = sorted(name for name, why in others.items() if why)
    if pulled:
        note = f"{len(pulled)} unchanged weights are written as numbers, since runtimes keep them in one matrix "
        notes.append(f"{note}with changed ones: {pulled[0]}, ...{_better(base, len(decoded) - len(others), pulled)}")
    for part in base.models:
        if is_decoded(part, decoded):
            if quantizes_kv_cache(part.declared):
                notes.append("the removed quantization config also quantized the cache of keys and values")
            if declared_method(part.declared) == "bitnet":
                notes.append(BITNET)
        elif part.declared:
            notes += mixed_notes(declared_method(part.declared) or "", [module_path(name) for name in decoded])
    return tuple(notes)
