"""Errors of a layer's outputs, where --imatrix has its inputs, beside the errors of the change."""

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
    """A module with ||D' - D|| / ||D||, and the same weighted by the inputs. None if the inputs are unknown."""

    @property
    def error(self) -> float: ...
    @property
    def weighted_error(self) -> float | None: ...


class WeightedReport(Protocol):
    """A report of such modules, with total energy and errors, and the modules with unknown inputs."""

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
    """Return in words what the kept energy is a share of."""
    return "the delta's energy" + ("" if report.weighted_error is None else ", weighted by inputs,")


def output_lines(report: WeightedReport, rows: Sequence[WeightedRow]) -> Iterator[Line]:
    """Yield the line of the verdict that has both errors, if the inputs of any module are known."""
    known = sum(row.weighted_error is not None for row in rows)
    if report.weighted_error is not None and report.error is not None:
        outputs = f"{share(report.weighted_error)} of the outputs lost in {plural(known, 'module')}"
        yield line(f"{outputs} with known inputs; {share(report.error)} of the delta lost")


def kept_figures(report: WeightedReport) -> list[Figure]:
    """Return a page's figures of the kept energy and of the errors."""
    figures = []
    if report.kept is not None:
        figures.append(Figure("kept", kept_share(report.kept), f"of {energy_of_what(report).rstrip(',')}"))
    if report.weighted_error is not None:
        figures.append(Figure("outputs", share(report.weighted_error), "of the delta's effect on the outputs is lost"))
    if report.error is not None:
        figures.append(Figure("error", share(report.error), "of the delta's norm"))
    return figures


def what_energy_is(report: WeightedReport) -> str:
    """Return a page's sentence that defines the energy."""
    if report.weighted_error is None:
        return (
            "energy is the sum of the delta's squared singular values, which is the sum of the squares of its numbers"
        )
    return (
        "energy is that of D W: D is the delta, and W has the root mean squares of its inputs, relative to their mean. "
        "It is the mean square of what D adds to the outputs, if inputs are uncorrelated"
    )


def unknown_inputs(report: WeightedReport, verbose: bool) -> Iterator[Line]:
    """Yield the lines that list modules with unknown inputs."""
    yield from listed("no inputs in the imatrix", report.unweighted, verbose)
