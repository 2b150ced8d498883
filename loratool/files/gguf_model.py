"""View of a GGUF model with the names, row order, separate experts and config.json of transformers.

Nothing is written, and numbers are read on access. Factors of rotary frequencies, which a GGUF file has as tensors,
are in the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from ..architectures.config_tensors import CONFIG_FAMILIES, tensor_shapes
from ..architectures.gguf import ARCHITECTURES
from ..architectures.gguf.config import FREQUENCIES, LONG, MTP, SHORT
from ..architectures.gguf.config_table import HEADLESS, IN_FIELDS, INSTEAD, MTP_LAYERS, OF_THE_FIRST, UNTURNED
from ..architectures.gguf.table import NEEDED, NOT_IN_GGUF, READS, ROW_ORDERS, WRITES, Architecture, Facts, Weight
from ..errors import InputError
from .checkpoint import Checkpoint
from .codecs.codec import Parts, StoredTensor
from .containers.gguf_config import gguf_config
from .containers.gguf_file import GgufFile
from .containers.virtual import of_numbers
from .dtypes import TORCH_FLOATS
from .folder.model_folder import SINGLE_NAMES
from .relaid import RelaidFile, RelaidTensor, StoredStack, logarithm, minus_one
from .tensor_ref import TensorRef

GENERATED = (FREQUENCIES, LONG, SHORT)

LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")

ENDS = (".weight", ".bias")

# Fields of config.json with a kind for each layer
KINDS_OF_LAYERS = ("layer_types", "indexer_types", "mlp_layer_types", "hybrid_override_pattern")

TURNS = ("attn_layer", "expert_layer")  # with the period and offset of the layers of a kind in config.json

UNDONE = {"plus one": minus_one, "minus exp": logarithm}  # key of CHANGES -> the function that undoes it

MTP_MODULES = ("eh_proj", "enorm", "hnorm")  # of each MTP layer


@dataclass(frozen=True)
class TransformersView:
    """A GGUF model as one of transformers."""

    checkpoint: Checkpoint  # of one virtual file
    in_config: tuple[str, ...]  # tensors of the GGUF file whose values are in the config


@dataclass(frozen=True)
class _Part:
    """A tensor of the file and its row in the table."""

    weight: Weight
    name: str
    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape, without the ones of four dimensions."""
        shape = self.ref.spec.shape
        return tuple(size for size in shape if size > 1) if len(shape) == 4 else shape

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Return the tensor as a stack: (matrices, rows, columns)."""
        shape = self.shape
        if self.weight.heads:
            heads, rows, columns = shape
            return (1, heads * columns, rows) if self.weight.heads_transposed else (1, heads * rows, columns)
        stack, inner = (shape[0], shape[1:]) if self.is_stack else (1, shape)
        return (stack, *inner) if len(inner) == 2 else (stack, inner[0], 1)

    @property
    def is_stack(self) -> bool:
        stacked = "_exps" in self.weight.gguf or "{e}" in self.weight.hf
        return stacked and len(self.shape) > 1

    @property
    def piece(self) -> StoredStack:
        _, rows, columns = self.matrices
        return StoredStack(self.ref, rows, columns, self.shape[-1] if self.weight.heads_transposed else 0)


def with_names_of_one(sides: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the models with comparable names: GGUF models under the names of transformers.

    If all are GGUF models, they keep their own names where no table has those of transformers.

    Raises:
        InputError: as in `as_transformers`.
    """
    unknown = any(side.is_gguf and not side.config for side in sides)
    if unknown and all(side.is_gguf for side in sides):
        return [*sides]
    return [as_transformers(side).checkpoint if side.is_gguf else side for side in sides]


