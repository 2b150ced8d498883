"""Plan an output's files: each tensor's file and first byte, before the first byte is written.

By default the output has the input's layout: the same files with the same tensors. A file without changes has the same
header bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from ...durable.fileio import length_of, read_file
from ...errors import InputError, UsageError
from ..checkpoint import Checkpoint, classify_checkpoint, split_into_shards
from ..codecs.skip_lists import plain_metadata
from ..containers.gguf_file import ALIGNMENT, GGUF, GgufFile
from ..containers.gguf_writer import PROVENANCE, SPLIT, build_gguf, kept_fields, split_fields, text_field, type_fields
from ..containers.safetensors_file import TensorFile, build_header, data_order, edited_header, is_hash
from ..containers.torch_writer import plan_archive
from ..dtypes import TORCH_FLOATS, TensorSpec, with_dtype
from ..folder.model_folder import SINGLE_NAMES
from ..folder.side_files import LeftBehind, classify_side_files, edited_config, encode_json, is_of_whole, undo_path
from ..weights_file import WeightsFile
from .output import CONTAINERS, UNDONE, Output, OutputEdits, OutputFile
from .undo_places import Belongs, undo_chain


@dataclass(frozen=True)
class _OutputRequest:
    """The arguments of `plan_output` that apply to every file of the output."""

    is_file: bool
    container: str  # a key of CONTAINERS
    provenance: str  # the value of the metadata key `loratool`
    changed: Collection[str]  # tensors whose values change
    max_shard_bytes: int | None  # None keeps the base's shards
    absent: Collection[str]  # shared tensors that this container does not store separately
    edits: OutputEdits

    @property
    def ending(self) -> str:
        return CONTAINERS[self.container][0]

    @property
    def is_torch(self) -> bool:
        return self.container == "torch"


@dataclass(frozen=True)
class _ShardPlan:
    """The content of one output file."""

    name: str  # without the component's folder
    members: list[str]  # names of its tensors
    base_shard: WeightsFile | None  # the base's shard with the same layout; None for a new shard


def plan_output(
    base: Checkpoint,
    path: Path,
    is_file: bool,
    provenance: str,
    changed: Collection[str],
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    edits: OutputEdits | None = None,
    undo: Belongs | None = None,
    container: str = "safetensors",
) -> Output:
    """Plan the output at `path`: the tensors of `base`, with other values for those in `changed`.

    Args:
        dtype: the safetensors name of the dtype for every float tensor of 16 bits or more that is not part of a
            quantized weight. A quantized weight keeps its format unless `edits` has a spec for it.
        undo: given if an undo file is written; it recognizes those of earlier merges, which get the next numbers.
        container: a key of CONTAINERS.

    Raises:
        UsageError: shards or a pipeline in a single file.
        InputError: the container cannot hold a tensor.
    """
    if is_file and (max_shard_bytes is not None or base.parts):
        what = "a pipeline" if base.parts else "--max-shard-size"
        raise UsageError(f"{what} needs a folder as output", remedy="name a folder with -o")
    edits = edits or OutputEdits()
    absent = edits.shared if container == "torch" else edits.skipped_tensors
    request = _OutputRequest(is_file, container, provenance, changed, max_shard_bytes, absent, edits)
    decoded = base.weights.keys() & edits.specs.keys()
    parts = {tensor for name in base.weights.keys() - decoded for tensor in base.weights[name].tensors}
    parts |= base.formats.keys()
    stored = {**base.with_decoded(decoded), **edits.specs}
    specs = {
        name: spec if name in parts else with_dtype(spec, dtype)
        for name, spec in stored.items()
        if name not in edits.removed
    }
    files: tuple[OutputFile, ...] = ()
    extras: dict[str, bytes] = {}
    side_files, left = _side_files(base, is_file, edits)
    for part in base.models:
        component_specs = {name: spec for name, spec in specs.items() if name.startswith(part.prefix)}
        planned, index = _plan_files(part, request, component_specs)
        files, extras = (*files, *planned), {**extras, **index}
        config = edits.configs.get(part.prefix, part.config)
        config = edited_config({**config, **edits.top}, edits.config, TORCH_FLOATS[dtype] if dtype else None)
        if config != part.original.config and f"{part.prefix}config.json" in side_files and not base.is_gguf:
            extras[f"{part.prefix}config.json"] = encode_json(config)
            del side_files[f"{part.prefix}config.json"]
    for name in side_files.keys() & edits.extras.keys():
        extras[name] = encode_json(edits.extras[name])
        del side_files[name]
    for name in sorted(side_files.keys() & edits.skipped_files.keys()):
        left.append(LeftBehind(name, length_of(side_files.pop(name)), edits.skipped_files[name]))
    written = {name: spec for name, spec in specs.items() if name not in absent}
    unplaced = written.keys() - {name for file in files for name in file.begin}
    if unplaced:
        raise InputError("is in no component of the pipeline, so there is no file for it", culprit=min(unplaced))
    place = undo_path(path, is_file) if undo else None
    model, carried = base.path if base.given_as_file else base.folder, list[Path]()
    if undo and (not base.given_as_file or base.path.suffix in UNDONE):  # a torch file has none
        carried = undo_chain(model, base.given_as_file, undo)
    output = Output(
        path=path,
        is_file=is_file,
        specs=written,
        files=files,
        extras=extras,
        side_files=side_files,
        left_behind=tuple(each for each in left if base.folder / each.name not in carried),
        provenance=provenance,
        undo=place,
        carried={place.with_name(f"{place.name}.{i}"): origin for i, origin in enumerate(carried, 1)} if place else {},
        inputs=base.shards,
        configs=tuple((part.config, part.declared) for part in base.models),
    )
    return put_inside(output, base)


def put_inside(output: Output, model: Checkpoint) -> Output:
    """Return an output in the layout of sentence-transformers, if the transformer has a subfolder.

    The transformer's files are in the subfolder, with its undo files. The model card and dense layers are not.
    """
    if output.is_file or not model.outer:
        return output
    inner = model.folder.name
    names, left = classify_side_files(model.outer, (), [inner])

    def inside(path: Path) -> Path:
        return path.parent / inner / path.name

    def placed(name: str) -> str:
        return name if is_of_whole(name) else f"{inner}/{name}"

    return replace(
        output,
        files=tuple(replace(file, name=f"{inner}/{file.name}") for file in output.files),
        extras={placed(name): data for name, data in output.extras.items()},
        side_files={name: model.outer / name for name in names if name not in output.extras}
        | {placed(name): origin for name, origin in output.side_files.items()},
        left_behind=(*left, *(replace(each, name=f"{inner}/{each.name}") for each in output.left_behind)),
        undo=output.undo and inside(output.undo),
        carried={inside(place): origin for place, origin in output.carried.items()},
    )


def _plan_files(
    base: Checkpoint, request: _OutputRequest, specs: Mapping[str, TensorSpec]
) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """Return the files of one model with the tensors `specs`, and its index by name if it has one.

    An unchanged component of a pipeline keeps the bytes of its headers and index.
    """
    if base.prefix and not base.shards:
        return (), {}
    is_resharded = request.max_shard_bytes is not None or (request.is_file and len(base.shards) > 1)
    stored = {name: spec for name, spec in specs.items() if name not in request.absent}
    shards = _make_shards(base, stored, request) if is_resharded else _keep_base_shards(base, stored, request)
    if not is_resharded:
        placed = {name for shard in shards for name in shard.members}
        shards[-1].members.extend(name for name in stored if name not in placed)
        # a shard that had only companions of weights that are dequantized now would be in no index
        shards = [
            shard for shard in shards if shard.members or not shard.base_shard or not shard.base_shard.specs
        ] or shards
    indexed = not request.is_file and (len(shards) > 1 or (base.index is not None and not is_resharded))
    is_kept = (
        base.prefix
        and not is_resharded
        and stored == base.stored
        and not any(name in request.changed for name in stored)
    )
    is_kept = is_kept and request.container == "safetensors" and all(isinstance(s, TensorFile) for s in base.shards)
    provenance = {} if indexed or is_kept else {"loratool": request.provenance}
    if request.container == GGUF:
        return _gguf_files(base, shards, stored, request), {}
    if request.is_torch:
        files = tuple(_torch_file(base, shard, specs, request.edits.shared) for shard in shards)
    else:
        modules = {path.removeprefix(base.prefix) for path in request.edits.decoded_modules}
        files = tuple(_tensor_file(base, shard, stored, request, provenance, modules) for shard in shards)
    if not indexed:
        return files, {}
    name, old_index = base.index or ("", {})
    if not (name.endswith(".json") and f"{request.ending}." in name):
        name = f"{_file_stem(base, request)}{request.ending}.index.json"
    content = read_file(base.folder / name) if is_kept else _index(base, old_index, request, shards, stored)
    return files, {base.prefix + name: content}


def _side_files(base: Checkpoint, is_file: bool, edits: OutputEdits) -> tuple[dict[str, Path], list[LeftBehind]]:
    """Return the side files to copy by name, and those that are not copied."""
    if is_file or not base.has_side_files:
        return {}, []
    names, left = classify_checkpoint(base)
    return {**{name: base.folder / name for name in names}, **edits.files}, left


def _file_stem(base: Checkpoint, request: _OutputRequest) -> str:
    """Return the stem of the file names that loaders expect: `model`, `pytorch_model` or `diffusion_pytorch_model`."""
    model, diffusers = (name.removesuffix(".safetensors") for name in SINGLE_NAMES)
    if base.shards[0].path.name.startswith(diffusers):
        return diffusers
    return "pytorch_model" if request.is_torch else model


def _numbered(
    base: Checkpoint, groups: list[list[str]], shards: Collection[WeightsFile | None], request: _OutputRequest
) -> list[_ShardPlan]:
    """Plan shards with the file names of transformers, one for each group."""
    stem, count = _file_stem(base, request), len(groups)
    names = [f"{stem}-{i:05d}-of-{count:05d}{request.ending}" for i in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}{request.ending}"]
    return [_ShardPlan(*each) for each in zip(names, groups, shards, strict=True)]


def _keep_base_shards(base: Checkpoint, specs: Mapping[str, TensorSpec], request: _OutputRequest) -> list[_ShardPlan]:
    """Plan the base's shards, renamed for loaders if the container changes or the base is a single file."""
    names = {weight.tensors[0]: name for name, weight in base.weights.items() if name in specs}
    following: dict[str, list[str]] = {}
    for name, first in request.edits.beside.items():
        following.setdefault(first, []).append(name)
    written = [
        [n for name in shard.specs for n in following.get(name, [names.get(name, name)])] for shard in base.shards
    ]
    groups = [[n for n in each if n in specs] for each in written]
    kind = {"safetensors": TensorFile, GGUF: GgufFile}.get(request.container, ())
    same = not base.given_as_file and all(isinstance(shard, kind) for shard in base.shards)
    if not same:
        return _numbered(base, groups, base.shards, request)
    return [_ShardPlan(shard.path.name, group, shard) for shard, group in zip(base.shards, groups, strict=True)]


