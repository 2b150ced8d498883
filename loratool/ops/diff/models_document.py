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
    Measure(
        "changed", lambda row: None if row.changed is None else row.changed / max(1, math.prod(row.shape_a)), share
    ),
)


def models_document(report: CheckpointDiff, verbose: bool) -> Document:
    """Make the document of a comparison of two models."""
    table = make_table(report.tensors, lambda row: row.name, COLUMNS, PRIORITY, verbose=verbose)
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
    """Return why a tensor cannot be compared."""
    if row.relative is not None:
        return None
    count = f": {plural(row.odd, 'number')}" if row.odd else ""
    return Flaw(WORST, f"not comparable, {_why_not(row)}{count}")


def _why_not(row: TensorDiff) -> str:
    if row.odd:
        return "nan or inf on one side alone"
    return "another shape" if row.shape_a != row.shape_b else "not floating-point"


def _lists(report: CheckpointDiff, verbose: bool) -> Iterator[Line]:
    unknown: dict[str, list[str]] = {}
    for row in report.tensors:
        if row.relative is None:
            unknown.setdefault(_why_not(row), []).append(row.name)
    for why, names in unknown.items():
        yield from listed(f"not comparable, {why}", names, verbose)
    yield from listed("only in A", report.only_a, verbose)
    yield from listed("only in B", report.only_b, verbose)


def _verdict(report: CheckpointDiff) -> Line:
    count = len(report.tensors)
    total = plural(report.equal + count, "tensor")
    if report.same:
        return line(Toned("same", "good"), f": {report.equal:,} of {total} are equal")
    equal = f"the {total} of both {'is' if report.equal == 1 else 'are'} equal"
    parts = [f"{count:,} of {total}" if count else equal]
    unknown = sum(row.relative is None for row in report.tensors)
    others = {"not comparable": unknown, "only in A": len(report.only_a), "only in B": len(report.only_b)}
    parts += [f"{number:,} {what}" for what, number in others.items() if number]
    if count > unknown and report.relative is not None and report.worst is not None:
        above = report.above is not None and report.worst > report.above
        parts += [
            f"{share(report.relative)} apart {over_how_many(report)}",
            f"at most {share(report.worst)}" + (f", which is above {share(report.above or 0.0)}" if above else ""),
        ]
    return line(Toned("different", "" if report.above is None else "bad"), f": {', '.join(parts)}")


def over_how_many(report: CheckpointDiff) -> str:
    """Return over which tensors the distance is: all, or how many of them."""
    in_all = report.equal + len(report.tensors) + len(report.only_a) + len(report.only_b)
    return "in all" if report.compared == in_all else f"over {plural(report.compared, 'tensor')}"