def as_transformers(base: Checkpoint) -> TransformersView:
    """Return a GGUF model under the names of transformers.

    Raises:
        InputError: the architecture or a tensor is in no table, or a tensor is missing or of another shape.
    """
    files = [shard for shard in base.shards if isinstance(shard, GgufFile)]
    key = files[0].architecture or ""
    config, architecture = gguf_config(files), ARCHITECTURES.get(key)
    if architecture is None or not config:
        why = "whose names in transformers are unknown" if architecture is None else "which has no rule for config.json"
        raise InputError(
            f"is of the architecture {key or 'without a name'!r}, {why}",
            culprit=str(base.path),
            remedy="use the model in transformers' format",
        )
    facts = Facts.of_metadata(key, files[0].fields)
    others = _other_names(architecture, config)
    groups = _group(base, architecture, others)
    tensors: dict[str, RelaidTensor] = {}
    for hf, parts in groups.items():
        tensors |= _relay(hf, parts, facts)
    tensors |= _in_fields(files[0])
    width = _number(files[0], "embedding_length")
    _require_widths(groups, width, _number(files[0], "moe_latent_size") or width)
    _require_fused_rows(groups, facts, _number(files[0], "attention.key_length"), width)
    layers, mtp = _mtp_layers(files[0], base)
    kinds = [*_kinds_of_layers(files[0], config), *[("mtp",)] * mtp]
    _require_layers(tensors, kinds, OF_THE_FIRST.get(config["model_type"], {}), base)
    _require_modules(groups, architecture)
    _require_shapes(tensors, config)
    if mtp:
        tensors = _with_mtp_names(tensors, key, layers, mtp)
    metadata = {"format": "pt"} | {k: v for shard in base.shards for k, v in (shard.metadata or {}).items()}
    file = RelaidFile(files[0], base.folder / SINGLE_NAMES[0], tensors, metadata)
    checkpoint = Checkpoint(base.path, base.folder, False, (file,), None, config)
    return TransformersView(checkpoint, tuple(name for name in base.stored if name in GENERATED))


def _mtp_layers(file: GgufFile, base: Checkpoint) -> tuple[int, int]:
    """Return the numbers of layers before the MTP layers, and of those; a file may tell MTP layers that it lacks."""
    layers = _number(file, "block_count") - _number(file, MTP)
    is_there = any(name.startswith(f"blk.{layers}.") for name in base.stored)
    return layers, _number(file, MTP) if is_there else 0


def _with_mtp_names(tensors: Mapping[str, RelaidTensor], key: str, layers: int, mtp: int) -> dict[str, RelaidTensor]:
    """Return the tensors with the original's names of those in the `mtp` MTP layers after the others.

    Raises:
        InputError: a layer has no tensors that it needs, or several layers have tensors that the original shares.
    """
    for name in (f"model.layers.{layers + i}.{module}.weight" for i in range(mtp) for module in MTP_MODULES):
        if name not in tensors:
            raise InputError("is missing, but its fields say that it is there", culprit=name)
    row, renamed = MTP_LAYERS[key], dict[str, RelaidTensor]()
    for name, tensor in tensors.items():
        match = LAYER.match(name)
        if match and (layer := int(match[2])) >= layers:
            module, _, role = match[3].removeprefix(".").rpartition(".")
            path = row.names.get(module, f"{row.path}.{module}")
            name = f"{path.replace('{n}', str(layer - layers)).replace('{layer}', str(layer))}.{role}"
            if name in renamed:
                raise InputError("is shared by all MTP layers, and the file has one of each", culprit=name)
        renamed[name] = tensor
    return renamed


