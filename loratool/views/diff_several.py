"""Reports on three or more adapters: their cosines and interference, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .diff_adapters import WHAT_IS_COMPARED
from .diff_shared import (
    Matrix,
    Shared,
    field_lines,
    fight,
    holds,
    letters,
    of_each_two,
    relations,
    shared_figures,
    shared_heatmaps,
    shared_picture,
    sides,
)
from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, TextSpan, line
from .parts.numbers import all_digits, correlation, measure, plural, rank, share, spread
from .parts.report import DiffReport
from .parts.rows import WORST, Category, Issue, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import listed


@dataclass(frozen=True)
class ModuleSpread:
    """One module of T adapters; D is its delta in one (of DoRA before the norm).

    Attributes:
        ranks, norms: of each adapter, 0 without the module.
        cosine: the least of two adapters that have it; None if only one has.
        pair: these two, counted from 0.
        relative: the largest ||D_j - D_i|| / max(||D_i||, ||D_j||) of two; 1 if one of them lacks it.
        same: whether that is 0 up to float32's rounding.
        interference, random_interference: as of `Shared`; None if only one has it.
    """

    name: str
    kind: str
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    cosine: float | None
    pair: tuple[int, int] | None
    relative: float
    same: bool
    interference: float | None
    random_interference: float | None


@dataclass(frozen=True)
class ValueSpread:
    """A tensor that is no factor, as of `ValueDiff`.

    Attributes:
        norms: None in an adapter without it.
        relative: the largest of two; 1 if one of them lacks it or has another shape.
    """

    name: str
    kind: str
    norms: tuple[float | None, ...]
    relative: float


@dataclass(frozen=True)
class AdaptersDiff(DiffReport):
    """Three or more adapters, in their order, module by module and as a whole.

    Attributes:
        ranks: of each adapter, rank -> how many modules have it.
        norms: of all factors together.
        lacking: of each adapter, its missing modules: those that only others have.
        fields: a field of the configs that differs -> the values.
        shared: cosines and interference, and their meaning.
        relatives: T rows of T: the distance over the larger norm, of all factors together.
        worst: the largest relative distance of two in any module or tensor, 1 if one of them lacks it.
        left_out: modules that --drop excluded from any adapter.
        above: the limit of --fail-above, if `worst` is above it.
        sha256: an adapter -> the hash of its weights file.
    """

    document_function: ClassVar[str] = "several_document"
    page_function: ClassVar[str] = "several_page"
    rows: ClassVar[str] = "modules"

    adapters: tuple[str, ...]
    modules: tuple[ModuleSpread, ...]
    values: tuple[ValueSpread, ...]
    ranks: tuple[Mapping[int, int], ...]
    norms: tuple[float, ...]
    lacking: tuple[tuple[str, ...], ...]
    fields: Mapping[str, tuple[Any, ...]]
    shared: Shared | None
    relatives: Matrix
    worst: float
    same: bool
    left_out: tuple[str, ...] = ()
    kind: str = "several"
    above: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def is_above(self, limit: float) -> bool:
        """Return whether a distance is above a limit."""
        return self.worst > limit


RANKS = 4  # written one by one


def several_document(report: AdaptersDiff, verbose: bool) -> Document:
    """Return the document of a comparison of three or more adapters."""
    names = letters(len(report.adapters))
    shared = [row for row in report.modules if row.pair]
    table = make_table(
        shared,
        several_columns(names),
        GroupColumns(layers=4, by_layer=9, count=5),
        find_issue=lambda row: several_issue(row, names),
        verbose=verbose,
    )
    values = make_table(
        report.values, _value_columns(names), GroupColumns(layers=3, count=2), title="tensor", verbose=verbose
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
    """Return the columns. `names` are those of the adapters."""
    return [
        Category(q.KIND, lambda row: row.kind, priority=10),
        Category(q.RANKS, lambda row: _ranks(row.ranks), priority=8, right=True),
        Measure(q.LEAST_COSINE, lambda row: row.cosine, correlation, priority=1, drawn=True, from_least=True),
        Category(q.PAIR, lambda row: "-".join(names[i] for i in row.pair or ()), priority=6),
        Measure(q.APART, lambda row: row.relative, share, priority=3, watched=True),
        Measure(q.INTERFERENCE, lambda row: row.interference, measure, priority=2),
        Measure(q.RANDOM, lambda row: row.random_interference, measure, priority=7),
    ]


def _ranks(ranks: Sequence[int]) -> str:
    if len(set(ranks)) == 1:
        return rank(ranks[0])
    return "/".join(map(rank, ranks)) if len(ranks) <= RANKS else spread(ranks, rank)


def _value_columns(names: Sequence[str]) -> list[Category[ValueSpread] | Measure[ValueSpread]]:
    norms: list[Category[ValueSpread] | Measure[ValueSpread]] = [
        Measure(q.norm_in(name), lambda row, i=i: row.norms[i], measure)  # type: ignore[misc]
        for i, name in enumerate(names)
    ]
    return [
        Category(q.KIND, lambda row: row.kind, priority=4, always=True),
        *norms,
        Measure(q.APART, lambda row: row.relative, share, priority=1),
    ]


def several_issue(row: ModuleSpread, names: Sequence[str]) -> Issue | None:
    """Return the issue of a module, if any: only one adapter has it, or some change nothing there."""
    if not row.pair:
        return Issue(WORST, f"only in {next(name for name, of in zip(names, row.ranks, strict=True) if of)}")
    zero = [name for name, of, norm in zip(names, row.ranks, row.norms, strict=True) if of and norm == 0]
    return Issue(1, f"delta is 0 in {' and '.join(zero)}") if zero else None


def _lists(report: AdaptersDiff, names: Sequence[str], verbose: bool) -> Iterator[Line]:
    if report.shared and not report.same:
        yield from relations(report.shared, verbose)
    yield from field_lines(report.fields)
    for label, modules in _found_in(report, names).items():
        yield from listed(label, modules, verbose)
    yield from listed("excluded", report.left_out, verbose)


def _found_in(report: AdaptersDiff, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the modules that some adapters miss, by these adapters or, if fewer, by those that have them."""
    lacking: dict[str, list[str]] = {}
    for name, modules in zip(names, report.lacking, strict=True):
        for module in modules:
            lacking.setdefault(module, []).append(name)
    by_adapters: dict[str, list[str]] = {}
    for module, without in lacking.items():
        having = [name for name in names if name not in without]
        few = f"only in {' '.join(having)}" if len(having) <= len(without) else f"not in {' '.join(without)}"
        by_adapters.setdefault(few, []).append(module)
    return by_adapters


