"""Reports on the differences between two models, tensor by tensor, and on tensors that only one has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, TextSpan, line, path
from .parts.numbers import all_digits, dimensions, measure, plural, share
from .parts.report import DiffReport
from .parts.rows import WORST, Category, Issue, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import listed


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that differs between two checkpoints. Quantized weights are compared as numbers, not as codes.

    Attributes:
        dtype_a, dtype_b: of a quantized weight, that of its codes.
        relative: ||B - A|| / max(||A||, ||B||); None if the two cannot be compared: their shapes differ, nan or inf is
            on one side alone, or they differ and are not floating-point.
        largest: the largest absolute difference; None where `relative` is.
        steps: the most ulps between two values; None where `relative` is, for float64 and if the types differ.
        changed: how many values differ; None if the shapes differ, or types that are not both floating-point.
        odd: how many are nan or inf on one side and not on the other.
        codec_a, codec_b: the format of a quantized weight, None for a plain tensor.
    """

    name: str
    dtype_a: str
    dtype_b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    relative: float | None
    largest: float | None
    steps: int | None
    changed: int | None
    odd: int
    codec_a: str | None = None
    codec_b: str | None = None


@dataclass(frozen=True)
class CheckpointDiff(DiffReport):
    """Two checkpoints, tensor by tensor.

    Attributes:
        tensors: those that differ.
        equal: how many do not.
        relative: over the tensors that are compared; None if none is.
        worst: the largest of any of these; None if none is.
        compared: how many tensors that is: those of both sides that can be compared, without those whose codes are
            equal but cannot be read.
        above: the limit of --fail-above, if the check said no.
    """

    document_function: ClassVar[str] = "models_document"
    page_function: ClassVar[str] = "models_page"
    rows: ClassVar[str] = "tensors"

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    equal: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    relative: float | None
    worst: float | None
    same: bool
    compared: int
    kind: str = "checkpoints"
    above: float | None = None

    def is_above(self, limit: float) -> bool:
        """Return whether a distance is above a limit. It is 1 for one-sided tensors, and infinite if unknown."""
        one_sided = 1.0 if self.only_a or self.only_b else 0.0
        unknown = any(row.relative is None for row in self.tensors)
        return unknown or max(self.worst or 0.0, one_sided) > limit


COLUMNS: tuple[Category[TensorDiff] | Measure[TensorDiff], ...] = (
    Category(
        q.SHAPE,
        lambda row: both_sides(dimensions(row.shape_a), dimensions(row.shape_b)),
        priority=9,
        right=True,
        always=True,
    ),
    Category(q.DTYPE, lambda row: both_sides(row.codec_a or row.dtype_a, row.codec_b or row.dtype_b), priority=8),
    Measure(q.MAX_DIFFERENCE, lambda row: row.largest, measure, priority=6),
    Measure(q.ULPS, lambda row: row.steps, all_digits, priority=7),
    Measure(q.APART, lambda row: row.relative, share, priority=1, watched=True, drawn=True),
    Measure(q.CHANGED, lambda row: _changed_share(row), share, priority=2),
)


def models_document(report: CheckpointDiff, verbose: bool) -> Document:
    """Return the document of a comparison of two models."""
    table = make_table(report.tensors, COLUMNS, GroupColumns(layers=3, by_layer=4, count=5), verbose=verbose)
    return Document(
        subject=line("A  ", path(report.a)),
        facts=(line("B  ", path(report.b)), *_facts(report)),
        tables=(table,) if report.tensors else (),
        lists=tuple(_lists(report, verbose)),
        verdict=(_verdict(report),),
        verbose=verbose,
    )


def _facts(report: CheckpointDiff) -> Iterator[Line]:
    """Yield the types that all rows share. They get no column then."""
    types = {(row.codec_a or row.dtype_a, row.codec_b or row.dtype_b) for row in report.tensors}
    if len(types) == 1:
        a, b = types.pop()
        yield line(a if a == b else f"{a} in A, {b} in B")


def _changed_share(row: TensorDiff) -> float | None:
    return None if row.changed is None else row.changed / max(1, math.prod(row.shape_a))


def both_sides(a: str, b: str) -> str:
    """Return the words of both sides, or the one that they share."""
    return a if a == b else f"{a} {b}"


def models_issue(row: TensorDiff) -> Issue | None:
    """Return the issue of a tensor, if any: the reason why it cannot be compared."""
    if row.relative is not None:
        return None
    count = f": {plural(row.odd, 'number')}" if row.odd else ""
    return Issue(WORST, f"not comparable, {_why_not(row)}{count}")


def _why_not(row: TensorDiff) -> str:
    if row.odd:
        return "nan or inf on one side only"
    return "shapes differ" if row.shape_a != row.shape_b else "not floating-point"


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
        return line(TextSpan("same", "good"), f": {report.equal:,} of {total} are equal")
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
    return line(TextSpan("different", "" if report.above is None else "bad"), f": {', '.join(parts)}")


def over_how_many(report: CheckpointDiff) -> str:
    """Return in words which tensors the distance covers: all, or how many."""
    in_all = report.equal + len(report.tensors) + len(report.only_a) + len(report.only_b)
    return "in all" if report.compared == in_all else f"over {plural(report.compared, 'tensor')}"


def models_page(report: CheckpointDiff) -> Page:
    """Return the page of a comparison of two models."""
    rows = report.tensors
    return Page(
        figures=tuple(_figures(report)),
        sheets=(Sheet(rows, COLUMNS, title="tensor", find_issue=models_issue),),
        arithmetic=(
            "apart is |B - A| over the larger of |A| and |B|, with Frobenius norms: 141% with nothing in common, 200% "
            "for opposites; pairs that are not comparable are in no total",
            "quantized weights are dequantized and then compared",
            "an ulp is the step from a number to the next of its dtype",
        ),
    )


def _figures(report: CheckpointDiff) -> Iterator[Figure]:
    total = plural(report.equal + len(report.tensors), "tensor")
    yield Figure("differ", all_digits(len(report.tensors)), f"of {total} in both")
    if report.relative is not None and report.worst is not None:
        yield Figure("apart", share(report.relative), over_how_many(report))
        yield Figure("at most", share(report.worst), "apart in any tensor")
    if unknown := sum(row.relative is None for row in report.tensors):
        yield Figure(
            "not comparable", all_digits(unknown), "shapes differ, nan or inf on one side, or not floating-point"
        )
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        if names:
            yield Figure(f"only in {side}", all_digits(len(names)), "tensors")
