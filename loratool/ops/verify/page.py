"""Show a verification: the verdict on each tensor that the adapters change, and on all that are wrong."""

from __future__ import annotations

from collections.abc import Iterator

from ...reports.numbers import plural, whole
from ...reports.page.content import Figure, Page, Sheet
from ...reports.rows import WORST, Category, Flaw
from .command import TensorVerdict, VerifyReport

VERDICT: Category[TensorVerdict] = Category("verdict", lambda row: row.verdict, always=True)


WHAT: Category[TensorVerdict] = Category("what", lambda row: row.detail or "-", always=True)


def verify_page(report: VerifyReport) -> Page:
    """Make the page of a verification."""
    rows = report.tensors
    columns = (VERDICT, WHAT) if any(row.detail for row in rows) else (VERDICT,)
    return Page(
        figures=tuple(_figures(report)),
        sheets=(Sheet(rows, lambda row: row.name, columns, "weight", _find_flaw),),
        arithmetic=(
            "exact: the bits are those that merge writes, of each weight the number of its type that is nearest to "
            "what its update defines (W + s B A for LoRA), or its code",
            "rounding: one known way of rounding on the way to the weight explains all weights of the tensor",
            "requantized: another program chose the codes, which show the merge only about",
        ),
        hashes=report.sha256,
    )


def _find_flaw(row: TensorVerdict) -> Flaw | None:
    return Flaw(WORST, row.detail or row.verdict) if row.verdict == "wrong" else None


def _figures(report: VerifyReport) -> Iterator[Figure]:
    coded = sum(each.verdict == "requantized" for each in report.tensors)
    yield Figure("the merge is", report.status)
    yield Figure("exact", whole(report.exact), f"of {plural(len(report.tensors), 'tensor')}")
    yield Figure("rounded otherwise", whole(report.rounded), "and right")
    yield Figure("wrong", whole(report.wrong))
    if coded:
        yield Figure("requantized", whole(coded))
    yield Figure("untouched", whole(report.untouched), "are the base's")
    if report.missing:
        yield Figure("missing", whole(len(report.missing)), "in the merged model")
    if report.extra:
        yield Figure("extra", whole(len(report.extra)), "in the merged model")
