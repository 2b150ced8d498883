"""Write the modules of a runtime as PEFT's folder with its config, with one rank and scale if it supports only one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..adapters.formats import FORMATS
from ..adapters.formats.content import ONLY_FOR
from ..adapters.formats.peft import Peft, wrappers_of
from ..adapters.formats.peft_config import config_of
from ..adapters.placed_factors import lay_A, lay_B
from ..adapters.updates.experts import Experts
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import Stack, UpdateSpec
from ..architectures.runtimes.runtime import Runtime
from ..errors import InputError
from ..files.dtypes import TensorSpec
from ..numerics.arrays import Numbers, recast, rounded_to
from ..numerics.forms import F16, Form, holding
from .factors import common_scale
from .lazy import Made, Tensors, Transformed, noted, with_modules
from .log import NO_LOSS, Loss
from .numbers import Settled, alpha_for_scale, pad, settle, with_scales
from .output import in_format
from .served import Factors, ServedModule

# Fields of PEFT's config that do not describe the factors
_KEPT_FIELDS = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")


def serve(state: Transformed, runtime: Runtime, modules: Mapping[str, ServedModule], dtype: Form | None) -> Settled:
    """Return the output with a runtime's modules, with one rank and one scale if it supports only one.

    Raises:
        NeedsFlag, InputError: a number overflows the output's type, or the runtime's.
    """
    load, wrappers = Factors(state.adapter), wrappers_of([path for path, module in modules.items() if module.stack])
    scales = list(dict.fromkeys(module.scale for module in modules.values() if module.update))
    scale = None if runtime.reads["alpha_pattern"] == "yes" else common_scale(scales)
    ranks: dict[str, int] = {}  # of groups of modules that must have the same rank
    for module in modules.values():
        ranks[_alike(runtime, module.path)] = max(module.rank, ranks.get(_alike(runtime, module.path), 0))
    planned = {path: _plan_module(load, module, wrappers.get(path, path), scale) for path, module in modules.items()}
    state = with_modules(state, planned, {}, {}, Peft.key)
    if scale is not None:
        state = with_scales(state, lambda update: (scale, update.scale / scale))
    output = settle(pad(state, lambda path: ranks[_alike(runtime, path)]), dtype)
    if runtime.half:
        _require_half(runtime, output)
    reordered = any(module.heads for module in modules.values())
    metadata = {ONLY_FOR: runtime.key} if reordered else {}
    written = in_format(output, FORMATS[Peft.key])
    notes = _notes(runtime, modules, output)
    return noted(replace(written, config=_config(runtime, output), metadata=metadata), *notes)


def _alike(runtime: Runtime, path: str) -> str:
    """Return the key of a group of modules that must have one rank: all, or one projection of all experts."""
    return "" if runtime.one_rank else re.sub(r"(?<=\.experts\.)\d+(?=\.)", "", path)


def _plan_module(load: Factors, module: ServedModule, wrapper: str, scale: float | None) -> Made:
    """Return a module with the runtime's rows; each number is the adapter's or 0."""
    (*experts, out, width), end = module.shape, "embedding_" if module.transposed else ""
    count = math.prod(experts) * module.rank
    specs = {"A": TensorSpec(module.form.name, (count, width)), "B": TensorSpec(module.form.name, (out, count))}

    def make() -> tuple[Tensors, Loss]:
        B, A = load(module)
        form = holding(module.form, A.form, B.form)  # float64 between steps
        A, B = recast(A, form), recast(B, form)
        if module.stack:
            A, B = Numbers(lay_A(A.bits), form), Numbers(lay_B(B.bits), form)
        return {"A": A, "B": B}, NO_LOSS

    tensors = {role: f"{wrapper}.lora_{end}{role}" + ("" if end else ".weight") for role in "AB"}
    detail = Stack(experts[0]) if module.stack else None
    cls = Experts if module.stack else LowRank
    written_scale = module.scale if module.update or scale is None else scale
    update = UpdateSpec(cls, module.path, tensors, specs, written_scale, module.transposed or None, detail)
    exact = "split" if module.slices else "exact"
    return Made(update, make, module.sources, exact, numbers=False, slices=module.slices)


@np.errstate(over="ignore")
def _require_half(runtime: Runtime, state: Settled) -> None:
    for module, update in state.adapter.updates.items():
        loaded = state.adapter.load(update)
        assert isinstance(loaded, LowRank | Experts)
        sides = loaded.A.wide(), loaded.B.wide() * loaded.scale
        if not all(rounded_to(side, F16).all_finite() for side in sides):
            message = f"overflows float16, in which {runtime.title} has factors and scales"
            raise InputError(message, culprit=module, remedy="merge the adapter into its base")


def _config(runtime: Runtime, state: Settled) -> dict[str, Any]:
    """Return the fields of PEFT's config; fields that do not describe the factors are the source's."""
    updates = state.adapter.updates
    both = {path: (u.rank, alpha_for_scale(u.scale, u.rank)) for path, u in updates.items()}
    fields = config_of(both, [path for path, update in updates.items() if update.cls.stack])
    for field, of in (("rank_pattern", 0), ("alpha_pattern", 1)):
        fields[field] = _patterns({path: rank_and_alpha[of] for path, rank_and_alpha in both.items()}, fields[field])
    if runtime.targets == "last names":
        fields["target_modules"] = sorted({path.rpartition(".")[2] for path in both})
    former = {key: value for key, value in state.adapter.config.peft.items() if key in _KEPT_FIELDS}
    return {**fields, **former}


def _notes(runtime: Runtime, modules: Mapping[str, ServedModule], state: Settled) -> tuple[str, ...]:
    """Return notes on padded ranks."""
    to = {path: state.adapter.updates[path].rank for path, module in modules.items() if module.update}
    padded = [path for path, rank in to.items() if modules[path].rank < rank]
    if not padded:
        return ()
    alike = "one rank" if runtime.one_rank else "one rank of all experts"
    most = max(to[path] for path in padded)
    return (f"{len(padded)} modules are padded with zeros to rank {most}, as {runtime.title} knows {alike}",)


def _patterns(values: Mapping[str, float], listed: Mapping[str, float]) -> dict[str, float]:
    """Return one expression for all paths that differ only in numbers, if they have one value.

    A runtime may try every expression on every tensor, and a mixture of experts has thousands.
    """
    alike: dict[str, set[float]] = {}
    for path, value in values.items():
        alike.setdefault(_numberless(path), set()).add(value)
    expressions: dict[str, float] = {}
    for path, value in values.items():
        exact_path = f"^{re.escape(path)}"
        if exact_path in listed:
            expressions[f"^{_numberless(path)}" if len(alike[_numberless(path)]) == 1 else exact_path] = value
    return expressions


def _numberless(path: str) -> str:
    """Return an expression that matches a path with any numbers in it."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(path))
