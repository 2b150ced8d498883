"""`inspect`: what is in a checkpoint, from headers alone; an adapter is for `inspect_adapter`.

Names that differ only in numbers are one group, so that a model of 90,000 tensors reads like its config.
Nothing here may import torch or numpy: the command answers before they would have loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..architectures.quantized import quantization
from ..architectures.roles import role
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import UsageError
from ..formats import holds_adapter, open_adapter
from ..naming import split_numbers, with_ranges
from ..tensorfile import TORCH_FLOATS, TensorSpec
from ..tied import head_is_missing

if TYPE_CHECKING:
    from .inspect_adapter import AdapterInspection


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype and shape whose names differ only in numbers: `model.layers.{0..31}.mlp.up_proj.weight`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: int
    parameters: int
    nbytes: int
    role: str


@dataclass(frozen=True)
class CheckpointReport:
    """`tied`: the head that the file lacks because it is the embedding; `quantization`: the method's name."""

    path: str
    model_type: str | None
    files: tuple[str, ...]
    groups: tuple[Group, ...]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    tied: bool
    quantization: str | None
    metadata: Mapping[str, str]
    kind: str = "checkpoint"


def inspect(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, alpha: float | None = None
) -> CheckpointReport | AdapterInspection:
    """Describe a checkpoint or an adapter, which is told by its tensor names.

    base: the model whose names an adapter is held against. alpha: for an adapter file that does not say its own.
    Raises InputError for what cannot be read, and UsageError for `base` with a checkpoint.
    """
    if holds_adapter(path):
        adapter = open_adapter(path, alpha, lenient=True)
        try:
            from .inspect_adapter import inspect_adapter

            return inspect_adapter(adapter, base)
        finally:
            adapter.file.close()
    if base is not None:
        raise UsageError("is a checkpoint; --base is for adapters", culprit=os.fspath(path))
    checkpoint = open_checkpoint(path)
    try:
        return _inspect_checkpoint(checkpoint, os.fspath(path))
    finally:
        checkpoint.close()


def _inspect_checkpoint(checkpoint: Checkpoint, path: str) -> CheckpointReport:
    dtypes: Counter[str] = Counter()
    for spec in checkpoint.specs.values():
        dtypes[spec.dtype] += spec.size
    return CheckpointReport(
        path,
        checkpoint.model_type,
        tuple(shard.path.name for shard in checkpoint.shards),
        tuple(_groups(checkpoint.specs)),
        len(checkpoint.specs),
        sum(spec.size for spec in checkpoint.specs.values()),
        sum(spec.nbytes for spec in checkpoint.specs.values()),
        dict(dtypes.most_common()),
        head_is_missing(checkpoint),
        quantization(checkpoint.specs, checkpoint.config),
        {str(key): str(value) for key, value in checkpoint.metadata.items()},
    )


def _groups(specs: Mapping[str, TensorSpec]) -> Iterable[Group]:
    """In the order in which a group's first tensor comes."""
    members: dict[tuple[tuple[str, ...], TensorSpec], list[tuple[int, ...]]] = {}
    for name, spec in specs.items():
        parts, numbers = split_numbers(name)
        members.setdefault((parts, spec), []).append(numbers)
    for (parts, spec), found in members.items():
        count = len(found)
        pattern = "0".join(parts)
        module = pattern.removesuffix(".weight")
        yield Group(
            with_ranges(parts, found),
            spec.dtype,
            spec.shape,
            count,
            count * spec.size,
            count * spec.nbytes,
            role(module, len(spec.shape), spec.dtype in TORCH_FLOATS)
            if pattern.endswith(".weight") or "expert" in pattern
            else "",
        )
