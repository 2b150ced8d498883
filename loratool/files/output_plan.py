"""How an output checkpoint is laid out: which file has which tensor at which byte, decided before the first byte.

By default the layout is the input's: its files, their tensors, and where nothing in them must change, their
very header bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, UsageError
from .checkpoint import SINGLE_NAMES, Checkpoint, split_into_shards
from .dtypes import TORCH_FLOATS, TensorSpec, with_dtype
from .output import CONTAINERS, Output, OutputEdits, OutputFile
from .safetensors_file import TensorFile, build_header, data_order, edit_metadata
from .side_files import classify_checkpoint, edited_config, encode_json, undo_path
from .torch_writer import plan_archive
from .undo_places import undo_chain
from .weights_file import WeightsFile

# Hashes of the tensor data that image tools write into the metadata: wrong once a tensor changes.
STALE_METADATA = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True)
class _OutputRequest:
    """What `plan_output` was asked for, for all files; shared: as in Edits, and who of them is no tensor of its own."""

    is_file: bool
    container: str
    provenance: str
    changed: Collection[str]
    max_shard_bytes: int | None
    shared: Mapping[str, str]
    absent: Collection[str]

    @property
    def ending(self) -> str:
        return CONTAINERS[self.container][0]

    @property
    def is_torch(self) -> bool:
        return self.container == "torch"


@dataclass(frozen=True)
class _ShardPlan:
    """What one output file holds; `kept` is the shard whose layout it keeps, None where it is laid out anew."""

    name: str
    members: list[str]
    kept: WeightsFile | None


def plan_output(
    base: Checkpoint,
    path: Path,
    is_file: bool,
    provenance: str,
    changed: Collection[str],
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    edits: OutputEdits | None = None,
    undo: bool = False,
    container: str = "safetensors",
) -> Output:
    """Lay out `base` anew at `path`, with other values in the tensors `changed`.

    `dtype` (a safetensors name) is taken by every float tensor of 16 bits or more that is no part of a quantized
    weight. undo: with an undo file, and those
    of earlier merges under their next numbers. container: a key of CONTAINERS. Raises UsageError for shards or a
    pipeline in a single file, InputError for what the container cannot hold.
    """
    if is_file and (max_shard_bytes is not None or base.parts):
        what = "a pipeline" if base.parts else "--max-shard-size"
        raise UsageError(f"{what} needs a folder as output", remedy="name a folder with -o")
    edits = edits or OutputEdits()
    absent = edits.shared if container == "torch" else edits.left_out
    wish = _OutputRequest(is_file, container, provenance, changed, max_shard_bytes, edits.shared, absent)
    stored = {**base.specs, **edits.specs}
    specs = {name: spec if name in base.formats else with_dtype(spec, dtype) for name, spec in stored.items()}
    files: tuple[OutputFile, ...] = ()
    extras: dict[str, bytes] = {}
    travels, not_copied = _side_files(base, is_file, edits)
    for part in base.models:
        own = {name: spec for name, spec in specs.items() if name.startswith(part.prefix)}
        planned, index = _plan_files(part, wish, own)
        files, extras = (*files, *planned), {**extras, **index}
        config = edited_config(part.config, edits.config, TORCH_FLOATS[dtype] if dtype else None)
        if config != part.config and f"{part.prefix}config.json" in travels:
            extras[f"{part.prefix}config.json"] = encode_json(config)
            del travels[f"{part.prefix}config.json"]
    written = {name: spec for name, spec in specs.items() if name not in absent}
    lost = written.keys() - {name for file in files for name in file.begin}
    if lost:
        raise InputError("is in no component of the pipeline, so there is no file for it", culprit=min(lost))
    place = undo_path(path, is_file) if undo else None
    carries = undo and (not base.given_as_file or base.path.suffix == ".safetensors")  # a torch file has none
    carried = undo_chain(base.path if base.given_as_file else base.folder, base.given_as_file) if carries else []
    return Output(
        path,
        is_file,
        written,
        files,
        extras,
        travels,
        tuple(name for name in not_copied if base.folder / name not in carried),
        provenance,
        place,
        {place.with_name(f"{place.name}.{i}"): origin for i, origin in enumerate(carried, 1)} if place else {},
        base.shards,
    )


def _plan_files(
    base: Checkpoint, wish: _OutputRequest, specs: Mapping[str, TensorSpec]
) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """The files with the tensors `specs`, and their index. A pipeline's component that stays keeps its very bytes."""
    if base.prefix and not base.shards:
        return (), {}
    anew = wish.max_shard_bytes is not None or (wish.is_file and len(base.shards) > 1)
    own = {name: spec for name, spec in specs.items() if name not in wish.absent}
    cuts = _make_shards(base, own, wish) if anew else _keep_base_shards(base, own, wish)
    if not anew:
        cuts[-1].members.extend(name for name in own if name not in base.specs)
    indexed = not wish.is_file and (len(cuts) > 1 or (base.index is not None and not anew))
    stays = base.prefix and not anew and own == base.specs and not any(name in wish.changed for name in own)
    stays = stays and not wish.is_torch and all(isinstance(shard, TensorFile) for shard in base.shards)
    provenance = {} if indexed or stays else {"loratool": wish.provenance}
    if wish.is_torch:
        files = tuple(_torch_file(base, cut, specs, wish.shared) for cut in cuts)
    else:
        files = tuple(_tensor_file(base, cut, own, wish, provenance) for cut in cuts)
    if not indexed:
        return files, {}
    name, former = base.index or ("", {})
    if not (name.endswith(".json") and f"{wish.ending}." in name):
        name = f"{_file_stem(base, wish)}{wish.ending}.index.json"
    content = (base.folder / name).read_bytes() if stays else _index(base, former, wish, cuts, own)
    return files, {base.prefix + name: content}


