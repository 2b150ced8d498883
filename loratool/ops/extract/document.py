"""Say what an extraction kept: the size of each matrix's delta, what of its energy is in the factors, and the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...reports.document import Document, Line, line, path
from ...reports.numbers import dimensions, kept_share, measure, plural, rank, share, spread
from ...reports.outputs import ERROR, OUTPUTS, energy_of_what, output_columns, output_lines, unknown_inputs
from ...reports.rows import Category, Flaw, Measure
from ...reports.table import make_table
from ...reports.writing import command_line, dry_run_mark, listed, wrote_adapter
from .command import ExtractReport, ModuleExtract

PRIORITY = (
    *("delta/W", "energy", OUTPUTS, ERROR, "layers", "by layer", "rank", "over noise", "eff. rank"),
    *("shape", "count", "residual"),
)


LITTLE = 0.5  # of the median energy of its siblings: below, a matrix has a line of its own


def extract_document(report: ExtractReport, verbose: bool) -> Document:
    """Make the document of an extraction."""
    rows = report.modules
    table = make_table(
        rows, lambda row: row.name, extract_columns(rows), PRIORITY, find_flaw=extract_flaw, verbose=verbose
    )
    ranks = [row.rank for row in rows]
    return Document(
        subject=line(path(report.tuned), " - ", path(report.base), " -> ", path(report.out), dry_run_mark(report)),
        facts=(line(f"rank {spread(ranks, rank)}, {', '.join(report.dtypes)}"),) if rows else (),
        tables=(table,) if rows else (),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=tuple(_verdict(report)),
        next=None if report.dry_run else command_line("merge", report.base, report.out, "-o", "rebuilt"),
        verbose=verbose,
    )


def extract_columns(rows: Sequence[ModuleExtract]) -> list[Category[ModuleExtract] | Measure[ModuleExtract]]:
    """Return the columns of an extraction, as far as its rows have them."""
    known = {row.how for row in rows}
    gap = f"gap ({'at most' if known == {'certified'} else 'about'})"
    columns: list[Category[ModuleExtract] | Measure[ModuleExtract]] = [
        Category("shape", lambda row: dimensions(row.shape), right=True, always=True),
        Category("kind", lambda row: row.kind),
        Category("rank", lambda row: str(row.rank), right=True),
        Measure("delta/W", lambda row: row.relative, share, watched=True, drawn=True),
        Measure("energy", lambda row: row.kept, kept_share),
        Measure("eff. rank", lambda row: row.effective_rank, rank),
        Measure("residual", lambda row: row.residual, measure),
    ]
    if any(row.above_noise is not None for row in rows):
        columns.insert(5, Measure("over noise", lambda row: row.above_noise, rank))
    columns += output_columns(rows)
    columns += [Measure(gap, lambda row: row.gap, measure)] if known - {"exact"} else []
    return columns + ([Measure("stored", lambda row: row.stored, measure)] if any(row.stored for row in rows) else [])


def extract_flaw(row: ModuleExtract) -> Flaw | None:
    """Return why a matrix needs attention: little of it is kept."""
    return Flaw(1, f"{kept_share(row.kept)} of its energy kept") if row.kept < LITTLE else None


def _lists(report: ExtractReport, verbose: bool) -> Iterator[Line]:
    yield from listed("kept as they are", report.exact, verbose)
    norms = {name: norm for name, norm in report.left_out.items() if norm is not None}
    if verbose:
        for name in report.left_out:
            yield line(f"left out: {name}" + (f", delta {measure(norms[name])}" if name in norms else ""))
    else:
        yield from listed("left out", report.left_out)
        if norms:
            yield line(f"note: the delta of what is left out is {measure(math.hypot(*norms.values()))} in all")
    yield from unknown_inputs(report, verbose)
    yield from listed("only in the base", report.only_base, verbose)
    yield from listed("only in the tuned model", report.only_tuned, verbose)


def _verdict(report: ExtractReport) -> Iterator[Line]:
    kept = "" if report.kept is None else f"{kept_share(report.kept)} of {energy_of_what(report)} kept in "
    matrices = plural(len(report.modules), "matrix", "matrices")
    relative = "" if report.relative is None else f"; delta/W is {share(report.relative)}"
    unchanged = f", {plural(report.unchanged, 'tensor')} unchanged" if report.unchanged else ""
    yield line(f"{kept}{matrices}{relative}{unchanged}")
    yield from output_lines(report, report.modules)
    yield wrote_adapter(report)