def _verdict(report: AdaptersDiff) -> Line:
    above = "" if report.above is None else f", which is above {share(report.above)}"
    apart = f"at most {share(report.worst)} apart{above}"
    if report.same:
        counts = [
            plural(len(rows), word) for rows, word in ((report.modules, "module"), (report.values, "tensor")) if rows
        ]
        return line(TextSpan("same", "good"), f": all have the same delta in {' and '.join(counts)}{above}")
    if not report.shared:
        count = sum(row.relative > 0 for row in report.values)
        return line(
            TextSpan("different", "bad" if above else ""),
            f": {count:,} of {plural(len(report.values), 'tensor')}, {apart}",
        )
    word, why = fight(report.shared)
    return line(TextSpan(word, "bad" if above else ""), f": {why}, {apart}")


VALUE_COLUMNS: tuple[Category[ValueSpread] | Measure[ValueSpread], ...] = (
    Category(q.KIND, lambda row: row.kind, always=True),
    Category(q.NORMS, lambda row: "/".join("-" if norm is None else measure(norm) for norm in row.norms), right=True),
    Measure(q.APART, lambda row: row.relative, share),
)


def several_page(report: AdaptersDiff) -> Page:
    """Return the page of a comparison of three or more adapters."""
    names, rows, values = letters(len(report.adapters)), report.modules, report.values
    modules = Sheet(rows, several_columns(names), find_issue=lambda row: several_issue(row, names))
    tensors = Sheet(values, VALUE_COLUMNS, "tensor")
    return Page(
        figures=(
            *(shared_figures(report.shared) if report.shared else ()),
            Figure("at most", share(report.worst), "apart in any module or tensor"),
            *((Figure("delta", spread(report.norms, measure), "the norms of the adapters"),) if report.shared else ()),
            Figure("modules", all_digits(len(rows)), f"in {len(names)} adapters"),
        ),
        sheets=(modules, tensors),
        heatmaps=(
            *shared_heatmaps(report.shared),
            of_each_two("distance of each pair", q.APART, report.relatives, share),
        )
        if report.shared
        else (),
        arithmetic=(
            *WHAT_IS_COMPARED,
            "each row has the lowest cosine and the largest distance of any two adapters",
        ),
        hashes=report.sha256,
    )
