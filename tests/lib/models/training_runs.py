"""Write sharded states of training runs: DCP by torch's own classes, ZeRO by DeepSpeed's rules, DTensors of ranks."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
except ImportError:  # before torch 2.5
    from torch.distributed._tensor import DTensor, Partial, Replicate, Shard

__all__ = ["Partial", "Replicate", "Shard"]

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def cut(shape: Sequence[int], parts: Mapping[int, Sequence[int]]) -> list[Box]:
    """Return the boxes of a tensor whose dimension d is cut into runs of `parts[d]` numbers."""
    boxes: list[Box] = [((), ())]
    for d, size in enumerate(shape):
        runs = parts.get(d, [size])
        starts = [sum(runs[:i]) for i in range(len(runs))]
        boxes = [((*o, at), (*s, n)) for o, s in boxes for at, n in zip(starts, runs, strict=True)]
    return boxes


def part_of(tensor: Tensor, box: Box) -> Tensor:
    for d, (at, size) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(d, at, size)
    return tensor.clone(memory_format=torch.contiguous_format)


def write_dcp(
    folder: Path,
    state: Mapping[tuple[str, ...], Any],
    boxes: Mapping[tuple[str, ...], Sequence[Box]] | None = None,
    files: int = 2,
    edit: Callable[[Any], None] = lambda metadata: None,
) -> Path:
    """Write a folder of DCP as FileSystemWriter does, each tensor in boxes of one's own choice.

    Args:
        state: path in the nested dict -> a tensor, or any other object.
        edit: changes the metadata before it is pickled.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir(parents=True, exist_ok=True)
    streams = [io.BytesIO() for _ in range(files)]
    entries, paths, places = {}, {}, {}
    count = 0
    for path, value in state.items():
        key = ".".join(path)
        paths[key] = path
        chosen = (boxes or {}).get(path)
        if not isinstance(value, Tensor):
            entries[key], items = BytesStorageMetadata(), [(MetadataIndex(key), value)]
        else:
            chosen = chosen or [((0,) * value.dim(), tuple(value.shape))]
            chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chosen]
            properties = TensorProperties.create_from_tensor(value)
            entries[key] = TensorStorageMetadata(properties, value.size(), chunks)
            items = [(MetadataIndex(key, o, i), part_of(value, (o, s))) for i, (o, s) in enumerate(chosen)]
        for index, item in items:
            stream = streams[count % files]
            begin = stream.tell()
            torch.save(item, stream)
            places[index] = _StorageInfo(f"__{count % files}_0.distcp", begin, stream.tell() - begin)
            count += 1
    for rank, stream in enumerate(streams):
        (folder / f"__{rank}_0.distcp").write_bytes(stream.getvalue())
    metadata = Metadata(entries, paths, places, StorageMeta(folder, "saved"))
    edit(metadata)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    return folder


def write_zero(
    step: Path,
    stage: int,
    world: int,
    groups: Sequence[Mapping[str, Tensor]],
    frozen: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, str] | None = None,
    gaps: int = 0,
) -> Path:
    """Write a step of ZeRO as DeepSpeed's `save_checkpoint` does: the trained parameters by groups, in float32.

    Args:
        gaps: numbers after each parameter, which newer versions may pad stages 1 and 2 with.
    """
    step.mkdir(parents=True)
    frozen, buffers, shared = frozen or {}, buffers or {}, shared or {}
    whole = {name: tensor.bfloat16() for group in groups for name, tensor in group.items()}
    whole |= {**frozen, **buffers, **{name: whole[to] for name, to in shared.items()}}
    module = whole if stage < 3 else {name: buffers.get(name, torch.empty(0)) for name in whole}
    for rank in range(world if stage == 3 else 1):
        torch.save(
            {
                "module": module,
                "buffer_names": list(buffers),
                "optimizer": None,
                "param_shapes": [{name: tensor.shape for name, tensor in group.items()} for group in groups],
                "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()} or None,
                "frozen_param_fragments": {
                    name: share(tensor, world, rank) if stage == 3 else tensor for name, tensor in frozen.items()
                },
                "shared_params": dict(shared),
                "ds_version": "0.19.8",
            },
            step / (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"),
        )
    for rank in range(world):
        state: dict[str, Any] = {
            "zero_stage": stage,
            "base_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}},
        }
        if stage == 3:
            flat = [torch.cat([share(t.float(), world, rank) for t in group.values()]) for group in groups]
            state |= {"partition_count": world, "fp32_flat_groups": flat}
        else:
            flat = [slice_of(group, gaps, world, rank) for group in groups]
            state |= {"partition_count": [world] * len(groups), "single_partition_of_fp32_groups": flat}
            state |= {"param_alignment_paddings": [[gaps] * len(group) for group in groups]} if gaps else {}
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"}, step / name)
    return step


def share(tensor: Tensor, world: int, rank: int) -> Tensor:
    """Return a rank's part of a parameter of stage 3: the last ones are padded."""
    size = -(-tensor.numel() // world)
    padded = torch.cat([tensor.flatten(), tensor.new_full((size * world - tensor.numel(),), 7)])
    return padded[rank * size : (rank + 1) * size].clone()


def slice_of(group: Mapping[str, Tensor], gaps: int, world: int, rank: int) -> Tensor:
    """Return a rank's part of a group of stages 1 and 2: the group is padded to twice the number of ranks.

    The padding at the end of the last part is not saved.
    """
    flat = torch.cat([torch.cat([t.float().flatten(), torch.full((gaps,), 7.0)]) for t in group.values()])
    size = -(-flat.numel() // (2 * world)) * 2
    return flat[rank * size : (rank + 1) * size].clone()


@contextmanager
def fake_rank(rank: int, world: int) -> Iterator[None]:
    """Be a rank of a run whose other ranks do not exist, so that DTensors can be made and saved."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def write_ranks(folder: Path, mesh: Sequence[int], state: Mapping[str, tuple[Tensor, Sequence[Any]] | Any]) -> Path:
    """Write what each rank of a mesh saves of a state, as verl does.

    Args:
        state: name -> a tensor and its placements, or what every rank saves as it is.
    """
    from torch.distributed.device_mesh import init_device_mesh

    folder.mkdir(parents=True, exist_ok=True)
    world = torch.Size(mesh).numel()
    for rank in range(world):
        with fake_rank(rank, world):
            ranks = init_device_mesh("cpu", tuple(mesh), mesh_dim_names=("ddp", "fsdp")[-len(mesh) :])
            saved = {name: local(*value, ranks) if isinstance(value, tuple) else value for name, value in state.items()}
            torch.save(saved, folder / f"model_world_size_{world}_rank_{rank}.pt")
    return folder


def local(tensor: Tensor, placements: Sequence[Any], mesh: Any) -> Tensor:
    """Return this rank's DTensor of a tensor, which torch.chunk cuts for each dimension of the mesh."""
    own = tensor
    for placement, count, index in zip(placements, mesh.mesh.shape, mesh.get_coordinate(), strict=True):
        if placement.is_shard():
            parts = own.chunk(count, placement.dim)
            own = parts[index] if index < len(parts) else own.narrow(placement.dim, 0, 0)
    own = own.clone(memory_format=torch.contiguous_format)
    stride = tensor.stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=tensor.size(), stride=stride)
