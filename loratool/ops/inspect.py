"""`inspect`: what is in a checkpoint or an adapter, from headers and scalar alphas alone.

Names that differ only in numbers are one group, so that a model of 90,000 tensors reads like its config.
Nothing here may import torch or numpy: the command answers before they would have loaded.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..adapter import Adapter
from ..architectures.quantized import quantization
from ..architectures.roles import EMBEDDINGS, HEADS, role
from ..checkpoint import Checkpoint, find_weights, open_checkpoint, open_weights
from ..errors import InputError, UsageError
from ..formats import find_adapter_file, is_adapter, open_adapter
from ..hub import resolve
from ..targets import nearest, resolve_modules
from ..tensorfile import TORCH_FLOATS, TensorSpec

NEAREST_SHOWN = 8  # unbound modules for which a nearest name is searched: a search costs milliseconds


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


@dataclass(frozen=True)
class AdapterGroup:
    """Updates of one kind (a key of UPDATES) whose names differ only in numbers; shape is that of what they change."""

    name: str
    kind: str
    modules: int
    rank: int
    alpha: float | None
    scale: float
    shape: tuple[int, ...]
    dtype: str
    parameters: int


@dataclass(frozen=True)
class Coverage:
    """How an adapter meets a base: modules that bind, and those that do not with the base's nearest names."""

    base: str
    bound: int
    unbound: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class AdapterInspection:
    path: str
    format: str
    groups: tuple[AdapterGroup, ...]
    modules: int
    parameters: int
    nbytes: int
    rank: int | None
    alpha: float | None
    use_rslora: bool
    base_model: str | None
    coverage: Coverage | None
    kind: str = "adapter"


def inspect(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, alpha: float | None = None
) -> CheckpointReport | AdapterInspection:
    """Describe a checkpoint or an adapter, which is told by its tensor names.

    base: the model whose names an adapter is held against. alpha: for an adapter file that does not say its own.
    Raises InputError for what cannot be read, and UsageError for `base` with a checkpoint.
    """
    if _is_adapter(path):
        adapter = open_adapter(path, alpha)
        try:
            return _inspect_adapter(adapter, base)
        finally:
            adapter.file.close()
    if base is not None:
        raise UsageError("is a checkpoint; --base is for adapters", culprit=os.fspath(path))
    checkpoint = open_checkpoint(path)
    try:
        return _inspect_checkpoint(checkpoint, os.fspath(path))
    finally:
        checkpoint.close()


def _is_adapter(path: str | os.PathLike[str]) -> bool:
    found = resolve(path)
    if found.is_dir() and (found / "adapter_config.json").is_file():
        return True
    try:
        weights = find_weights(found)
    except InputError:
        find_adapter_file(found)  # which says what is wrong with the folder as an adapter
        return True
    if weights.suffix == ".json":
        return False
    file = open_weights(weights)
    file.close()
    return is_adapter(file.specs)


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
        _is_tied(checkpoint),
        quantization(checkpoint.specs, checkpoint.config),
        {str(key): str(value) for key, value in checkpoint.metadata.items()},
    )


def _is_tied(checkpoint: Checkpoint) -> bool:
    """A causal model whose file has an embedding and no head, and whose config does not untie them."""
    config = checkpoint.config
    architectures = config.get("architectures")
    first = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    modules = {name.removesuffix(".weight").rpartition(".")[2] for name in checkpoint.specs}
    return (
        first.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        and not modules & HEADS
        and bool(modules & EMBEDDINGS)
        and config.get("tie_word_embeddings") is not False
    )


_NUMBER = re.compile(r"(?<![^.:])\d{1,9}(?![^.:])")  # a part of a name, between dots or colons, that is a number


def _groups(specs: Mapping[str, TensorSpec]) -> Iterable[Group]:
    """In the order in which a group's first tensor comes."""
    members: dict[tuple[tuple[str, ...], TensorSpec], list[tuple[int, ...]]] = {}
    for name, spec in specs.items():
        numbers = tuple(int(part) for part in _NUMBER.findall(name))
        members.setdefault((tuple(_NUMBER.split(name)), spec), []).append(numbers)
    for (parts, spec), found in members.items():
        count = len(found)
        pattern = "0".join(parts)
        module = pattern.removesuffix(".weight")
        yield Group(
            _with_ranges(parts, found),
            spec.dtype,
            spec.shape,
            count,
            count * spec.size,
            count * spec.nbytes,
            role(module, len(spec.shape), spec.dtype in TORCH_FLOATS)
            if pattern.endswith(".weight") or "expert" in pattern
            else "",
        )


def _with_ranges(parts: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    """Between the parts of a name its only number, or `{0..31}` and the like."""
    texts = [_ranges(sorted(set(column))) for column in zip(*numbers, strict=True)]
    return parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 5] -> {0..2,5}"""
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def _inspect_adapter(adapter: Adapter, base: str | os.PathLike[str] | None) -> AdapterInspection:
    number = re.compile(r"(?<![^._])\d{1,9}(?![^._])") if adapter.flattened else _NUMBER
    members: dict[tuple[tuple[str, ...], str, int, float, tuple[int, ...], str, int], list[tuple[int, ...]]] = {}
    for module, update in adapter.updates.items():
        dtype = next(iter(update.specs.values())).dtype
        parameters = sum(spec.size for spec in update.specs.values())
        parts = tuple(number.split(module))
        key = (parts, update.kind, update.rank, update.scale, update.shape, dtype, parameters)
        members.setdefault(key, []).append(tuple(int(part) for part in number.findall(module)))
    groups = []
    for (parts, kind, rank, scale, shape, dtype, parameters), found in members.items():
        alpha = scale * (rank**0.5 if adapter.config.use_rslora else rank) if rank else None
        name, count = _with_ranges(parts, found), len(found)
        groups.append(AdapterGroup(name, kind, count, rank, alpha, scale, shape, dtype, parameters * count))
    ranks = {update.rank for update in adapter.updates.values() if update.rank}
    return AdapterInspection(
        adapter.name,
        adapter.format,
        tuple(groups),
        len(adapter.updates),
        sum(group.parameters for group in groups),
        sum(spec.nbytes for spec in adapter.file.specs.values()),
        ranks.pop() if len(ranks) == 1 else None,
        adapter.config.alpha,
        adapter.config.use_rslora,
        adapter.config.base_model,
        None if base is None else _coverage(adapter, base),
    )


def _coverage(adapter: Adapter, base: str | os.PathLike[str]) -> Coverage:
    checkpoint = open_checkpoint(base)
    try:
        bound, missing = resolve_modules(checkpoint.specs, adapter, checkpoint.model_types)
        near = {
            module: tuple(nearest(module, checkpoint.specs)) if i < NEAREST_SHOWN else ()
            for i, module in enumerate(missing)
        }
        return Coverage(os.fspath(base), len(bound), near)
    finally:
        checkpoint.close()
