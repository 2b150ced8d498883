"""Say how two models differ, tensor by tensor: how far apart, how many numbers, and what only one of them has."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...reports.document import Document, Line, Toned, line, path
from ...reports.numbers import dimensions, measure, plural, share, whole
from ...reports.rows import WORST, Category, Flaw, Measure
from ...reports.table import make_table
from ...reports.writing import listed
from .models import CheckpointDiff, TensorDiff

PRIORITY = ("apart", "changed", "layers", "by layer", "count", "max |B-A|", "ulps", "dtype", "shape")


COLUMNS: tuple[Category[TensorDiff] | Measure[TensorDiff], ...] = (
    Category("shape", lambda row: _both(dimensions(row.shape_a), dimensions(row.shape_b)), right=True, always=True),
    Category("dtype", lambda row: _both(row.codec_a or row.dtype_a, row.codec_b or row.dtype_b)),
    Measure("max |B-A|", lambda row: row.largest, measure),
    Measure("ulps", lambda row: row.steps, whole),
    Measure("apart", lambda row: row.relative, share, watched=True, drawn=True),
    Measure("changed", lambda row: row.changed / max(1, math.prod(row.shape_a)), share),
)


def models_document(report: CheckpointDiff, verbose: bool) -> Document:
    """Make the document of a comparison of two models."""
    table = make_table(report.tensors, lambda row: row.name, COLUMNS, PRIORITY, find_flaw=models_flaw, verbose=verbose)
    return Document(
        subject=line("A  ", path(report.a)),
        facts=(line("B  ", path(report.b)), *_facts(report)),
        tables=(table,) if report.tensors else (),
        lists=tuple(_lists(report, verbose)),
        verdict=(_verdict(report),),
        verbose=verbose,
    )


def _facts(report: CheckpointDiff) -> Iterator[Line]:
    """Yield the types that all rows have, which are no column then."""
    types = {(row.codec_a or row.dtype_a, row.codec_b or row.dtype_b) for row in report.tensors}
    if len(types) == 1:
        a, b = types.pop()
        yield line(a if a == b else f"{a} in A, {b} in B")


def _both(a: str, b: str) -> str:
    return a if a == b else f"{a} {b}"


def models_flaw(row: TensorDiff) -> Flaw | None:
    """Return why a tensor needs attention: values that are no numbers came or went, or its shape is another."""
    if row.odd:
        return Flaw(WORST, f"nan or inf on one side alone: {plural(row.odd, 'number')}")
    return Flaw(1, "another shape") if row.shape_a != row.shape_b else None


def _lists(report: CheckpointDiff, verbose: bool) -> Iterator[Line]:
    yield from listed("only in A", report.only_a, verbose)
    yield from listed("only in B", report.only_b, verbose)


def _verdict(report: CheckpointDiff) -> Line:
    count = len(report.tensors)
    total = plural(report.equal + count, "tensor")
    above = "" if report.above is None else f", which is above {share(report.above)}"
    if report.same:
        return line(Toned("same", "good"), f": {report.equal:,} of {total} are equal")
    if not count:
        return line(Toned("different", "bad"), f": the {total} of both are equal{above}")
    said = f"{count:,} of {total}, {share(report.relative)} apart in all, at most {share(report.worst)}{above}"
    return line(Toned("different", "bad" if above else ""), f": {said}")
