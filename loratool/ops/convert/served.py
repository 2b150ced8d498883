"""Give each module of a runtime the factors that its adapter holds for it: some rows of a module's, one expert's, or 0.

A runtime looks modules up by the names in the base's files, or by those of transformers' class, and has experts one by
one or as a stack. All of it is a choice of the adapter's numbers, so that nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.updates.experts import Experts
from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.update import UpdateSpec
from ...architectures.experts import INTERLEAVED_EXPERTS, TRANSPOSED_EXPERTS
from ...architectures.prefixes import module_path
from ...architectures.renames import canonical
from ...binding.class_names import ClassNames
from ...binding.model_weights import model_weights, weight_of_tensor
from ...binding.placement import Match, place_update
from ...binding.resolve import resolve_modules, strip_wrappers
from ...binding.shared_tensors import bindable
from ...binding.tied_weights import find_tie
from ...errors import InputError
from ...files.checkpoint import Checkpoint
from ...files.dtypes import TORCH_FLOATS, TensorSpec
from .request import cannot_convert

# The parameter of a stack -> the projections whose rows it has, one after the other
_PROJECTIONS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


@dataclass(frozen=True)
class ServedModule:
    """A module of a runtime, and which of an adapter's numbers are its factors."""

    path: str
    update: UpdateSpec | None  # None for zeros
    shape: tuple[int, ...]  # (out, in); (experts, out, in) of a stack
    rank: int
    scale: float
    dtype: torch.dtype
    transposed: bool = False  # an embedding
    expert: int | None = None  # of the update, which is a stack
    turned: bool = False  # the update's matrix is (in, out)
    rows: slice = slice(None)  # of the update's matrix

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.update.module,) if self.update else ()

    @property
    def stack(self) -> bool:
        return len(self.shape) == 3


def zeros(path: str, shape: tuple[int, ...], like: ServedModule) -> ServedModule:
    """Return a module that changes nothing, of the rank and scale of another."""
    return ServedModule(path, None, shape, like.rank, like.scale, like.dtype)


class Factors:
    """Load the factors of modules as (B, A), one update at a time."""

    def __init__(self, source: Adapter) -> None:
        self._source = source
        self._last: tuple[UpdateSpec, LowRank | Experts] | None = None

    def __call__(self, module: ServedModule) -> tuple[Tensor, Tensor]:
        """Return B (out, r) and A (r, in) without the scale; of a stack (E, out, r) and (E, r, in)."""
        experts, (out, width) = module.shape[:-2], module.shape[-2:]
        if module.update is None:
            return (
                torch.zeros(*experts, out, module.rank, dtype=module.dtype),
                torch.zeros(*experts, module.rank, width, dtype=module.dtype),
            )
        if self._last is None or self._last[0] is not module.update:
            loaded = self._source.load(module.update)
            assert isinstance(loaded, LowRank | Experts)
            self._last = module.update, loaded
        found = self._last[1]
        if isinstance(found, Experts) and module.expert is None:
            rank = len(found.A) // found.experts
            B = found.B.view(-1, rank, found.experts).permute(2, 0, 1)
            return B, found.A.view(found.experts, rank, -1)
        pair = found.matrix(module.expert)
        assert isinstance(pair, LowRank)
        B, A = (pair.A.T, pair.B.T) if module.turned else (pair.B, pair.A)
        return B[module.rows], A


def modules_of_class(kept: Mapping[str, UpdateSpec]) -> list[ServedModule]:
    """Return the modules of an adapter that has the names of the class."""
    return [_module(module, update, update.shape) for module, update in kept.items()]


def modules_of_files(source: Adapter, base: Checkpoint, kept: Mapping[str, UpdateSpec]) -> list[ServedModule]:
    """Return the modules by their names in the base's files, with experts one by one.

    Raises:
        NeedsFlag: the base does not have a module.
        InputError: a module's shape is not the base's, or its rows are a part of a tensor, or several.
    """
    specs, _ = bindable(base, find_tie(base))
    matches, absent = resolve_modules(specs, replace(source, updates=dict(kept)), base.configs)
    if absent:
        raise cannot_convert(source.name, f"are not in {base.path}", absent)
    found: list[ServedModule] = []
    for module, each in matches.items():
        update = kept[module]
        turned = False
        for match in each:
            placed = place_update(source, module, 1.0, match, specs, base.model_types, matches)
            turned = update.cls.stack and not placed[0].transposed and _stores_turned(base, match, specs)
            if match.rows:
                raise InputError(
                    f"is rows of {match.name}, and which module of a runtime these are is not known here",
                    culprit=module,
                )
        if update.cls.stack or each[0].expert is not None:
            found += _experts(base, update, each, specs, turned)
        else:
            found.append(_module(module_path(strip_wrappers(each[0].name)), update, update.shape))
    return found


def _stores_turned(base: Checkpoint, match: Match, specs: Mapping[str, TensorSpec]) -> bool:
    return len(specs[match.name].shape) == 3 and not TRANSPOSED_EXPERTS.isdisjoint(base.model_types)


def _module(path: str, update: UpdateSpec, shape: tuple[int, ...]) -> ServedModule:
    dtypes = [getattr(torch, TORCH_FLOATS[update.specs[role].dtype]) for role in "AB"]
    dtype = torch.promote_types(*dtypes)
    return ServedModule(path, update, shape, update.rank, update.scale, dtype, bool(update.transposed))


