"""Reports on runs of recipes: a line for each step, and how far the run came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .parts.document import Document, Line, line, path
from .parts.numbers import plural
from .parts.report import CheckReport, Report


@dataclass(frozen=True)
class StepReport:
    """One step of a recipe.

    Attributes:
        out: what it writes; None if it writes nothing.
        state: done; planned, in a dry run; waits, in a dry run, for what earlier steps would write.
        waits_for: the numbers of these steps.
        exists: whether a step that waits has an output already, which only --force replaces.
        report: the command's own; None if it was not called.
    """

    number: int
    command: str
    out: str | None
    state: str
    waits_for: tuple[int, ...]
    report: Any
    exists: bool = False


@dataclass(frozen=True)
class RunReport(CheckReport):
    """The result of `run`.

    Attributes:
        steps: those that were called, or that would be.
        total: how many the recipe has; more than there are in `steps` if a check said no.
        lock: the lock that was written, or with `locked` read; None without one.
        locked: whether inputs and outputs were held against the lock.
        differs: the input or output that is not as recorded, at which the run stopped; None if all are.
    """

    document_function: ClassVar[str] = "run_document"
    rows: ClassVar[str] = "steps"
    recipe: str
    dry_run: bool
    steps: tuple[StepReport, ...]
    total: int
    lock: str | None = None
    locked: bool = False
    differs: str | None = None

    @property
    def said_no(self) -> str | None:
        """The verdict of the check at which the run stopped: `differs`, or that of a verification."""
        if self.differs is not None:
            return "differs"
        last: Report | None = self.steps[-1].report
        return None if last is None else last.said_no

    @property
    def status(self) -> str:
        """`done`, or the verdict of the check at which the run stopped."""
        return self.said_no or "done"


SHOWN = 15  # lines for steps


def run_document(report: RunReport, verbose: bool) -> Document:
    """Return the document of a run. The reports of its steps have their own documents."""
    dry = " (dry run, nothing is written)" if report.dry_run else ""
    return Document(
        subject=line(path(report.recipe), f", {plural(report.total, 'step')}{dry}"),
        lists=tuple(_steps(report, verbose)),
        verdict=(verdict_of(report), *lock_lines(report)),
        verbose=verbose,
    )


def verdict_of(report: RunReport) -> Line:
    """Return how far the run came."""
    left = report.total - len(report.steps)
    rest = f"; {plural(left, 'step')} not run" if left and report.total > 1 else ""
    if report.differs is not None:
        return line(f"differs: {report.differs}{rest}")
    if report.status != "done":
        last = report.steps[-1]
        return line(f"step {last.number} of {report.total}, {last.command}: {report.status}{rest}")
    return line(f"{plural(len(report.steps), 'step')} {'planned' if report.dry_run else 'done'}")


def lock_lines(report: RunReport) -> tuple[Line, ...]:
    """Return the line on the lock that was written, or that inputs and outputs agree with."""
    if not report.lock or report.said_no:
        return ()
    if not report.locked:
        return (line("wrote ", path(report.lock)),)
    return (line("inputs are" if report.dry_run else "inputs and outputs are", " as in ", path(report.lock)),)


def heading(step: StepReport, total: int) -> Line:
    """Return the line above a step's report."""
    return line(f"step {step.number} of {total}: {step.command}")


def waiting(step: StepReport) -> Line:
    """Return the line for a step whose report cannot be made yet."""
    exists = f"; {step.out} exists: --force replaces it" if step.exists else ""
    if step.state == "waits":
        return line(
            f"its keys and paths are checked; the rest waits for the output of {_named(step.waits_for)}{exists}"
        )
    return line("its keys and paths are checked")


def _named(numbers: Sequence[int]) -> str:
    return f"step{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"


def _steps(report: RunReport, verbose: bool) -> Iterator[Line]:
    shown = len(report.steps) if verbose or len(report.steps) <= SHOWN else SHOWN - 1
    for step in report.steps[:shown]:
        wrote = (" -> ", path(step.out)) if step.out else ()
        waits = f" (waits for {_named(step.waits_for)})" if step.state == "waits" else ""
        yield line(f"step {step.number}: {step.command}", *wrote, waits)
    if shown < len(report.steps):
        yield line(f"and {len(report.steps) - shown} more steps: -v shows them")
