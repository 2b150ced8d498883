"""Convert a language model's adapter to a format of one model: tensors keep their bytes, scales go into the config.

Only --dtype and another layout of fused modules (`fused_qkv`) change tensors. `plain` plans plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.edited import CarriedTensor
from ...adapters.formats import FORMATS
from ...adapters.formats.content import AdapterContent
from ...adapters.formats.format import Format
from ...adapters.formats.peft import adapter_names
from ...adapters.formats.peft_config import base_mutating_init, config_of, listed_as_parameters
from ...adapters.stacked import factor_dtypes, round_factors, stack_factors
from ...adapters.updates.dora import DoRA
from ...adapters.updates.experts import Experts
from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.replace import ReplaceTensor
from ...adapters.updates.update import UpdateSpec
from ...architectures.families import LAYOUTS
from ...binding.image_modules import SourceModule
from ...errors import InputError, NeedsFlag, UsageError
from ...files.dtypes import TensorSpec, safetensors_name
from ...files.tensor_ref import TensorRef
from .factors import (
    EPSILON,
    NO_LOSS,
    Loss,
    alpha_for_scale,
    cast_factors,
    delta_error,
    dtype_holds,
    is_zero_filler,
    make_factors,
    relative_error,
)
from .fused_qkv import locate_fused, plan_qkv, read_qkv_rows, to_fuse_unlike
from .one_scale import with_one_scale
from .request import (
    ADD_INITIAL,
    AdapterOutput,
    ConvertRequest,
    ModuleConvert,
    alpha_notes,
    cannot_convert,
    low_rank_modules,
)

PT = {"format": "pt"}  # the metadata


def plan_language(
    source: Adapter,
    request: ConvertRequest,
    kept: Mapping[str, UpdateSpec],
    dropped: tuple[str, ...],
    lost: Mapping[str, Loss],
) -> AdapterOutput:
    """Plan the output from the updates that are `kept`; raise NeedsFlag for an init that it could not tell."""
    to = FORMATS[request.to]
    refuse_unsaid_init(source, to)
    if request.layout and base_mutating_init(source.config):
        raise NeedsFlag(
            f"was initialized with {base_mutating_init(source.config)} "
            "from whole matrices of its base, not from their parts",
            culprit=source.name,
            remedy="convert it with --plain --initial ADAPTER first, the adapter as it was before training",
        )
    if not to.can.one_scale:
        return _plan(source, request, kept, dropped, lost)
    one = with_one_scale(source, kept)
    made = _plan(one.adapter, request, one.updates, dropped, one.lost(lost))
    exact = {module for module, error in one.errors.items() if not error}
    rows = (replace(row, how="folded") if row.how == "exact" and row.name in exact else row for row in made.modules)
    return replace(made, modules=tuple(rows), notes=(*made.notes, *to.model_notes(request.model)))


def _plan(
    source: Adapter,
    request: ConvertRequest,
    kept: Mapping[str, UpdateSpec],
    dropped: tuple[str, ...],
    lost: Mapping[str, Loss],
) -> AdapterOutput:
    to, model = FORMATS[request.to], request.model
    if request.layout:
        return _convert_qkv(source, request, kept, dropped, lost)
    if source.format == to.key and to.can.alpha == "config" and request.dtype is None and not dropped:
        named = adapter_names(source.file.specs)
        keys = {to.edited_name(key, named): key for key in source.file.specs}
        specs = {name: source.file.specs[key] for name, key in keys.items()}
        rows = tuple(module_rows(source, request, kept, lost))
        content = AdapterContent(
            specs, lambda name: source.file.tensor(keys[name]), config_from(source, kept), PT, model
        )
        return AdapterOutput(content, rows, (), ())
    specs, load = copy_tensors(source, request, kept)
    rows = tuple(module_rows(source, request, kept, lost, "r" not in source.config.peft and to.can.alpha == "config"))
    content = AdapterContent(specs, load, config_from(source, kept), PT, model)
    return AdapterOutput(content, rows, dropped, alpha_notes(to.key, rows))


def refuse_unsaid_init(source: Adapter, to: Format) -> None:
    """Raise NeedsFlag for an initialization that changed the base, where the format's files cannot say so."""
    init = base_mutating_init(source.config)
    if init and not to.can.starts:
        message = f"was initialized with {init}, which changed the base under it, and {to.key}'s files cannot say so"
        raise NeedsFlag(message, culprit=source.name, remedy=ADD_INITIAL)