def _make_shards(base: Checkpoint, specs: Mapping[str, TensorSpec], request: _OutputRequest) -> list[_ShardPlan]:
    """Plan new shards, with the tensors in the base's order."""
    groups = split_into_shards(specs, request.max_shard_bytes)
    return _numbered(base, groups, [None] * len(groups), request)


def _tensor_file(
    base: Checkpoint,
    shard: _ShardPlan,
    specs: Mapping[str, TensorSpec],
    request: _OutputRequest,
    provenance: Mapping[str, str],
    modules: Set[str],
) -> OutputFile:
    """Plan a safetensors file.

    Args:
        modules: the component's `decoded_modules`, without its prefix.
    """
    members = {name: specs[name] for name in shard.members}
    same = isinstance(shard.base_shard, TensorFile) and shard.base_shard.specs == members
    changed = not same or any(name in request.changed for name in members)
    stale = {"loratool", *filter(is_hash, _metadata(base, shard))} if changed else set()
    if same and isinstance(shard.base_shard, TensorFile):
        former = shard.base_shard.metadata or {}
        described = plain_metadata(former, modules) if modules else former
        gone = [key for key in former if key not in described]
        header = edited_header(
            shard.base_shard.header, (*stale, *gone), {**described, **provenance} if described != former else provenance
        )
        shift = len(header) - shard.base_shard.data_start
        begin = {name: shard.base_shard.begin[name] + shift for name in members}
    else:
        remaining = {key: value for key, value in _metadata(base, shard).items() if key not in stale}
        metadata = {**remaining, **request.edits.metadata}
        metadata = plain_metadata(metadata, modules) if modules else metadata
        shared = {
            _component_name(base, name): _component_name(base, to)
            for name, to in request.edits.shared.items()
            if to in members
        }
        stored = {_component_name(base, name): spec for name, spec in members.items()}
        header, placed = build_header(stored, data_order(stored), {**metadata, **shared, **provenance})
        begin = {base.prefix + name: start for name, start in placed.items()}
    return OutputFile(
        base.prefix + shard.name, header, begin, len(header) + sum(spec.nbytes for spec in members.values())
    )


