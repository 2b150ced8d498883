"""Say what a resize kept: the new rank and the share of each delta's energy that it holds, and what was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...reports.document import Document, Line, line, path
from ...reports.numbers import kept_share, measure, plural, rank, spread
from ...reports.outputs import ERROR, OUTPUTS, energy_of_what, output_columns, output_lines, unknown_inputs
from ...reports.rows import Flaw, Measure
from ...reports.table import make_table
from ...reports.writing import dry_run_mark, listed, wrote_adapter
from .command import ModuleResize, ResizeReport

PRIORITY = ("energy", "new rank", OUTPUTS, ERROR, "layers", "by layer", "rank", "eff. rank", "delta", "count")


def resize_document(report: ResizeReport, verbose: bool) -> Document:
    """Make the document of a resize."""
    rows = report.modules
    table = make_table(
        rows, lambda row: row.name, resize_columns(rows), PRIORITY, find_flaw=resize_flaw, verbose=verbose
    )
    old, new = (spread(ranks, rank) for ranks in ([row.rank for row in rows], [row.new_rank for row in rows]))
    return Document(
        subject=line(path(report.adapter), " -> ", path(report.out), dry_run_mark(report)),
        facts=(line(f"rank {old} -> {new}, {', '.join(report.dtypes)}"),) if rows else (),
        tables=(table,) if rows else (),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=(
            line(f"{kept_share(report.kept)} of {energy_of_what(report)} kept in {plural(len(rows), 'module')}"),
            *output_lines(report, rows),
            wrote_adapter(report, report.adapter_nbytes),
        ),
        verbose=verbose,
    )


def resize_columns(rows: Sequence[ModuleResize]) -> list[Measure[ModuleResize]]:
    """Return the columns of a resize; ranks that all rows have are none."""
    differ = len({row.new_rank for row in rows}) > 1
    return [
        *([Measure[ModuleResize]("rank", lambda row: row.rank, rank)] if len({row.rank for row in rows}) > 1 else []),
        *([Measure[ModuleResize]("new rank", lambda row: row.new_rank, _mean_rank, drawn=True)] if differ else []),
        Measure("delta", lambda row: row.norm, measure),
        Measure("eff. rank", lambda row: row.effective_rank, rank),
        Measure("energy", lambda row: row.kept, kept_share, drawn=not differ, from_least=True),
        *output_columns(rows),
    ]


def _mean_rank(x: float) -> str:
    """Write a rank, or the mean of those of a layer, which may be whole."""
    return rank(x).removesuffix(".0")


def resize_flaw(row: ModuleResize) -> Flaw | None:
    """Return why a module needs attention."""
    return Flaw(1, "delta is 0") if row.norm == 0 else None


def _lists(report: ResizeReport, verbose: bool) -> Iterator[Line]:
    yield from listed("carried along", report.carried, verbose)
    yield from listed("left out", report.left_out, verbose)
    yield from unknown_inputs(report, verbose)
