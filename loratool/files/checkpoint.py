"""A model's weights as one lazy mapping: a file of safetensors or torch, or a folder of shards with its index.

Opening reads headers only, and checks the index against the shards: a name that the index lacks or
misplaces is an error here, not a missing tensor in the output. Laziness lives here and nowhere else.
A diffusers pipeline is a folder of such folders, its tensors named `unet/conv_in.weight`: component, slash, own name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .dtypes import TensorSpec
from .fileio import open_for_reading, reading
from .hub_cache import resolve
from .quantized import (
    CONFIG_FILES,
    DUMMY_SCALE,
    FLOATS,
    SCALED_FLOAT,
    Coded,
    coded_as,
    declared_method,
    find_coded,
    find_declared,
    listed_layers,
)
from .safetensors_file import TensorFile, parse_json
from .torch_reader import TorchFile
from .weights_file import WeightsFile

if TYPE_CHECKING:
    import torch

# The file names that loaders look for in a folder, first match wins; an index decides before a single file.
INDEX_NAMES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")


SINGLE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")


TORCH_NAMES = (
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)


PIPELINE = "model_index.json"  # says of which components, in folders of their own, a diffusers pipeline is made


PICKLES = (".bin", ".pt", ".pth", ".ckpt")


# Torch files that hold a training run's state or arguments and no weights; a number is that of a process.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)(_\d+)?\.\w+")


# What a training run leaves for itself, as patterns in its folder -> what writes it, and how to make weights of it.
_DCP = (
    "a sharded state of torch.distributed (DCP, FSDP)",
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} pytorch_model.bin",
)


_ZERO = ("a DeepSpeed ZeRO state", "run python zero_to_fp32.py {folder} OUT and pass OUT")


TRAINING_STATES = {
    ".metadata": _DCP,
    "*/.metadata": _DCP,
    "zero_to_fp32.py": _ZERO,
    "*_optim_states.pt": _ZERO,
    "*zero_pp_rank_*_states.pt": _ZERO,
    "*/*_optim_states.pt": _ZERO,
}


@dataclass(frozen=True)
class Checkpoint(Mapping[str, "torch.Tensor"]):
    """Weights by name. `specs` is in file order, shard by shard; `shard_of` says where a tensor lies.

    `index` is the index JSON's name and content, None for a checkpoint of one file. `folder` is where side
    files lie; `given_as_file` remembers that the user named a file and not a folder. `parts` are a pipeline's
    components, with weights or without, each a checkpoint whose tensors' names begin with its `prefix`.
    """

    path: Path
    folder: Path
    given_as_file: bool
    shards: tuple[WeightsFile, ...]
    index: tuple[str, dict[str, Any]] | None
    config: dict[str, Any]
    prefix: str = ""
    parts: tuple[Checkpoint, ...] = ()

    def __post_init__(self) -> None:
        shard_of = {name: shard for shard in self.shards for name in shard.specs}
        object.__setattr__(self, "shard_of", shard_of)
        object.__setattr__(self, "specs", {name: shard.specs[name] for name, shard in shard_of.items()})

    shard_of: Mapping[str, WeightsFile] = None  # type: ignore[assignment]
    specs: Mapping[str, TensorSpec] = None  # type: ignore[assignment]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.shard_of[name].tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the index, or else the single file, says of itself; of a pipeline our own record alone.

        A component has the record of the last edit that changed it. Each has those before in it, so the longest is
        the pipeline's last.
        """
        if self.parts:
            records = [str(part.metadata["loratool"]) for part in self.parts if "loratool" in part.metadata]
            return {"loratool": max(records, key=len)} if records else {}
        value = self.index[1].get("metadata") if self.index else self.shards[0].metadata if self.shards else None
        return value if isinstance(value, dict) else {}

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """The components of a pipeline, else itself."""
        return self.parts or (self,)

    @property
    def quantized(self) -> str | None:
        """The method by which it or a component is quantized, as its config says, else as its tensors do."""
        methods = (declared_method(part.declared) for part in self.models)
        return next(filter(None, methods), None) or next((c.format for c in self.coded.values()), None)

    @cached_property
    def declared(self) -> Mapping[str, Any]:
        """What its config, or a file beside it, says of its quantization; empty where nothing does."""
        declared = find_declared(self.config)
        for name, method in CONFIG_FILES.items():
            if not declared and (self.folder / name).is_file():
                content = read_json_file(self.folder / name)
                declared = find_declared(content) or {"quant_method": method, **content}
        return declared

    @cached_property
    def coded(self) -> Mapping[str, Coded]:
        """Its coded weights, by the names that they have where they are not quantized."""
        if self.parts:
            return {name: coded for part in self.parts for name, coded in part.coded.items()}
        layers = (listed_layers(shard.metadata or {}) for shard in self.shards)
        found = find_coded(self.specs, self.declared, {self.prefix + layer for each in layers for layer in each})
        for name in (name for name in self.specs if name.endswith(DUMMY_SCALE)):
            path = name.removesuffix(DUMMY_SCALE)
            weight = self.specs.get(f"{path}.weight")
            if weight and weight.dtype in FLOATS and not self._is_one(name):
                found[f"{path}.weight"] = coded_as(SCALED_FLOAT, path, f"{path}.weight", self.specs, self.declared)
        return found

    def _is_one(self, name: str) -> bool:
        return self.specs[name].size == 1 and self.shard_of[name].scalar(name) == 1

    @cached_property
    def formats(self) -> Mapping[str, str]:
        """The quantized format of each tensor that is stored for a coded weight, codes and all that is beside them."""
        return {tensor: coded.format for coded in self.coded.values() for tensor in coded.tensors}

    @property
    def weight_files(self) -> set[str]:
        """The files in its folder that were read: shards and index."""
        return {shard.path.name for shard in self.shards} | ({self.index[0]} if self.index else set())

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def model_types(self) -> tuple[str, ...]:
        """Of the whole and of its parts, which config.json nests."""
        parts = (self.config, *self.config.values())
        found = [part.get("model_type") for part in parts if isinstance(part, dict)]
        return tuple(dict.fromkeys(value for value in found if isinstance(value, str)))

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def read_json_file(path: Path) -> dict[str, Any]:
    with open_for_reading(path) as file:
        return parse_json(file.read(), path)