def copy_tensors(
    source: Adapter, request: ConvertRequest, kept: Mapping[str, UpdateSpec]
) -> tuple[dict[str, TensorSpec], Callable[[str], Tensor]]:
    """Return specs and loader of the updates' tensors under the output's names, with factors in its dtype."""
    pieces, specs = FORMATS[request.to].names(source, kept), {}
    letters = safetensors_name(request.dtype) if request.dtype else None

    def load(name: str) -> Tensor:
        module, role = pieces[name]
        update = kept[module]
        if role not in "AB":
            key = update.base if role == "base" else update.tensors[role]
            return CarriedTensor(((TensorRef(source.file, str(key)), 1.0),)).load()
        tensor: Tensor = getattr(source.load(update.cls.without_norm(update)), role)
        return round_factors(module, (tensor, tensor), request.dtype)[0] if request.dtype else tensor

    for name, (module, role) in pieces.items():
        base = kept[module].base if role == "base" else None
        spec = source.file.specs[base] if base else kept[module].specs[role]
        specs[name] = TensorSpec(letters, spec.shape) if letters and role in "AB" else spec
    return specs, load


def _convert_qkv(
    source: Adapter,
    request: ConvertRequest,
    kept: Mapping[str, UpdateSpec],
    dropped: tuple[str, ...],
    lost: Mapping[str, Loss],
) -> AdapterOutput:
    """Plan the output with the modules of the other layout split or fused.

    Each is made once for its specs and error, and again when it is written, so that only one is held at a time.
    """
    assert request.layout is not None
    pairs = [SourceModule(m, u, "", m) for m, u in kept.items() if u.cls in (LowRank, DoRA) and len(u.shape) == 2]
    parts, unlike = to_fuse_unlike(pairs) if request.layout == "fused" else ({}, [])
    if unlike:
        what = "would be fused with parts that have no magnitude, and are DoRA or beside it"
        raise cannot_convert(source.name, what, unlike, among=parts)
    targets = plan_qkv(pairs, request.layout, read_qkv_rows(request.base))
    regrouped = {target.path: target for target in targets if target.how != "exact"}
    if not regrouped:
        raise UsageError(
            f"--layout {request.layout} changes nothing: the adapter has no such modules", culprit=source.name
        )
    taken = {part.source.module for target in regrouped.values() for part in target.parts}
    others = {module: update for module, update in kept.items() if module not in taken}
    beside = [m for m in others if m.rpartition(".")[0] in taken or m in regrouped]
    beside += [m for m in kept if m in taken and kept[m].base]
    if beside:
        raise InputError("has another change beside its factors, which no other layout has", culprit=beside[0])
    specs, copy = copy_tensors(source, request, others)
    to = FORMATS[request.to]
    rows, made, last = module_rows(source, request, others, lost, restated=True), {}, dict[str, dict[str, Tensor]]()

    def make(path: str) -> tuple[dict[str, Tensor], ModuleConvert | None]:
        target = regrouped[path]
        updates = [low_rank_modules(source, part.source) for part in target.parts]
        factors = make_factors(target, updates)
        if is_zero_filler(target, updates, factors):
            return {}, None
        round_factors(path, (factors.B, factors.A), request.dtype or factors.B.dtype)
        factors = cast_factors(factors, request.dtype or factors.B.dtype)
        tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
        alpha = alpha_for_scale(factors.scale, rank := len(factors.A))
        sources = tuple(part.source.module for part in target.parts)
        former = sum((lost.get(module, NO_LOSS) for module in sources), NO_LOSS)
        error = math.hypot(delta_error(target, updates, factors, alpha / rank), former.relative)
        row = ModuleConvert(path, sources, "rounded" if error else target.how, rank, alpha, error)
        return {to.tensor_name(path, role): t for role, t in tensors.items() if t is not None}, row

    for path in regrouped:
        tensors, row = make(path)
        for name, tensor in tensors.items():
            specs[name] = TensorSpec(safetensors_name(tensor.dtype), tuple(tensor.shape))
            made[name] = path
        rows += [row] if row else []

    def load(name: str) -> Tensor:
        if name not in made:
            return copy(name)
        if made[name] not in last:
            last.clear()
            last[made[name]] = make(made[name])[0]
        return last[made[name]][name]

    config = _layout_config(source, kept, rows)
    fused = (path for path in (*regrouped, *taken) if (found := locate_fused(path)) and path in found.maker)
    if any(path.endswith(end) for path in fused for family in LAYOUTS.values() for end in family.conv1d):
        config["fan_in_fan_out"] = request.layout == "fused"
    content = AdapterContent(specs, load, config, PT, request.model)
    return AdapterOutput(content, tuple(rows), dropped, alpha_notes(to.key, rows))


