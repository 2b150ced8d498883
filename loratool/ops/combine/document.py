"""Say what a combination is: of which adapters with which weights, how much of it the rank keeps, what was written."""

from __future__ import annotations

from collections.abc import Iterator

from ...reports.document import Document, Line, Toned, line, path
from ...reports.numbers import kept_share, measure, plural, rank, share, spread
from ...reports.outputs import ERROR, OUTPUTS, energy_of_what, output_columns, output_lines, unknown_inputs
from ...reports.rows import Category, Flaw, Measure
from ...reports.table import make_table
from ...reports.writing import dry_run_mark, listed, weighted, wrote_adapter
from ..diff.shared_document import legend, shared_lines, shared_picture
from .command import CombineReport, ModuleCombine

PRIORITY = ("energy", "shared", "rank", "ranks", "layers", "count", "by layer", "delta", OUTPUTS, ERROR)


EXACT = 1 - 1e-9  # of the energy: what float64 makes of all of it


LOST = 0.02  # of the sum: above what rounding to bf16 costs, which is near 0.003, a type has no numbers so small


def combine_document(report: CombineReport, verbose: bool) -> Document:
    """Make the document of a combination; the exact sum has no table, as each row would say 100%."""
    rows = report.modules
    exact = is_exact(report)
    table = make_table(
        rows, lambda row: row.name, combine_columns(report, exact), PRIORITY, find_flaw=combine_flaw, verbose=verbose
    )
    is_shown = bool(rows) and (verbose or not exact or any(row.remarks for row in table.rows))
    return Document(
        subject=_subject(report),
        facts=(*((line(_facts(report)),) if rows else ()), *(legend(report.adapters) if report.shared else ())),
        tables=(table,) if is_shown else (),
        pictures=tuple(shared_picture(report.shared, verbose)) if report.shared else (),
        lists=(
            *(shared_lines(report.shared, verbose) if report.shared else ()),
            *listed("carried along", report.carried, verbose),
            *listed("left out", report.left_out, verbose),
            *unknown_inputs(report, verbose),
            *_metadata(report),
        ),
        warnings=report.warnings,
        verdict=tuple(_verdict(report, exact)),
        verbose=verbose,
    )


def is_exact(report: CombineReport) -> bool:
    """Return whether what is written is the sum of the changes but for the rounding of its factors."""
    return report.method == "cat" and report.kept >= EXACT


def combine_columns(report: CombineReport, exact: bool) -> list[Category[ModuleCombine] | Measure[ModuleCombine]]:
    """Return the columns; of an exact sum without the energy, which all rows have in full."""
    title = "shared" if report.rank_method == "ctm" else "energy"
    energy: list[Category[ModuleCombine] | Measure[ModuleCombine]] = [
        Measure(title, lambda row: row.kept, kept_share, drawn=True, from_least=True)
    ]
    return [
        Category("ranks", lambda row: "+".join(map(str, row.ranks)), right=True),
        Category("rank", lambda row: str(row.rank), right=True),
        Measure("delta", lambda row: row.norm, measure),
        *([] if exact else energy),
        *(output_columns(report.modules) or [Measure(ERROR, lambda row: row.error, share)]),
    ]


def combine_flaw(row: ModuleCombine) -> Flaw | None:
    """Return why a module needs attention."""
    return Flaw(1, "delta is 0") if row.norm == 0 else None


def _subject(report: CombineReport) -> Line:
    given = zip(report.adapters, report.weights, report.components, strict=True)
    added = [each for name, weight, components in given for each in weighted(name, weight, components)]
    density = "" if report.density is None else f", density {report.density:g}"
    return line(
        *added[1:] if added[0].text == " + " else added,
        " -> ",
        path(report.out),
        f", by {report.method}{density}",
        dry_run_mark(report),
    )


def _facts(report: CombineReport) -> str:
    rows = report.modules
    sides = [spread([row.ranks[i] for row in rows if row.ranks[i]], rank) for i in range(len(report.adapters))]
    ranks = spread([row.rank for row in rows], rank)
    is_sum = all(row.rank == sum(row.ranks) for row in rows)
    words = [f"rank {' + '.join(sides)} {'=' if is_sum else '->'} {ranks}", *report.dtypes]
    return ", ".join([*words, plural(len(rows), "module")])


def _metadata(report: CombineReport) -> Iterator[Line]:
    if report.metadata_left_out:
        names, rest = report.metadata_left_out[:4], len(report.metadata_left_out) - 4
        more = f" and {rest} more" if rest > 0 else ""
        yield line(f"metadata left out, as the adapters' differ: {', '.join(names)}{more}")


def _verdict(report: CombineReport, exact: bool) -> Iterator[Line]:
    if exact and report.error > LOST:
        dtype = "/".join(report.dtypes)
        yield line(Toned(f"{share(report.error)} of the sum is lost", "bad"), f": {dtype} has no numbers so small")
    elif exact:
        yield line(f"the exact sum, to {measure(report.error)}")
    elif report.rank_method == "ctm":
        ranks = spread([min(row.rank, sum(row.ranks)) for row in report.modules], rank)
        modules = plural(len(report.modules), "module")
        hold = "shared direction holds" if ranks == "1" else "shared directions hold"
        yield line(f"{ranks} {hold} {kept_share(report.kept)} of the changes' energy in {modules}")
    else:
        kept, modules = kept_share(report.kept), plural(len(report.modules), "module")
        yield line(f"{kept} of {energy_of_what(report)} kept in {modules}")
    yield from output_lines(report, report.modules)
    yield wrote_adapter(report)
