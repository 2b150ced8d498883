"""Adapters whose tensors are computed on request, each module's together with their loss.

A step describes the modules that it changes (`Made`). They are computed when `settle` measures them, and again when
they are written. Each step holds one module's tensors at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TypeVar

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.stacked import stack_factors
from ..adapters.updates.update import UpdateSpec
from ..files.containers.virtual import VirtualFile
from ..files.dtypes import TensorSpec
from ..files.weights_file import WeightsFile
from ..numerics.arrays import Numbers
from ..numerics.forms import Wide
from ..numerics.linalg import adjoint, triangle_of
from .log import NO_LOSS, Change, Log, Loss, of_parts

Tensors = Mapping[str, Numbers]  # by role


@dataclass(frozen=True)
class Made:
    """A module that a step computes.

    Attributes:
        update: its update; the names of its tensors are those in the new file.
        make: computes its tensors by role, and the loss of this step.
        parts: the modules that it is computed from.
        exact: one of EXACT: the step's change, apart from rounding errors.
        numbers: whether its numbers may differ from its parts' (else the specs hold, and no loss needs measuring).
        resized: its change has another size than its part's, as for DoRA, whose change includes the magnitude.
        slices: the rows of its parts that it contains, counted over all experts of a stack; if empty, all rows,
            unchanged. If the last number is None, the rows are in another order here.
    """

    update: UpdateSpec
    make: Callable[[], tuple[Tensors, Loss]]
    parts: tuple[str, ...]
    exact: str = "exact"
    numbers: bool = True
    resized: bool = False
    slices: tuple[tuple[str, int, int, int | None], ...] = ()  # (part, first row, row after the last, first row here)


@dataclass(frozen=True)
class Transformed:
    """An adapter after some steps, with a log of its modules since the adapter was opened."""

    adapter: Adapter
    log: Log
    notes: tuple[str, ...] = ()  # sentences for the user

    def measured(self, module: str) -> bool:
        """Return whether a module's numbers may differ from the stored ones, so that it must be computed."""
        return has_numbers(self.adapter.file, module)


class LazyFile(VirtualFile):
    """Virtual file of an adapter after a step.

    Args:
        source: the file before the step.
        updates: the modules before the step.
        planned: the modules that the step computes, by their new names.
        copied: name of a copied tensor -> its name in the source's file.
        moved: new name of a module with copied tensors -> its name in the source.
    """

    def __init__(
        self,
        source: WeightsFile,
        updates: Mapping[str, UpdateSpec],
        planned: Mapping[str, Made],
        copied: Mapping[str, str],
        moved: Mapping[str, str],
    ) -> None:
        self._source, self._updates = source, updates
        self._planned, self._copied, self._moved = planned, copied, moved
        self._of = {name: (m, role) for m, plan in planned.items() for role, name in plan.update.tensors.items()}
        self._last: tuple[str, Tensors, Loss, bool] | None = None  # and whether its loss is of all steps by rows
        self._losses: dict[str, Loss] = {}  # of modules that were computed
        self.settled = False  # all losses up to here are in the log, and all types are final
        specs: dict[str, TensorSpec] = {new: source.specs[old] for new, old in copied.items()}
        for name, (module, role) in self._of.items():
            specs[name] = planned[module].update.specs[role]
        super().__init__(source, specs, self._numbers, source.metadata or {})

    def _numbers(self, name: str) -> Numbers:
        if name not in self._of:
            return self._source.numbers(self._copied[name])
        module, role = self._of[name]
        return self._making(module)[0][role]

    def _making(self, module: str, by_rows: bool = False) -> tuple[Tensors, Loss]:
        """Return a module's tensors and its loss. Several threads may call this."""
        last = self._last
        if last is None or last[0] != module or (by_rows and not last[3]):
            self._last = last = None  # before the next is computed, so that one is in memory
            planned, known = self._planned[module], self._losses.get(module)
            tensors, step_loss = planned.make()
            if known is None or by_rows:
                former = self._former(planned, by_rows)
                loss = step_loss.after(former) if planned.resized else former.then(step_loss)
                self._losses[module] = loss.summed
            else:
                loss = known
            self._last = last = module, tensors, loss, by_rows or loss.rows is not None or not loss.squared
        return last[1], last[2]

    def _former(self, planned: Made, by_rows: bool) -> Loss:
        """Return the loss of a module's parts; beside parts with losses, one without counts with its size."""
        by_rows = by_rows or any(self._is_share(planned, part) for part in planned.parts)
        losses = {part: loss_of(self._source, part, by_rows) for part in planned.parts}
        if not any(loss.squared for loss in losses.values()):
            return NO_LOSS
        for part, loss in losses.items():
            if not loss.squared and len(losses) > 1:
                update = self._updates[part]
                sizes = squares_of_change(update, stored_tensors(update, self._source))
                losses[part] = Loss.of_rows(np.zeros_like(sizes), sizes)
        if not (by_rows and planned.slices):
            return reduce(add, losses.values()) if len(losses) == 1 else reduce(add, losses.values()).summed
        shares = [losses[part].between(start, stop) for part, start, stop, _ in planned.slices]
        total, rows = reduce(add, shares), np.zeros((2, rows_of(planned.update)))
        for share, (_, start, stop, first) in zip(shares, planned.slices, strict=True):
            if share.rows is None or first is None:
                return total.summed
            rows[:, first : first + stop - start] = share.rows
        return replace(total, rows=rows)

    def _is_share(self, planned: Made, part: str) -> bool:
        """Return whether the module lacks some rows of a part."""
        rows = sum(stop - start for name, start, stop, _ in planned.slices if name == part)
        return bool(planned.slices) and rows < rows_of(self._updates[part])

    def loss(self, module: str, by_rows: bool = False) -> Loss:
        """Return a module's loss by this and all former steps since it was settled, by computing it."""
        if self.settled:
            return NO_LOSS
        if module not in self._planned:
            return loss_of(self._source, self._moved.get(module, module), by_rows)
        if by_rows or module not in self._losses:
            return self._making(module, by_rows)[1]
        return self._losses[module]

    def has_numbers(self, module: str) -> bool:
        """Return whether this or a former step since it was settled may change a module's numbers."""
        if self.settled:
            return False
        planned = self._planned.get(module)
        if planned and planned.numbers:
            return True
        parts = planned.parts if planned else (self._moved.get(module, module),)
        return any(has_numbers(self._source, part) for part in parts)


def loss_of(file: WeightsFile, module: str, by_rows: bool = False) -> Loss:
    """Return the loss of computing a module's tensors: none if they are stored."""
    return file.loss(module, by_rows) if isinstance(file, LazyFile) else NO_LOSS


def has_numbers(file: WeightsFile, module: str) -> bool:
    """Return whether a module's numbers may differ from the stored ones, so that it must be computed."""
    return isinstance(file, LazyFile) and file.has_numbers(module)


def rows_of(update: UpdateSpec) -> int:
    """Return the number of rows of a change, over all experts of a stack."""
    return update.experts * update.specs["B"].shape[0]


def squares_of_change(update: UpdateSpec, tensors: Tensors) -> Wide:
    """Return the squared norms of the rows of a change, (E * out,), without a magnitude."""
    inner = update.cls.without_norm(update)
    return squares_of_rows(*stack_factors(inner.cls.make(inner, tensors)))


def stored_tensors(update: UpdateSpec, file: WeightsFile) -> Tensors:
    """Return a module's tensors by role."""
    return {role: file.numbers(name) for role, name in update.tensors.items()}


def size_of_change(adapter: Adapter, module: str) -> float:
    """Return ||D||^2 of a module's change, without a magnitude."""
    update = adapter.updates[module]
    return float(squares_of_change(update, stored_tensors(update, adapter.file)).sum())


@np.errstate(all="ignore")
def squares_of_rows(B: Wide, A: Wide) -> Wide:
    """Return the squared norms of the rows of B @ A, (E * out,), of stacked factors (E, out, r) and (E, r, in)."""
    return row_squares(B @ adjoint(triangle_of(adjoint(A))))


def row_squares(rows: Wide) -> Wide:
    """Return the squared norm of each row of a stack of matrices, (E * out,)."""
    squares: Wide = np.square(rows).sum(-1).reshape(-1)
    return squares


