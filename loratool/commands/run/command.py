"""Run a recipe: its steps in order, after all are checked, before the first writes a byte.

A step that fails stops the run. The outputs of earlier steps stay, and the error says so. A dry run plans every step.
If a step reads the output of an earlier one, it checks the rest: its words, its other inputs, its output. With a lock,
what steps read and write is recorded, or held against the record.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import LoratoolError, MachineError, UsageError
from ...files.hub.cache import place_named
from ...streaming.parallel import Progress
from ...views.run import RunReport, StepReport
from .call import Run
from .lock import HeldLock, Lock, NewLock, check_lock_path, lock_path
from .mlrecipe import Pin, from_mlrecipe, unlike_pin
from .read import TOML_ENDING, read_recipe
from .steps import Step, is_taken, plan_steps

ProgressOf = Callable[["Step | None"], "Progress | None"]  # of a step; None for the inputs of all


def run_recipe(call: Run) -> RunReport:
    """Run a recipe, a file that says what commands do in the words of their options."""
    recipe = OpenRecipe(call)
    for _ in recipe.run(lambda step: call.progress):
        pass
    report = recipe.report()
    if report.differs:
        report.check()
    return report


class OpenRecipe:
    """A recipe that is read and checked, and its run.

    Raises:
        UsageError, InputError, NeedsFlag: as `run` does. Errors of the recipe name its file.
    """

    def __init__(self, call: Run) -> None:
        if call.lock and call.locked:
            raise UsageError("--lock and --locked exclude each other")
        if call.lock and call.dry_run:
            raise UsageError("a dry run writes no lock", culprit="--lock", remedy="remove --dry-run")
        self._call = call
        self._pins: tuple[Pin, ...] = ()
        self._done: list[StepReport] = []
        self._unlike: str | None = None
        self._complete = False
        place = place_named(call.recipe)
        try:
            content = read_recipe(place)
            if place.suffix.lower() == TOML_ENDING:
                content, self._pins = from_mlrecipe(content, place)
            self.steps = plan_steps(content, call.force, call.dry_run)
        except LoratoolError as error:
            if error.culprit != str(call.recipe):
                error.culprit = f"{call.recipe}: {error.culprit}" if error.culprit else str(call.recipe)
            raise
        self._lock: Lock | None = None
        if call.lock:
            check_lock_path(lock_path(place), call.force)
            self._lock = NewLock(lock_path(place), self.steps)
        elif call.locked:
            self._lock = HeldLock(lock_path(place), self.steps, os.fspath(call.recipe))

    def run(self, progress_of: ProgressOf) -> Iterator[StepReport]:
        """Yield the report of each step when it is done. A failed check ends the run."""
        lock, dry_run = self._lock, self._call.dry_run
        self._unlike = next(filter(None, map(unlike_pin, self._pins)), None)
        if lock and not self._difference():
            lock.before_all(progress_of(None))
        for step in self.steps:
            if self._difference():
                return
            several = len(self.steps) > 1
            where = f"\nin step {step.number} of {len(self.steps)}, {step.command}{self._kept()}" if several else ""
            try:
                if lock and not dry_run:
                    lock.before(step)
                    if self._difference():
                        return
                self._done.append(_run_step(step, dry_run, progress_of(step)))
                if lock and not dry_run:
                    lock.after(step, progress_of(None))
            except BrokenPipeError:
                raise
            except OSError as error:
                raise MachineError((error.strerror or str(error)) + where, culprit=error.filename) from error
            except LoratoolError as error:
                error.message += where
                raise
            yield self._done[-1]
            if (report := self._done[-1].report) is not None and report.said_no:
                return
        self._complete = not self._difference()
        if lock and self._complete:
            lock.end()

    def report(self) -> RunReport:
        """Return the report, when the run has ended."""
        call = self._call
        return RunReport(
            os.fspath(call.recipe),
            call.dry_run,
            tuple(self._done),
            len(self.steps),
            lock=str(self._lock.place) if self._lock and (call.locked or self._complete) else None,
            locked=call.locked,
            differs=self._difference(),
        )

    def _difference(self) -> str | None:
        """Return what is not as pinned or as in the lock."""
        return self._unlike or (self._lock.differs if self._lock else None)

    def _kept(self) -> str:
        """Return the text of an error on the outputs of earlier steps."""
        outs = [step.out for step in self._done if step.out]
        return f"; the outputs of earlier steps stay: {', '.join(outs)}" if outs and not self._call.dry_run else ""


def _run_step(step: Step, dry_run: bool, progress: Progress | None) -> StepReport:
    parameters = inspect.signature(step.function).parameters
    out = step.arguments.get("out")
    if dry_run and (step.waits_for or "dry_run" not in parameters):
        state = "waits" if step.waits_for else "planned"
        exists = not step.arguments.get("force") and any(is_taken(Path(path)) for path in step.writes)
        return StepReport(step.number, step.command, out, state, step.waits_for, report=None, exists=exists)
    given: dict[str, Any] = {"dry_run": True} if dry_run else {}
    given |= {"attest": None} if dry_run and "attest" in parameters else {}
    given |= {"progress": progress} if "progress" in parameters else {}
    report = step.function(**{**step.arguments, **given})
    return StepReport(step.number, step.command, out, "planned" if dry_run else "done", step.waits_for, report)
