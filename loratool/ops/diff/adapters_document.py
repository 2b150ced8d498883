"""Say how two adapters differ: alike or not, module by module, and what only one of them has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...reports.document import Document, Line, Toned, line
from ...reports.numbers import correlation, degrees, measure, plural, share
from ...reports.pictures import grid, side_by_side
from ...reports.rows import WORST, Category, Flaw, Measure
from ...reports.table import make_table
from ...reports.writing import listed
from .adapters import AdapterDiff, ModuleDiff, Phi
from .shared import MEANINGS
from .shared_document import field_lines, holds, overlap_words, sides
from .values import ValueDiff

PRIORITY = (
    "cosine",
    "apart",
    "layers",
    "interference",
    "A delta/W",  # there where a base was named
    "B delta/W",
    "size B/A",
    "count",
    "angle",
    "phi",
    "ranks",
    "by layer",
    "A amplified",
    "B amplified",
    "kind",
)


COLUMNS: tuple[Category[ModuleDiff] | Measure[ModuleDiff], ...] = (
    Category("kind", lambda row: row.kind),
    Category("ranks", lambda row: f"{row.rank_a}/{row.rank_b}", right=True),
    Measure("cosine", lambda row: row.cosine if _is_in_both(row) else None, correlation, drawn=True, from_least=True),
    Measure("apart", lambda row: row.relative, share, watched=True),
    Measure("interference", lambda row: row.interference, measure),
    Measure("size B/A", lambda row: row.norm_b / row.norm_a if row.norm_a else None, measure, watched=True),
    Measure("A delta/W", lambda row: row.size_a, share),
    Measure("B delta/W", lambda row: row.size_b, share),
    Measure("A amplified", lambda row: row.amplification_a, measure),
    Measure("B amplified", lambda row: row.amplification_b, measure),
    Measure("angle", lambda row: max(row.angles_right) if row.angles_right else None, degrees),
    Measure("phi", lambda row: row.phi.right[-1][-1] if row.phi else None, correlation),
)


# what a measure is of one subspace on both sides: a column of it alone is none
OF_ONE_SUBSPACE = {"angle": degrees(0), "phi": correlation(1)}


VALUE_COLUMNS: tuple[Category[ValueDiff] | Measure[ValueDiff], ...] = (
    Category("kind", lambda row: row.kind, always=True),
    Measure("A", lambda row: row.norm_a, measure),
    Measure("B", lambda row: row.norm_b, measure),
    Measure("apart", lambda row: row.relative, share),
)


VALUE_PRIORITY = ("apart", "count", "layers", "A", "B", "kind")


def adapters_document(report: AdapterDiff, verbose: bool) -> Document:
    """Make the document of a comparison of two adapters."""
    both = [row for row in report.modules if _is_in_both(row)]
    table = make_table(
        both, lambda row: row.name, adapters_columns(both), PRIORITY, find_flaw=adapters_flaw, verbose=verbose
    )
    values = make_table(
        report.values, lambda row: row.name, VALUE_COLUMNS, VALUE_PRIORITY, title="tensor", verbose=verbose
    )
    said = [
        holds(report.ranks_a, report.norm_a, [row.norm_a for row in report.values]),
        holds(report.ranks_b, report.norm_b, [row.norm_b for row in report.values]),
    ]
    subject, *facts = sides((report.a, report.b), said)
    return Document(
        subject=subject,
        facts=tuple(facts),
        tables=(*((table,) if both else ()), *((values,) if report.values else ())),
        pictures=tuple(_pictures(report.phi)) if verbose and report.phi else (),
        lists=tuple(_lists(report, verbose)),
        verdict=(_verdict(report),),
        verbose=verbose,
    )


def _is_in_both(row: ModuleDiff) -> bool:
    return bool(row.rank_a and row.rank_b)


def adapters_columns(rows: Sequence[ModuleDiff]) -> list[Category[ModuleDiff] | Measure[ModuleDiff]]:
    """Return the columns, without measures that tell of all rows that they have one subspace."""

    def is_told(column: Category[ModuleDiff] | Measure[ModuleDiff]) -> bool:
        if isinstance(column, Category) or column.title not in OF_ONE_SUBSPACE:
            return True
        values = [value for row in rows if (value := column.of(row)) is not None]
        return any(column.write(value) != OF_ONE_SUBSPACE[column.title] for value in values)

    return [column for column in COLUMNS if is_told(column)]


def adapters_flaw(row: ModuleDiff) -> Flaw | None:
    """Return why a module needs attention: one of the adapters lacks it, or changes nothing there."""
    if not _is_in_both(row):
        return Flaw(WORST, f"only in {'A' if row.rank_a else 'B'}")
    zero = [letter for letter, norm in (("A", row.norm_a), ("B", row.norm_b)) if norm == 0]
    return Flaw(1, f"delta is 0 in {' and '.join(zero)}") if zero else None


def _lists(report: AdapterDiff, verbose: bool) -> Iterator[Line]:
    if report.pair and not report.same:
        yield line(f"{overlap_words([report.pair])}: {MEANINGS[report.pair.relation]}")
    yield from field_lines(report.fields)
    yield from listed("only in A", report.only_a, verbose)
    yield from listed("only in B", report.only_b, verbose)
    yield from listed("left out", report.left_out, verbose)


def _pictures(phi: Phi) -> list[Line]:
    """Draw phi of both sides, with the random subspaces' mean in the title."""
    drawn = [
        grid(f"phi(i, j), {side} (random {random[-1][-1]:.3f})", phi.i, phi.j, values)
        for side, values, random in (("input", phi.right, phi.random_right), ("output", phi.left, phi.random_left))
    ]
    return side_by_side(*drawn)


def _verdict(report: AdapterDiff) -> Line:
    above = "" if report.above is None else f", which is above {share(report.above)}"
    if report.same:
        deltas = f"the same delta in {plural(len(report.modules), 'module')}" if report.modules else ""
        values = f"the same values in {plural(len(report.values), 'tensor')}" if report.values else ""
        return line(Toned("same", "good"), f": {' and '.join(filter(None, (deltas, values)))}{above}")
    if not report.pair:
        apart = sum(row.relative > 0 for row in report.values)
        said = f"{apart:,} of {plural(len(report.values), 'tensor')} apart, at most {share(report.worst)}{above}"
        return line(Toned("different", "bad" if above else ""), f": {said}")
    said = f"cosine {correlation(report.cosine)}, {share(report.relative)} apart, at most {share(report.worst)}{above}"
    return line(Toned(report.pair.relation, "bad" if above else ""), f": {said}")
