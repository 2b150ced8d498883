"""Say what a merge did: a row a group of weights, how much of the delta survived, and what was written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from ...reports.document import Document, Line, line, path
from ...reports.numbers import KEPT_ENOUGH, dimensions, kept_share, measure, nbytes, plural, scaling, share, spread
from ...reports.rows import Category, Flaw, Measure, common
from ...reports.table import make_table
from ...reports.writing import command_line, dry_run_mark, listed, not_copied, told, weighted
from .report import MergeReport, TensorReport

PRIORITY = (
    "delta/W kept missed size layers".split()
    + ["by layer", "count", "stored as", "shape", "update", "rank", "scale"]
)  # fmt: skip


@lru_cache(1024)
def _scales(scales: tuple[float, ...]) -> str:
    return ", ".join(map(scaling, scales)) or "-"


COLUMNS: tuple[Category[TensorReport] | Measure[TensorReport], ...] = (
    Category("shape", lambda row: dimensions(row.shape), right=True),
    Category("update", lambda row: row.update),
    Category("rank", lambda row: str(row.rank) if row.rank else "-", right=True, alone=True),
    Category("scale", lambda row: _scales(row.scales), right=True, alone=True),
    Category("stored as", lambda row: _stored_as(row)),
    Measure("delta/W", lambda row: row.relative, share, watched=True, drawn=True),
    Measure("kept", lambda row: None if row.kept is None else min(row.kept, 1.0), kept_share),
    Measure("missed", lambda row: row.missed, measure),
)


SIZE: Measure[TensorReport] = Measure("size", lambda row: row.nbytes, nbytes, summed=True)


def merge_document(report: MergeReport, verbose: bool) -> Document:
    """Make the document of a merge."""
    columns = (*COLUMNS, SIZE) if report.quantized else COLUMNS
    table = make_table(report.tensors, lambda row: row.name, columns, PRIORITY, find_flaw=weight_flaw, verbose=verbose)
    return Document(
        subject=_subject(report),
        facts=tuple(_facts(report)),
        tables=(table,) if report.tensors else (),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=tuple(_verdict(report)),
        next=_next(report),
        verbose=verbose,
    )


def weight_flaw(row: TensorReport) -> Flaw | None:
    """Return why a weight needs attention: nothing of its delta arrives, or too little."""
    if row.relative == 0:
        return Flaw(1, "delta is 0")
    if row.changed == 0 and row.relative:
        return Flaw(2, "unchanged: the delta rounds away")
    if row.kept is not None and row.kept < KEPT_ENOUGH:
        return Flaw(3, f"{kept_share(row.kept)} kept")
    return None


def _stored_as(row: TensorReport) -> str:
    """Return the type of a merged tensor, with that in the base where it was another."""
    return row.dtype if row.source_dtype in ("", row.dtype) else f"{row.source_dtype} -> {row.dtype}"


def _subject(report: MergeReport) -> Line:
    added = [each for adapter in report.adapters for each in weighted(adapter.name, adapter.weight, adapter.components)]
    return line(path(report.base), *added, " -> ", path(report.out), dry_run_mark(report))


def _facts(report: MergeReport) -> Iterator[Line]:
    rows = report.tensors
    if not rows:
        return
    ranks = [row.rank for row in rows if row.rank]
    scales = {_scales(row.scales) for row in rows} - {"-"}
    words = [", ".join(dict.fromkeys(row.update for row in rows))]
    words += [f"rank {spread(ranks, whole_or_range)}"] if ranks else []
    words += [f"scale{'s' * (',' in ''.join(scales))} {scales.pop()}"] if len(scales) == 1 else []
    words += [", ".join(dict.fromkeys(map(_stored_as, rows)))]
    shape = common(dimensions(row.shape) for row in rows)
    yield line(", ".join([*words, shape] if shape else words))


def whole_or_range(rank: float) -> str:
    return f"{rank:g}"


def _lists(report: MergeReport, verbose: bool) -> Iterator[Line]:
    yield from listed("left out", report.left_out, verbose)
    yield from not_copied(report.left_behind, verbose)
    yield from told("note", report.notes, verbose)
    if report.dry_run and report.sizes:
        sizes = ", ".join(f"{way} {nbytes(size)}" for way, size in report.sizes.items())
        yield line(f"note: with --quantized: {sizes}")


def _verdict(report: MergeReport) -> Iterator[Line]:
    changed = len(report.tensors) if report.changed is None else report.changed
    total = plural(len(report.tensors) + report.copied + report.decoded, "tensor")
    others = f", {report.decoded:,} others {'encoded' if report.quantized == 'like' else 'decoded'}"
    others = others if report.decoded else ""
    was = f" (was {nbytes(report.base_nbytes)})" if report.quantized else ""
    if report.dry_run:
        yield line(f"{changed:,} of {total} would change{others}, {report.copied:,} would be copied")
        undo = f", undo at most {nbytes(report.undo_bytes)}" if report.undo_bytes is not None else ""
        free = "" if report.free_bytes is None else f"; {nbytes(report.free_bytes)} are free"
        yield line("would write ", path(report.out), f"  {nbytes(report.nbytes)}{was}{undo}{free}")
        return
    left = "" if report.kept is None else f", {kept_share(report.kept)} of the delta kept"
    nothing = "; the merge changes nothing" if report.changed == 0 else ""
    yield line(f"{changed:,} of {total} changed{others}{left}{nothing}")
    yield line("wrote ", path(report.out), f"  {nbytes(report.nbytes)}{was}")
    if report.undo and report.undo_bytes is not None:
        yield line("undo  ", path(report.undo), f"  {nbytes(report.undo_bytes)}")


def _next(report: MergeReport) -> str | None:
    """Return the call that verifies the merge, where it needs none of the merge's own options."""
    if report.dry_run or report.left_out or report.quantized == "like":
        return None
    adapters = [each.name if each.weight == 1 else f"{each.name}:{each.weight:g}" for each in report.adapters]
    if any(each.components for each in report.adapters):
        return None
    return command_line("verify", report.base, adapters, report.out)
