"""Read states with DTensors that each rank of a run saved separately, the format of verl, without torch.

The files are `model_world_size_W_rank_R.pt`. A DTensor has a rank's box of a tensor, the mesh of ranks, and a placement
for each dimension of the mesh: `Shard(d)` cuts dimension d as torch.chunk does, `Replicate()` repeats it. A plain
tensor is the same in all files. Defined by torch/distributed/tensor: `placement_types.py`, `_dtensor_spec.py`,
`_utils.py`; the files' names by volcengine/verl: `verl/utils/checkpoint/fsdp_checkpoint_manager.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...durable.fileio import read_into
from ...errors import InputError
from ..containers.torch_archive import TorchArchive
from ..containers.torch_pickle import MAX_RANK, SavedObject, SavedTensor, is_whole, rebuild_from_type
from ..containers.torch_reader import is_name
from ..dtypes import DTYPES, TensorSpec
from ..weights_file import WeightsFile
from .sharded_file import Boxes, Chunk, ShardedFile, require_tiling

RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")

BLOCK = 1 << 20  # bytes read at a time

_REBUILD = "torch._tensor._rebuild_from_type_v2"

_MODULES = ("torch.distributed.tensor", "torch.distributed._tensor")  # torch 2.5 took the first for the second

_DTENSORS = {f"{module}{end}.DTensor" for module in _MODULES for end in ("", "._api", ".api")}

_PLACEMENTS = {
    f"{module}.placement_types.{name}": name
    for module in _MODULES
    for name in ("Shard", "Replicate", "Partial", "_Partial", "_StridedShard")
}

_RECORDS = frozenset(
    {_REBUILD, "torch._utils._rebuild_wrapper_subclass", *_DTENSORS, *_PLACEMENTS}
    | {f"{module}._dtensor_spec.{name}" for module in _MODULES for name in ("DTensorSpec", "ShardOrderEntry")}
    | {f"{module}.placement_types.DTensorSpec" for module in _MODULES}
    | {f"{module}.{place}.TensorMeta" for module in _MODULES for place in ("_dtensor_spec", "placement_types")}
    | {"torch.distributed.device_mesh.DeviceMesh", "torch.distributed._tensor.device_mesh.DeviceMesh"}
    | {f"torch.distributed._mesh_layout.{name}" for name in ("_MeshLayout", "_FlatLayout")}
)


@dataclass(frozen=True)
class _Share:
    """A rank's share of a tensor: all of a plain tensor, else a box at a place that follows from the mesh."""

    file: WeightsFile
    spec: TensorSpec
    begin: int
    tensor_shape: tuple[int, ...]
    placements: tuple[tuple[str, int], ...] = ()  # of each dimension of the mesh: Shard or Replicate, and Shard's dim
    coordinate: tuple[int, ...] = ()  # of the rank in the mesh


class _Copies(Boxes):
    """The bytes of a tensor that several groups of ranks have; reading compares the copies.

    A comparison on opening would read the complete state.
    """

    def __init__(self, name: str, first: Boxes, others: Sequence[Boxes]) -> None:
        self._name, self._first, self._others = name, first, others

    @property
    def first(self) -> tuple[int, int] | None:
        return self._first.first

    def read(self, first: int, out: memoryview) -> None:
        self._first.read(first, out)
        copy = memoryview(bytearray(min(BLOCK, len(out))))
        for other in self._others:
            for done in range(0, len(out), BLOCK):
                part = copy[: len(out) - done]
                other.read(first + done, part)
                if part != out[done : done + len(part)]:
                    why = "has other numbers on one group of ranks than on another, which should have the same"
                    raise InputError(why, culprit=self._name, remedy="are all files of one step of one run?")


class DTensorFile(ShardedFile):
    """The states of all ranks of a run, opened by one rank's file.

    Raises:
        InputError: a rank's file is missing, or the ranks' states contradict each other.
    """

    file_format = "dtensor"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return its folder, and the folder in which verl puts the model's config and tokenizer."""
        return self.path.parent, self.path.parent / "huggingface"

    def _find(self) -> dict[str, tuple[TensorSpec, Boxes]]:
        match = RANK_FILE.fullmatch(self.path.name)
        assert match, "the finder accepts no other name"
        world = int(match[1])
        held = {
            rank_file[2]
            for path in self.path.parent.iterdir()
            if (rank_file := RANK_FILE.fullmatch(path.name)) and int(rank_file[1]) == world
        }
        if len(held) != world:
            why = f"has the files of {len(held)} ranks of a run of {world}"
            raise InputError(why, culprit=str(self.path.parent), remedy="copy the whole folder")
        states = []
        for rank in range(world):
            part = self._part(self.path.with_name(f"model_world_size_{world}_rank_{rank}.pt"))
            archive = TorchArchive(part.path, part.file, 0, part.nbytes, _RECORDS)
            if type(archive.top) is not dict:
                raise InputError("holds no dict of tensors", culprit=str(part.path))
            states.append((archive, part))
        first = states[0][0].top
        names = [name for name, value in first.items() if _is_tensor(value)]
        if bad := next((name for name in names if not is_name(name)), None):
            raise ValueError(f"a tensor whose name {bad!a} is reserved or not text")
        if not names:
            raise InputError("holds no tensors", culprit=str(self.path))
        self.ignored = tuple(name if type(name) is str else "?" for name in first if name not in names)
        return {name: _join(name, [_share(name, *state) for state in states]) for name in names}