def _side_files(base: Checkpoint, is_file: bool, edits: OutputEdits) -> tuple[dict[str, Path], list[str]]:
    """What travels by name, and what does not: beside a lone file without a config nothing is its own."""
    if is_file or (base.given_as_file and not base.config):
        return {}, []
    names, not_copied = classify_checkpoint(base)
    return {**{name: base.folder / name for name in names}, **edits.files}, not_copied


def _file_stem(base: Checkpoint, wish: _OutputRequest) -> str:
    """The first part of loaders' file names: `model` or `pytorch_model`, or diffusers' `diffusion_pytorch_model`."""
    model, diffusers = (name.removesuffix(".safetensors") for name in SINGLE_NAMES)
    if base.shards[0].path.name.startswith(diffusers):
        return diffusers
    return "pytorch_model" if wish.is_torch else model


def _numbered(
    base: Checkpoint, groups: list[list[str]], kept: Collection[WeightsFile | None], wish: _OutputRequest
) -> list[_ShardPlan]:
    """Under transformers' names."""
    stem, count = _file_stem(base, wish), len(groups)
    names = [f"{stem}-{i:05d}-of-{count:05d}{wish.ending}" for i in range(1, count + 1)]
    names = names if count > 1 else [f"{stem}{wish.ending}"]
    return [_ShardPlan(*each) for each in zip(names, groups, kept, strict=True)]


def _keep_base_shards(base: Checkpoint, specs: Mapping[str, TensorSpec], wish: _OutputRequest) -> list[_ShardPlan]:
    """The base's files; of another container, or a lone one, under the names that loaders look for."""
    groups = [[name for name in shard.specs if name in specs] for shard in base.shards]
    same = not base.given_as_file and not wish.is_torch and all(isinstance(shard, TensorFile) for shard in base.shards)
    if not same:
        return _numbered(base, groups, base.shards, wish)
    return [_ShardPlan(shard.path.name, group, shard) for shard, group in zip(base.shards, groups, strict=True)]


