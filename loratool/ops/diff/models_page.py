"""Show how two models differ: how far apart each tensor is, and how many of its numbers are others."""

from __future__ import annotations

from collections.abc import Iterator

from ...reports.numbers import plural, share, whole
from ...reports.page.content import Figure, Page, Sheet
from .models import CheckpointDiff
from .models_document import COLUMNS, models_flaw, over_how_many


def models_page(report: CheckpointDiff) -> Page:
    """Make the page of a comparison of two models."""
    rows = report.tensors
    return Page(
        figures=tuple(_figures(report)),
        sheets=(Sheet(rows, lambda row: row.name, COLUMNS, title="tensor", find_flaw=models_flaw),),
        arithmetic=(
            "apart is |B - A| over the larger of |A| and |B|, Frobenius' norms: 141% for what has nothing in common, "
            "200% for opposites; a pair that cannot be compared is in no total",
            "of quantized weights the numbers that the codes mean are compared, and not the codes",
            "an ulp is the step from a number to the next of its type",
        ),
    )


def _figures(report: CheckpointDiff) -> Iterator[Figure]:
    total = plural(report.equal + len(report.tensors), "tensor")
    yield Figure("differ", whole(len(report.tensors)), f"of {total} in both")
    if report.relative is not None and report.worst is not None:
        yield Figure("apart", share(report.relative), over_how_many(report))
        yield Figure("at most", share(report.worst), "apart in any tensor")
    if unknown := sum(row.relative is None for row in report.tensors):
        yield Figure("not comparable", whole(unknown), "another shape, nan or inf on one side, or not floating-point")
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        if names:
            yield Figure(f"only in {side}", whole(len(names)), "tensors")
