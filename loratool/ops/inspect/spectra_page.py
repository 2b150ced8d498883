"""Show spectra: how they fall off, module by module, and beside a base what is new among the leading directions."""

from __future__ import annotations

from ...numerics.spectrum import SpectrumPoints
from ...reports.numbers import rank, spread, whole
from ...reports.page.content import Figure, Page, Sheet
from ...reports.page.curves import spectrum_curves
from .intruders import what_is_new
from .spectra import SpectraReport, Spectrum
from .spectra_document import COLUMNS

ARITHMETIC = {
    "adapter": "the singular values are those of the delta s B A, in float64 from a core of its factors",
    "checkpoint": "the singular values are the roots of the eigenvalues of the smaller of W^T W and W W^T, in float64: "
    "below 1e-7 of the largest they are not told from 0",
}


def spectra_page(report: SpectraReport) -> Page:
    """Make the page of singular values."""
    rows = report.modules
    what = "delta" if report.what == "adapter" else "weight"
    figures = [
        Figure("matrices", f"{len(rows):,}", "of deltas" if what == "delta" else "of weights"),
        Figure("eff. rank", spread([row.effective_rank for row in rows], rank), "over how many directions they spread"),
        Figure("rank of 90%", spread([row.rank_90 for row in rows], rank), "holds that share of the energy"),
    ]
    counts = [row.intruders for row in rows if row.intruders]
    if counts:
        examined = f"of {sum(each.examined for each in counts):,} leading singular vectors have no match in the base"
        figures.append(Figure("new", whole(sum(each.new for each in counts)), examined))

    def spectra(row: Spectrum) -> dict[str, SpectrumPoints | None]:
        beside = {"weight with its delta": row.intruders.spectrum} if row.intruders else {}
        return {what: row.spectrum, **beside}

    curves = spectrum_curves(spectra, lambda row: {"first new": row.intruders.first} if row.intruders else {})
    is_stack = any(len(row.shape) > 2 for row in rows)
    arithmetic = [ARITHMETIC[report.what]]
    arithmetic += ["of a stack of matrices a singular value is the root mean square over the stack"] if is_stack else []
    if report.top is not None and report.threshold is not None:
        arithmetic.append(what_is_new(report.top, report.threshold))
    return Page(
        figures=tuple(figures),
        sheets=(Sheet(rows, lambda row: row.name, COLUMNS, "module" if what == "delta" else "weight", curves=curves),),
        arithmetic=tuple(arithmetic),
        hashes=report.sha256,
    )
