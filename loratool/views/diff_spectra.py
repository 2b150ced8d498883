"""Reports on the leading directions of each weight that a fine-tune has added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .intruders import IntruderCount, IntruderRule, intruder_verdict, what_is_new
from .page.curves import spectrum_curves
from .parts import quantities as q
from .parts.content import Curve, Figure, Page, Sheet
from .parts.document import Document, line, path
from .parts.numbers import all_digits, dimensions, plural, share, spread
from .parts.report import Report
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.untargeted import untargeted
from .parts.writing import listed


@dataclass(frozen=True)
class WeightSpectra:
    """A weight that differs between the two models, as one matrix or as a stack of them.

    Attributes:
        relative: ||TUNED - BASE|| / ||BASE||; None if the base's is 0.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    relative: float | None
    intruders: IntruderCount


@dataclass(frozen=True)
class SpectraDiff(Report):
    """The result of `diff --spectra`.

    Attributes:
        weights: those that differ.
        equal: how many of the selected weights do not.
        not_compared: selected weights that the tuned model does not have, or has in another shape.
        left_out: weights that only a pattern selects -> their kind: experts, convolutions, ...
        top, threshold: as in `SpectraReport`.
    """

    document_function: ClassVar[str] = "spectra_diff_document"
    page_function: ClassVar[str] = "spectra_diff_page"
    rows: ClassVar[str] = "weights"

    base: str
    tuned: str
    weights: tuple[WeightSpectra, ...]
    equal: int
    not_compared: tuple[str, ...]
    top: int
    threshold: float
    left_out: Mapping[str, str]
    kind: str = "spectra"


COLUMNS: tuple[Category[WeightSpectra] | Measure[WeightSpectra], ...] = (
    Category(q.KIND, lambda row: row.kind),
    Category(q.SHAPE, lambda row: dimensions(row.shape), priority=8, right=True, always=True),
    Measure(q.CHANGE, lambda row: row.relative, share, priority=2),
    Measure(q.NEW, lambda row: row.intruders.new, all_digits, priority=1, watched=True, drawn=True),
    Measure(q.OUT_OF, lambda row: row.intruders.examined, all_digits, priority=7),
    Measure(q.FIRST_NEW, lambda row: row.intruders.first, all_digits, priority=4),
)


def spectra_diff_document(report: SpectraDiff, verbose: bool) -> Document:
    """Return the document on new singular vectors of a fine-tune."""
    rows = report.weights
    table = make_table(rows, COLUMNS, GroupColumns(layers=3, by_layer=5, count=6), verbose=verbose)
    equal = plural(report.equal, "selected weight")
    verdict = [line(f"{plural(len(rows), 'weight')} changed; {equal} did not")]
    if rows:
        rule = IntruderRule(report.top, report.threshold)
        verdict += intruder_verdict([row.intruders for row in rows], rule)
    return Document(
        subject=line("BASE   ", path(report.base)),
        facts=(line("TUNED  ", path(report.tuned)),),
        tables=(table,) if rows else (),
        lists=(*listed("not compared", report.not_compared, verbose), *untargeted(report.left_out)),
        verdict=tuple(verdict),
        verbose=verbose,
    )


def spectra_diff_page(report: SpectraDiff) -> Page:
    """Return the page on new singular vectors of a fine-tune."""
    rows = report.weights
    examined = sum(row.intruders.examined for row in rows)
    figures = [Figure("changed", all_digits(len(rows)), f"of {len(rows) + report.equal:,} weights")]
    if rows:
        new = all_digits(sum(row.intruders.new for row in rows))
        figures += [
            Figure("new", new, f"of {examined:,} leading singular vectors match none of the base"),
            Figure("change", spread([row.relative for row in rows], share), "of the weight's norm"),
        ]
    curves: Sequence[Curve[WeightSpectra]] = spectrum_curves(
        lambda row: {"tuned": row.intruders.spectrum}, lambda row: {"first new": row.intruders.first}
    )
    return Page(
        figures=tuple(figures),
        sheets=(Sheet(rows, COLUMNS, "weight", curves=curves),),
        arithmetic=(
            what_is_new(report.top, report.threshold),
            "the curves have the singular values of the tuned weight for these vectors; the energy is their share of "
            "its energy",
        ),
    )
