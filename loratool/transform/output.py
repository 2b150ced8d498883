"""Say what of a settled adapter is written in a format, and what its report says of each module: in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.edited import CarriedTensor
from ..adapters.formats.content import AdapterContent
from ..adapters.formats.format import Format
from ..adapters.formats.peft import Peft, adapter_names, saved_name
from ..adapters.formats.peft_config import config_of, listed_as_parameters
from ..adapters.updates.add import AddDelta
from ..adapters.updates.dora import DoRA
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.update import Update, UpdateSpec
from ..files.dtypes import TensorSpec
from ..files.tensor_ref import TensorRef
from .numbers import Settled, alpha_for_scale, single
from .rows import ModuleConvert

PT = {"format": "pt"}  # the metadata


def is_restated(adapter: Adapter) -> bool:
    """Return whether the config does not say ranks and scales, so that they are written anew."""
    return "r" not in adapter.config.peft


def rows(state: Settled, to: Format) -> tuple[ModuleConvert, ...]:
    """Return the report's row of each module with factors, from the log alone."""
    restated, found = to.can.alpha == "tensor" or (is_restated(state.adapter) and to.can.alpha == "config"), []
    for module, update in state.adapter.updates.items():
        change = state.log[module]
        if update.rank and change.sources:  # zeros that a runtime needs are made of none
            alpha = alpha_for_scale(update.scale, update.rank)
            said = (single(alpha) if to.can.alpha == "tensor" else alpha) / update.rank  # as a reader computes it
            rounded = abs(said / update.scale - 1.0) if restated and update.scale else 0.0
            error = math.hypot(change.loss.relative, rounded)
            how = "rounded" if rounded and not change.loss.relative else change.how
            found.append(ModuleConvert(module, change.sources, how, update.rank, alpha, error))
    return tuple(found)


def content(state: Settled, to: Format, model: Mapping[str, Any]) -> AdapterContent:
    """Return what is written of a language model's adapter."""
    adapter = state.adapter
    pieces = to.names(adapter, adapter.updates)
    copied = _copied(adapter, to, pieces)
    specs: dict[str, TensorSpec] = {}
    for name, (module, role) in pieces.items():
        specs[name] = adapter.updates[module].specs[role]
    specs |= {name: adapter.file.specs[key] for name, key in copied.items()}

    tensor = _Tensors(adapter)

    def load(name: str) -> Tensor:
        return _copy(adapter, copied[name]) if name in copied else tensor(*pieces[name])

    return AdapterContent(specs, load, fields(adapter), PT, model)


def named_content(state: Settled, to: Format, config: Mapping[str, Any], metadata: Mapping[str, str]) -> AdapterContent:
    """Return what is written of an adapter whose modules have the format's names."""
    adapter, specs, of = state.adapter, dict[str, TensorSpec](), dict[str, tuple[str, str]]()
    for module, update in adapter.updates.items():
        for role in to.ends:
            if role in update.specs:
                name = to.tensor_name(module, role)
                specs[name], of[name] = _formed(to, update, role), (module, role)
    alphas = {}
    if to.can.alpha == "tensor":
        alphas = {to.tensor_name(module, "alpha"): module for module in adapter.updates}
        specs |= dict.fromkeys(alphas, TensorSpec("F32", ()))

    tensor = _Tensors(adapter)

    def load(name: str) -> Tensor:
        if name in alphas:
            update = adapter.updates[alphas[name]]
            return torch.tensor(alpha_for_scale(update.scale, update.rank), dtype=torch.float32)
        return tensor(*of[name]).reshape(specs[name].shape)

    return AdapterContent(specs, load, config, metadata)


class _Tensors:
    """Load the factors of a module together, and keep those of the last one."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._last: tuple[str, Update] | None = None

    def __call__(self, module: str, role: str) -> Tensor:
        update = self._adapter.updates[module]
        if not update.rank:
            return _copy(self._adapter, update.tensors[role])
        if self._last is None or self._last[0] != module:
            self._last = None
            self._last = module, self._adapter.load(update)
        loaded = self._last[1]
        tensor: Tensor = getattr(loaded.inner if isinstance(loaded, DoRA) and role in "AB" else loaded, role)
        return tensor


def _copy(adapter: Adapter, name: str) -> Tensor:
    return CarriedTensor(((TensorRef(adapter.file, name), 1.0),)).load()


def _formed(to: Format, update: UpdateSpec, role: str) -> TensorSpec:
    """Return a tensor's spec with the format's shape; magnitudes along the inputs are (1, in) in every format."""
    spec, B = update.specs[role], update.specs["B"].shape
    if role != "magnitude":
        return spec if to.can.kernels else replace(spec, shape=spec.shape[:2])
    if update.along_inputs:
        return replace(spec, shape=(1, spec.size))
    return replace(spec, shape=to.magnitude_shape(B[0], (1,) * (len(B) - 2)))


def _copied(adapter: Adapter, to: Format, pieces: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return the name in the output of each tensor that no role has, with its name in the adapter's file."""
    if to.key != Peft.key:
        return {}
    named = adapter_names(adapter.file.specs)
    return {saved_name(u.base, named): u.base for u in adapter.updates.values() if u.base}


def fields(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of PEFT's config: the adapter's, with those that its updates tell where it says none."""
    peft, updates = adapter.config.peft, adapter.updates
    if not is_restated(adapter):
        return {"lora_alpha": adapter.config.alpha, **peft}
    both = {u.target: (u.rank, alpha_for_scale(u.scale, u.rank)) for u in updates.values() if u.rank}
    replaced = {module for module, update in updates.items() if update.cls is ReplaceTensor}
    saved = {m for m in replaced if not m.endswith(".bias")}
    biases = {m for m in replaced - saved if m.rpartition(".")[0] not in saved}
    base = adapter.config.base_model
    told: dict[str, Any] = {"base_model_name_or_path": base} if base else {}
    told["use_dora"] = any(update.cls is DoRA for update in updates.values())
    told |= {"lora_bias": True} if any(update.cls is AddDelta for update in updates.values()) else {}
    told |= {"modules_to_save": sorted(saved) or None, "bias": "all" if biases else "none"}
    ours = config_of(both, listed_as_parameters(updates.values()))
    return {**ours, **told, **peft, "peft_type": "LORA"}
