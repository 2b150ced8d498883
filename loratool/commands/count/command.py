"""`count` reports what each method of the LoRA paper would train of a model, and add at inference.

It reads headers or a config. Nothing here may import torch or numpy: shapes are all that is needed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.formats import is_adapter
from ...architectures.config_tensors import (
    CONFIG_FAMILIES,
    config_field,
    declared_class,
    model_class,
    tensor_shapes,
    tied_head,
)
from ...architectures.numbered_names import grouped
from ...architectures.ties import COPIES
from ...binding.modules.selection import Selection
from ...binding.names.class_names import ClassNames
from ...binding.ties.ties import find_tie
from ...binding.weights.default_targets import find_unnamed
from ...durable.fileio import reading
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, Headers, open_checkpoint, plain_dtype, require_one_model
from ...files.codecs.quantized import declared_method, find_declared, is_marker
from ...files.dtypes import CONFIG_DTYPES, DTYPES, TensorSpec
from ...files.folder.model_folder import is_torch_weights, read_json_file
from ...files.gguf_model import with_names_of_one
from ...files.hub.cache import resolve
from ...views.count import CountReport, MethodCount
from ...views.parts.writing import command_line
from ..arguments import parse_count
from .call import Count
from .formulas import FORMULAS, TOP_LAYERS, CountedMatrix, Formula, Outline, largest_size
from .outline import (
    SINGLE,
    Matrix,
    Parts,
    find_blocks,
    find_matrices,
    find_targets,
    make_outline,
    named_cost,
    names_one,
    parameters_of,
    parts_in_files,
    peft_targets,
    stack_experts,
)

RANK = 8

TARGET = ("q_proj", "v_proj")  # the paper's choice, section 7.1

SHOWN = 20  # names in an error

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class Described:
    """A model with only a config.json."""

    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    model_types: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """Names and shapes of the trained tensors, each tied matrix once, with notes."""

    source: str  # `config` or `checkpoint`
    model_type: str | None
    headers: Headers
    in_model: ClassNames | None  # the names in the class; None if these are the model's
    specs: Mapping[str, TensorSpec]  # experts as the class has them
    parts: Parts  # of stacks of experts
    dtype: str  # the commonest
    tied: tuple[str, str] | None  # (embedding, head), twice the embedding if the head cannot be its own
    context: int | None  # in positions
    notes: tuple[str, ...]


def run_count(call: Count) -> CountReport:
    """Count what every method of `formulas.FORMULAS` trains of a model and adds at inference."""
    if call.rank is not None and call.params is not None:
        raise UsageError("--rank and --params exclude each other")
    selection = Selection.parse(call.target or TARGET, call.exclude, call.layers)
    model, budget = _open_model(call.path), parse_count(call.params)
    blocks = find_blocks(model.specs)
    groups = find_unnamed(model.headers, model.in_model, selection.target)
    names = model.in_model.in_main_class if model.in_model else str
    matrices = find_matrices(model.specs, blocks, model.tied, model.parts, groups, names)
    targets = find_targets(matrices, selection)
    _check_targets(targets, matrices, selection, None if call.params is not None else call.rank or RANK)
    shape = make_outline(model.specs, blocks, targets, selection.layers, model.context)
    notes = [f"--target {p} matches nothing" for p in selection.target if not any(names_one(p, m) for m in matrices)]
    chosen = call.rank or RANK
    if call.params is not None:
        chosen = max(1, largest_size(FORMULAS["lora"], shape, budget or 0))
    if single := [m.path for m in matrices if m.group == SINGLE]:
        notes.append(
            f"{len(single)} matrices of experts get no factors, as the class has no stack for them: {single[0]}, ..."
        )
    notes += _notes_on_peft(matrices, selection, targets, model, chosen)
    if call.params is None and model.context and (call.rank or RANK) >= model.context:
        notes.append(f"a prefix of {call.rank or RANK} fills the context of {model.context}")
    return CountReport(
        path=os.fspath(call.path),
        source=model.source,
        model_type=model.model_type,
        parameters=shape.total,
        nbytes=_nbytes(shape.total, model.dtype),
        dtype=model.dtype,
        layers=len(shape.layers),
        width=shape.width,
        tied=model.tied is not None,
        rank=None if call.params is not None else call.rank or RANK,
        params=budget,
        matrices=sum(each.copies for each in targets),
        targets=tuple(grouped(each.name for each in targets)),
        methods=tuple(
            _count_method(name, each, shape, call.rank or RANK, budget, model.dtype) for name, each in FORMULAS.items()
        ),
        notes=(*model.notes, *notes),
    )


def _notes_on_peft(
    matrices: Sequence[Matrix], selection: Selection, targets: Sequence[CountedMatrix], model: Model, rank: int
) -> list[str]:
    """Return notes on PEFT's reading of the same targets in a mixture of experts, if it differs."""
    stacks = {m.path: m for m in matrices if m.kind == "experts"}
    parts = [each for each in targets if each.name.partition("[")[0] in stacks and each.name.endswith("]")]
    if parts:
        last = stacks[parts[0].name.partition("[")[0]].in_model.rpartition(".")[2]
        role = parts[0].name.partition("[")[2].rstrip("]")
        return [f"PEFT and init train {last} of the experts as one parameter, not {role} alone: use --target {last}"]
    cost, named, notes = sum(each.cost for each in targets), named_cost(matrices, selection), []
    if named and named != cost:
        by_names = f"init reads --target as names only, and trains {rank * named:,}"
        notes.append(f"{by_names}: for count, a name like q_proj also selects the same part under another name")
    family = (model.in_model.family if model.in_model else model.model_type) or ""
    theirs = peft_targets(matrices, selection, targets, family) if stacks else None
    if theirs is None or theirs.cost == cost:
        return notes
    given = "all-linear" if selection.target == ("all-linear",) else f"{','.join(selection.target)} as target_modules"
    facts = [f"{' and '.join(theirs.more)} too"] if theirs.more else []
    facts += [f"{' and '.join(theirs.doubled)} of the experts with twice the rank"] if theirs.doubled else []
    facts += [f"not {' and '.join(theirs.stacks)} of the experts"] if theirs.stacks else []
    facts += [f"not {' and '.join(theirs.fewer)} outside of the experts"] if theirs.fewer else []
    why = f"given {given}, PEFT trains {rank * theirs.cost:,}{': ' * bool(facts)}{', '.join(facts)}"
    return [*notes, f"{why}. With a config written by init, it trains the modules of that config"]


