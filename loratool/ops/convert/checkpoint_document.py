"""Say what a conversion of a checkpoint did: which types changed, which numbers became 0, and what was written."""

from __future__ import annotations

from collections.abc import Iterator

from ...architectures.families import FAMILIES
from ...reports.document import Document, Line, line, path
from ...reports.numbers import dimensions, nbytes, plural, whole
from ...reports.rows import Category, Measure
from ...reports.table import make_table
from ...reports.writing import dry_run_mark, listed, not_copied, outcome, told
from .checkpoint import CastTensor, CheckpointConvertReport

PRIORITY = ("became 0", "count", "layers", "from", "to", "shape", "by layer")


COLUMNS: tuple[Category[CastTensor] | Measure[CastTensor], ...] = (
    Category("shape", lambda row: dimensions(row.shape), right=True, always=True),
    Category("from", lambda row: row.source_dtype),
    Category("to", lambda row: row.dtype),
    Measure("became 0", lambda row: row.flushed, whole, summed=True),
)


def converted_document(report: CheckpointConvertReport, verbose: bool) -> Document:
    """Make the document of a converted checkpoint: a row for tensors of which numbers became 0."""
    rows = [row for row in report.cast if verbose or row.flushed]
    table = make_table(rows, lambda row: row.name, COLUMNS, PRIORITY, title="tensor", verbose=verbose)
    return Document(
        subject=line(path(report.checkpoint), " -> ", path(report.out), dry_run_mark(report)),
        facts=tuple(map(line, _facts(report))),
        tables=(table,) if rows else (),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=(_verdict(report),),
        verbose=verbose,
    )


def _facts(report: CheckpointConvertReport) -> Iterator[str]:
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in report.cast:
        kinds.setdefault((row.source_dtype, row.dtype), []).append(row.flushed or 0)
    for (old, new), flushed in kinds.items():
        zeros = plural(sum(flushed), "number") if any(flushed) else "no number"
        said = "" if report.dry_run else f", {zeros} became 0"
        yield f"{plural(len(flushed), 'tensor')} {old} -> {new}{said}"
    if report.family:
        renamed = plural(report.renamed, "tensor")
        yield f"{renamed} of {FAMILIES[report.family].title} renamed, {report.regrouped:,} made of rows of others"
    if report.copied:
        yield f"{plural(report.copied, 'tensor')} copied byte for byte"


def _lists(report: CheckpointConvertReport, verbose: bool) -> Iterator[Line]:
    yield from listed("left out", report.left_out, verbose)
    yield from told("shared", [f"{name} is {kept}" for name, kept in report.shared.items()], verbose)
    yield from not_copied(report.left_behind, verbose)


def _verdict(report: CheckpointConvertReport) -> Line:
    files = plural(max(1, len(report.files)), "file")
    return outcome(report.out, report.dry_run, f"{nbytes(report.nbytes)}, {report.to}, {files}")
