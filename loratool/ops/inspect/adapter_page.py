"""Show an adapter: how large the delta of each module is, how many directions it has, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from ...reports.numbers import nbytes, plural, quantity, rank, spread, whole
from ...reports.page.content import Figure, Page, Sheet
from .adapter import AdapterInspection
from .adapter_document import alpha_words, inspection_columns, inspection_flaw, is_held


def inspection_page(report: AdapterInspection) -> Page:
    """Make the page of an adapter."""
    rows, columns = report.details, inspection_columns(is_held(report))
    return Page(
        figures=tuple(_figures(report)),
        sheets=(Sheet(rows, lambda row: row.name, columns, find_flaw=inspection_flaw),),
        arithmetic=(
            "the delta of a module is s B A, of DoRA before it is normed; its norm is Frobenius', the root of the sum "
            "of the squares of all its numbers",
            "of a module with factors, the norm and the effective rank are those of the singular values of s B A, "
            "computed from the factors in float64",
            "the effective rank is exp of the entropy of the singular values' shares of their sum: r for r equal ones",
        ),
        hashes=report.sha256,
    )


def _figures(report: AdapterInspection) -> Iterator[Figure]:
    rows = report.details
    ranks = [row.rank for row in rows if row.rank]
    if ranks:
        yield Figure("rank", spread(ranks, rank), alpha_words(report))
    yield Figure("modules", whole(report.modules), ", ".join(dict.fromkeys(row.kind for row in rows)))
    yield Figure("parameters", quantity(report.parameters), ", ".join(dict.fromkeys(row.dtype for row in rows)))
    yield Figure("size", nbytes(report.nbytes))
    if report.coverage:
        yield Figure("in the base", whole(report.coverage.bound), f"of {plural(report.modules, 'module')}")
    yield Figure("problems", whole(len(report.problems)))
