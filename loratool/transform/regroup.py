"""Split, fuse or swap the rows of an adapter's modules, as a map of target modules says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.formats.format import Format
from ..adapters.updates.dora import DoRA
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import UpdateSpec
from ..files.dtypes import TensorSpec
from ..numerics.forms import holding
from .factors import ModuleFactors, is_zero_filler, make_factors
from .lazy import Made, Tensors, Transformed, has_numbers, with_modules
from .log import NO_LOSS, Loss
from .module_map import TargetModule
from .numbers import loss_between, natural


def low_rank_modules(adapter: Adapter, module: str) -> ModuleFactors:
    """Load the factors of a module, and DoRA's magnitude."""
    update = adapter.load(adapter.updates[module])
    magnitude = update.magnitude.reshape(-1) if isinstance(update, DoRA) else None
    inner = update.inner if isinstance(update, DoRA) else update
    assert isinstance(inner, LowRank)
    return ModuleFactors(inner.A, inner.B, inner.scale, magnitude)


def regroup(
    state: Transformed,
    targets: Mapping[str, TargetModule],
    stay: Sequence[str] = (),
    to: Format | None = None,
    beside: Mapping[str, Made] | None = None,
) -> Transformed:
    """Return the adapter with the modules of `targets`, computed from those of `state`, and the modules that stay.

    A module that keeps its rows keeps its tensors. Zeros that an earlier fusing filled in for a part are removed.

    Args:
        targets: by their names in the output.
        stay: modules in no target that stay; all others are removed.
        to: the format whose names the tensors get; by default the names follow the source's file.
        beside: modules without factors, computed from others of `state`.
    """
    source, load = state.adapter, _Loader(state.adapter)
    planned, moved, keys = dict[str, Made](), {m: source.updates[m] for m in stay}, dict[str, str]()
    for path, target in targets.items():
        module = target.parts[0].source.module
        update = source.updates[module]
        name_of = partial(to.tensor_name if to else partial(_like, update), path)
        if target.how == "exact" and (to or len(update.specs.get("magnitude", _FLAT).shape) == 1):
            moved[module] = replace(update, module=path, tensors={role: name_of(role) for role in update.tensors})
        elif plan := _plan_module(source, load, target, path, name_of):
            planned[path] = plan
    for module, new in moved.items():
        keys |= {new.tensors[role]: old for role, old in source.updates[module].tensors.items()}
        keys |= {new.base: new.base} if new.base else {}
    names = (*stay, *targets)
    order = [name for name in names if name in planned or name not in targets or targets[name].how == "exact"]
    planned, order = {**planned, **(beside or {})}, [*order, *(beside or ())]
    return with_modules(state, planned, moved, keys, to.key if to else source.format, order)


_FLAT = TensorSpec("F32", (1,))


def _like(source: UpdateSpec, module: str, role: str) -> str:
    """Return the name of a new module's tensor, in the spelling of the source's file."""
    key = source.tensors[role]
    return key.replace(source.module, module) if source.module in key else f"{module}.{role}"


class _Loader:
    """Loader of source modules that caches the last one, for all targets that it is split into."""

    def __init__(self, source: Adapter) -> None:
        self._source = source
        self._last: tuple[str, ModuleFactors] | None = None

    def __call__(self, module: str) -> ModuleFactors:
        last = self._last  # read once, as several threads may call this
        if last is None or last[0] != module:
            self._last = last = module, low_rank_modules(self._source, module)
        return last[1]


def _plan_module(
    source: Adapter, load: _Loader, target: TargetModule, path: str, name_of: Callable[[str], str]
) -> Made | None:
    """Plan a target by computing it once, since its rank and its type depend on its numbers.

    Returns:
        None for zeros that an earlier fusing filled in.
    """
    updates = [load(part.source.module) for part in target.parts]
    factors = make_factors(target, updates)
    if is_zero_filler(target, updates, factors):
        return None
    modules = tuple(dict.fromkeys(part.source.module for part in target.parts))

    def make() -> tuple[Tensors, Loss]:
        updates = [load(part.source.module) for part in target.parts]
        factors = make_factors(target, updates)
        return _tensors(factors), NO_LOSS if factors.exact else _rounding(target, updates, factors)

    specs = {role: TensorSpec(numbers.form.name, numbers.shape) for role, numbers in _tensors(factors).items()}
    if any(
        has_numbers(source.file, module) for module in modules
    ):  # float64 between steps, which is not the output's type
        form = holding(*(natural(source.updates[m]) for m in modules))
        specs |= {role: replace(specs[role], dtype=form.name) for role in "AB"}
    first = source.updates[modules[0]]
    detail = first.detail if first.cls is DoRA else None
    tensors = {role: name_of(role) for role in specs}
    update = replace(first, module=path, tensors=tensors, specs=specs, scale=factors.scale, detail=detail, base=None)
    slices = tuple((part.source.module, part.start, part.stop, part.target_start) for part in target.parts)
    return Made(update, make, modules, target.how, not factors.exact, slices=slices)


@np.errstate(over="ignore")
def _rounding(target: TargetModule, updates: Sequence[ModuleFactors], written: ModuleFactors) -> Loss:
    """Return the rounding error of folding the slices' scales into B."""
    rows = np.zeros((2, target.rows))
    for part, update in zip(target.parts, updates, strict=True):
        place = slice(part.target_start, part.target_start + part.stop - part.start)
        true = update.B.matrix[part.start : part.stop].wide() * update.scale, update.A.matrix.wide()
        rounded = written.B.matrix[place].wide() * written.scale, written.A.matrix.wide()
        row_losses = loss_between(true, rounded).rows
        assert row_losses is not None
        rows[:, place] = row_losses
    squared, total = rows
    return Loss.of_rows(squared, total)


def _tensors(factors: ModuleFactors) -> Tensors:
    tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
    return {role: numbers for role, numbers in tensors.items() if numbers is not None}
