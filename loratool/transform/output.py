"""Name the tensors of a settled adapter in a format, and compute its content and the report's rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.edited import CarriedTensor
from ..adapters.formats import FORMATS
from ..adapters.formats.content import AdapterContent
from ..adapters.formats.format import Format
from ..adapters.formats.peft_config import config_of, listed_as_parameters
from ..adapters.updates.add import AddDelta
from ..adapters.updates.dora import DoRA
from ..adapters.updates.oft import OFT
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.update import Update, UpdateSpec
from ..architectures.families import FAMILIES
from ..architectures.families.lookup import locate
from ..files.dtypes import TensorSpec
from ..files.tensor_ref import TensorRef
from ..numerics.arrays import Numbers, rounded_to
from ..numerics.forms import F32, F64
from ..views.convert import ModuleConvert
from .lazy import Transformed, with_modules
from .numbers import Settled, alpha_for_scale, single


def is_restated(adapter: Adapter) -> bool:
    """Return whether the config lacks ranks and scales, so that they are written from the updates."""
    return "r" not in adapter.config.peft


def in_format(state: Settled, to: Format) -> Settled:
    """Rename the tensors of a language model's adapter to the names in a format's files."""
    source = state.adapter
    names: dict[str, dict[str, str]] = {module: {} for module in source.updates}
    for name, (module, role) in to.names(source, source.updates).items():
        names[module][role] = name
    moved, keys = dict[str, UpdateSpec](), dict[str, str]()
    for module, update in source.updates.items():
        base = names[module].pop("base", None)
        keys |= {name: update.tensors[role] for role, name in names[module].items()}
        keys |= {base: update.base} if base and update.base else {}
        moved[module] = replace(update, tensors=names[module], base=base)
    changed = with_modules(state, {}, moved, keys, to.key)
    return replace(state, adapter=replace(changed.adapter, config=source.config))  # names alone restate nothing


def rows(state: Settled) -> tuple[ModuleConvert, ...]:
    """Return the report's row of each module with factors or rotations, of an image model's also of others."""
    can, report_rows = FORMATS[state.adapter.format].can, []
    restated = can.alpha == "tensor" or (is_restated(state.adapter) and can.alpha == "config")
    for module, update in state.adapter.updates.items():
        change = state.log[module]
        if update.cls is OFT or (state.family and not update.rank):
            report_rows.append(ModuleConvert(module, change.sources, change.how, 0, 0.0, change.loss.relative))
        elif update.rank and change.sources:  # zeros that a runtime needs have no sources
            alpha = alpha_for_scale(update.scale, update.rank)
            written_scale = (single(alpha) if can.alpha == "tensor" else alpha) / update.rank  # as a reader computes it
            rounded = abs(written_scale / update.scale - 1.0) if restated and update.scale else 0.0
            error = math.hypot(change.loss.relative, rounded)
            how = "rounded" if rounded and not change.loss.relative else change.how
            report_rows.append(ModuleConvert(module, change.sources, how, update.rank, alpha, error))
    return tuple(report_rows)


def unused_modules(source: Adapter, state: Transformed) -> tuple[str, ...]:
    """Return the modules of the opened adapter that are not in the output, not even in part."""
    used = {module for change in state.log.values() for module in change.sources}
    return tuple(module for module in source.updates if module not in used)


def content(state: Settled, model: Mapping[str, Any] | None = None) -> AdapterContent:
    """Return the content to write, for an adapter whose tensors have the names of its format.

    Args:
        model: the config.json of the adapter's model, if it is known.
    """
    adapter, to = state.adapter, FORMATS[state.adapter.format]
    specs, of = dict[str, TensorSpec](), dict[str, tuple[str, str]]()
    for module, update in adapter.updates.items():
        for role, name in update.tensors.items():
            specs[name] = _formed(to, update, role) if state.family else update.specs[role]
            of[name] = module, role
    bases = [update.base for update in adapter.updates.values() if update.base]
    specs |= {name: adapter.file.specs[name] for name in bases}
    alphas = {}
    if to.can.alpha == "tensor":
        alphas = {to.tensor_name(module, "alpha"): module for module, update in adapter.updates.items() if update.rank}
        specs |= dict.fromkeys(alphas, TensorSpec("F32", ()))
    reshaped = _reshaped(state, to)
    specs |= dict.fromkeys(reshaped, TensorSpec(INTEGERS.name, (2,)))
    numbers = _Tensors(adapter)

    def load(name: str) -> Numbers:
        if name in reshaped:
            return Numbers(np.array(reshaped[name], INTEGERS.bits_type), INTEGERS)
        if name in alphas:
            update = adapter.updates[alphas[name]]
            value = rounded_to(np.array(alpha_for_scale(update.scale, update.rank)), F32)
        else:
            value = numbers(*of[name]) if name in of else _copy(adapter, name)
        return value.reshape(*specs[name].shape)

    config = fields(adapter) if state.config is None else state.config
    metadata = state.metadata if state.family else {**state.metadata, "format": "pt"}
    return AdapterContent(specs, load, config, metadata, model or {})


INTEGERS = F64._replace(name="I64")  # numbers whose bits are integers


def _reshaped(state: Settled, to: Format) -> dict[str, tuple[int, ...]]:
    """Return the tensor that tells ComfyUI to widen the input of an image model for a control adapter, with the shape.

    It is empty for an adapter of a model without a control image.
    """
    family = FAMILIES.get(state.family or "")
    located = locate(family, family.control_input) if family and family.control_input else None
    if not family or not located or "reshape" not in to.value_ends:
        return {}
    (path,) = located.names(to.naming(family.key))
    module = to.module_name("unet", path, family.key)
    update = state.adapter.updates.get(module)
    if not update or not update.rank or update.shape[1] <= family.control_columns:
        return {}
    return {f"{module}.{to.value_ends['reshape']}": update.shape}


class _Tensors:
    """Loader of numbers that loads the factors of a module together, and caches the last module."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._last: tuple[str, Update] | None = None

    def __call__(self, module: str, role: str) -> Numbers:
        update = self._adapter.updates[module]
        if not update.rank:
            return _copy(self._adapter, update.tensors[role])
        last = self._last  # read once, as several threads may call this
        if last is None or last[0] != module:
            self._last = last = None
            self._last = last = module, self._adapter.load(update)
        loaded = last[1]
        numbers: Numbers = getattr(loaded.inner if isinstance(loaded, DoRA) and role in "AB" else loaded, role)
        return numbers


