"""Widen the input of an image model for a control adapter: new columns of zeros, to which the adapter's factors add.

A control image is a second part of the latent image's channels, so that the weight of the first layer has more columns.
Defined by diffusers (`loaders/lora_pipeline.py`, FluxLoraLoaderMixin) and ComfyUI (`comfy/lora.py`, `reshape_weight`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...adapters.adapter import Adapter
from ...architectures.components import components_of
from ...architectures.families.table import DENOISERS
from ...architectures.image import ModuleRows, image_modules
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.containers.virtual import with_zero_columns
from ...files.dtypes import TensorSpec
from ...files.tensor_ref import TensorRef

HELD = frozenset({"BF16", "F16", "F32", "F64"})  # types of a weight that can be widened


@dataclass(frozen=True)
class Widened:
    """The weights that get columns of zeros.

    Attributes:
        specs: name -> new type and shape.
        configs: prefix of a component -> its new config.json.
    """

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def sources(self, base: Checkpoint) -> dict[str, TensorRef]:
        """Return the widened weights, as tensors of files that are computed."""
        return {
            name: TensorRef(with_zero_columns(base.shard_of[name], name, spec.shape[1]), name)
            for name, spec in self.specs.items()
        }


def find_widened(base: Checkpoint, adapters: Sequence[Adapter]) -> Widened:
    """Return the weights of a base that have fewer inputs than adapters have for them; none for most bases.

    Raises:
        InputError: the base's config does not say how many inputs its model has.
    """
    specs: dict[str, TensorSpec] = {}
    modules = None
    for adapter in adapters:
        wide = {module: u for module, u in adapter.updates.items() if u.rank and len(u.shape) == 2 and not u.cls.stack}
        if not wide:
            continue
        modules = modules or image_modules({name: spec.shape for name, spec in base.specs.items()})
        if modules.family is None or not modules.family.control_input:
            return Widened()
        inputs = [row for each in DENOISERS for row in modules.find(each, modules.family.control_input)]
        for module, update in wide.items():
            components, path = components_of(module)
            flat = adapter.flattened or "." not in path
            rows = next(filter(None, (modules.find(each, path, flat) for each in components or ("unet",))), ())
            name = _widens(rows, inputs, base.specs, update.shape)
            if name and name not in base.weights and name in base.stored:
                former = specs.get(name, base.specs[name])
                specs[name] = TensorSpec(former.dtype, (former.shape[0], max(former.shape[1], update.shape[1])))
    return Widened(specs, {prefix: config for name in specs for prefix, config in _configs(base, name, specs[name])})


def _widens(
    rows: Sequence[ModuleRows], inputs: Sequence[ModuleRows], specs: Mapping[str, TensorSpec], shape: tuple[int, ...]
) -> str | None:
    """Return the tensor of an update that is one of `inputs` and has fewer columns than the update."""
    if len(rows) != 1 or rows[0] not in inputs:
        return None
    spec = specs[rows[0].tensor]
    fits = len(spec.shape) == 2 and spec.dtype in HELD and spec.shape[0] == shape[0] and spec.shape[1] < shape[1]
    return rows[0].tensor if fits else None


def _configs(base: Checkpoint, name: str, spec: TensorSpec) -> list[tuple[str, dict[str, Any]]]:
    """Return the config.json of the component that has a tensor, with its new number of inputs."""
    part = next((part for part in base.models if name.startswith(part.prefix)), base)
    former = base.specs[name].shape[1]
    if not part.config:
        return []
    if part.config.get("in_channels") != former:
        message = f"has {former} inputs, and in_channels of its config.json is {part.config.get('in_channels')}"
        raise InputError(message, culprit=name, remedy="pass the base without a config.json, or with that of its model")
    # without a number of outputs, the model takes that of its inputs
    outputs = part.config.get("out_channels") or former
    return [(part.prefix, {**part.config, "in_channels": spec.shape[1], "out_channels": outputs})]
