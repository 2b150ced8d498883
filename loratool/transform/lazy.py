"""Adapters whose tensors are made when they are asked for, each module's together with what making them loses.

A step describes the modules that it changes (`Made`). Nothing is computed before `settle` measures them, and again when
they are written; of each step one module's tensors are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.stacked import stack_factors
from ..adapters.updates.update import UpdateSpec
from ..files.dtypes import TensorSpec
from ..files.virtual import VirtualFile
from ..files.weights_file import WeightsFile
from ..numerics.factored_svd import core
from .log import NO_LOSS, Change, Log, Loss, of_parts

Tensors = Mapping[str, Tensor]  # role -> tensor


@dataclass(frozen=True)
class Made:
    """A module as a step makes it.

    Attributes:
        update: what headers say of it; the names of its tensors are those in the new file.
        make: makes its tensors by role, and says what of the modules it is made of is lost by that.
        parts: the modules that it is made of.
        exact: one of EXACT: the change that loses nothing.
        numbers: whether the numbers may be others than its parts' (else the specs hold, and nothing need be measured).
    """

    update: UpdateSpec
    make: Callable[[], tuple[Tensors, Loss]]
    parts: tuple[str, ...]
    exact: str = "exact"
    numbers: bool = True


@dataclass(frozen=True)
class Transformed:
    """An adapter, and what became of its modules on the way from the one that was opened."""

    adapter: Adapter
    log: Log
    notes: tuple[str, ...] = ()  # sentences for the user

    def measured(self, module: str) -> bool:
        """Return whether its numbers may be others than the stored ones, so that it has to be made to know them."""
        file = self.adapter.file
        return isinstance(file, LazyFile) and file.has_numbers(module)


class LazyFile(VirtualFile):
    """The file of an adapter that a step makes of another one's.

    Args:
        source: the file before the step.
        updates: the modules before the step.
        made: the modules that the step makes, by their new names.
        copied: name of a tensor that stays -> its name in the source's file.
        moved: new name of a module whose tensors stay -> its name in the source.
    """

    def __init__(
        self,
        source: WeightsFile,
        updates: Mapping[str, UpdateSpec],
        made: Mapping[str, Made],
        copied: Mapping[str, str],
        moved: Mapping[str, str],
    ) -> None:
        self._source, self._updates = source, updates
        self._made, self._copied, self._moved = made, copied, moved
        self._of = {name: (m, role) for m, each in made.items() for role, name in each.update.tensors.items()}
        self._last: tuple[str, Tensors] | None = None
        self._losses: dict[str, Loss] = {}  # of modules that were made
        self.settled = False  # all that was lost up to here is in the log, and no type is open
        specs: dict[str, TensorSpec] = {new: source.specs[old] for new, old in copied.items()}
        for name, (module, role) in self._of.items():
            specs[name] = made[module].update.specs[role]
        super().__init__(source, specs, self._tensor, source.metadata or {})

    def _tensor(self, name: str) -> Tensor:
        if name not in self._of:
            return self._source.tensor(self._copied[name])
        module, role = self._of[name]
        return self._tensors(module)[role]

    def _tensors(self, module: str) -> Tensors:
        if self._last is None or self._last[0] != module:
            self._last = None  # before the next is made, so that one is held
            each = self._made[module]
            tensors, own = each.make()
            former = sum((self._former(part, len(each.parts) > 1) for part in each.parts), NO_LOSS)
            self._losses[module] = former.then(own)
            self._last = module, tensors
        return self._last[1]

    def _former(self, part: str, beside: bool) -> Loss:
        """Return what was lost of a part; `beside` others the size of one that lost nothing counts."""
        found, update = loss_of(self._source, part), self._updates[part]
        if found.total or not beside or not isinstance(self._source, LazyFile):
            return found
        tensors = {role: self._source.tensor(name) for role, name in update.tensors.items()}
        return Loss(0.0, size_of_change(update, tensors))

    def loss(self, module: str) -> Loss:
        """Return what this and all former steps lose of a module since it was settled, by making it."""
        if self.settled:
            return NO_LOSS
        if module in self._made:
            if module not in self._losses:
                self._tensors(module)
            return self._losses[module]
        return loss_of(self._source, self._moved.get(module, module))

    def has_numbers(self, module: str) -> bool:
        """Return whether this or a former step, since it was settled, may change its numbers."""
        if self.settled:
            return False
        source, made = self._source, self._made.get(module)
        if made and made.numbers:
            return True
        parts = made.parts if made else (self._moved.get(module, module),)
        return isinstance(source, LazyFile) and any(source.has_numbers(part) for part in parts)


def loss_of(file: WeightsFile, module: str) -> Loss:
    """Return what making a module's tensors loses: nothing if they are stored."""
    return file.loss(module) if isinstance(file, LazyFile) else NO_LOSS


def size_of_change(update: UpdateSpec, tensors: Tensors) -> float:
    """Return ||D||^2 of factors, without a magnitude."""
    inner = update.cls.without_norm(update)
    return float(torch.linalg.vector_norm(core(*stack_factors(inner.cls.make(inner, tensors))))) ** 2


def start(adapter: Adapter) -> Transformed:
    """Return an adapter before the first step."""
    return Transformed(adapter, {module: Change((module,)) for module in adapter.updates})


def with_factors(state: Transformed, made: Mapping[str, Made]) -> Transformed:
    """Return the adapter with other factors of some of its modules, which keep their names and tensors' names."""
    if not made:
        return state
    source = state.adapter
    gone = {name for module in made for name in source.updates[module].tensors.values()}
    copied = {name: name for name in source.file.specs if name not in gone}
    file = LazyFile(source.file, source.updates, made, copied, {})
    updates = {m: made[m].update if m in made else update for m, update in source.updates.items()}
    adapter = replace(source, file=file, updates=updates, config=restated(source).config)
    log = {m: each.then(made[m].exact) if m in made else each for m, each in state.log.items()}
    return replace(state, adapter=adapter, log=log)


def with_modules(
    state: Transformed,
    made: Mapping[str, Made],
    moved: Mapping[str, UpdateSpec],
    keys: Mapping[str, str],
    format: str,
    order: Sequence[str] = (),
) -> Transformed:
    """Return the adapter with other modules; those that are neither made nor moved are left out.

    Args:
        made: new name of a module -> it.
        moved: module that stays -> its update under the new name.
        keys: name of a tensor of those -> its name in the former file.
        format: a key of FORMATS, whose names these are.
        order: of the modules; without it those that stay come first.
    """
    source = state.adapter
    back = {update.module: module for module, update in moved.items()}
    file = LazyFile(source.file, source.updates, made, keys, back)
    updates = {update.module: update for update in moved.values()} | {m: each.update for m, each in made.items()}
    updates = {module: updates[module] for module in order or updates}
    adapter = replace(source, format=format, flattened=False, file=file, updates=updates)
    log = {update.module: state.log[module] for module, update in moved.items()}
    log |= {m: of_parts(state.log[part] for part in each.parts).then(each.exact) for m, each in made.items()}
    return replace(state, adapter=restated(adapter), log=log)


# Fields of PEFT's config that say which modules have factors, and their ranks and scales
RESTATED = frozenset(
    """alpha_pattern exclude_modules layers_pattern layers_to_transform lora_alpha r rank_pattern target_modules
    target_parameters use_rslora""".split()
)


def restated(adapter: Adapter) -> Adapter:
    """Return the adapter with a config that does not say names, ranks and scales, which its updates do."""
    peft = {key: value for key, value in adapter.config.peft.items() if key not in RESTATED}
    return replace(adapter, config=replace(adapter.config, peft=peft))
