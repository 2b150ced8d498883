"""Show a resize: the spectrum of each module's delta, and what of it the new rank holds."""

from __future__ import annotations

from collections.abc import Sequence

from ...reports.numbers import nbytes, rank, spread
from ...reports.outputs import kept_figures, what_energy_is
from ...reports.page.content import Curve, Figure, Page, Sheet
from ...reports.page.curves import spectrum_curves
from .command import ModuleResize, ResizeReport
from .document import resize_columns, resize_flaw


def resize_page(report: ResizeReport) -> Page:
    """Make the page of a resize."""
    rows = report.modules
    old, new = (spread(ranks, rank) for ranks in ([row.rank for row in rows], [row.new_rank for row in rows]))
    curves: Sequence[Curve[ModuleResize]] = spectrum_curves(
        lambda row: {"delta": row.spectrum}, lambda row: {"new rank": row.new_rank}
    )
    product = "the product s B A" if report.weighted_error is None else "s B A W"
    return Page(
        figures=(
            *kept_figures(report),
            Figure("rank", new, f"was {old}"),
            Figure("output", nbytes(report.nbytes), f"was {nbytes(report.adapter_nbytes)}"),
        ),
        sheets=(Sheet(rows, lambda row: row.name, resize_columns(rows), "module", resize_flaw, curves=curves),),
        arithmetic=(
            what_energy_is(report),
            f"the singular values are those of {product}, from a core of the factors in float64",
            "error is the distance of what is written, rounded to its type, from the delta, beside the delta's norm",
        ),
        hashes=report.sha256,
    )
