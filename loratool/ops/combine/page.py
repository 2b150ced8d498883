"""Show a combination: the spectrum of each module's result, what the rank holds of it, and what the adapters share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...reports.numbers import kept_share, nbytes, quantity, rank, share, spread
from ...reports.outputs import kept_figures, what_energy_is
from ...reports.page.content import Curve, Figure, Page, Sheet
from ...reports.page.curves import spectrum_curves
from ..diff.shared_page import shared_figures, shared_heatmaps
from .command import CombineReport, ModuleCombine
from .document import combine_columns, combine_flaw, is_exact


def combine_page(report: CombineReport) -> Page:
    """Make the page of a combination."""
    rows, columns = report.modules, combine_columns(report, is_exact(report))
    curves: Sequence[Curve[ModuleCombine]] = spectrum_curves(
        lambda row: {"result": row.spectrum}, lambda row: {"rank": row.rank}
    )
    sheet = Sheet(rows, lambda row: row.name, columns, find_flaw=combine_flaw, curves=curves)
    return Page(
        figures=tuple(_figures(report)),
        sheets=(sheet,),
        heatmaps=shared_heatmaps(report.shared) if report.shared else (),
        arithmetic=tuple(_arithmetic(report)),
        hashes=report.sha256,
    )


def _figures(report: CombineReport) -> Iterator[Figure]:
    if report.rank_method == "ctm":
        yield Figure("shared", kept_share(report.kept), "of the changes' energy, in the directions that are kept")
        yield Figure("error", share(report.error), "of the result's norm")
    else:
        yield from kept_figures(report)
    if report.modules:
        yield Figure("rank", spread([row.rank for row in report.modules], rank), f"by {report.method}")
    yield Figure("output", nbytes(report.nbytes), f"{quantity(report.parameters)} parameters")
    if report.shared and len(report.adapters) > 2:
        yield from shared_figures(report.shared)


def _arithmetic(report: CombineReport) -> Iterator[str]:
    yield "what is combined is the delta s B A of each module, times the weight of its adapter"
    if report.rank_method == "ctm":
        yield (
            "the changes are compressed to the directions that they share, and then combined; shared is the mean share "
            "of their energies that these hold"
        )
    else:
        yield what_energy_is(report)
    yield "error is the distance of what is written, rounded to its type, from the result, beside the result's norm"
