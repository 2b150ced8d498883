"""Show what a rank keeps of the outputs beside what it keeps of the change, where --imatrix tells the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from .content import Figure
from .document import Line, line
from .numbers import kept_share, plural, share
from .quantities import ERROR, OUTPUT_ERROR
from .rows import Measure
from .writing import listed


class WeightedRow(Protocol):
    """A module in a report: ||D' - D|| / ||D||, and the same with the weights of the inputs, None if none are known."""

    @property
    def error(self) -> float: ...
    @property
    def weighted_error(self) -> float | None: ...


class WeightedReport(Protocol):
    """A report of such modules: energy and errors in all, and the modules of whose inputs nothing is known."""

    @property
    def kept(self) -> float | None: ...
    @property
    def error(self) -> float | None: ...
    @property
    def weighted_error(self) -> float | None: ...
    @property
    def unweighted(self) -> Sequence[str]: ...


R = TypeVar("R", bound=WeightedRow)


def output_columns(rows: Sequence[R], priority: int) -> list[Measure[R]]:
    """Return the columns of both errors, if the inputs of any module are known."""
    if all(row.weighted_error is None for row in rows):
        return []
    return [
        Measure(OUTPUT_ERROR, lambda row: row.weighted_error, share, priority=priority),
        Measure(ERROR, lambda row: row.error, share, priority=priority),
    ]


def energy_of_what(report: WeightedReport) -> str:
    """Return what the energy kept is of."""
    return "the delta's energy" + ("" if report.weighted_error is None else ", weighted by inputs,")


def output_lines(report: WeightedReport, rows: Sequence[WeightedRow]) -> Iterator[Line]:
    """Yield the line of the verdict that has both errors, if the inputs of any module are known."""
    known = sum(row.weighted_error is not None for row in rows)
    if report.weighted_error is not None and report.error is not None:
        outputs = f"{share(report.weighted_error)} of the outputs lost in {plural(known, 'module')}"
        yield line(f"{outputs} whose inputs are known; of the delta itself {share(report.error)}")


def kept_figures(report: WeightedReport) -> list[Figure]:
    """Return what a page shows of the energy that is kept, and of what is lost."""
    found = []
    if report.kept is not None:
        found.append(Figure("kept", kept_share(report.kept), f"of {energy_of_what(report).rstrip(',')}"))
    if report.weighted_error is not None:
        found.append(Figure("outputs", share(report.weighted_error), "of the delta's effect on them is lost"))
    if report.error is not None:
        found.append(Figure("error", share(report.error), "of the delta's norm"))
    return found


def what_energy_is(report: WeightedReport) -> str:
    """Return the sentence of a page that defines the energy."""
    if report.weighted_error is None:
        return "energy is the sum of the squares of the delta's singular values, which is that of its numbers"
    return (
        "energy is that of D W, where D is the delta and W has the roots of its inputs' mean squares, beside their "
        "mean: the mean square of what D adds to the outputs, if inputs are uncorrelated"
    )


def unknown_inputs(report: WeightedReport, verbose: bool) -> Iterator[Line]:
    """Yield the lines that list modules of whose inputs nothing is known."""
    yield from listed("no inputs in the imatrix", report.unweighted, verbose)