def _component_name(base: Checkpoint, name: str) -> str:
    """Return a tensor's name in the files of its component."""
    return name.removeprefix(base.prefix)


def _metadata(base: Checkpoint, shard: _ShardPlan) -> dict[str, str]:
    """Return the metadata of the shards that a file comes from, without aliases of tensors that are not in it.

    safetensors.torch stores a shared tensor as a metadata key, with the name of the stored tensor as the value.
    """
    sources = (shard.base_shard,) if shard.base_shard else base.shards
    metadata = {key: value for source in sources for key, value in (source.metadata or {"format": "pt"}).items()}
    members = set(shard.members)
    return {
        key: value
        for key, value in metadata.items()
        if (name := base.prefix + value) not in base.stored or name in members
    }


def _gguf_files(
    base: Checkpoint, shards: list[_ShardPlan], specs: Mapping[str, TensorSpec], request: _OutputRequest
) -> tuple[OutputFile, ...]:
    """Plan GGUF files. The first has the fields of the base's first file, the others those of their shard."""
    first, files = base.shards[0], []
    for number, shard in enumerate(shards):
        source = shard.base_shard or first
        assert isinstance(source, GgufFile)
        changed = split_fields(number, len(shards), len(specs))
        gone = [key for key in SPLIT if key not in changed]
        if number == 0:
            changed |= type_fields(source, base.stored, specs) | {
                PROVENANCE: text_field(PROVENANCE, request.provenance)
            }
        elif not shard.base_shard:
            gone += [key for key in source.places if key != ALIGNMENT]
        members = {name: specs[name] for name in shard.members}
        fields = kept_fields(source, changed, gone)
        files.append(OutputFile(shard.name, *build_gguf(fields, members, source.alignment, source.version)))
    return tuple(files)


