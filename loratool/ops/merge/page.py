"""Show a merge: how large each delta is beside its weight, and how much of it rounding has left."""

from __future__ import annotations

from ...reports.numbers import kept_share, nbytes
from ...reports.page.content import Figure, Page, Sheet
from .document import COLUMNS, SIZE, weight_flaw
from .report import MergeReport

NEAREST = (
    "each merged weight that is stored as a number is the one of its type that is nearest to what its update defines "
    "as a real number: W + s B A for LoRA"
)


# what became of coded weights -> what those are that have codes after the merge
CODES = {
    "requantize": "of what keeps its codes, each weight has the code nearest to that number, with the base's scales",
    "like": "what is written as codes is quantized anew, with scales of its own",
}


def merge_page(report: MergeReport) -> Page:
    """Make the page of a merge."""
    changed = len(report.tensors) if report.changed is None else report.changed
    total = len(report.tensors) + report.copied + report.decoded
    figures = [Figure("would change" if report.dry_run else "changed", f"{changed:,}", f"of {total:,} tensors")]
    if report.kept is not None:
        figures.append(Figure("kept", kept_share(report.kept), "of the delta, after rounding"))
    figures.append(Figure("output", nbytes(report.nbytes), f"was {nbytes(report.base_nbytes)}"))
    if report.undo_bytes is not None:
        figures.append(Figure("undo file", nbytes(report.undo_bytes), "at most" if report.dry_run else ""))
    columns = (*COLUMNS, SIZE) if report.quantized else COLUMNS
    return Page(
        figures=tuple(figures),
        sheets=(Sheet(report.tensors, lambda row: row.name, columns, "weight", weight_flaw),),
        arithmetic=(NEAREST, *([CODES[report.quantized]] if report.quantized in CODES else [])),
        hashes={each.name: each.sha256 for each in report.adapters if each.sha256},
    )
