"""Plan a merge that is written in the formats of another model, with newly computed scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.codecs.codec import Quantizer
from ...files.codecs.quantized import CONFIG_FIELDS, QUANTIZERS
from ...files.dtypes import TORCH_FLOATS, TensorSpec
from ...files.folder.side_files import edited_config
from .merge_plan import MergePlan

CALIBRATED = ("gptq", "awq")  # keys of codecs with codes that depend on calibration data

OWN_KEYS = ("_name_or_path",)  # keys of config.json on a model's origin, which stay the base's

# Fields of config.json on how a model was stored or saved, not on its architecture
_OF_STORAGE = frozenset((*CONFIG_FIELDS, "dtype", "torch_dtype", "transformers_version", *OWN_KEYS))


def plan_like(plan: MergePlan, like: Checkpoint, dtype: str | None) -> MergePlan:
    """Return the plan with an output that has the tensors, types and configs of `like`.

    Args:
        dtype: the safetensors name of the type of plain weights, and of weights before they are encoded. None means
            `like`'s type for plain weights, and the base's type before encoding.

    Raises:
        InputError: the base is quantized, the two models differ, or a format needs more than the weights' numbers.
    """
    base = plan.base
    if base.is_gguf is not like.is_gguf:
        kinds = "one is a GGUF file and the other is not"
        raise InputError(f"is stored differently from {base.path}: {kinds}", culprit=str(like.path))
    if base.weights or base.coded:
        name = next(iter(base.weights or base.coded))
        message = f"{base.path} is quantized itself: a merge like {like.path} starts from the original"
        raise InputError(message, culprit=name, remedy="pass the model in 16 or 32 bits as BASE")
    for name, coded in like.coded.items():
        why = f": {coded.fault}" if coded.fault else ""
        raise InputError(f"is {coded.format} in {like.path}, which cannot be written{why}", culprit=name)
    if not like.weights or like.parts or base.parts:
        why = "is a pipeline" if like.parts or base.parts else "has no quantized weights"
        raise InputError(f"{why}, so nothing can be written like it", culprit=str(like.path))
    quantizers = {name: _quantizer(like, name) for name in like.weights}
    _require_same(plan, like)
    plain = {name: source for name, source in plan.sources.items() if name not in quantizers}
    specs = {name: _plain_spec(source.spec, like.stored[name], dtype) for name, source in plain.items()}
    beside: dict[str, str] = {}  # stored tensor -> the weight that it is written with
    for name, quantizer in quantizers.items():
        names = like.weights[name].names
        tensors = {names[role]: spec for role, spec in quantizer.specs().items()}
        specs |= tensors
        beside |= dict.fromkeys(tensors, name)
    files = {name: like.folder / name for name in QUANTIZERS if (like.folder / name).is_file()}
    format_name = (like.shards[0].metadata or {}).get("format", "pt")
    config = like.config or base.config  # a single file may have no config
    origin = {key: base.config[key] for key in OWN_KEYS if key in base.config}
    edits = replace(
        plan.edits,
        specs=specs,
        removed=tuple(name for name in quantizers if name not in beside),
        configs={"": edited_config({**config, **origin}, {}, TORCH_FLOATS[dtype] if dtype else None)},
        files={**plan.edits.files, **files},
        beside=beside,
        metadata={"format": format_name},
    )
    former = {name: base.specs.get(name, plan.sources[name].spec) for name in quantizers}  # an adapter's may be wider
    types = {name: dtype or spec.dtype for name, spec in former.items()}
    return replace(plan, edits=edits, encoded=types, like=like, warnings=(*plan.warnings, *_differences(base, like)))


def _differences(base: Checkpoint, like: Checkpoint) -> tuple[str, ...]:
    """Return notes for the user on fields of the same model that differ between the two configs."""
    if base.config and not like.config:
        return (f"{like.path} has no config, so the output's config does not say what is quantized and how",)
    fields, other = _of_the_model(base.config), _of_the_model(like.config)
    names = sorted(key for key in fields.keys() & other.keys() if fields[key] != other[key])
    return (f"the config is that of {like.path}, which has another {', '.join(names)} than BASE",) if names else ()


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in config.items() if key not in _OF_STORAGE}
    return {key: _of_the_model(value) if isinstance(value, Mapping) else value for key, value in fields.items()}


def _plain_spec(source: TensorSpec, stored: TensorSpec, dtype: str | None) -> TensorSpec:
    """Return the spec of a plain tensor of the output: floats have the requested type, or the model's."""
    if source.dtype not in TORCH_FLOATS:
        return source
    return TensorSpec(dtype or (stored.dtype if stored.dtype in TORCH_FLOATS else source.dtype), source.shape)


def _quantizer(like: Checkpoint, name: str) -> Quantizer:
    parts = like.parts_of(name)
    codec = parts.weight.format
    quantizer = codec.quantizer(parts)
    if quantizer is None:
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
    return quantizer


def _require_same(plan: MergePlan, like: Checkpoint) -> None:
    """Raise InputError if the two models have different weights."""
    sources, other = plan.sources, like.specs
    for name in plan.untied:
        if name not in other:
            message = f"is tied to the embedding in {like.path}, and an adapter changes one of the two"
            raise InputError(message, culprit=name, remedy="merge without --like, or change both with --tied share")
    for left, right, path in ((sources, other, like.path), (other, sources, plan.base.path)):
        lacking = next((name for name in left if name not in right), None)
        if lacking is not None:
            raise InputError(
                f"is not in {path}: the two are of different models, or their names come from different tools",
                culprit=lacking,
                remedy="pass a quantized model of the same base, with the same names",
            )
    for name, source in sources.items():
        if source.spec.shape != other[name].shape:
            message = f"has the shape {source.spec.shape}, but {other[name].shape} in {like.path}"
            raise InputError(message, culprit=name, remedy="pass a quantized model of the same base")
