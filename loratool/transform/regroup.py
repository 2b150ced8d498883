"""Give an adapter's modules other rows: split, fuse or swap them, as a map of target modules says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.formats.format import Format
from ..adapters.updates.dora import DoRA
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.update import UpdateSpec
from ..files.dtypes import TensorSpec, safetensors_name
from .factors import ModuleFactors, is_zero_filler, make_factors
from .lazy import Made, Tensors, Transformed, has_numbers, with_modules
from .log import NO_LOSS, Loss
from .module_map import TargetModule
from .numbers import loss_between, natural


def low_rank_modules(adapter: Adapter, module: str) -> ModuleFactors:
    """Load the factors of a module, and the magnitude of a DoRA."""
    update = adapter.load(adapter.updates[module])
    magnitude = update.magnitude.flatten() if isinstance(update, DoRA) else None
    own = update.inner if isinstance(update, DoRA) else update
    assert isinstance(own, LowRank)
    return ModuleFactors(own.A, own.B, own.scale, magnitude)


def regroup(
    state: Transformed,
    targets: Mapping[str, TargetModule],
    stay: Sequence[str] = (),
    to: Format | None = None,
    beside: Mapping[str, Made] | None = None,
) -> Transformed:
    """Return the adapter with the modules of `targets`, made of those of `state`, and those that stay.

    A module that keeps its rows keeps its tensors. Zeros that fusing had filled in for a part are dropped.

    Args:
        targets: by their names in the output.
        stay: modules that are in no target; others are left out.
        to: the format whose names the tensors get; without it they are like those of the file.
        beside: modules without factors, made of others of `state`.
    """
    source, load = state.adapter, _Loader(state.adapter)
    made, moved, keys = dict[str, Made](), {m: source.updates[m] for m in stay}, dict[str, str]()
    for path, target in targets.items():
        module = target.parts[0].source.module
        update = source.updates[module]
        name_of = partial(to.tensor_name if to else partial(_like, update), path)
        if target.how == "exact" and (to or len(update.specs.get("magnitude", _FLAT).shape) == 1):
            moved[module] = replace(update, module=path, tensors={role: name_of(role) for role in update.tensors})
        elif one := _made(source, load, target, path, name_of):
            made[path] = one
    for module, new in moved.items():
        keys |= {new.tensors[role]: old for role, old in source.updates[module].tensors.items()}
        keys |= {new.base: new.base} if new.base else {}
    order = [name for name in (*stay, *targets) if name in made or name not in targets or targets[name].how == "exact"]
    made, order = {**made, **(beside or {})}, [*order, *(beside or ())]
    return with_modules(state, made, moved, keys, to.key if to else source.format, order)


_FLAT = TensorSpec("F32", (1,))


def _like(source: UpdateSpec, module: str, role: str) -> str:
    """Return a new module's name of a tensor, in the manner of the file that it is made from."""
    key = source.tensors[role]
    return key.replace(source.module, module) if source.module in key else f"{module}.{role}"


class _Loader:
    """Load the modules of a target, the last one once for all targets that it is split into."""

    def __init__(self, source: Adapter) -> None:
        self._source = source
        self._last: tuple[str, ModuleFactors] | None = None

    def __call__(self, module: str) -> ModuleFactors:
        last = self._last  # threads may ask for several
        if last is None or last[0] != module:
            self._last = last = module, low_rank_modules(self._source, module)
        return last[1]


def _made(
    source: Adapter, load: _Loader, target: TargetModule, path: str, name_of: Callable[[str], str]
) -> Made | None:
    """Plan a target by making it, since the ranks that reach its rows, and the type that holds them, are its numbers'.

    Returns:
        None for zeros that fusing had filled in.
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

    specs = {role: TensorSpec(safetensors_name(t.dtype), tuple(t.shape)) for role, t in _tensors(factors).items()}
    if any(has_numbers(source.file, module) for module in modules):  # float64 so far, which is no type to keep
        letters = safetensors_name(reduce(torch.promote_types, (natural(source.updates[m]) for m in modules)))
        specs |= {role: replace(specs[role], dtype=letters) for role in "AB"}
    first = source.updates[modules[0]]
    detail = first.detail if first.cls is DoRA else None
    tensors = {role: name_of(role) for role in specs}
    update = replace(first, module=path, tensors=tensors, specs=specs, scale=factors.scale, detail=detail, base=None)
    slices = tuple((part.source.module, part.start, part.stop, part.at) for part in target.parts)
    return Made(update, make, modules, target.how, not factors.exact, slices=slices)


def _rounding(target: TargetModule, updates: Sequence[ModuleFactors], made: ModuleFactors) -> Loss:
    """Return what folding the scales of the slices into B has rounded."""
    rows = torch.zeros(2, target.rows, dtype=torch.float64)
    for part, update in zip(target.parts, updates, strict=True):
        place = slice(part.at, part.at + part.stop - part.start)
        true = update.B.flatten(1)[part.start : part.stop].double() * update.scale, update.A.flatten(1)
        found = loss_between(true, (made.B.flatten(1)[place].double() * made.scale, made.A.flatten(1))).rows
        assert found is not None
        rows[:, place] = found
    squared, total = rows
    return Loss.of_rows(squared, total)


def _tensors(factors: ModuleFactors) -> dict[str, Tensor]:
    tensors = {"A": factors.A, "B": factors.B, "magnitude": factors.magnitude}
    return {role: tensor for role, tensor in tensors.items() if tensor is not None}