def _torch_file(
    base: Checkpoint, shard: _ShardPlan, specs: Mapping[str, TensorSpec], shared: Mapping[str, str]
) -> OutputFile:
    """Plan a torch file in which tensors with shared bytes have one storage."""
    sharing: dict[str, list[str]] = {}  # stored tensor -> the tensors that share its storage
    for name, to in shared.items():
        sharing.setdefault(to, []).append(name)
    names = {name: to for to in shard.members for name in (to, *sharing.get(to, ()))}
    archive = plan_archive(
        {
            _component_name(base, name): (_component_name(base, to), specs.get(name, specs[to]))
            for name, to in names.items()
        }
    )
    begin = {base.prefix + name: start for name, start in archive.begin.items()}
    return OutputFile(base.prefix + shard.name, archive.header, begin, archive.nbytes, archive)


def _index(
    base: Checkpoint,
    old_index: Mapping[str, object],
    request: _OutputRequest,
    shards: list[_ShardPlan],
    specs: Mapping[str, TensorSpec],
) -> bytes:
    """Encode the index JSON: the base's fields and order, with the output's map, size and provenance."""
    metadata = old_index.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "loratool": request.provenance}
    metadata["total_size"] = sum(spec.nbytes for spec in specs.values())
    holder = {_component_name(base, name): shard.name for shard in shards for name in shard.members}
    if request.is_torch:
        holder |= {
            _component_name(base, n): holder[_component_name(base, to)]
            for n, to in request.edits.shared.items()
            if _component_name(base, to) in holder
        }
    order = old_index.get("weight_map", {})
    assert isinstance(order, dict)
    names = [*(name for name in order if name in holder), *sorted(holder.keys() - order.keys())]
    return encode_json({**old_index, "metadata": metadata, "weight_map": {name: holder[name] for name in names}})
