"""Open a file, a folder of shards or a pipeline as one lazy mapping name -> tensor.

Opening reads headers only, and checks the index against the shards: a name that is missing or misplaced in the index
is an error here, not a missing tensor in the output. A GGUF file is a model under its own names; its config.json is
rebuilt from its fields.
A diffusers pipeline is a folder of such folders. Its tensors are named `unet/conv_in.weight`: component, slash, name.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..architectures.conv1d import stores_transposed
from ..architectures.fused_rows import nested_configs
from ..architectures.prefixes import module_path
from ..durable.fileio import is_beside, reading
from ..errors import InputError, shell_word
from .codecs import find_stored
from .codecs.codec import Parts, StoredTensor, StoredWeight, Unclaimed
from .codecs.quantized import (
    CONFIG_FILES,
    DUMMY_SCALE,
    SCALED_FLOAT,
    Coded,
    coded_as,
    declared_method,
    find_coded,
    find_declared,
    listed_layers,
)
from .containers.file_kinds import NPZ, container_of, first_bytes, found_by_content, no_weights, not_weights
from .containers.gguf_config import gguf_config
from .containers.gguf_file import GGUF, GgufFile
from .containers.gguf_split import open_parts, split_number
from .containers.npz_file import NpzFile
from .containers.safetensors_file import TensorFile
from .containers.torch_reader import TorchFile
from .dtypes import CONFIG_DTYPES, TORCH_FLOATS, TensorSpec
from .folder.model_folder import (
    INDEX_NAMES,
    NO_WEIGHTS,
    PIPELINE,
    SINGLE_NAMES,
    TORCH_NAMES,
    component_names,
    is_pipeline,
    is_torch_weights,
    read_json_file,
)
from .folder.sentence_transformers import transformer_folder
from .folder.side_files import LeftBehind, classify_side_files
from .folder.weight_changes import refuse_change, refuse_change_folder, refuse_described_change
from .hub.cache import resolve
from .layer_numbers import RepeatedLayers
from .states.training_states import find_state, opener, refuse_rank_file
from .tensor_ref import TensorRef
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import torch

SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")

# of the layers of GPT-2: their weights are (in, out), but the layers that quantizers replace them with are not
TRANSPOSED = "it is of a layer that stores (in, out), and the layout of its codes is unknown"


class Headers(Protocol):
    """Names, shapes and config.json of a model, from a checkpoint or from a config.json alone."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def model_types(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Checkpoint(Mapping[str, "torch.Tensor"]):
    """A model's weights by name, read on access."""

    path: Path  # as the user gave it, or in the cache
    folder: Path  # of the weights and the side files
    given_as_file: bool  # the user named a file, not a folder
    shards: tuple[WeightsFile, ...]
    index: tuple[str, dict[str, Any]] | None  # the index JSON's name and content; None without an index
    config: dict[str, Any]  # config.json; empty without one
    prefix: str = ""  # of a pipeline's component: its folder and a slash, before its tensors' names
    parts: tuple[Checkpoint, ...] = ()  # a pipeline's components, with weights or without
    layers: RepeatedLayers | None = None  # of a view that repeats those of another model
    stored_model: Checkpoint | None = None  # the model that such a view shows

    def __post_init__(self) -> None:
        shard_of = {name: shard for shard in self.shards for name in shard.specs}
        stored = {name: shard.specs[name] for name, shard in shard_of.items()}
        if self.parts:
            weights = {name: weight for part in self.parts for name, weight in part.weights.items()}
            faults = {name: fault for part in self.parts for name, fault in part.faults.items()}
        else:
            metadata = {key: value for shard in self.shards for key, value in (shard.metadata or {}).items()}
            unclaimed = Unclaimed(
                stored, self.declared, metadata, lambda name: bytes(shard_of[name].read(name)), self.prefix
            )
            weights, faults = find_stored(unclaimed)
            for name in [name for name in weights if stores_transposed(self.model_types, module_path(name))]:
                faults[weights.pop(name).tensors[0]] = TRANSPOSED
        for field, value in (("shard_of", shard_of), ("stored", stored), ("weights", weights), ("faults", faults)):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "specs", self.with_decoded(weights))
        object.__setattr__(self, "_parts", {})

    shard_of: Mapping[str, WeightsFile] = None  # type: ignore[assignment]  # stored tensor -> the file that has it
    stored: Mapping[str, TensorSpec] = None  # type: ignore[assignment]  # in file order, shard by shard
    weights: Mapping[str, StoredWeight] = None  # type: ignore[assignment]  # those of several tensors, by logical name
    faults: Mapping[str, str] = None  # type: ignore[assignment]  # name of codes that no codec reads -> their fault
    specs: Mapping[str, TensorSpec] = None  # type: ignore[assignment]  # of the weights, in the order of `stored`
    _parts: dict[str, Parts] = None  # type: ignore[assignment]  # those that were asked for

    def with_decoded(self, names: Collection[str]) -> dict[str, TensorSpec]:
        """Return the specs of all stored tensors in order, with the weights `names` in place of their tensors."""
        if not names:
            return dict(self.stored)
        weights = {self.weights[name].tensors[0]: (name, self.weights[name].spec) for name in names}
        parts = {tensor for name in names for tensor in self.weights[name].tensors[1:]}
        return dict(weights.get(name, (name, spec)) for name, spec in self.stored.items() if name not in parts)

    def ref(self, name: str) -> TensorRef:
        """Return a reference from which a weight is read."""
        weight = self.weights.get(name)
        if weight is None:
            return self.stored_ref(name)
        parts = self.parts_of(name)
        return TensorRef(parts["codes"].file, parts["codes"].name, parts)

    def parts_of(self, name: str) -> Parts:
        """Return the stored tensors of one of `weights`; later calls return the same object."""
        if name not in self._parts:
            weight = self.weights[name]
            tensors = [StoredTensor(self.shard_of[tensor], tensor) for tensor in weight.tensors]
            self._parts[name] = Parts(weight, dict(zip(weight.roles, tensors, strict=True)), tensors[0].spec)
        return self._parts[name]

    def nbytes_of(self, name: str) -> int:
        """Return the size of a stored weight with its companions, in bytes."""
        weight = self.weights.get(name)
        return sum(self.stored[tensor].nbytes for tensor in (weight.tensors if weight else (name,)))

    def stored_ref(self, name: str) -> TensorRef:
        """Return a stored tensor unchanged, even if it is a part of a weight."""
        return TensorRef(self.shard_of[name], name)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.ref(name).tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the index or else of the single file; for a pipeline, only our provenance.

        A component has the record of the last edit that changed it. Each record contains the former ones, so the
        longest record is the pipeline's last.
        """
        if self.parts:
            records = [str(part.metadata["loratool"]) for part in self.parts if "loratool" in part.metadata]
            return {"loratool": max(records, key=len)} if records else {}
        value = self.index[1].get("metadata") if self.index else self.shards[0].metadata if self.shards else None
        return value if isinstance(value, dict) else {}

    @property
    def has_side_files(self) -> bool:
        """Return whether the folder's files are the model's: not if a file was named and no config is beside it."""
        return not self.given_as_file or (bool(self.config) and not self.is_gguf)

    @cached_property
    def is_gguf(self) -> bool:
        return any(isinstance(shard, GgufFile) for shard in self.shards)

    @property
    def container(self) -> str:
        """Return the container in which the model is written by default, a key of `output.CONTAINERS`."""
        return GGUF if self.is_gguf else "safetensors"

    @property
    def architecture(self) -> str | None:
        """Return llama.cpp's name for the architecture of a GGUF model; None for other models."""
        first = self.shards[0] if self.shards else None
        return first.architecture if isinstance(first, GgufFile) else None

    @cached_property
    def outer(self) -> Path | None:
        """Return the sentence-transformers folder around the transformer's own folder; None if there is none."""
        inner = transformer_folder(self.path) if self.path != self.folder and self.path.is_dir() else None
        return self.path if inner and self.folder == self.path / inner else None

    @property
    def root(self) -> Path:
        """Return the folder of the complete model, with its card."""
        return self.outer or self.folder

    @property
    def original(self) -> Checkpoint:
        """Return the model that is stored: the checkpoint itself, or the one whose layers it repeats."""
        return self.stored_model or self

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in `original`."""
        return self.layers.stored_name(name) if self.layers else name

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """Return the components of a pipeline, or the checkpoint itself."""
        return self.parts or (self,)

    @property
    def quantized(self) -> str | None:
        """Return the quantization method of the model or a component: the config's name, else our format's name."""
        methods = (declared_method(part.declared) for part in self.models)
        formats = [c.format for c in self.coded.values()] or [w.codec.key for w in self.weights.values()]
        return next(filter(None, methods), None) or next(iter(formats), None)

    @cached_property
    def declared(self) -> Mapping[str, Any]:
        """Return the quantization config from config.json or a file beside it; empty if there is none."""
        declared = find_declared(self.config)
        if self.is_gguf:  # the tensors' types tell everything
            return {}
        for name, method in CONFIG_FILES.items():
            if not declared and (self.folder / name).is_file():
                content = read_json_file(self.folder / name)
                declared = find_declared(content) or {"quant_method": method, **content}
        return declared

    @cached_property
    def coded(self) -> Mapping[str, Coded]:
        """Return the quantized weights that no codec reads, by their names in an unquantized model."""
        if self.parts:
            return {name: coded for part in self.parts for name, coded in part.coded.items()}
        layers, plain = (listed_layers(shard.metadata or {}) for shard in self.shards), self._plain
        unreadable = find_coded(plain, self.declared, {self.prefix + layer for each in layers for layer in each})
        holders = {coded.tensors[0]: weight for weight, coded in unreadable.items()}
        for name, fault in self.faults.items():
            weight = holders.get(name, name)
            known = unreadable.get(weight) or Coded("codes of an unknown kind", (name,), plain[name], None)
            unreadable[weight] = replace(known, fault=fault)
        for name in (name for name in plain if name.endswith(DUMMY_SCALE)):
            path = name.removesuffix(DUMMY_SCALE)
            spec = plain.get(f"{path}.weight")
            if spec and spec.dtype in TORCH_FLOATS and not self._is_one(name):
                unreadable[f"{path}.weight"] = coded_as(SCALED_FLOAT, path, f"{path}.weight", plain, self.declared)
        return unreadable

    @property
    def _plain(self) -> Mapping[str, TensorSpec]:
        """Return the stored tensors that are not part of a weight of several tensors."""
        parts = {tensor for weight in self.weights.values() for tensor in weight.tensors}
        return {name: spec for name, spec in self.stored.items() if name not in parts} if parts else self.stored

    def _is_one(self, name: str) -> bool:
        return self.stored[name].size == 1 and self.shard_of[name].scalar(name) == 1

    @cached_property
    def formats(self) -> Mapping[str, str]:
        """Return the quantized format of each tensor of a quantized weight: codes, scales and other companions."""
        return {tensor: coded.format for coded in self.coded.values() for tensor in coded.tensors}

    @property
    def weight_files(self) -> set[str]:
        """Return the names of the shards and the index in the folder."""
        read = set[str]()
        for member in (member for shard in self.shards for member in shard.members):
            with suppress(ValueError):  # a file on another drive of Windows is not in the folder
                read.add(os.path.relpath(member.path, self.folder))
        return read | ({self.index[0]} if self.index else set())

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @cached_property
    def model_types(self) -> tuple[str, ...]:
        """Return the model types of config.json and of the configs nested in it, without duplicates."""
        return tuple(self.configs)

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Return config.json and the configs nested in it by their model types, the outer one first."""
        return nested_configs(self.config)

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def read_config(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the config of a model, given in any form that `open_checkpoint` takes or as its config.json.

    The result is empty if there is no config.
    """
    path = resolve(name, config_alone=True)
    if path.name == "config.json":
        return read_folder_config(path.parent)
    if path.is_dir() and ((config := read_folder_config(path)) or not _gguf_models(path)):
        return config
    with closing(open_checkpoint(path)) as model:
        return model.config


def read_folder_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model's folder; empty if there is none."""
    path = folder / (transformer_folder(folder) or "") / "config.json"
    return read_json_file(path) if path.is_file() else {}


def is_config_alone(name: str | os.PathLike[str]) -> bool:
    """Return whether a model is given as its config.json alone, which is enough for tensor names."""
    path = resolve(name, config_alone=True)
    if not path.is_dir() or is_pipeline(path):
        return path.name == "config.json"
    refuse_change_folder(path)
    with suppress(InputError):
        find_weights(path)
        return False
    return (path / "config.json").is_file() and os.path.exists(name)  # weights on the hub are downloaded on opening


def find_weights(path: Path) -> Path:
    """Find the index or the single weights file in a folder; return any other path unchanged.

    Raises:
        InputError: the folder has no weights, several checkpoints, or a change of weights.
    """
    if not path.is_dir():
        return path
    refuse_change_folder(path)
    if inner := transformer_folder(path):
        return find_weights(path / inner)
    for name in INDEX_NAMES + SINGLE_NAMES:
        if (path / name).is_file():
            return path / name
    indexes = sorted(path.glob("*.safetensors.index*.json"))
    files = [each for each in sorted(path.glob("*.safetensors")) if not each.is_dir()]
    if len(indexes) == 1 or (not indexes and len(files) == 1):
        return (indexes or files)[0]
    for part in files:
        refuse_rank_file(part)
    if indexes or files:
        names = ", ".join(p.name for p in (indexes or files)[:4])
        shard = None if indexes else next(filter(None, (SHARD.fullmatch(each.name) for each in files)), None)
        remedy = "give the path of one of these files"
        if shard:
            remedy = f"copy {shard['stem']}.safetensors.index.json of the same model into it: these files are shards"
        raise InputError(f"holds several checkpoints ({names}, ...)", culprit=str(path), remedy=remedy)
    pickled = [path / name for name in TORCH_NAMES if (path / name).is_file()]
    if not pickled and (state := find_state(path)):
        return state
    if not pickled:
        pickled = sorted(each for each in path.iterdir() if is_torch_weights(each) and not each.is_dir())
    if len(pickled) > 1 and pickled[0].name not in TORCH_NAMES:
        names = ", ".join(p.name for p in pickled[:4])
        raise InputError(f"holds several torch files ({names})", culprit=str(path), remedy="name one of these files")
    if pickled:
        return pickled[0]
    models = _gguf_models(path)
    if len(models) > 1:
        names = ", ".join(p.name for p in models[:4])
        raise InputError(f"holds several GGUF models ({names})", culprit=str(path), remedy="name one of these files")
    if models:
        return models[0]
    others = [each for each in found_by_content(path) if not NO_WEIGHTS.fullmatch(each.name)]
    if len(others) == 1:
        return others[0]
    raise no_weights(path, others)


def _gguf_models(folder: Path) -> list[Path]:
    """Return a folder's GGUF files; of a split, only the first part."""
    models = (each for each in sorted(folder.glob("*.gguf")) if not each.is_dir())
    return [each for each in models if split_number(each) in (None, 1)]


def open_weights(path: Path) -> WeightsFile:
    """Open a weights file by its first bytes, or a sharded state (several files) by its name."""
    refuse_rank_file(path)
    if sharded := opener(path):
        return sharded(path)
    first = first_bytes(path)
    container = container_of(first)
    if container is None:
        refuse_change_folder(path.parent)  # the files in it may be compressed
        raise not_weights(path, first)
    file = {GGUF: GgufFile, NPZ: NpzFile, "torch": TorchFile}.get(container, TensorFile)(path)
    if isinstance(file, TensorFile):
        try:
            refuse_change(file)
        except BaseException:
            file.close()
            raise
    return file


OpenFile = Callable[[Path], WeightsFile]


def open_checkpoint(name: str | os.PathLike[str], open_file: OpenFile = open_weights) -> Checkpoint:
    """Open a file, a folder, an index JSON, or the name of a model on the hub.

    Args:
        open_file: opens a weights file.

    Raises:
        InputError: a file breaks its format, or an index contradicts its shards.
    """
    path = resolve(name)
    with reading(path):
        if is_pipeline(path):
            return _open_pipeline(path, open_file)
        weights = find_weights(path)
    return _open_model(path, weights, open_file)


def require_one_model(checkpoint: Checkpoint) -> None:
    """Raise InputError for a pipeline, which has several models."""
    if checkpoint.parts:
        first = next(part for part in checkpoint.parts if part.shards)
        raise InputError(
            "is a pipeline of several models",
            culprit=str(checkpoint.path),
            remedy=f"name one of its components, like {shell_word(first.path)}",
        )


def _open_pipeline(path: Path, open_file: OpenFile) -> Checkpoint:
    parts: list[Checkpoint] = []
    try:
        for name in component_names(path):
            parts.append(_open_component(path, name, open_file))
        shards = tuple(shard for part in parts for shard in part.shards)
        if not shards:
            raise InputError("is a pipeline without weights", culprit=str(path))
    except BaseException:
        for part in parts:
            part.close()
        raise
    return Checkpoint(path, path, False, shards, None, {}, parts=tuple(parts))


def _open_component(pipeline: Path, name: str, open_file: OpenFile) -> Checkpoint:
    """Open a pipeline's component. Its weights may be missing only if its config.json is not a model's."""
    folder = pipeline / name
    if not folder.is_dir():
        raise InputError(
            f"names {name}, but there is no such folder",
            culprit=str(pipeline / PIPELINE),
            remedy="download the pipeline again",
        )
    try:
        weights = find_weights(folder)
    except InputError:
        config = read_json_file(folder / "config.json") if (folder / "config.json").is_file() else {}
        if config.keys() & {"_class_name", "architectures"} or any(folder.glob("*.safetensors")):
            raise
        return Checkpoint(folder, folder, False, (), None, config, prefix=f"{name}/")
    component = _open_model(folder, weights, open_file)
    for shard in component.shards:
        shard.put_under(f"{name}/")
    return Checkpoint(folder, folder, False, component.shards, component.index, component.config, prefix=f"{name}/")


def _open_model(path: Path, weights: Path, open_file: OpenFile) -> Checkpoint:
    folder = weights.parent
    file = None if weights.suffix == ".json" else open_file(weights)
    if file and file.scattered:
        folders = (path,) if path.is_dir() else ()
        folder = next((each for each in file.folders if (each / "config.json").is_file()), (*folders, folder)[0])
    try:
        config = read_folder_config(folder)
    except InputError:
        if file:
            file.close()
        raise
    if file is None:
        index = read_json_file(weights)
        refuse_described_change(path, index)
        shards = _open_shards(weights, index, open_file)
        return Checkpoint(path, folder, False, shards, (weights.name, index), config)
    if isinstance(file, GgufFile):
        parts, config = open_parts(file), {}
        with suppress(InputError):  # a fault of the config is an error only where it is needed: `gguf_model`
            config = gguf_config(parts)
        return Checkpoint(path, folder, not path.is_dir() and len(parts) == 1, parts, None, config)
    if weights.name.endswith("_states.pt") and not any(spec.size for spec in file.specs.values()):
        file.close()
        why = "is a part of a DeepSpeed ZeRO state, and the weights are in other files"
        raise InputError(why, culprit=str(path), remedy=f"name its folder, {shell_word(folder)}")
    return Checkpoint(path, folder, not path.is_dir(), (file,), None, config)


def _open_shards(path: Path, index: dict[str, Any], open_file: OpenFile) -> tuple[WeightsFile, ...]:
    weight_map = index.get("weight_map")
    if weight_map is None and path.name.endswith("config.json"):
        raise InputError("is only a config, but the weights are needed", culprit=str(path), remedy="name its folder")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError("has no weight_map from names to files", culprit=str(path))
    files = sorted(set(weight_map.values()))
    _require_present(path, files)
    shards: list[WeightsFile] = []
    try:
        for file in files:
            shards.append(open_file(path.parent / file))
        _check_index(path, weight_map, shards)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return tuple(shards)


def _require_present(path: Path, files: list[str]) -> None:
    """Raise InputError if a file that an index names is not beside it."""
    for file in files:
        if not is_beside(file):
            raise InputError(f"names {file!r}, which is not a file beside it", culprit=str(path))
    with reading(path):
        missing = [file for file in files if not (path.parent / file).is_file()]
    if len(missing) > 1:
        message = f"names {len(files)} files, of which {len(missing)} are missing, like {missing[0]}"
        raise InputError(message, culprit=str(path), remedy="download the rest of the checkpoint")
    if missing:
        message = f"names {missing[0]}, which is missing"
        raise InputError(message, culprit=str(path), remedy="download it beside the others")


def _check_index(path: Path, weight_map: Mapping[str, str], shards: list[WeightsFile]) -> None:
    holders: dict[str, str] = {}
    for shard in shards:
        for name in shard.specs:
            if name in holders:
                raise InputError(f"{name} is in both {holders[name]} and {shard.path.name}", culprit=str(path))
            holders[name] = shard.path.name
    for name, file in weight_map.items():
        if holders.get(name) != file:
            fault = f"it is in {holders[name]}" if name in holders else "no shard has it"
            raise InputError(f"is stale: it puts {name} in {file}, but {fault}", culprit=str(path))
    unlisted = [name for name in holders if name not in weight_map]
    if unlisted:
        raise InputError(f"does not list {unlisted[0]}, which is in {holders[unlisted[0]]}", culprit=str(path))


def classify_checkpoint(base: Checkpoint) -> tuple[list[str], list[LeftBehind]]:
    """Return the side files of a model or pipeline that are copied, and those that are not."""
    if not base.parts:
        return classify_side_files(base.folder, base.weight_files)
    copied, left = classify_side_files(base.folder, (), [part.folder.name for part in base.parts])
    for part in base.parts:
        names, rest = classify_side_files(part.folder, part.weight_files)
        copied += [part.prefix + name for name in names]
        left += [replace(each, name=part.prefix + each.name) for each in rest]
    return copied, left


def split_into_shards(specs: Mapping[str, TensorSpec], max_bytes: int | None) -> list[list[str]]:
    """Split the names, in order, into shards of at most `max_bytes`; a larger tensor is alone in its shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if max_bytes is not None and shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def plain_dtype(base: Checkpoint) -> str:
    """Return the safetensors name of the type of most plain numbers in a model, else its config's type, else bf16.

    In a GGUF model only matrices count, since vectors are always float32; without any it is F16, which llama.cpp's
    export-lora writes.
    """
    sizes: Counter[str] = Counter()
    for name, spec in base.specs.items():
        if base.is_gguf and len(spec.shape) < 2:
            continue
        if spec.dtype in TORCH_FLOATS and name not in base.weights and name not in base.formats:
            sizes[spec.dtype] += spec.size
    configs = (base.config, *(value for value in base.config.values() if isinstance(value, Mapping)))
    stated = [CONFIG_DTYPES.get(str(config.get(field))) for config in configs for field in ("dtype", "torch_dtype")]
    default = "F16" if base.is_gguf else next(filter(None, stated), "BF16")
    return max(sizes, key=lambda dtype: sizes[dtype], default=default)
