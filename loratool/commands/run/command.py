"""Run a recipe: its steps in order, after all are checked, before the first writes a byte.

A step that fails stops the run. The outputs of earlier steps stay, and the error says so. A dry run plans every step.
If a step reads the output of an earlier one, it checks the rest: its words, its other inputs, its output.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import LoratoolError, MachineError
from ...streaming.parallel import Progress
from ...views.run import RunReport, StepReport
from ..arguments import StrPath
from .call import Run
from .read import read_recipe
from .steps import Step, is_taken, plan_steps


def run_recipe(call: Run) -> RunReport:
    """Run a recipe, a file that says what commands do in the words of their options."""
    steps = open_recipe(call.recipe, call.force, call.dry_run)
    return RunReport(
        os.fspath(call.recipe),
        call.dry_run,
        tuple(run_steps(steps, call.dry_run, lambda step: call.progress)),
        len(steps),
    )


def open_recipe(recipe: StrPath, force: bool, dry_run: bool) -> tuple[Step, ...]:
    """Read and check a recipe. Errors name the file."""
    try:
        return plan_steps(read_recipe(Path(recipe)), force, dry_run)
    except LoratoolError as error:
        if error.culprit != str(recipe):
            error.culprit = f"{recipe}: {error.culprit}" if error.culprit else str(recipe)
        raise


def run_steps(
    steps: Sequence[Step], dry_run: bool, progress_of: Callable[[Step], Progress | None]
) -> Iterator[StepReport]:
    """Yield the report of each step when it is done. A failed verification ends the run."""
    done: list[StepReport] = []
    for step in steps:
        where = f"\nin step {step.number} of {len(steps)}, {step.command}{_kept(done, dry_run)}" if steps[1:] else ""
        try:
            done.append(_run_step(step, dry_run, progress_of(step)))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MachineError((error.strerror or str(error)) + where, culprit=error.filename) from error
        except LoratoolError as error:
            error.message += where
            raise
        yield done[-1]
        if (report := done[-1].report) is not None and report.said_no:
            return


def _run_step(step: Step, dry_run: bool, progress: Progress | None) -> StepReport:
    parameters = inspect.signature(step.function).parameters
    out = step.arguments.get("out")
    if dry_run and (step.waits_for or "dry_run" not in parameters):
        state = "waits" if step.waits_for else "planned"
        exists = not step.arguments.get("force") and any(is_taken(Path(path)) for path in step.writes)
        return StepReport(step.number, step.command, out, state, step.waits_for, report=None, exists=exists)
    given: dict[str, Any] = {"dry_run": True} if dry_run else {}
    given |= {"progress": progress} if "progress" in parameters else {}
    report = step.function(**step.arguments, **given)
    return StepReport(step.number, step.command, out, "planned" if dry_run else "done", step.waits_for, report)


def _kept(done: Sequence[StepReport], dry_run: bool) -> str:
    """Return the text of an error on the outputs of earlier steps."""
    outs = [step.out for step in done if step.out]
    return f"; the outputs of earlier steps stay: {', '.join(outs)}" if outs and not dry_run else ""