def find_weights(path: Path) -> Path:
    """The index or the single file that a checkpoint's path means."""
    if not path.is_dir():
        return path
    for name in INDEX_NAMES + SINGLE_NAMES:
        if (path / name).is_file():
            return path / name
    indexes = sorted(path.glob("*.safetensors.index*.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indexes) == 1 or (not indexes and len(files) == 1):
        return (indexes or files)[0]
    if indexes or files:
        names = ", ".join(p.name for p in (indexes or files)[:4])
        raise InputError(
            f"holds several checkpoints ({names}, ...)", culprit=str(path), remedy="name one of these files"
        )
    pickled = [path / name for name in TORCH_NAMES if (path / name).is_file()]
    if not pickled:
        refuse_training_state(path)
        pickled = sorted(filter(is_torch_weights, path.iterdir()))
    if len(pickled) > 1 and pickled[0].name not in TORCH_NAMES:
        names = ", ".join(p.name for p in pickled[:4])
        raise InputError(f"holds several torch files ({names})", culprit=str(path), remedy="name one of these files")
    if pickled:
        return pickled[0]
    raise InputError("holds no *.safetensors file and none of torch", culprit=str(path))


def is_torch_weights(path: Path) -> bool:
    """Whether a file could be weights by its name."""
    return path.suffix in PICKLES and not NO_WEIGHTS.fullmatch(path.name)


def refuse_training_state(path: Path) -> None:
    """Raises InputError for a folder of what a training run left for itself, naming how to make weights of it."""
    for pattern, (what, remedy) in TRAINING_STATES.items():
        found = next(path.glob(pattern), None)
        if found is not None:
            is_step = found.parent == path and found.name.endswith("_states.pt")
            folder = found.parent if found.name == ".metadata" else path.absolute().parent if is_step else path
            raise InputError(f"holds {what}, not weights", culprit=str(path), remedy=remedy.format(folder=folder))


def open_weights(path: Path) -> WeightsFile:
    """A file of weights by what it holds, not by what it is called."""
    with open_for_reading(path) as file:
        start = file.read(9)
    torch = start.startswith((b"PK\x03\x04", b"\x80\x02")) and start[8:] != b"{"
    return TorchFile(path) if torch else TensorFile(path)


def open_checkpoint(name: str | os.PathLike[str]) -> Checkpoint:
    """Open a file, a folder, an index JSON, or a name in the local Hugging Face cache.

    Raises InputError for a file that breaks the format, and for an index that contradicts its shards.
    """
    path = resolve(name)
    with reading(path):
        if is_pipeline(path):
            return _open_pipeline(path)
        weights = find_weights(path)
    return _open_model(path, weights)


def is_pipeline(path: Path) -> bool:
    return (path / PIPELINE).is_file()


def component_names(folder: Path) -> list[str]:
    """The components that a pipeline has, by its model_index.json: `[library, class]`, with nulls for one it lacks."""
    index = read_json_file(folder / PIPELINE)
    names = [k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1] is not None and k[:1] != "_"]
    for name in names:
        if name != Path(name).name or "\\" in name or ":" in name or name in ("", ".", ".."):
            raise InputError(f"names {name!r}, which is no folder beside it", culprit=str(folder / PIPELINE))
    return names


def require_one_model(checkpoint: Checkpoint) -> None:
    """Raises InputError for a pipeline, where a verb makes something for one model."""
    if checkpoint.parts:
        first = next(part for part in checkpoint.parts if part.shards)
        raise InputError(
            "is a pipeline of several models",
            culprit=str(checkpoint.path),
            remedy=f"name one of its components, like {first.path}",
        )


def _open_pipeline(path: Path) -> Checkpoint:
    parts: list[Checkpoint] = []
    try:
        for name in component_names(path):
            parts.append(_open_component(path, name))
        shards = tuple(shard for part in parts for shard in part.shards)
        if not shards:
            raise InputError("is a pipeline without weights", culprit=str(path))
    except BaseException:
        for part in parts:
            part.close()
        raise
    return Checkpoint(path, path, False, shards, None, {}, parts=tuple(parts))


def _open_component(pipeline: Path, name: str) -> Checkpoint:
    """A scheduler or a tokenizer has no weights; what has a model's config.json must have them."""
    folder = pipeline / name
    if not folder.is_dir():
        raise InputError(
            f"names {name}, but there is no such folder",
            culprit=str(pipeline / PIPELINE),
            remedy="download the pipeline anew",
        )
    try:
        weights = find_weights(folder)
    except InputError:
        config = read_json_file(folder / "config.json") if (folder / "config.json").is_file() else {}
        if config.keys() & {"_class_name", "architectures"} or any(folder.glob("*.safetensors")):
            raise
        return Checkpoint(folder, folder, False, (), None, config, prefix=f"{name}/")
    found = _open_model(folder, weights)
    for shard in found.shards:
        shard.put_under(f"{name}/")
    return Checkpoint(folder, folder, False, found.shards, found.index, found.config, prefix=f"{name}/")


def _open_model(path: Path, weights: Path) -> Checkpoint:
    folder = weights.parent
    config_path = folder / "config.json"
    config = read_json_file(config_path) if config_path.is_file() else {}
    if weights.suffix == ".json":
        index = read_json_file(weights)
        shards = _open_shards(weights, index)
        return Checkpoint(path, folder, False, shards, (weights.name, index), config)
    file = open_weights(weights)
    if weights.name.endswith("_states.pt") and not any(spec.size for spec in file.specs.values()):
        file.close()
        what, remedy = _ZERO
        remedy = remedy.format(folder=folder.absolute().parent)
        raise InputError(f"is a part of {what}, its weights elsewhere", culprit=str(path), remedy=remedy)
    return Checkpoint(path, folder, not path.is_dir(), (file,), None, config)


def _open_shards(path: Path, index: dict[str, Any]) -> tuple[WeightsFile, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError("has no weight_map from names to files", culprit=str(path))
    shards: list[WeightsFile] = []
    try:
        for file in sorted(set(weight_map.values())):
            if file != Path(file).name or "\\" in file or ":" in file or file in ("", ".", ".."):
                raise InputError(f"names {file!r}, which is not a file beside it", culprit=str(path))
            with reading(path.parent / file):
                present = (path.parent / file).is_file()
            if not present:
                raise InputError(
                    f"names {file}, which is missing", culprit=str(path), remedy="download the checkpoint anew"
                )
            shards.append(open_weights(path.parent / file))
        _check_index(path, weight_map, shards)
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return tuple(shards)


def _check_index(path: Path, weight_map: Mapping[str, str], shards: list[WeightsFile]) -> None:
    holders: dict[str, str] = {}
    for shard in shards:
        for name in shard.specs:
            if name in holders:
                raise InputError(f"{name} stands in both {holders[name]} and {shard.path.name}", culprit=str(path))
            holders[name] = shard.path.name
    for name, file in weight_map.items():
        if holders.get(name) != file:
            found = f"it is in {holders[name]}" if name in holders else "no shard has it"
            raise InputError(f"is stale: it puts {name} in {file}, but {found}", culprit=str(path))
    unlisted = [name for name in holders if name not in weight_map]
    if unlisted:
        raise InputError(f"does not list {unlisted[0]}, which is in {holders[unlisted[0]]}", culprit=str(path))


def split_into_shards(specs: Mapping[str, TensorSpec], max_bytes: int | None) -> list[list[str]]:
    """Names in order, cut where the next tensor would pass `max_bytes`; one larger tensor is alone in its shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if max_bytes is not None and shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards
