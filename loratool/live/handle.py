"""`merge`, `merged` and their handle: adapters in the tensors of a model, and the way back."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import nn

from ..binding.merge.merge_plan import MergePlan, plan_merge
from ..binding.modules.beside import reading_weights
from ..binding.modules.placement import Placement
from ..binding.modules.selection import Selection
from ..commands import calls
from ..commands.adapter_requests import Adapters, parse_adapters
from ..commands.arguments import ArgumentType, StrPath, checked, parse_words
from ..commands.calls import log_warnings
from ..commands.inputs import WeightedAdapter, open_adapters, require_residual_base, subtract_initial
from ..commands.machine import require_ieee
from ..commands.merge.report import build_report
from ..durable.interrupts import held_back
from ..errors import InputError, NeedsFlag, UsageError, brief
from ..files.checkpoint import Checkpoint
from ..files.dtypes import FLOATS
from ..files.output.output import Output
from ..files.tensor_ref import require_finite
from ..streaming.parallel import worker_count
from ..views.merge import MergeReport
from .blocks import CHECKS, MOVING, Merged, Mover
from .memory_files import KeptFile, MemoryFile, checkpoint_of
from .tensors import LiveTensors, Model, find_tensors, refuse_overlaps, refuse_unchangeable, span_of

WITH_FILES = "merge the files with loratool.merge, and load the result"

_merges: list[weakref.ref[LiveMerge]] = []  # those in tensors now, in order


@dataclass(frozen=True)
class Options:
    """How adapters are read and bound, as the arguments of `merge` say."""

    target: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    layers: str | Iterable[int] | None = None
    drop: str | Sequence[str] = ()
    alpha: float | None = None
    tied: Literal["refuse", "share"] = "refuse"
    initial: str | os.PathLike[str] | None = None
    residual_base: bool = False


class LiveMerge:
    """Adapters that are merged into the tensors of a model. Make one with `merge`.

    Attributes:
        report: of the last merge or swap: `kept`, and a row for each tensor.
    """

    report: MergeReport

    def __init__(self, model: Model, options: Options, check: str, workers: int | None) -> None:
        self._model, self._options = model, options
        self._tensors = find_tensors(model)
        self._base = checkpoint_of(self._tensors)
        self._places = self._tensors.places()
        (file,) = self._base.shards
        assert isinstance(file, MemoryFile)
        self._file = file
        self._mover = Mover(file, CHECKS[check], workers or worker_count())
        self._merged: Merged | None = None
        self._kept: tuple[KeptFile, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of memory that it holds: the records, and the factors of the adapters."""
        return (self._merged.nbytes if self._merged else 0) + sum(file.kept_nbytes for file in self._kept)

    @property
    def is_merged(self) -> bool:
        """Whether the adapters are in the tensors: not after `unmerge`."""
        return self._merged is not None

    def __enter__(self) -> LiveMerge:
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_merged:
            self.unmerge()

    def unmerge(self) -> None:
        """Restore the weights as they were before the merge, bit for bit.

        Raises:
            InputError: the weights were changed since, or a later merge is in the same tensors; nothing is changed.
            UsageError: there is nothing to unmerge.
        """
        require_ieee(self._unmerge)()

    def swap(self, adapters: Adapters) -> None:
        """Take the adapters out and merge others: the bits of a new merge, in one pass over the weights.

        Args:
            adapters: as those of `merge`, whose other arguments hold here too.

        Raises:
            UsageError, InputError, NeedsFlag: as `merge` and `unmerge`; the former adapters are then still merged.
        """
        require_ieee(self._swap)(adapters)

    def _merge(self, adapters: Adapters) -> None:
        with MOVING, ExitStack() as opened:
            new, kept = self._planned(adapters, opened)
            self._settle(new, kept, self._bring(None, new))

    def _unmerge(self) -> None:
        with MOVING:
            self._mover.move(self._current(), None)
            self._settle(None, (), self.report)

    def _swap(self, adapters: Adapters) -> None:
        with MOVING, ExitStack() as opened:
            old = self._current()
            self._file.is_read = False
            new, kept = self._planned(adapters, opened)
            if not self._file.is_read:
                self._settle(new, kept, self._bring(old, new))
                return
            self._mover.move(old, None)  # the plan depends on the base's numbers
            try:
                new, kept = self._planned(adapters, opened)
                report = self._bring(None, new)
            except BaseException:
                with held_back():
                    self._mover.move(None, _unrecorded(old))
                raise
            self._settle(new, kept, report)

    def _bring(self, old: Merged | None, new: Merged) -> MergeReport:
        """Bring the tensors to another merge, and return its report. After an error they are as before."""
        self._mover.move(old, new)
        try:
            return _report(new, self._tensors.title)
        except BaseException:
            with held_back():
                self._mover.move(new, _unrecorded(old) if old else None)
            raise

    def _current(self) -> Merged:
        """Return the merge in the tensors; raise an error if it is not there, or not the last."""
        if self._merged is None:
            raise UsageError("is not merged any more", culprit=self._tensors.title)
        if find_tensors(self._model).places() != self._places:
            what = "has other tensors than when it was merged: it was moved, cast or loaded since"
            raise InputError(what, culprit=self._tensors.title, remedy="unmerge before that")
        for later in reversed(_active()):
            if later is self:
                break
            if name := _first_shared(self._changed_tensors(), later._changed_tensors()):
                others = " and ".join(adapter.name for adapter in later.report.adapters)
                what = f"{others} was merged into it later"
                raise InputError(what, culprit=name, remedy="unmerge that first")
        return self._merged

    def _changed_tensors(self) -> dict[str, tuple[str, int, int]]:
        """Return the memory of each tensor that is merged."""
        names = self._merged.changed if self._merged else ()
        return {name: span_of(self._tensors.named[name]) for name in names}

    def _settle(self, merged: Merged | None, kept: tuple[KeptFile, ...], report: MergeReport) -> None:
        self._merged, self._kept, self.report = merged, kept, report
        _merges[:] = [weakref.ref(each) for each in _active() if each is not self]
        if merged:
            _merges.append(weakref.ref(self))

    def _planned(self, adapters: Adapters, opened: ExitStack) -> tuple[Merged, tuple[KeptFile, ...]]:
        """Return the merge of adapters, and their files with what it needs in memory."""
        options = self._options
        requests = parse_adapters(adapters, parse_words(options.drop))
        loaded = open_adapters(requests, options.alpha, opened, base=self._base)
        weighted: WeightedAdapter = tuple(zip(loaded, (each.weight for each in requests), strict=True))
        weighted = self._on_the_base(weighted, opened)
        files = [KeptFile(adapter.file) for adapter, _ in weighted]
        weighted = tuple((replace(a, file=file), w) for (a, w), file in zip(weighted, files, strict=True))
        plan = self._plan(weighted, Selection.parse(options.target, options.exclude, options.layers))
        _refuse_other_tensors(plan, self._tensors)
        for file in files:
            file.keep(_needed(plan, file))
        for name, source in plan.sources.items():
            if source.file is not self._file:
                require_finite(plan.sources[name])
        for adapter, _ in weighted:
            _ = adapter.sha256  # while its file is that of these factors
        return Merged.of(plan, self._file.memory), tuple(files)

    def _on_the_base(self, weighted: WeightedAdapter, opened: ExitStack) -> WeightedAdapter:
        """Return the adapters, minus the initial one if they were trained on a residual base and this is not it."""
        options = self._options
        if options.residual_base:
            if options.initial is not None:
                raise UsageError("initial and residual_base exclude each other")
            return weighted
        if options.initial is None:
            origin = self._tensors.config.get("_name_or_path")
            require_residual_base(self._base, tuple(each for each in weighted if each[0].config.base_model != origin))
        return subtract_initial(weighted, options.initial, False, opened)

    def _plan(self, weighted: WeightedAdapter, selection: Selection) -> MergePlan:
        try:
            return plan_merge(self._base, weighted, selection, self._options.tied)
        except NeedsFlag as error:
            if not self._can_share(weighted, selection):
                raise
            remedy = f'tied="share" changes all sides; to untie them, {WITH_FILES}'
            raise InputError(error.message, culprit=error.culprit, remedy=remedy) from error

    def _can_share(self, weighted: WeightedAdapter, selection: Selection) -> bool:
        """Return whether a plan succeeds if all sides of tied weights change."""
        try:
            plan_merge(self._base, weighted, selection, "share")
        except (InputError, NeedsFlag):
            return False
        return True


def _unrecorded(merged: Merged) -> Merged:
    """Return a merge that is to be done again; its records, which are the same, stay those of the argument."""
    return replace(merged, records={}, stats={})


def _active() -> list[LiveMerge]:
    """Return the merges in tensors now, in order; one that nobody has any more cannot be taken out."""
    return [each for ref in _merges if (each := ref()) is not None]


def _first_shared(mine: dict[str, tuple[str, int, int]], theirs: dict[str, tuple[str, int, int]]) -> str | None:
    """Return the name of a tensor of the first whose memory overlaps that of one of the second."""
    spans = sorted(theirs.values())
    for name, (device, start, stop) in mine.items():
        if any(other == device and first < stop and start < last for other, first, last in spans):
            return name
    return None


def _needed(plan: MergePlan, file: KeptFile) -> set[str]:
    """Return the tensors of an adapter's file that the steps of a plan read."""
    placed: Iterable[Placement] = (p for each in plan.placements.values() for p in each if p.adapter.file is file)
    names = {name for p in placed for name in p.update.stored}
    return names | {source.name for source in plan.sources.values() if source.file is file}


def _refuse_other_tensors(plan: MergePlan, tensors: LiveTensors) -> None:
    """Raise InputError for a merge that other tensors than those in memory would have to hold."""
    base = plan.base
    if plan.added:
        raise InputError("is not in the model, and would be added", culprit=plan.added[0], remedy=WITH_FILES)
    if reading := reading_weights(plan.placements):
        what = "changes by a product with its module's weight, which changes too"
        raise InputError(what, culprit=reading[0], remedy=f"exclude it, or {WITH_FILES}")
    for name in plan.edits.specs:
        if plan.edits.specs[name] != base.specs.get(name):
            what = f"would become {plan.edits.specs[name]}; it is {base.specs.get(name)}"
            raise InputError(what, culprit=name, remedy=f"exclude it, or {WITH_FILES}")
    for name in sorted(plan.changed):
        if name in base.weights or name in base.coded:
            raise InputError("is stored as codes", culprit=name, remedy="load the model in 16 or 32 bits")
        refuse_unchangeable(name, tensors.named[name])
        if base.specs[name].dtype not in FLOATS or not base.specs[name].shape:
            what = f"is {base.specs[name]}, which cannot be replaced in place"
            raise InputError(what, culprit=name, remedy=WITH_FILES)
    refuse_overlaps(tensors, plan.changed)


def _report(merged: Merged, title: str) -> MergeReport:
    plan = merged.plan
    checkpoint: Checkpoint = plan.base
    output = Output(checkpoint.path, True, checkpoint.specs, (), {}, {}, ())
    report = build_report(plan, output, title, merged.stats, None, dry_run=False)
    log_warnings(report)
    return report


def _read_model(value: object) -> Model:
    if isinstance(value, nn.Module) or (
        isinstance(value, Mapping) and value and all(isinstance(x, torch.Tensor) for x in value.values())
    ):
        return value
    raise UsageError(f"{brief(value)} is not {MODEL_TYPE.taken}")


MODEL_TYPE = ArgumentType("a module, or a mapping from names to tensors", _read_model)


@checked
@require_ieee
def merge(
    model: Annotated[Model, MODEL_TYPE],
    adapters: Adapters,
    *,
    target: calls.Target = (),
    exclude: calls.Exclude = (),
    layers: calls.OfLayers = None,
    drop: calls.Drop = (),
    alpha: calls.Alpha = None,
    tied: Literal["refuse", "share"] = "refuse",
    initial: StrPath | None = None,
    residual_base: bool = False,
    check: Literal["sha256", "sum"] = "sha256",
    workers: calls.Workers = None,
) -> LiveMerge:
    """Merge adapters into the tensors of a model, in place: the bits that the merge of files writes.

    No forward pass may run meanwhile. The tensors keep their memory, so that compiled graphs hold.

    Args:
        model: a module, or a mapping from names to tensors. What is inside of wrappers is changed.
        adapters: one adapter or several, as the merge of files takes them.
        tied: what to do if an adapter changes one side of tied weights: refuse, or change all (share).
        initial: the adapter before training, to be subtracted.
        residual_base: the model is the residual of a PiSSA-like initialization.
        check: how W is compared when it is restored: by its hash, or by the sum of its words, which costs less.

    Returns:
        what takes them out again, by itself at the end of a `with`. If it is lost, so is the way back.

    Raises:
        UsageError, InputError, NeedsFlag: it is not possible. As after every error, the tensors are as before.
    """
    live = LiveMerge(model, Options(target, exclude, layers, drop, alpha, tied, initial, residual_base), check, workers)
    live._merge(adapters)
    return live


merged = merge  # the name that reads well after `with`