def _is_tensor(value: Any) -> bool:
    return type(value) is SavedTensor or (type(value) is SavedObject and value.name == _REBUILD)


def _share(name: str, archive: TorchArchive, file: WeightsFile) -> _Share:
    value = archive.top.get(name)
    if type(value) is SavedObject and value.name == _REBUILD and _kind(value) not in _DTENSORS:
        value = rebuild_from_type(*value.args)
    if type(value) is SavedTensor:
        spec, begin = archive.place(name, value)
        return _Share(file, spec, begin, spec.shape)
    if not _is_tensor(value):
        raise InputError(f"is in the first rank's file, but not in {file.path.name}", culprit=name)
    attributes, slots = value.args[3] if type(value.args[3]) is tuple else (value.args[3], None)
    attributes = {**(attributes or {}), **(slots or {})}
    local, meta = attributes["_local_tensor"], attributes["_spec"]
    shape = meta.field("tensor_meta").args[0]
    if type(local) is not SavedTensor or type(shape) is not tuple or len(shape) > MAX_RANK or not is_whole(*shape):
        raise ValueError(f"{name} has no shape or no part")
    coordinate = meta.field("mesh").field("_coordinate_on_dim")
    placements = tuple(_placement(name, each) for each in meta.field("placements"))
    if type(coordinate) not in (list, tuple) or len(coordinate) != len(placements) or not is_whole(*coordinate):
        raise ValueError(f"{name} has no place in a mesh")
    spec, begin = archive.place(name, local)
    return _Share(file, spec, begin, shape, placements, tuple(coordinate))


def _kind(value: SavedObject) -> str:
    return str(getattr(value.args[1], "name", ""))


def _placement(name: str, placement: Any) -> tuple[str, int]:
    kind = _PLACEMENTS[placement.name]
    if kind not in ("Shard", "Replicate"):
        raise InputError(f"is placed on the ranks as {kind.strip('_')}, which is not read", culprit=name)
    dim = placement.field("dim") if kind == "Shard" else 0
    if not is_whole(dim):
        raise ValueError(f"{name} is cut along no dimension")
    return kind, dim


def _join(name: str, shares: Sequence[_Share]) -> tuple[TensorSpec, Boxes]:
    """Return a tensor that consists of the ranks' shares, using one copy of each box.

    Raises:
        InputError: the ranks describe it differently, or plain tensors differ.
    """
    first = shares[0]
    if any(
        (share.spec.dtype, share.tensor_shape, share.placements)
        != (first.spec.dtype, first.tensor_shape, first.placements)
        for share in shares
    ):
        raise InputError("has another type, shape or placement on one rank than on another", culprit=name)
    mesh = [1 + max(share.coordinate[d] for share in shares) for d in range(len(first.placements))]
    copies: dict[tuple[int, ...], list[Chunk]] = {}  # offsets of a box -> its copies: a mesh may repeat it
    for share in shares:
        offsets, sizes = _box(share, mesh)
        if sizes != share.spec.shape:
            should = f"{sizes} of {share.tensor_shape}"
            why = f"{share.file.path.name} has {share.spec.shape} of it, which should be {should}"
            raise InputError(why, culprit=name)
        if share.spec.size:
            copies.setdefault(offsets, []).append(Chunk(share.file, share.begin, offsets, sizes))
    if not first.placements:
        _require_equal(name, shares)
    require_tiling(name, first.tensor_shape, [(chunk.offsets, chunk.sizes) for chunk, *_ in copies.values()])
    if len({len(chunks) for chunks in copies.values()}) > 1:
        raise InputError("is on more ranks with one part than with another", culprit=name)
    dtype = first.spec.dtype
    tilings = [Boxes(first.tensor_shape, DTYPES[dtype] // 8, chunks) for chunks in zip(*copies.values(), strict=True)]
    first_copy, *others = tilings or [Boxes(first.tensor_shape, DTYPES[dtype] // 8, ())]
    boxes = _Copies(name, first_copy, others) if others and first.placements else first_copy
    return TensorSpec(dtype, first.tensor_shape), boxes


def _box(share: _Share, mesh: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the offsets and sizes of a rank's box: each dimension of the mesh cuts what the ones before left."""
    offsets, sizes = [0] * len(share.tensor_shape), list(share.tensor_shape)
    for (kind, dim), count, index in zip(share.placements, mesh, share.coordinate, strict=True):
        if kind == "Shard":
            step = -(-sizes[dim] // count)
            begin = min(index * step, sizes[dim])
            offsets[dim], sizes[dim] = offsets[dim] + begin, min(step, sizes[dim] - begin)
    return tuple(offsets), tuple(sizes)


def _require_equal(name: str, shares: Sequence[_Share]) -> None:
    """Raise InputError unless all ranks have the same bytes of a plain tensor."""
    first, size = shares[0], shares[0].spec.nbytes
    buffers = [memoryview(bytearray(min(BLOCK, size))) for _ in range(2)]
    for other in shares[1:]:
        for done in range(0, size, BLOCK):
            parts = [buffer[: size - done] for buffer in buffers]
            for part, share in zip(parts, (first, other), strict=True):
                read_into(share.file.file, part, share.begin + done)
            if parts[0] != parts[1]:
                why = f"is not cut over the ranks, but {other.file.path.name} has other numbers than the first rank's"
                raise InputError(why, culprit=name)
