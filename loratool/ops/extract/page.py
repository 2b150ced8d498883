"""Show an extraction: the spectrum of each matrix's delta as far as it was computed, and what the factors hold."""

from __future__ import annotations

from ...reports.numbers import nbytes, quantity, rank, share, spread, whole
from ...reports.outputs import kept_figures, what_energy_is
from ...reports.page.content import Figure, Page, Points, Sheet
from ...reports.page.curves import spectrum_curves
from .command import ExtractReport, ModuleExtract
from .document import extract_columns, extract_flaw

KEPT = (
    "the energy kept is exact: it is the sum of the squares of the factors' singular values, over that of all of the "
    "delta's numbers"
)


def extract_page(report: ExtractReport) -> Page:
    """Make the page of an extraction."""
    rows = report.modules
    figures = [
        *kept_figures(report),
        *([] if report.relative is None else [Figure("delta/W", share(report.relative), "of what changed")]),
        *([Figure("rank", spread([row.rank for row in rows], rank))] if rows else []),
        Figure("output", nbytes(report.nbytes), f"{quantity(report.parameters)} parameters"),
        *([Figure("exact", whole(len(report.exact)), "tensors are kept as they are")] if report.exact else []),
        *([Figure("left out", whole(len(report.left_out)), "tensors that changed")] if report.left_out else []),
    ]
    curves = spectrum_curves(lambda row: {"delta": row.spectrum}, lambda row: {"rank": row.rank}, _rounding, _estimates)
    sheet = Sheet(rows, lambda row: row.name, extract_columns(rows), "weight", extract_flaw, curves=curves)
    return Page(
        figures=tuple(figures),
        sheets=(sheet,),
        arithmetic=(
            what_energy_is(report),
            *([KEPT] if report.weighted_error is None else []),
            "of a delta only the largest singular values are computed, so a curve may end before its energy is 100%; "
            "about is where a power law puts the ranks of 50% and 90%",
            "rounding is up to where singular values may be those of rounding the models to their types alone",
        ),
    )


def _rounding(row: ModuleExtract) -> dict[str, float | None]:
    """Return below what the singular values may be rounding's, where they are those of the delta itself."""
    return {} if row.above_noise is None else {"rounding": row.noise}


def _estimates(row: ModuleExtract) -> dict[str, Points]:
    """Return about what ranks would keep half and nine tenths of the energy, where that is beyond what is known."""
    points = row.spectrum
    shares = ((row.rank_50, 50.0), (row.rank_90, 90.0))
    found = [(at, share) for at, share in shares if at and points and at > points.places[-1]]
    return {"about": [(points.places[-1], 100 * points.energies[-1]), *found]} if points and found else {}