def _experts(
    base: Checkpoint, update: UpdateSpec, matches: Sequence[Match], specs: Mapping[str, TensorSpec], turned: bool
) -> Iterator[ServedModule]:
    """Yield a module for each projection of each expert that an update of a stack, or of one expert, changes."""
    shape = update.shape[-2:]
    whole = _module("", update, shape[::-1] if turned else shape)
    if len(specs[matches[0].name].shape) == 2:  # single experts in the file, a stack in the adapter
        for match in matches:
            rows = whole.shape[0] // match.parts
            start = match.part * rows
            path = module_path(strip_wrappers(match.name))
            yield _part(whole, path, match.expert, slice(start, start + rows), rows, turned)
        return
    for match in matches:
        owner, last = _stack_name(base, match.name)
        names = _PROJECTIONS.get(last)
        if names is None:
            raise InputError(f"is a stack of experts, and what its rows are is not known: {last}", culprit=match.name)
        names = names[match.part : match.part + 1] if match.parts > 1 else names
        numbers: Iterable[int] = range(update.experts) if match.expert is None else (match.expert,)
        for expert in numbers:
            for i, name in enumerate(names):
                count = whole.shape[0] // len(names)
                interleaved = len(names) > 1 and not INTERLEAVED_EXPERTS.isdisjoint(base.model_types)
                rows_of = slice(i, None, len(names)) if interleaved else slice(i * count, (i + 1) * count)
                of_stack = expert if update.cls.stack else None
                yield _part(whole, f"{owner}.{expert}.{name}", of_stack, rows_of, count, turned)


def _part(whole: ServedModule, path: str, expert: int | None, rows: slice, count: int, turned: bool) -> ServedModule:
    return replace(whole, path=path, expert=expert, rows=rows, shape=(count, whole.shape[1]), turned=turned)


def _stack_name(base: Checkpoint, name: str) -> tuple[str, str]:
    """Return the path of the experts that a tensor stacks, and the parameter's name; canonical where files differ."""
    path = module_path(strip_wrappers(name))
    if ".experts." not in path:
        path = module_path(canonical(name, base.model_types))
    owner, _, last = path.rpartition(".")
    return owner, last


@dataclass(frozen=True)
class Missing:
    """Find the modules of the base that a runtime needs beside those that an adapter has."""

    base: Checkpoint

    def beside(self, there: Mapping[str, ServedModule], group: Sequence[str]) -> Iterator[ServedModule]:
        """Yield zeros for the other modules of groups of which one is there."""
        for path, module in there.items():
            owner, _, last = path.rpartition(".")
            if last in group and ".experts." not in path:
                for name in group:
                    yield from self._zeros(f"{owner}.{name}", module, there)

    def experts(self, there: Mapping[str, ServedModule]) -> Iterator[ServedModule]:
        """Yield zeros for all experts, and all of their matrices, of layers where one is there."""
        groups = {path.partition(".experts.")[0]: module for path, module in there.items() if ".experts." in path}
        for owner, module in groups.items():
            for path, shape in self._shapes_of_experts(owner):
                if path not in there:
                    yield zeros(path, shape, module)

    def stacks(self, there: Mapping[str, ServedModule]) -> Iterator[ServedModule]:
        """Yield zeros for the other stack of layers of which one is there, by the class's names."""
        owners = {path.rpartition(".")[0]: module for path, module in there.items() if module.stack}
        for weight in model_weights(self.base, ClassNames(self.base)) if owners else ():
            owner, _, last = weight.in_model.rpartition(".")
            if owner in owners and last in _PROJECTIONS and weight.in_model not in there:
                yield zeros(weight.in_model, weight.sizes, owners[owner])

    def layers(self, there: Mapping[str, ServedModule]) -> Iterator[ServedModule]:
        """Yield zeros for the modules of other layers that have the names of those that are there."""
        kinds = {_without_layer(path): module for path, module in there.items() if _without_layer(path) != path}
        for name in self.base.specs:
            path = module_path(strip_wrappers(name))
            if (module := kinds.get(_without_layer(path))) and path not in there:
                yield from self._zeros(path, module, there)

    def _zeros(self, path: str, module: ServedModule, there: Mapping[str, ServedModule]) -> Iterator[ServedModule]:
        spec = self.base.specs.get(f"{path}.weight")
        if path not in there and spec and len(spec.shape) == 2:
            yield zeros(path, spec.shape, module)

    def _shapes_of_experts(self, owner: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, spec in self.base.specs.items():
            path = module_path(strip_wrappers(name))
            if len(spec.shape) == 2 and re.fullmatch(rf"{re.escape(owner)}\.experts\.\d+\.\w+", path):
                yield path, spec.shape
            elif len(spec.shape) == 3 and (found := _stack_name(self.base, name))[0] == f"{owner}.experts":
                names, weight = _PROJECTIONS.get(found[1], ()), weight_of_tensor(self.base, name, spec, None)
                experts, out, width = weight.sizes if weight else (0, 0, 0)
                for expert in range(experts):
                    yield from ((f"{owner}.experts.{expert}.{each}", (out // len(names), width)) for each in names)


def _without_layer(path: str) -> str:
    return re.sub(r"\blayers\.\d+\.", "layers.*.", path, count=1)