def _layout_config(source: Adapter, kept: Mapping[str, UpdateSpec], rows: Sequence[ModuleConvert]) -> dict[str, Any]:
    names = {module: update.target for module, update in kept.items()}
    factored = {names.get(row.name, row.name): (row.rank, row.alpha) for row in rows}
    ours = config_of(factored, factored.keys() & listed_as_parameters(kept.values()))
    former = config_from(source, kept)
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "use_rslora")
    return {**ours, **{key: value for key, value in former.items() if key not in keys}}


def config_from(source: Adapter, kept: Mapping[str, UpdateSpec]) -> dict[str, Any]:
    """Return the fields of PEFT's config: the source's, or if it has none those that its updates tell."""
    if "r" in source.config.peft:
        return {"lora_alpha": source.config.alpha, **source.config.peft}
    both = {u.target: (u.rank, alpha_for_scale(u.scale, u.rank)) for u in kept.values() if u.rank}
    replaced = {module for module, update in kept.items() if update.cls is ReplaceTensor}
    saved = {m for m in replaced if not m.endswith(".bias")}
    biases = {m for m in replaced - saved if m.rpartition(".")[0] not in saved}
    ours = config_of(both, listed_as_parameters(kept.values()))
    base = source.config.base_model
    named: dict[str, Any] = {"base_model_name_or_path": base} if base else {}
    named["use_dora"] = any(update.cls is DoRA for update in kept.values())
    return {**ours, **named, "modules_to_save": sorted(saved) or None, "bias": "all" if biases else "none"}


def module_rows(
    source: Adapter,
    request: ConvertRequest,
    kept: Mapping[str, UpdateSpec],
    lost: Mapping[str, Loss],
    restated: bool = False,
) -> list[ModuleConvert]:
    """Report the modules with factors that are copied, with the error of a narrower dtype.

    Args:
        restated: their scales are written as another alpha / r, which may round.
    """
    rows = []
    for module, update in kept.items():
        if not update.rank:
            continue
        alpha = alpha_for_scale(update.scale, update.rank)
        error = abs(alpha / update.rank / update.scale - 1.0) if restated and update.scale else 0.0
        if request.dtype and not dtype_holds(request.dtype, *factor_dtypes(update)):
            loaded = source.load(update.cls.without_norm(update))
            assert isinstance(loaded, LowRank | Experts)
            A, B = loaded.A.to(request.dtype), loaded.B.to(request.dtype)
            round_factors(module, (loaded.B, loaded.A), request.dtype)
            if not (torch.equal(A.double(), loaded.A.double()) and torch.equal(B.double(), loaded.B.double())):
                error = max(
                    EPSILON, error, relative_error(stack_factors(loaded), stack_factors(replace(loaded, A=A, B=B)))
                )
        error = math.hypot(error, lost.get(module, NO_LOSS).relative)
        rows.append(ModuleConvert(module, (module,), "rounded" if error else "exact", update.rank, alpha, error))
    return rows