def _copy(adapter: Adapter, name: str) -> Numbers:
    return CarriedTensor(((TensorRef(adapter.file, name), 1.0),)).load()


def _formed(to: Format, update: UpdateSpec, role: str) -> TensorSpec:
    """Return a tensor's spec with the format's shape; magnitudes along the inputs are (1, in) in every image format."""
    spec = update.specs[role]
    if role != "magnitude":
        return spec if to.can.kernels else replace(spec, shape=spec.shape[:2])
    if update.along_inputs:
        return replace(spec, shape=(1, spec.size))
    B = update.specs["B"].shape
    return replace(spec, shape=to.magnitude_shape(B[0], (1,) * (len(B) - 2)))


def fields(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of PEFT's config: the adapter's, and those that its updates determine where it has none."""
    peft, updates = adapter.config.peft, adapter.updates
    if not is_restated(adapter):
        return {"lora_alpha": adapter.config.alpha, **peft}
    both = {u.target: (u.rank, alpha_for_scale(u.scale, u.rank)) for u in updates.values() if u.rank}
    replaced = {module for module, update in updates.items() if update.cls is ReplaceTensor}
    saved = {m for m in replaced if not m.endswith(".bias")}
    biases = {m for m in replaced - saved if m.rpartition(".")[0] not in saved}
    base = adapter.config.base_model
    from_updates: dict[str, Any] = {"base_model_name_or_path": base} if base else {}
    from_updates["use_dora"] = any(update.cls is DoRA for update in updates.values())
    from_updates |= {"lora_bias": True} if any(update.cls is AddDelta for update in updates.values()) else {}
    from_updates |= {"modules_to_save": sorted(saved) or None, "bias": "all" if biases else "none"}
    ours = config_of(both, listed_as_parameters(updates.values()))
    return {**ours, **from_updates, **peft, "peft_type": "LORA"}
