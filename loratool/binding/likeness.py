"""Plan a merge that is written as another model is stored: each weight in its format, with scales of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.codecs.codec import CodeFormat, Quantizer
from ..files.dtypes import TORCH_FLOATS, TensorSpec
from ..files.quantized import CONFIG_FIELDS, QUANTIZERS
from ..files.side_files import edited_config
from .merge_plan import MergePlan

CALIBRATED = ("gptq", "awq")


def plan_like(plan: MergePlan, like: Checkpoint, dtype: str | None) -> MergePlan:
    """Return the plan with an output that has the tensors, types and configs of `like`.

    Args:
        dtype: the safetensors name of the type to which weights are rounded before they become codes, and of plain
            weights; None for the base's, and for `like`'s plain weights.

    Raises:
        InputError: the base is quantized itself, the two are of different models, or a format takes more than numbers.
    """
    base = plan.base
    if base.weights or base.coded:
        name = next(iter(base.weights or base.coded))
        message = f"{base.path} is quantized itself: a merge like {like.path} starts from the original"
        raise InputError(message, culprit=name, remedy="pass the model in 16 or 32 bits as BASE")
    for name, coded in like.coded.items():
        why = f": {coded.fault}" if coded.fault else ""
        raise InputError(f"is {coded.format} in {like.path}, which cannot be written{why}", culprit=name)
    if not like.weights or like.parts or base.parts:
        why = "is a pipeline" if like.parts or base.parts else "has no quantized weights"
        raise InputError(f"{why}, so that nothing can be written like it", culprit=str(like.path))
    quantizers = {name: _quantizer(like, name) for name in like.weights}
    _require_same(plan, like)
    specs: dict[str, TensorSpec] = {}
    removed: list[str] = []
    beside: dict[str, str] = {}
    for name, source in plan.sources.items():
        if name in quantizers:
            weight = like.weights[name]
            names = dict(zip(weight.roles, weight.tensors, strict=True))
            made = {names[role]: spec for role, spec in quantizers[name].specs().items()}
            specs |= made
            beside |= dict.fromkeys(made, name)
            removed += [] if name in made else [name]
        else:
            stored = like.stored[name].dtype
            kind = dtype or (stored if stored in TORCH_FLOATS else source.spec.dtype)
            specs[name] = TensorSpec(
                kind if source.spec.dtype in TORCH_FLOATS else source.spec.dtype, source.spec.shape
            )
    files = {name: like.folder / name for name in QUANTIZERS if (like.folder / name).is_file()}
    told = (like.shards[0].metadata or {}).get("format", "pt")
    config = like.config or base.config  # a file without one says nothing of its codes
    origin = {key: base.config[key] for key in ("_name_or_path",) if key in base.config}
    edits = replace(
        plan.edits,
        specs=specs,
        removed=tuple(removed),
        configs={"": edited_config({**config, **origin}, {}, TORCH_FLOATS[dtype] if dtype else None)},
        files={**plan.edits.files, **files},
        beside=beside,
        metadata={"format": told},
    )
    former = {name: base.specs.get(name, plan.sources[name].spec) for name in quantizers}  # an adapter's may be wider
    types = {name: dtype or spec.dtype for name, spec in former.items()}
    return replace(plan, edits=edits, encoded=types, like=like, warnings=(*plan.warnings, *_differences(base, like)))


# Fields of config.json that say how a model was stored or saved, not what it is
_OF_STORAGE = frozenset((*CONFIG_FIELDS, "dtype", "torch_dtype", "transformers_version", "_name_or_path"))


def _differences(base: Checkpoint, like: Checkpoint) -> tuple[str, ...]:
    """Return what a user should know of two configs that say different things of one model."""
    if base.config and not like.config:
        return (f"{like.path} has no config, so that the output's does not say what is quantized, and how",)
    own, other = _of_the_model(base.config), _of_the_model(like.config)
    names = sorted(key for key in own.keys() & other.keys() if own[key] != other[key])
    return (f"the config is that of {like.path}, which has another {', '.join(names)} than BASE",) if names else ()


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _OF_STORAGE}
    return {key: _of_the_model(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _quantizer(like: Checkpoint, name: str) -> Quantizer:
    parts = like.parts_of(name)
    codec = parts.weight.codec
    found = codec.quantizer(parts) if isinstance(codec, CodeFormat) else None
    if found is None:
        why = (
            "whose codes follow from calibration data"
            if codec.key in CALIBRATED
            else "in a layout that --like does not write"
        )
        raise InputError(
            f"is {codec.key}, {why}",
            culprit=name,
            remedy="merge without --like, and quantize the result with the format's own software",
        )
    return found


def _require_same(plan: MergePlan, like: Checkpoint) -> None:
    """Raise InputError for two models that do not have the same weights."""
    own, other = plan.sources, like.specs
    for name in plan.untied:
        if name not in other:
            message = f"is tied to the embedding in {like.path}, and an adapter changes one of the two"
            raise InputError(message, culprit=name, remedy="merge without --like, or change both with --tied share")
    for one, two, path in ((own, other, like.path), (other, own, plan.base.path)):
        lacking = next((name for name in one if name not in two), None)
        if lacking is not None:
            raise InputError(
                f"is not in {path}: the two are no twins, or their names are of different tools",
                culprit=lacking,
                remedy="pass a quantized model of the same base, with the same names",
            )
    for name, source in own.items():
        if source.spec.shape != other[name].shape:
            message = f"has the shape {source.spec.shape}, but {other[name].shape} in {like.path}"
            raise InputError(message, culprit=name, remedy="pass a quantized model of the same base")
