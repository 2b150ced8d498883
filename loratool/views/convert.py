"""Reports on conversions of adapters: how the factors of each module were made, and the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..architectures.families import FAMILIES
from .parts import quantities as q
from .parts.document import Document, line, path
from .parts.numbers import plural, rank, share, spread
from .parts.report import WritingReport
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import dry_run_mark, labelled, listed, wrote_adapter


@dataclass(frozen=True)
class ModuleConvert:
    """One module of the output.

    Attributes:
        sources: the modules of the adapter that it is made from.
        how: bitwise the same change, if it is `exact` (the very factors), `split`, `fused` or `swapped` (other
            rows: `module_map.TargetModule`), `folded` (the scale, or the direction of a rotation, in the numbers) or
            `expanded` (factors of another kind multiplied out to LoRA's); not so if it is `rounded` (a scale or type
            that it could not have) or `truncated` to a rank.
        rank, alpha: 0 for rotations.
        error: ||D' - D|| / ||D||, for D' as written; 0 for the same change. Of rotations R it is that of R - 1.
    """

    name: str
    sources: tuple[str, ...]
    how: str
    rank: int
    alpha: float
    error: float = 0.0


@dataclass(frozen=True)
class ConvertReport(WritingReport):
    """The result of `convert` of an adapter. family: a key of FAMILIES, None for a language model; dropped: modules and
    extras left out; notes: what the output cannot say; runtime: a key of RUNTIMES, where it is written for one;
    warnings: of changes of which a large part is lost; next: the command that takes the output into the runtime.
    """

    document_function: ClassVar[str] = "convert_document"
    rows: ClassVar[str] = "modules"

    adapter: str
    source_format: str
    out: str
    to: str
    family: str | None
    dry_run: bool
    modules: tuple[ModuleConvert, ...]
    dropped: tuple[str, ...]
    parameters: int
    nbytes: int
    notes: tuple[str, ...] = ()
    runtime: str | None = None
    warnings: tuple[str, ...] = ()
    next: str = ""


COLUMNS: tuple[Category[ModuleConvert] | Measure[ModuleConvert], ...] = (
    Category(q.HOW, lambda row: row.how, priority=1),
    Category(q.FROM_MODULES, lambda row: _sources(row), priority=4),
    Category(q.RANK, lambda row: str(row.rank or "-"), priority=6, right=True, alone=True),
    Category(q.ALPHA, lambda row: f"{row.alpha:g}" if row.rank else "-", priority=7, right=True),
    Measure(q.ERROR, lambda row: row.error or None, share, priority=2),
)


def convert_document(report: ConvertReport, verbose: bool) -> Document:
    """Return the document of a conversion. Modules whose factors are copied have a row only with `verbose`."""
    rows = [row for row in report.modules if verbose or row.how != "exact"]
    table = make_table(rows, COLUMNS, GroupColumns(layers=5, by_layer=8, count=3), verbose=verbose)
    return Document(
        subject=line(path(report.adapter), " -> ", path(report.out), dry_run_mark(report)),
        facts=(line(", ".join(_facts(report))),),
        tables=(table,) if rows else (),
        lists=(*listed("dropped", report.dropped, verbose), *labelled("note", report.notes, verbose)),
        warnings=report.warnings,
        verdict=(line(_verdict(report)), wrote_adapter(report)),
        next=report.next or None,
        verbose=verbose,
    )


def _sources(row: ModuleConvert) -> str:
    """Return the last names of a module's sources. Empty if that is the module's own last name."""
    names = dict.fromkeys(source.rpartition(".")[2] for source in row.sources)
    return ", ".join(names) if [*names] != [row.name.rpartition(".")[2]] else "-"


def _facts(report: ConvertReport) -> Iterator[str]:
    runtime = f" for {report.runtime}" if report.runtime else ""
    yield f"{report.source_format} -> {report.to}{runtime}"
    if report.family:
        yield FAMILIES[report.family].title
    ranks = [row.rank for row in report.modules if row.rank]
    if ranks:
        yield f"rank {spread(ranks, rank)}"
        yield f"alpha {spread([row.alpha for row in report.modules if row.rank], '{:g}'.format)}"


def _verdict(report: ConvertReport) -> str:
    count = len(report.modules)
    errors = [row.error for row in report.modules if row.error]
    if errors:
        hows = Counter(row.how for row in report.modules if row.error)
        inexact = ", ".join(f"{number:,} {how}" for how, number in hows.items())
        exact = f"{count - len(errors):,} of {plural(count, 'module')} exact"
        return f"{exact}, {inexact}: the largest error is {share(max(errors))}"
    if all(row.how == "exact" for row in report.modules):
        what = "factors" if all(row.rank for row in report.modules) else "tensors"
        return f"{plural(count, 'module')}, {what} copied byte for byte"
    return f"{plural(count, 'module')}, their deltas equal bit for bit"