def _make_shards(base: Checkpoint, specs: Mapping[str, TensorSpec], wish: _OutputRequest) -> list[_ShardPlan]:
    """Shards cut in the base's order."""
    groups = split_into_shards(specs, wish.max_shard_bytes)
    return _numbered(base, groups, [None] * len(groups), wish)


def _tensor_file(
    base: Checkpoint,
    cut: _ShardPlan,
    specs: Mapping[str, TensorSpec],
    wish: _OutputRequest,
    provenance: Mapping[str, str],
) -> OutputFile:
    members = {name: specs[name] for name in cut.members}
    same = isinstance(cut.kept, TensorFile) and cut.kept.specs == members
    stale = (*STALE_METADATA, "loratool") if not same or any(name in wish.changed for name in members) else ()
    if same and isinstance(cut.kept, TensorFile):
        header = edit_metadata(cut.kept.header, stale, provenance)
        shift = len(header) - cut.kept.data_start
        begin = {name: cut.kept.begin[name] + shift for name in members}
    else:
        metadata = {key: value for key, value in _metadata(base, cut).items() if key not in stale}
        shared = {
            _component_name(base, name): _component_name(base, to) for name, to in wish.shared.items() if to in members
        }
        own = {_component_name(base, name): spec for name, spec in members.items()}
        header, placed = build_header(own, data_order(own), {**metadata, **shared, **provenance})
        begin = {base.prefix + name: start for name, start in placed.items()}
    return OutputFile(
        base.prefix + cut.name, header, begin, len(header) + sum(spec.nbytes for spec in members.values())
    )


def _component_name(base: Checkpoint, name: str) -> str:
    """A tensor's name in the files of its component."""
    return name.removeprefix(base.prefix)


def _metadata(base: Checkpoint, cut: _ShardPlan) -> dict[str, str]:
    """What the files of a cut said, without what `sharing` reads of tensors that are in another one now."""
    shards = (cut.kept,) if cut.kept else base.shards
    found = {key: value for shard in shards for key, value in (shard.metadata or {"format": "pt"}).items()}
    elsewhere = {_component_name(base, name) for name in base.specs.keys() - set(cut.members)}
    return {key: value for key, value in found.items() if value not in elsewhere}


def _torch_file(
    base: Checkpoint, cut: _ShardPlan, specs: Mapping[str, TensorSpec], shared: Mapping[str, str]
) -> OutputFile:
    """Each tensor with those that share its storage."""
    sharing: dict[str, list[str]] = {}
    for name, to in shared.items():
        sharing.setdefault(to, []).append(name)
    names = {name: to for to in cut.members for name in (to, *sharing.get(to, ()))}
    archive = plan_archive(
        {
            _component_name(base, name): (_component_name(base, to), specs.get(name, specs[to]))
            for name, to in names.items()
        }
    )
    begin = {base.prefix + name: start for name, start in archive.begin.items()}
    return OutputFile(base.prefix + cut.name, archive.header, begin, archive.nbytes, archive)


def _index(
    base: Checkpoint,
    former: Mapping[str, object],
    wish: _OutputRequest,
    cuts: list[_ShardPlan],
    specs: Mapping[str, TensorSpec],
) -> bytes:
    """The index JSON: the former one's fields and order, with the output's map, size and provenance."""
    metadata = former.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "loratool": wish.provenance}
    metadata["total_size"] = sum(spec.nbytes for spec in specs.values())
    holder = {_component_name(base, name): cut.name for cut in cuts for name in cut.members}
    if wish.is_torch:
        holder |= {
            _component_name(base, n): holder[_component_name(base, to)]
            for n, to in wish.shared.items()
            if _component_name(base, to) in holder
        }
    order = former.get("weight_map", {})
    assert isinstance(order, dict)
    names = [*(name for name in order if name in holder), *sorted(holder.keys() - order.keys())]
    return encode_json({**former, "metadata": metadata, "weight_map": {name: holder[name] for name in names}})
