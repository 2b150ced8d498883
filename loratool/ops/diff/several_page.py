"""Show what three or more adapters share: each two of them in all, and the worst two module by module."""

from __future__ import annotations

from ...reports.numbers import measure, share, spread, whole
from ...reports.page.content import Figure, Page, Sheet
from ...reports.rows import Category, Measure
from .adapters_page import WHAT_IS_COMPARED
from .several import AdaptersDiff, ValueSpread
from .several_document import several_columns, several_flaw
from .shared_document import letters
from .shared_page import of_each_two, shared_figures, shared_heatmaps

VALUE_COLUMNS: tuple[Category[ValueSpread] | Measure[ValueSpread], ...] = (
    Category("kind", lambda row: row.kind, always=True),
    Category("norms", lambda row: "/".join("-" if norm is None else measure(norm) for norm in row.norms), right=True),
    Measure("apart", lambda row: row.relative, share),
)


def several_page(report: AdaptersDiff) -> Page:
    """Make the page of a comparison of three or more adapters."""
    names, rows, values = letters(len(report.adapters)), report.modules, report.values
    modules = Sheet(rows, lambda row: row.name, several_columns(names), find_flaw=lambda row: several_flaw(row, names))
    tensors = Sheet(values, lambda row: row.name, VALUE_COLUMNS, "tensor")
    return Page(
        figures=(
            *(shared_figures(report.shared) if report.shared else ()),
            Figure("at most", share(report.worst), "apart in any module or tensor"),
            *((Figure("delta", spread(report.norms, measure), "the norms of the adapters"),) if report.shared else ()),
            Figure("modules", whole(len(rows)), f"in {len(names)} adapters"),
        ),
        sheets=(modules, tensors),
        heatmaps=(
            *shared_heatmaps(report.shared),
            of_each_two("distance of each two", "apart", report.relatives, share),
        )
        if report.shared
        else (),
        arithmetic=(
            *WHAT_IS_COMPARED,
            "of a module the cosine is the least, and the distance the largest, of any two adapters",
        ),
        hashes=report.sha256,
    )
