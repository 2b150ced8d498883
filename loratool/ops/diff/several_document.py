"""Say what three or more adapters share: the cosines of any two, module by module, and which of them fight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...reports.document import Document, Line, Toned, line
from ...reports.numbers import correlation, measure, plural, rank, share, spread
from ...reports.rows import WORST, Category, Flaw, Measure
from ...reports.table import make_table
from ...reports.writing import listed
from .several import AdaptersDiff, ModuleSpread, ValueSpread
from .shared_document import field_lines, fight, holds, letters, relations, shared_picture, sides

PRIORITY = ("least cosine", "interference", "apart", "layers", "count", "pair", "random", "ranks", "by layer", "kind")


VALUE_PRIORITY = ("apart", "count", "layers", "kind")


RANKS = 4  # written one by one


def several_document(report: AdaptersDiff, verbose: bool) -> Document:
    """Make the document of a comparison of three or more adapters."""
    names = letters(len(report.adapters))
    shared = [row for row in report.modules if row.pair]
    table = make_table(
        shared,
        lambda row: row.name,
        several_columns(names),
        PRIORITY,
        find_flaw=lambda row: several_flaw(row, names),
        verbose=verbose,
    )
    values = make_table(
        report.values, lambda row: row.name, _value_columns(names), VALUE_PRIORITY, title="tensor", verbose=verbose
    )
    norms = [[row.norms[i] for row in report.values] for i in range(len(names))]
    subject, *facts = sides(report.adapters, list(map(holds, report.ranks, report.norms, norms)))
    return Document(
        subject=subject,
        facts=tuple(facts),
        tables=(*((table,) if shared else ()), *((values,) if report.values else ())),
        pictures=tuple(shared_picture(report.shared, verbose)) if report.shared else (),
        lists=tuple(_lists(report, names, verbose)),
        verdict=(_verdict(report),),
        verbose=verbose,
    )


def several_columns(names: Sequence[str]) -> list[Category[ModuleSpread] | Measure[ModuleSpread]]:
    """Return the columns; `names` are the adapters'."""
    return [
        Category("kind", lambda row: row.kind),
        Category("ranks", lambda row: _ranks(row.ranks), right=True),
        Measure("least cosine", lambda row: row.cosine, correlation, drawn=True, from_least=True),
        Category("pair", lambda row: "-".join(names[i] for i in row.pair or ())),
        Measure("apart", lambda row: row.relative, share, watched=True),
        Measure("interference", lambda row: row.interference, measure),
        Measure("random", lambda row: row.random_interference, measure),
    ]


def _ranks(ranks: Sequence[int]) -> str:
    if len(set(ranks)) == 1:
        return rank(ranks[0])
    return "/".join(map(rank, ranks)) if len(ranks) <= RANKS else spread(ranks, rank)


def _value_columns(names: Sequence[str]) -> list[Category[ValueSpread] | Measure[ValueSpread]]:
    norms: list[Category[ValueSpread] | Measure[ValueSpread]] = [
        Measure(name, lambda row, i=i: row.norms[i], measure)  # type: ignore[misc]
        for i, name in enumerate(names)
    ]
    return [
        Category("kind", lambda row: row.kind, always=True),
        *norms,
        Measure("apart", lambda row: row.relative, share),
    ]


def several_flaw(row: ModuleSpread, names: Sequence[str]) -> Flaw | None:
    """Return why a module needs attention: one adapter alone has it, or some change nothing there."""
    if not row.pair:
        return Flaw(WORST, f"only in {next(name for name, of in zip(names, row.ranks, strict=True) if of)}")
    zero = [name for name, of, norm in zip(names, row.ranks, row.norms, strict=True) if of and norm == 0]
    return Flaw(1, f"delta is 0 in {' and '.join(zero)}") if zero else None


def _lists(report: AdaptersDiff, names: Sequence[str], verbose: bool) -> Iterator[Line]:
    if report.shared and not report.same:
        yield from relations(report.shared, verbose)
    yield from field_lines(report.fields)
    for label, modules in _found_in(report, names).items():
        yield from listed(label, modules, verbose)
    yield from listed("left out", report.left_out, verbose)


def _found_in(report: AdaptersDiff, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the modules that some adapters lack, by which these are or, if they are fewer, which have them."""
    lacking: dict[str, list[str]] = {}
    for name, modules in zip(names, report.lacking, strict=True):
        for module in modules:
            lacking.setdefault(module, []).append(name)
    found: dict[str, list[str]] = {}
    for module, without in lacking.items():
        those = [name for name in names if name not in without]
        few = f"only in {' '.join(those)}" if len(those) <= len(without) else f"not in {' '.join(without)}"
        found.setdefault(few, []).append(module)
    return found


def _verdict(report: AdaptersDiff) -> Line:
    above = "" if report.above is None else f", which is above {share(report.above)}"
    apart = f"at most {share(report.worst)} apart{above}"
    if report.same:
        whole = [
            plural(len(rows), word) for rows, word in ((report.modules, "module"), (report.values, "tensor")) if rows
        ]
        return line(Toned("same", "good"), f": all have one delta in {' and '.join(whole)}{above}")
    if not report.shared:
        count = sum(row.relative > 0 for row in report.values)
        return line(
            Toned("different", "bad" if above else ""),
            f": {count:,} of {plural(len(report.values), 'tensor')}, {apart}",
        )
    word, why = fight(report.shared)
    return line(Toned(word, "bad" if above else ""), f": {why}, {apart}")
