"""Reports on the differences between the headers of two models or adapters: names, shapes and types of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .diff_models import both_sides
from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, TextSpan, line, path
from .parts.numbers import all_digits, dimensions, plural
from .parts.report import Report
from .parts.rows import Category
from .parts.table import GroupColumns, make_table
from .parts.writing import listed


@dataclass(frozen=True)
class HeaderDiff:
    """A tensor of both sides that has another shape or type in each.

    Attributes:
        dtype_a, dtype_b: of a quantized weight, that of its codes.
        codec_a, codec_b: the format of a quantized weight, if the other side has it in another; None for any other
            tensor.
    """

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    codec_a: str | None = None
    codec_b: str | None = None


@dataclass(frozen=True)
class HeadersDiff(Report):
    """The result of `diff --headers`.

    Attributes:
        tensors: those of both sides with another shape or type.
        equal: how many of both have the same.
    """

    document_function: ClassVar[str] = "headers_document"
    page_function: ClassVar[str] = "headers_page"
    rows: ClassVar[str] = "tensors"

    a: str
    b: str
    tensors: tuple[HeaderDiff, ...]
    equal: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    same: bool
    kind: str = "headers"

    def is_above(self, limit: float) -> bool:
        """Return whether a distance is above a limit. It is 1 for one-sided tensors, and infinite for others."""
        return bool(self.tensors) or (not self.same and limit < 1)


COLUMNS = (
    Category[HeaderDiff](
        q.SHAPE,
        lambda row: both_sides(dimensions(row.shape_a), dimensions(row.shape_b)),
        priority=2,
        right=True,
        always=True,
    ),
    Category[HeaderDiff](
        q.DTYPE, lambda row: both_sides(row.codec_a or row.dtype_a, row.codec_b or row.dtype_b), priority=1, always=True
    ),
)


def headers_document(report: HeadersDiff, verbose: bool) -> Document:
    """Return the document of a comparison of headers."""
    table = make_table(report.tensors, COLUMNS, GroupColumns(layers=3, by_layer=4, count=5), verbose=verbose)
    return Document(
        subject=line("A  ", path(report.a)),
        facts=(line("B  ", path(report.b)),),
        tables=(table,) if report.tensors else (),
        lists=(*listed("only in A", report.only_a, verbose), *listed("only in B", report.only_b, verbose)),
        verdict=(_verdict(report),),
        verbose=verbose,
    )


def _counts(report: HeadersDiff) -> dict[str, int]:
    counts = {
        "of another shape": sum(row.shape_a != row.shape_b for row in report.tensors),
        "of another type": sum((row.dtype_a, row.codec_a) != (row.dtype_b, row.codec_b) for row in report.tensors),
        "only in A": len(report.only_a),
        "only in B": len(report.only_b),
    }
    return {what: count for what, count in counts.items() if count}


def _verdict(report: HeadersDiff) -> Line:
    if report.same:
        return line(TextSpan("same", "good"), f": names, shapes and types of {plural(report.equal, 'tensor')}")
    count = report.equal + len(report.tensors)
    equal = f"{report.equal:,} of {plural(count, 'tensor')} of both are the same" if count else "no name is in both"
    differing = ", ".join(f"{number:,} {what}" for what, number in _counts(report).items())
    return line(f"different: {differing}; {equal}")


def headers_page(report: HeadersDiff) -> Page:
    """Return the page of a comparison of headers."""
    return Page(
        figures=(
            Figure("same", all_digits(report.equal), f"of {report.equal + len(report.tensors):,} tensors in both"),
            *(Figure(what, all_digits(count), "tensors") for what, count in _counts(report).items()),
        ),
        sheets=(Sheet(report.tensors, COLUMNS, title="tensor"),),
        arithmetic=("everything here comes from the headers of the files: no weight is read",),
    )
