"""Define the command `loratool run`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from ..commands.run import call
from .from_call import make_command, options_for
from .options import TERMINAL
from .progress import ProgressBar
from .surface import surface_of

if TYPE_CHECKING:
    from ..commands.run.steps import Step
    from ..views.run import RunReport, StepReport

UNITS = {"combine": "modules", "resize": "modules"}  # command -> what its progress counts, where it is not bytes

TEXT = """\
RECIPE is a .json file, or a .yaml file if PyYAML is installed. Steps run one after the other, and can read what earlier
steps write. Keys, values and paths of all steps are checked before the first byte is written. A step that fails, or a
verify that finds an error, stops the run. With --save-recipe, merge, extract and every other command that writes saves
its call as a recipe. --lock records the digests of inputs and outputs; --locked holds a later run against them.

\b
  loratool merge base/ adapter/:0.7 -o merged/ --save-recipe merge.yaml
  loratool run merge.yaml --force --dry-run
  loratool run merge.yaml --force --lock
  loratool run merge.yaml --force --locked
"""


def _run(context: click.Context, quiet: bool, verbose: bool, json: bool, **options: Any) -> None:
    from ..commands.run.command import OpenRecipe
    from .render import print_report

    recipe = OpenRecipe(call.Run(**options))
    total = len(recipe.steps)
    with closing(_Progress(total, quiet or json)) as progress:
        for step in recipe.run(progress.of):
            progress.close()
            if not json:
                _print_step(step, total, quiet, verbose)
    report = recipe.report()
    if json:
        print_report("run", report, form="json", status=report.said_no)
    else:
        _print_end(report)
    if report.said_no:
        context.exit(1)


class _Progress:
    """A bar for each step."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._bar: ProgressBar | None = None

    def of(self, step: Step | None) -> ProgressBar:
        self.close()
        if step is None:
            self._bar = ProgressBar("digest", self._quiet)
        else:
            label = f"step {step.number} of {self._total}, {step.command}" if self._total > 1 else step.command
            self._bar = ProgressBar(label, self._quiet, UNITS.get(step.command, ""))
        return self._bar

    def close(self) -> None:
        if self._bar:
            self._bar.close()


def _print_step(step: StepReport, total: int, quiet: bool, verbose: bool) -> None:
    from ..views.run import heading, waiting
    from .render import print_report

    if total > 1:
        surface_of(sys.stdout).print([*([()] if step.number > 1 else []), heading(step, total)])
    if step.report is None:
        surface_of(sys.stdout).print([waiting(step)])
    else:
        print_report(step.command, step.report, quiet=quiet, verbose=verbose)


def _print_end(report: RunReport) -> None:
    from ..views.run import lock_lines, verdict_of

    several = report.total > 1
    lines = [*([verdict_of(report)] if several or report.differs else []), *lock_lines(report)]
    if lines:
        surface_of(sys.stdout).print([*([()] if several and report.steps else []), *lines])


run = make_command("run", call.run, TEXT, [*options_for(call.run), *TERMINAL], click.pass_context(_run))
