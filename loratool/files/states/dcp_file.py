"""Read a checkpoint of torch.distributed.checkpoint (DCP), saved by FSDP, torchtitan or Megatron-Core, without torch.

The folder has `.metadata`, a pickle with the chunks of each tensor, and for each chunk a run of bytes in a `.distcp`
file that torch.save wrote. The state is nested dicts, flattened. The pickle has the path of each key, which
distinguishes a model's state under `model` from an optimizer's. Megatron-Core (`torch_dist`) saves no paths: its keys
are the names of tensors, those of the optimizer too. Defined by torch/distributed/checkpoint: `metadata.py`,
`filesystem.py` and `default_planner.py`; and by NVIDIA/Megatron-LM: `core/dist_checkpointing/strategies/torch.py`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...durable.fileio import is_beside, read_into
from ...errors import InputError
from ..containers.torch_archive import TorchArchive
from ..containers.torch_pickle import MAX_RANK, Machine, SavedObject, SavedTensor, is_whole
from ..containers.torch_reader import STATE_DICT_KEYS, is_name
from ..dtypes import DTYPES, TORCH_DTYPES, TORCH_FLOATS, TensorSpec
from ..weights_file import WeightsFile
from .sharded_file import Boxes, Chunk, ShardedFile, require_tiling

METADATA = ".metadata"

MAX_METADATA = 1 << 26  # bytes, half a million chunks

_IN_METADATA = "torch.distributed.checkpoint.metadata."

_TENSOR, _BYTES = f"{_IN_METADATA}TensorStorageMetadata", f"{_IN_METADATA}BytesStorageMetadata"

_INDEX, _CHUNK = f"{_IN_METADATA}MetadataIndex", f"{_IN_METADATA}ChunkStorageMetadata"

_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"

_TOPS = (f"{_IN_METADATA}Metadata", "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata")

# Keys of Megatron-Core's optimizers, one or several in a chain
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.(?:state|distributed)\..+")

_RECORDS = frozenset(
    {_TENSOR, _BYTES, _INDEX, _CHUNK, _PLACE}
    | {f"{_IN_METADATA}{name}" for name in ("Metadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")}
    | {*_TOPS, "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan"}
    # the plans of all ranks, which are ignored
    | {f"torch.distributed.checkpoint.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType")}
    | {f"torch.distributed.checkpoint.planner.{name}" for name in ("TensorWriteData", "BytesIOWriteData")}
    | {f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
    | {f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath")}  # Python 3.13
)


class DcpFile(ShardedFile):
    """A folder of DCP, opened by its `.metadata`.

    The weights are the tensors at the top of the state, else those of the first dict in it that has some, under a name
    in `STATE_DICT_KEYS`. `ignored` names everything else.

    Raises:
        InputError: the metadata does more than describe tensors, or does not fit the files.
    """

    file_format = "dcp"

    def _find(self) -> dict[str, tuple[TensorSpec, Boxes]]:
        metadata = self._unpickle()
        entries, paths = metadata.field("state_dict_metadata"), metadata.field("planner_data")
        places = self._places(metadata.field("storage_data"))
        if type(paths) is not dict:
            paths = {key: ("optimizer", key) for key in entries if _OPTIMIZER.fullmatch(_text(key))}
        names, self.ignored = self._choose(entries, paths)
        self._used: set[int] = set()
        return {name: self._tensor(key, entries[key], places) for key, name in names.items()}

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return its folder and the parent: accelerate's `pytorch_model_fsdp_0` is in the trainer's folder."""
        return self.path.parent, self.path.parent.parent

    def _refuse(self, why: str, remedy: str | None = None) -> InputError:
        return InputError(why, culprit=str(self.path), remedy=remedy)

    def _unpickle(self) -> SavedObject:
        file = self._part(self.path)
        if file.nbytes > MAX_METADATA:
            raise self._refuse(f"has {file.nbytes} bytes, and at most {MAX_METADATA} are read")
        data = memoryview(bytearray(file.nbytes))
        read_into(file.file, data, 0)
        metadata = Machine(self.path, _RECORDS, MAX_METADATA, MAX_METADATA // 4).run(io.BytesIO(data))
        if type(metadata) is not SavedObject or metadata.name not in _TOPS:
            raise ValueError("not metadata of torch.distributed.checkpoint")
        return metadata

    def _places(self, stored: Any) -> dict[tuple[str, tuple[int, ...]], SavedObject]:
        """Return the place of each chunk by the tensor's key and the chunk's offsets."""
        places: dict[tuple[str, tuple[int, ...]], SavedObject] = {}
        for index, place in stored.items():
            offsets = index.field("offset")
            if offsets is None:  # of an object that is not a tensor
                continue
            key = _text(index.field("fqn")), _sizes(offsets)
            if key in places:
                raise ValueError(f"{key[0]} has two chunks at {key[1]}")
            if place.name != _PLACE:
                raise self._refuse(f"was written by another storage than files ({place.name})")
            places[key] = place
        return places

    def _choose(self, entries: Any, paths: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return the keys of the weights -> their names in their dict, and the names of everything else."""
        groups: dict[tuple[str, ...], dict[str, str]] = {}
        for key, entry in entries.items():
            path = paths.get(key, (_text(key),))
            if entry.name == _TENSOR and type(path) is tuple and all(type(part) is str for part in path):
                groups.setdefault(path[:-1], {})[key] = path[-1]
        order = [each for word in STATE_DICT_KEYS for each in groups if each[-1:] == (word,)]
        chosen = next(iter(order), ())
        if not groups.get(chosen):
            held = ", ".join(sorted({".".join(each[:1]) for each in groups})) or "no tensors"
            raise self._refuse(f"holds {held}, and no weights: neither at its top nor in {', '.join(STATE_DICT_KEYS)}")
        if chosen and any(_is_weight(entries[key]) for key in groups.get((), {})):
            raise self._refuse(f"holds tensors both at its top and in {'.'.join(chosen)}: which are the weights?")
        names = groups[chosen]
        if same := next((name for name in names.values() if not is_name(name)), None):
            raise ValueError(f"a tensor whose name {same!a} is reserved or not text")
        if len(set(names.values())) < len(names):
            raise ValueError("two tensors of one name")
        beside = {_beside(key, paths.get(key), chosen): None for key in entries if key not in names}
        return names, tuple(beside)

    def _tensor(
        self, key: str, entry: SavedObject, places: Mapping[tuple[str, tuple[int, ...]], SavedObject]
    ) -> tuple[TensorSpec, Boxes]:
        shape, chunks = _sizes(entry.field("size")), entry.field("chunks")
        if type(chunks) is not list or id(chunks) in self._used:
            raise ValueError(f"{key} has no chunks of its own")
        self._used.add(id(chunks))  # else a million tensors could have the same million chunks
        kind = entry.field("properties").state[0].name.removeprefix("torch.")
        dtype = TORCH_DTYPES.get(kind)
        if dtype is None:
            raise InputError(f"is stored as {kind}, which safetensors has no name for", culprit=key)
        boxes = [(_sizes(chunk.field("offsets")), _sizes(chunk.field("sizes"))) for chunk in chunks]
        if any(not len(offsets) == len(sizes) == len(shape) for offsets, sizes in boxes):
            raise ValueError(f"a chunk of {key} has other dimensions than it")
        require_tiling(key, shape, boxes)
        opened = []
        for offsets, sizes in boxes:
            if math.prod(sizes):
                file, begin = self._open_chunk(key, TensorSpec(dtype, sizes), places.get((key, offsets)))
                opened.append(Chunk(file, begin, offsets, sizes))
        return TensorSpec(dtype, shape), Boxes(shape, DTYPES[dtype] // 8, opened)

    def _open_chunk(self, key: str, spec: TensorSpec, place: SavedObject | None) -> tuple[WeightsFile, int]:
        """Return a chunk's file and first byte, read from the torch archive at its place."""
        if place is None:
            raise InputError("has no place for one of its chunks", culprit=key)
        name, offset, length = _text(place.field("relative_path")), place.field("offset"), place.field("length")
        if not is_beside(name):
            raise self._refuse(f"names {name[:100]!r}, which is not a file beside it")
        if place.field("transform_descriptors"):
            raise self._refuse(f"has {key} compressed", "save it without extensions")
        file = self._part(self.path.parent / name)
        if not is_whole(offset, length) or offset + length > file.nbytes:
            raise InputError(f"is cut off: {key} ends after the end of the file", culprit=str(file.path))
        archive = TorchArchive(file.path, file.file, offset, length)
        if type(archive.top) is not SavedTensor:
            raise InputError(f"has no tensor where {key} should be", culprit=str(file.path))
        stored, begin = archive.place(key, archive.top)
        if stored != spec:
            raise InputError(f"its chunk in {name} is {stored}, and {METADATA} says {spec}", culprit=key)
        return file, begin


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a name that is not text")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_RANK or not is_whole(*value):
        raise ValueError("invalid sizes")
    return value


def _is_weight(entry: SavedObject) -> bool:
    """Return whether a tensor may be a weight, not a generator's state or a counter."""
    dtype = entry.field("properties").state[0].name.removeprefix("torch.")
    return TORCH_DTYPES.get(dtype) in TORCH_FLOATS and bool(entry.field("size"))


def _beside(key: str, path: Any, chosen: tuple[str, ...]) -> str:
    """Return the owner of a key that is not a weight: the first name in its path, or the path beside the weights."""
    if type(path) is not tuple or not path or type(path[0]) is not str:
        return key
    return key if path[: len(chosen)] == chosen and chosen else path[0]