def _open_model(path: str | os.PathLike[str]) -> Model:
    resolved = resolve(path, config_alone=True)
    with reading(resolved):
        config = _lone_config(resolved)
    if config is not None:
        return _from_config(config)
    with closing(open_checkpoint(path)) as checkpoint:
        require_one_model(checkpoint)
        if is_adapter(checkpoint.specs):
            remedy = f"to see what it has: {command_line('inspect', path)}"
            raise InputError("is an adapter; count takes a model", culprit=os.fspath(path), remedy=remedy)
        if not checkpoint.coded:
            return _from_checkpoint(*with_names_of_one([checkpoint]))
        method = checkpoint.quantized
        if checkpoint.model_type not in CONFIG_FAMILIES:
            name, coded = next(iter(checkpoint.coded.items()))
            raise InputError(
                f"is quantized ({method}), and the shape of {name} cannot be derived from its codes ({coded.format})",
                culprit=os.fspath(path),
                remedy="give the checkpoint that it was quantized from",
            )
        return _from_config(checkpoint.config)


def _lone_config(path: Path) -> dict[str, Any] | None:
    """Read the config.json of a model without weights: the path itself, or in a folder. None if there are weights."""
    if path.is_dir():
        has_weights = any(p.suffix == ".safetensors" or is_torch_weights(p) for p in path.iterdir())
        config = path / "config.json"
        return read_json_file(config) if config.is_file() and not has_weights else None
    if path.suffix != ".json":
        return None
    value = read_json_file(path)
    return None if "weight_map" in value else value


def _from_config(config: Mapping[str, Any]) -> Model:
    shapes = tensor_shapes(config)
    family = CONFIG_FAMILIES[config["model_type"]]
    named, counted = declared_class(config), model_class(config)
    notes = []
    if counted == family.bare and named not in ("", counted):
        notes.append(f"config.json names {named}: modules that {counted} does not have are not counted")
    if method := declared_method(find_declared(config)):
        notes.append(f"quantized ({method}): the parameters are those before quantization")
    dtype = CONFIG_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), "F32")
    tied = tied_head(config)
    context = config_field(config, family, "max_position_embeddings")
    specs = {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}
    kind = config["model_type"]
    headers, parts = Described(specs, config, (kind,)), parts_in_files(specs, kind)
    return Model("config", kind, headers, None, specs, parts, dtype, tied, context, tuple(notes))


def _from_checkpoint(checkpoint: Checkpoint) -> Model:
    plain = plain_dtype(checkpoint)
    specs = {
        name: TensorSpec(plain, spec.shape) if name in checkpoint.weights else spec
        for name, spec in parameters_of(checkpoint.specs).items()
        if not is_marker(name)
    }
    tie, tied = find_tie(checkpoint), None
    if tie is not None and tie.embedding in specs:
        tied = tie.embedding, tie.head if tie.separable else tie.embedding
        shape = specs[tie.embedding].shape
        copies = [
            n for n, s in specs.items() if n.removesuffix(".weight").split(".")[-1] in COPIES and s.shape == shape
        ]
        specs = {name: spec for name, spec in specs.items() if name == tie.embedding or name not in copies}
    if not any(spec.size for spec in specs.values()):
        raise InputError("holds no floating-point weights", culprit=str(checkpoint.path))
    dtypes: Counter[str] = Counter()
    for spec in specs.values():
        dtypes[spec.dtype] += spec.size
    types = [dtype for dtype, _ in dtypes.most_common()]
    notes: tuple[str, ...] = ()
    if len(types) > 1:
        notes += (f"dtypes are mixed ({', '.join(types)}): bytes are those of {types[0]}",)
    if checkpoint.weights:
        count = len(checkpoint.weights.keys() & specs.keys())
        notes += (f"quantized ({checkpoint.quantized}): {count} weights are counted as {plain}",)
    configs = (checkpoint.config, checkpoint.config.get("text_config"))
    fields = [config.get(name) for config in configs if isinstance(config, dict) for name in CONTEXT_FIELDS]
    context = next((value for value in fields if type(value) is int and value > 0), None)
    specs, parts = stack_experts(specs, checkpoint.model_types)
    kind, in_model = checkpoint.model_type, ClassNames(checkpoint)
    return Model("checkpoint", kind, checkpoint, in_model, specs, parts, types[0], tied, context, notes)


def _check_targets(
    targets: Sequence[CountedMatrix], matrices: Sequence[Matrix], selection: Selection, rank: int | None
) -> None:
    """Raise InputError if nothing is selected, and UsageError for a rank above that of a matrix."""
    if not targets:
        narrowed = " after --exclude and --layers" if selection.exclude or selection.layers is not None else ""
        names = sorted({m.path.rpartition(".")[2] for m in matrices if m.kind != "embedding"})
        raise InputError(
            f"--target {','.join(selection.target)} selects no matrix{narrowed}",
            remedy=f"choose among {', '.join(names[:SHOWN])}, or all-linear" if names else None,
        )
    low = min(targets, key=lambda each: min(each.inp, each.out))
    max_rank = min(low.inp, low.out)
    if rank is not None and rank > max_rank:
        raise UsageError(
            f"is {low.out} x {low.inp}, so its rank is at most {max_rank}, but --rank is {rank}", culprit=low.name
        )


def _count_method(name: str, method: Formula, shape: Outline, rank: int, params: int | None, dtype: str) -> MethodCount:
    n: int | None = None
    if method.size:
        n = min(TOP_LAYERS, len(shape.layers)) if method.size == "layers" else rank
        if params is not None:
            n = max(1, largest_size(method, shape, params))
    trained = method.count(shape, n or 0) if n != 0 else 0
    depth = method.depth(shape)
    of_context = f" of {shape.context:,}" if shape.context else ""
    adds = method.adds.format(n=f"{n:,}" if n else "", depth=depth, of=of_context) if trained else method.needs
    return MethodCount(
        method=name,
        title=method.title,
        measure=method.size,
        size=n if trained else None,
        parameters=trained,
        nbytes=_nbytes(trained, dtype),
        share=trained / shape.total,
        adds=adds,
        depth=depth,
        positions=n if n and method.positions and trained else 0,
        fits=None if params is None or not trained else trained <= params,
    )


def _nbytes(parameters: int, dtype: str) -> int:
    return parameters * DTYPES[dtype] // 8
