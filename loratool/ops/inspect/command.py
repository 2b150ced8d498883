"""`inspect` describes what is in a checkpoint, from headers alone; for an adapter it calls `inspect_adapter`.

Names that differ only in numbers are one group, so that a model of 90,000 tensors reads like its config.
Nothing here may import torch or numpy: the command answers before they would have loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.formats import holds_adapter, open_adapter, open_other
from ...adapters.formats.other_methods import OTHER_METHODS, OUTCOMES, OtherMethod, describe_bottlenecks, find_marks
from ...architectures.numbered_names import split_numbers, with_ranges
from ...architectures.roles import weight_role
from ...binding.tied_weights import head_is_missing
from ...errors import UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.dtypes import FLOATS, TensorSpec
from ...files.weights_file import WeightsFile
from ..machine import require_ieee

if TYPE_CHECKING:
    from .adapter import AdapterInspection


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype and shape whose names differ only in numbers: `model.layers.{0..31}.mlp.up_proj.weight`.

    Attributes:
        tensors: how many there are.
        parameters, nbytes: of all of them.
        role: what kind of LoRA target they are, empty for none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: int
    parameters: int
    nbytes: int
    role: str


@dataclass(frozen=True)
class CheckpointReport:
    """The result of `inspect` of a checkpoint.

    Attributes:
        parameters: weights, however they are stored: of a quantized one its codes stand for all that there are, scales
            for none.
        dtypes: dtype -> parameters.
        tied: whether the file has no head because it is the embedding.
        quantization: the method's name.
        uncounted: quantized weights of which headers do not tell how many numbers they are.
    """

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
    uncounted: int
    metadata: Mapping[str, str]
    kind: str = "checkpoint"


@dataclass(frozen=True)
class MethodReport:
    """The result of `inspect` of what another method than LoRA left.

    Attributes:
        method: a key of OTHER_METHODS, or what the config says.
        outcome: a key of OUTCOMES.
        verdict: the outcome as a sentence, with its reason and what to do.
    """

    path: str
    method: str
    title: str
    outcome: str
    verdict: str
    groups: tuple[Group, ...]
    tensors: int
    parameters: int
    nbytes: int
    base_model: str | None
    notes: tuple[str, ...]
    kind: str = "method"


@require_ieee
def inspect(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, alpha: float | None = None
) -> CheckpointReport | AdapterInspection | MethodReport:
    """Describe a checkpoint, an adapter or the output of another method, whichever the tensors' names tell.

    Args:
        base: the model that an adapter's names and shapes are compared with.
        alpha: for an adapter file without an alpha.

    Raises:
        InputError: the files cannot be read.
        UsageError: `base` or `alpha` is given, and the files are no LoRA.
    """
    if holds_adapter(path):
        if other := open_other(path):
            file, fields, key, method = other
            file.close()
            _refuse_options(path, f"holds {method.title}", base, alpha)
            return _inspect_method(os.fspath(path), file, fields, key, method)
        adapter = open_adapter(path, alpha, lenient=True)
        try:
            from .adapter import inspect_adapter

            return inspect_adapter(adapter, base)
        finally:
            adapter.file.close()
    checkpoint = open_checkpoint(path)
    try:
        _refuse_options(path, "is a checkpoint", base, None)
        return _inspect_checkpoint(checkpoint, os.fspath(path))
    finally:
        checkpoint.close()


def _refuse_options(path: str | os.PathLike[str], what: str, base: object, alpha: object) -> None:
    for option, value in (("--base", base), ("--alpha", alpha)):
        if value is not None:
            raise UsageError(f"{what}; {option} is for adapters", culprit=os.fspath(path))


def _inspect_method(
    path: str, file: WeightsFile, fields: Mapping[str, Any], key: str, method: OtherMethod
) -> MethodReport:
    base = fields.get("base_model_name_or_path") or fields.get("model_name")
    places = {(file.begin[name], spec): name for name, spec in reversed(file.specs.items())}
    specs = {n: spec for n, spec in file.specs.items() if not spec.size or places[file.begin[n], spec] == n}
    notes = [describe_bottlenecks(file.specs)] if key == "BOTTLENECK" else []
    if len(specs) < len(file.specs):  # a torch file's names can share their bytes
        notes.append(f"{len(file.specs) - len(specs)} more names are of these tensors")
    _, *more = [*find_marks(file.specs)] or [key]  # `method` is the first one's
    notes += [f"it holds tensors of {OTHER_METHODS[kind].title} too" for kind in more]
    verdict = f"{OUTCOMES[method.outcome]}: {method.title}, which {method.reason}"
    return MethodReport(
        path,
        key,
        method.title,
        method.outcome,
        f"{verdict}; {method.remedy}" if method.remedy else verdict,
        tuple(_groups(specs)),
        len(specs),
        sum(spec.size for spec in specs.values()),
        sum(spec.nbytes for spec in specs.values()),
        base if isinstance(base, str) and base else None,
        tuple(note for note in notes if note),
    )


def _inspect_checkpoint(checkpoint: Checkpoint, path: str) -> CheckpointReport:
    keys = {name: weight.codec.key for name, weight in checkpoint.weights.items()}
    specs = {name: TensorSpec(keys.get(name, spec.dtype), spec.shape) for name, spec in checkpoint.specs.items()}
    sizes = {name: spec.size for name, spec in specs.items()}
    nbytes = {name: checkpoint.nbytes_of(name) for name in specs}
    codes = {coded.tensors[0]: weight for weight, coded in checkpoint.coded.items()} | {name: name for name in keys}
    for coded in checkpoint.coded.values():
        sizes |= dict.fromkeys(coded.tensors, 0) | {coded.tensors[0]: coded.size or 0}
    dtypes: Counter[str] = Counter()
    for name, spec in specs.items():
        dtypes[spec.dtype] += sizes[name]
    return CheckpointReport(
        path,
        checkpoint.model_type,
        tuple(shard.place for shard in checkpoint.shards),
        tuple(_groups(specs, sizes, nbytes, {name: codes.get(name, "") for name in (*checkpoint.formats, *keys)})),
        len(specs),
        sum(sizes.values()),
        sum(nbytes.values()),
        {dtype: size for dtype, size in dtypes.most_common() if size or not checkpoint.coded},
        head_is_missing(checkpoint),
        checkpoint.quantized,
        sum(coded.size is None for coded in checkpoint.coded.values()),
        {str(key): str(value) for key, value in checkpoint.metadata.items()},
    )


def _groups(
    specs: Mapping[str, TensorSpec],
    sizes: Mapping[str, int] | None = None,
    nbytes: Mapping[str, int] | None = None,
    weights: Mapping[str, str] | None = None,
) -> Iterable[Group]:
    """Group tensors whose names differ only in numbers, in the order in which a group's first one comes.

    Args:
        sizes: how many weights each stands for, where that is not its own size.
        nbytes: in which each is stored, where that is not its own.
        weights: for a tensor that belongs to a quantized weight, the weight's name if it is the codes, else "".
    """
    members: dict[tuple[tuple[str, ...], TensorSpec, int, int, str | None], list[tuple[int, ...]]] = {}
    for name, spec in specs.items():
        parts, numbers = split_numbers(name)
        size, stored = sizes[name] if sizes else spec.size, nbytes[name] if nbytes else spec.nbytes
        weight = weights.get(name) if weights else None
        weight = weight and "0".join(split_numbers(weight)[0])
        members.setdefault((parts, spec, size, stored, weight), []).append(numbers)
    for (parts, spec, size, stored, weight), found in members.items():
        count = len(found)
        yield Group(
            with_ranges(parts, found),
            spec.dtype,
            spec.shape,
            count,
            count * size,
            count * stored,
            _target("0".join(parts), spec) if weight is None else _coded_target(weight, spec),
        )


def _target(name: str, spec: TensorSpec) -> str:
    if not name.endswith(".weight") and ("expert" not in name or name.endswith("bias")):
        return ""
    return weight_role(name.removesuffix(".weight"), len(spec.shape), spec.dtype in FLOATS)


def _coded_target(weight: str, spec: TensorSpec) -> str:
    """Return what a quantized weight is for; its codes may have other dimensions than it has."""
    return weight_role(weight.removesuffix(".weight"), min(max(len(spec.shape), 2), 3), True) if weight else ""