def change_of_parts(state: Transformed, parts: Sequence[str]) -> Change:
    """Return the log entry of a module computed from these; beside parts with losses, one without counts by size."""
    changes = {part: state.log[part] for part in parts}
    if len(changes) > 1 and any(change.loss.squared for change in changes.values()):
        adapter = state.adapter
        for part, change in changes.items():
            if not change.loss.squared:
                since = loss_of(adapter.file, part)
                size = since.total  # of the change before a loss that is in no log yet
                if not since.squared:
                    size = size_of_change(adapter, part)
                changes[part] = replace(change, loss=Loss(0.0, size))
    return of_parts(changes.values())


S = TypeVar("S", bound=Transformed)


def noted(state: S, *notes: str) -> S:
    """Append sentences for the user."""
    return replace(state, notes=(*state.notes, *notes))


def start(adapter: Adapter) -> Transformed:
    """Return an adapter before the first step."""
    return Transformed(adapter, {module: Change((module,)) for module in adapter.updates})


def only(state: Transformed, modules: Iterable[str]) -> Transformed:
    """Return the adapter with these modules only; if others had factors, PEFT's config no longer names any."""
    source = state.adapter
    adapter = source.only(modules)
    if any(update.rank for module, update in source.updates.items() if module not in adapter.updates):
        adapter = restated(adapter)
    return replace(state, adapter=adapter, log={module: state.log[module] for module in adapter.updates})


def with_scales_of(state: Transformed, written: Adapter) -> Adapter:
    """Return the written adapter with the scales of the steps, which files may lack or round."""
    scales = {module: update.scale for module, update in state.adapter.updates.items() if update.rank}
    updates = {m: replace(u, scale=scales.get(m, u.scale)) for m, u in written.updates.items()}
    return replace(written, updates=updates)


def without_bases(state: Transformed) -> Transformed:
    """Return the adapter without the weights under its factors, which equal the base's."""
    updates = {m: replace(update, base=None) for m, update in state.adapter.updates.items()}
    return replace(state, adapter=replace(state.adapter, updates=updates))


def with_factors(state: S, planned: Mapping[str, Made]) -> S:
    """Return the adapter with new factors for some modules; the names of modules and tensors stay."""
    if not planned:
        return state
    source = state.adapter
    gone = {name for module in planned for name in source.updates[module].tensors.values()}
    copied = {name: name for name in source.file.specs if name not in gone}
    file = LazyFile(source.file, source.updates, planned, copied, {})
    updates = {m: planned[m].update if m in planned else update for m, update in source.updates.items()}
    adapter = replace(source, file=file, updates=updates, config=restated(source).config)
    log = {m: change.then(planned[m].exact) if m in planned else change for m, change in state.log.items()}
    return replace(state, adapter=adapter, log=log)


def with_modules(
    state: Transformed,
    planned: Mapping[str, Made],
    moved: Mapping[str, UpdateSpec],
    keys: Mapping[str, str],
    format: str,
    order: Sequence[str] = (),
) -> Transformed:
    """Return the adapter with other modules; modules neither planned nor moved are removed.

    Args:
        planned: new name of a module -> its plan.
        moved: module that stays -> its update under the new name.
        keys: name of a moved module's tensor -> its name in the former file.
        format: a key of FORMATS, the format of the names.
        order: of the modules; by default moved modules come first.
    """
    source = state.adapter
    back = {update.module: module for module, update in moved.items()}
    file = LazyFile(source.file, source.updates, planned, keys, back)
    updates = {update.module: update for update in moved.values()} | {m: plan.update for m, plan in planned.items()}
    updates = {module: updates[module] for module in order or updates}
    adapter = replace(source, format=format, flattened=False, file=file, updates=updates)
    log = {update.module: state.log[module] for module, update in moved.items()}
    log |= {m: change_of_parts(state, plan.parts).then(plan.exact) for m, plan in planned.items()}
    return replace(state, adapter=restated(adapter), log=log)


# Fields of PEFT's config with the modules that have factors, their ranks and scales
RESTATED = frozenset(
    """alpha_pattern exclude_modules layers_pattern layers_to_transform lora_alpha r rank_pattern target_modules
    target_parameters use_rslora""".split()
)


def restated(adapter: Adapter) -> Adapter:
    """Return the adapter with a config without names, ranks and scales; its updates hold them."""
    peft = {key: value for key, value in adapter.config.peft.items() if key not in RESTATED}
    return replace(adapter, config=replace(adapter.config, peft=peft))