def _other_names(architecture: Architecture, config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the table's names that differ in this model, mapped to this model's."""
    if config["architectures"][0] in HEADLESS:
        return {weight.hf: weight.hf.removeprefix("model.") for weight in architecture.weights}
    (field, value), names = INSTEAD.get(architecture.key, (("", None), {}))
    return names if field and config.get(field) == value else {}


def _group(base: Checkpoint, architecture: Architecture, others: Mapping[str, str]) -> dict[str, list[_Part]]:
    """Return the tensors of the file, grouped by the name in transformers that they are parts of.

    Raises:
        InputError: a tensor is in no table.
    """
    groups: dict[str, list[_Part]] = {}
    companions = {
        t for weight in base.weights.values() for t in weight.tensors[1:] if not _place(architecture, t, others)
    }
    for name in base.stored:
        if name in GENERATED or name in companions:
            continue
        place = _place(architecture, name, others)
        if place is None:
            raise InputError(
                f"is not in the table of {architecture.key}",
                culprit=name,
                remedy="convert the model's original files",
            )
        if name.endswith(UNTURNED.get(architecture.key, ())):
            raise InputError("has its rows in an unknown order", culprit=name)
        weight, hf = place
        groups.setdefault(hf, []).append(_Part(weight, name, _ref(base, name, companions)))
    return groups


def _place(architecture: Architecture, name: str, others: Mapping[str, str]) -> tuple[Weight, str] | None:
    """Return a tensor's row in the table and its name in transformers; None if the table does not have it."""
    for end in ("", *ENDS):
        row = architecture.find(name.removesuffix(end)) if name.endswith(end) else None
        if row and row[0].bare is not bool(end):
            weight, layer = row
            return weight, others.get(weight.hf, weight.hf).replace("{n}", str(layer)) + end
    return None


def _ref(base: Checkpoint, name: str, companions: Set[str]) -> TensorRef:
    """Return a reference to a tensor: its codes with the companions that are not tensors of the model.

    Raises:
        InputError: no codec reads its codes.
    """
    weight, stored = base.weights.get(name), base.stored_ref(name)
    if weight is None and stored.spec.dtype not in TORCH_FLOATS:
        raise InputError(
            f"is {stored.spec.dtype}, which is not read ({base.faults.get(name, 'its numbers are of no known rule')})",
            culprit=name,
            remedy="use the model in another type",
        )
    if weight is None or companions >= {*weight.tensors[1:]}:
        return base.ref(name)
    alone = replace(weight, tensors=(name,), roles=weight.roles[:1])
    return TensorRef(stored.file, name, Parts(alone, {alone.roles[0]: StoredTensor(stored.file, name)}, stored.spec))


def _relay(hf: str, parts: Sequence[_Part], facts: Facts) -> Iterator[tuple[str, RelaidTensor]]:
    """Yield the tensors of transformers that consist of these parts: one, or one for each expert.

    Raises:
        InputError: a shape contradicts the model's other sizes.
    """
    for part in parts:
        dimensions = len(part.shape)
        if part.weight.change == "minus exp" and part.ref.spec.dtype != "F32":
            raise InputError(f"is {part.ref.spec}, where numbers of F32 belong", culprit=part.name)
        if not part.ref.spec.size or dimensions not in (
            (3,) if part.weight.heads or part.weight.shape == "experts" else (2, 3) if part.is_stack else (1, 2)
        ):
            raise InputError(f"is {part.ref.spec}, which such a weight cannot be", culprit=part.name)
    (first, *others), weight = parts, parts[0].weight
    stack, _, columns = first.matrices
    for part in others:
        if (part.matrices[0], part.matrices[2]) != (stack, columns):
            raise InputError(f"is {part.ref.spec}, and {first.name} {first.ref.spec}", culprit=part.name)
    rows, transposed = sum(part.matrices[1] for part in parts), weight.transposed and columns > 1
    is_vector = len(first.shape) - first.is_stack == 1
    shape = (rows,) if is_vector else (columns, rows) if transposed else (rows, columns)
    pieces, order = tuple(part.piece for part in parts), _order(hf, parts, facts, rows)
    change = None if hf.endswith(".bias") else UNDONE.get(weight.change)
    tensor = RelaidTensor(shape, pieces, order, _columns(parts, facts, columns), transposed, change)
    if "{e}" not in hf:
        yield hf, replace(tensor, shape=_whole(weight, (stack, *shape) if first.is_stack else shape))
        return
    for expert in range(stack):
        yield hf.replace("{e}", str(expert)), replace(tensor, first=expert)


def _whole(weight: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor in transformers: the table's row may say that it differs."""
    if weight.shape == "experts":
        return (shape[0] * shape[1], *shape[2:])
    if weight.shape == "kernel" and len(shape) == 2:
        return (shape[0], 1, *shape[1:])
    if weight.shape == "heads":
        return (1, 1, math.prod(shape), 1)
    return (math.prod(shape),) if weight.shape == "vector" else shape


def _columns(parts: Sequence[_Part], facts: Facts, columns: int) -> list[int] | None:
    """Return the index among a part's columns of each column of a transformers matrix; None if the order is the same.

    Raises:
        InputError: the columns are not those of the model's heads.
    """
    order = parts[0].weight.columns
    if not order:
        return None
    try:
        numbers = ROW_ORDERS[order].numbers(facts, columns)
    except ValueError as error:
        raise InputError(f"{error}: it belongs to another model", culprit=parts[0].name) from None
    if sorted(numbers) != list(range(columns)):
        raise InputError("has only some of the columns", culprit=parts[0].name)
    return sorted(range(columns), key=numbers.__getitem__)


def _order(hf: str, parts: Sequence[_Part], facts: Facts, rows: int) -> list[int] | None:
    """Return the index among the parts' rows of each row of a transformers matrix; None if the order is the same.

    Raises:
        InputError: the parts do not make up the rows.
    """
    if not any(part.weight.rows for part in parts) and len(parts) == 1:
        return None
    places: list[int] = []
    for part in parts:
        try:
            numbers = ROW_ORDERS[part.weight.rows].numbers(facts, rows) if part.weight.rows else list(range(rows))
        except ValueError as error:
            raise InputError(f"{error}: it belongs to another model", culprit=part.name) from None
        if len(numbers) != part.matrices[1]:
            raise InputError(f"is {part.ref.spec}, where {len(numbers)} rows of {hf} belong", culprit=part.name)
        places += numbers
    if sorted(places) != list(range(rows)):
        raise InputError(f"is missing other parts of {hf}", culprit=parts[0].name)
    order = [0] * rows
    for number, place in enumerate(places):
        order[place] = number
    return order


def _in_fields(file: GgufFile) -> Iterator[tuple[str, RelaidTensor]]:
    """Yield the tensors of transformers whose numbers are fields in GGUF, as float32.

    Raises:
        InputError: a field does not have a number for each layer.
    """
    layers = _number(file, "block_count")
    for template, (key, shape) in IN_FIELDS.get(file.architecture or "", {}).items():
        stored = file.fields.get(key, ())
        values = [*stored] if isinstance(stored, Sequence) and not isinstance(stored, str) else []
        if len(values) != layers or not all(type(value) is float for value in values):
            raise InputError(f"has no {key} with a number for each of {layers} layers", culprit=str(file.path))
        numbers = {template.replace("{n}", str(i)): value for i, value in enumerate(values)}
        virtual = of_numbers(file, numbers)
        for name in numbers:
            yield name, RelaidTensor(shape, (StoredStack(TensorRef(virtual, name), 1, 1),))


def _number(file: GgufFile, key: str) -> int:
    """Return an integer field of the file's architecture; 0 if it is missing."""
    value = file.fields.get(f"{file.architecture}.{key}", 0)
    return value if type(value) is int else 0


def _kinds_of_layers(file: GgufFile, config: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Return a key for each layer that determines its tensors and their shapes; decoders have the encoder's numbers."""
    layers = _number(file, "block_count") - _number(file, MTP)
    decoder = _number(file, "decoder_block_count") or layers
    dense, shared = _number(file, "leading_dense_block_count"), _number(file, "attention.shared_kv_layers")
    step = max(1, _number(file, "interleave_moe_layer_step"))  # each of so many layers has experts
    turns = [(config[f"{name}_period"], config[f"{name}_offset"]) for name in TURNS if f"{name}_period" in config]
    return [
        (
            *(i < dense, i >= layers - shared, (i + 1) % step == 0, i < layers, i < decoder),
            *(kind for name in KINDS_OF_LAYERS for kind in config.get(name, ())[i : i + 1]),
            *(i % period == offset for period, offset in turns),
        )
        for i in range(max(layers, decoder))
    ]


def _require_widths(groups: Mapping[str, Sequence[_Part]], width: int, routed: int) -> None:
    """Raise InputError for a tensor whose input or output width differs from the fields. routed: that of experts."""
    for part in (part for parts in groups.values() for part in parts):
        path, _, end = part.name.rpartition(".")
        last, shape = path.rpartition(".")[2], part.ref.spec.shape
        side = -1 if last in READS else -2 if last in WRITES else 0
        expected = routed if last.endswith("_exps") else width
        if end == "weight" and side and (len(shape) < -side or shape[side] != expected):
            raise InputError(f"is {part.ref.spec}, in a model of the width {expected}", culprit=part.name)


def _require_layers(
    tensors: Mapping[str, RelaidTensor],
    kind_of: Sequence[tuple[object, ...]],
    of_the_first: Mapping[str, bool],
    base: Checkpoint,
) -> None:
    """Raise InputError for an extra layer, or one with missing tensors or other shapes than others of its kind.

    Args:
        of_the_first: end of a module's name -> whether only the first layer has it; if not, only the others.
    """
    layers: list[dict[str, tuple[int, ...]]] = [{} for _ in kind_of]
    for name, tensor in tensors.items():
        if match := LAYER.match(name):
            if int(match[2]) >= len(layers):
                raise InputError(f"is of a layer that a model of {len(layers)} does not have", culprit=name)
            layers[int(match[2])][f"{match[1]}{{}}{match[3]}"] = tensor.shape
    every: dict[tuple[object, ...], dict[str, tuple[int, ...]]] = {}
    for kind, shapes in zip(kind_of, layers, strict=True):
        every.setdefault(kind, {}).update(shapes)
    for number, (kind, shapes) in enumerate(zip(kind_of, layers, strict=True)):
        if not shapes:
            raise InputError(f"has no layer {number}", culprit=str(base.path), remedy="download the file again")
        for name, shape in sorted(every[kind].items()):
            only_first = next((only for end, only in of_the_first.items() if f".{end}." in name), None)
            if only_first is not None and only_first is not (number == 0):
                if name in shapes:
                    raise InputError("is of a layer that has no such tensor", culprit=name.format(number))
            elif shapes.get(name) != shape:
                what = (
                    f"is {shapes[name]}, and in other layers {shape}"
                    if name in shapes
                    else "is missing, but other layers have it"
                )
                raise InputError(what, culprit=name.format(number))


def _require_fused_rows(groups: Mapping[str, Sequence[_Part]], facts: Facts, size: int, width: int) -> None:
    """Raise InputError for fused queries, keys and values whose size contradicts the heads."""
    size = size or width // max(1, facts.heads)
    rows = (facts.heads + 2 * facts.kv_heads) * size
    for part in (part for parts in groups.values() for part in parts if part.weight.gguf.endswith(".attn_qkv")):
        if rows and part.ref.spec.shape[0] != rows:
            says = f"{facts.heads} heads and {facts.kv_heads} of the keys, of {size}"
            raise InputError(f"has {part.ref.spec.shape[0]} rows, and its fields say {says}", culprit=part.name)


def _require_modules(groups: Mapping[str, Sequence[_Part]], architecture: Architecture) -> None:
    """Raise InputError if a module is missing that every file has."""
    present = {part.weight.gguf for parts in groups.values() for part in parts}
    for weight in architecture.weights:
        if weight.gguf in NEEDED and weight.gguf not in present:
            raise InputError("is missing", culprit=weight.gguf)


def _require_shapes(tensors: Mapping[str, RelaidTensor], config: Mapping[str, Any]) -> None:
    """Raise InputError for a tensor that is missing, or whose shape contradicts the config, where a table has it."""
    single = any(".experts." in name for name in tensors)
    expected = {} if single or config["model_type"] not in CONFIG_FAMILIES else tensor_shapes(config)
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise InputError(f"is {tensors[name].shape}, and its fields say {shape}", culprit=name)
        if name not in tensors and not name.startswith(NOT_IN_GGUF):
            raise InputError("is missing, but its fields say that it is there", culprit=name)
