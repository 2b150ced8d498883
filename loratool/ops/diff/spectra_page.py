"""Show what a fine-tune has brought into the leading directions of each weight."""

from __future__ import annotations

from collections.abc import Sequence

from ...reports.numbers import share, spread, whole
from ...reports.page.content import Curve, Figure, Page, Sheet
from ...reports.page.curves import spectrum_curves
from ..inspect.intruders import what_is_new
from .spectra import SpectraDiff, WeightSpectra
from .spectra_document import COLUMNS


def spectra_diff_page(report: SpectraDiff) -> Page:
    """Make the page of what is new in a fine-tune's singular vectors."""
    rows = report.weights
    examined = sum(row.intruders.examined for row in rows)
    figures = [Figure("changed", whole(len(rows)), f"of {len(rows) + report.equal:,} weights")]
    if rows:
        new = whole(sum(row.intruders.new for row in rows))
        figures += [
            Figure("new", new, f"of {examined:,} leading singular vectors have no match in the base"),
            Figure("change", spread([row.relative for row in rows], share), "of the weight's norm"),
        ]
    curves: Sequence[Curve[WeightSpectra]] = spectrum_curves(
        lambda row: {"tuned": row.intruders.spectrum}, lambda row: {"first new": row.intruders.first}
    )
    return Page(
        figures=tuple(figures),
        sheets=(Sheet(rows, lambda row: row.name, COLUMNS, "weight", curves=curves),),
        arithmetic=(
            what_is_new(report.top, report.threshold),
            "the singular values are those of the tuned weight that belong to these vectors, and the energy is their "
            "share of all of its energy",
        ),
    )
