"""Reports on combinations: the adapters with their weights, the share that the rank keeps, and the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..numerics.spectrum import SpectrumPoints
from .diff_shared import Shared, legend, shared_figures, shared_heatmaps, shared_lines, shared_picture
from .page.curves import spectrum_curves
from .parts import quantities as q
from .parts.content import Curve, Figure, Page, Sheet
from .parts.document import Document, Line, TextSpan, line, path
from .parts.numbers import kept_share, measure, nbytes, plural, quantity, rank, share, spread
from .parts.outputs import (
    energy_of_what,
    kept_figures,
    output_columns,
    output_lines,
    unknown_inputs,
    what_energy_is,
)
from .parts.report import WritingReport
from .parts.rows import Category, Issue, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import dry_run_mark, listed, weighted, wrote_adapter


@dataclass(frozen=True)
class ModuleCombine:
    """One module: D is the method's result, and D' the written change.

    Attributes:
        ranks: of the adapters; 0 if one does not have the module.
        rank: of the output.
        norm: ||D||.
        kept: the share of ||D||^2 that the rank holds; with --imatrix of ||D W||^2, W the weights of the inputs. By the
            rank method `ctm` the share of the changes' energy, each by its own norm, in the directions that they share.
        error: ||D' - D|| / ||D||.
        weighted_error: the same for D' W and D W; None without --imatrix, or if it does not have the inputs.
        spectrum: the curve of D's singular values, with --imatrix of D W's; of a method of entries as far as `rank`.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    norm: float
    kept: float
    error: float
    weighted_error: float | None
    spectrum: SpectrumPoints | None = None


@dataclass(frozen=True)
class CombineReport(WritingReport):
    """The result of `combine`.

    Attributes:
        kept, error, weighted_error: over all modules, the last over those that have it; for the rank method `ctm`, kept
            is the mean over the changes.
        parameters, nbytes: of the output.
        carried: tensors other than factors, added up or copied unchanged.
        left_out: modules that --drop, --target and --exclude exclude.
        components: of each adapter, components and patterns with another weight than the adapter; the last that matches
            a module wins.
        dtypes: of the output without scalars, the commonest first.
        metadata_left_out: keys in which the files differ.
        rank_method: a key of RANK_METHODS.
        imatrix: the file that --imatrix named.
        unweighted: modules whose inputs it does not have.
        shared: the overlaps of the weighted changes; only in a dry run of several adapters, else None.
        sha256: an adapter -> the hash of its weights file.
    """

    document_function: ClassVar[str] = "combine_document"
    page_function: ClassVar[str] = "combine_page"
    rows: ClassVar[str] = "modules"

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    density: float | None
    out: str
    dry_run: bool
    modules: tuple[ModuleCombine, ...]
    kept: float
    error: float
    weighted_error: float | None
    parameters: int
    nbytes: int
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    components: tuple[Mapping[str, float], ...]
    dtypes: tuple[str, ...] = ()
    metadata_left_out: tuple[str, ...] = ()
    rank_method: str = "truncate"
    imatrix: str | None = None
    unweighted: tuple[str, ...] = ()
    shared: Shared | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


EXACT = 1 - 1e-9  # of the energy: what float64 makes of all of it

LOST = 0.02  # of the sum: above what rounding to bf16 costs, which is near 0.003, a type has no numbers so small


def combine_document(report: CombineReport, verbose: bool) -> Document:
    """Return the document of a combination. The exact sum has no table, as each row would say 100%."""
    rows = report.modules
    exact = is_exact(report)
    columns = combine_columns(report, exact)
    table = make_table(
        rows, columns, GroupColumns(layers=4, by_layer=6, count=5), find_issue=combine_issue, verbose=verbose
    )
    is_shown = bool(rows) and (verbose or not exact or any(row.issues for row in table.rows))
    return Document(
        subject=_subject(report),
        facts=(*((line(_facts(report)),) if rows else ()), *(legend(report.adapters) if report.shared else ())),
        tables=(table,) if is_shown else (),
        pictures=tuple(shared_picture(report.shared, verbose)) if report.shared else (),
        lists=(
            *(shared_lines(report.shared, verbose) if report.shared else ()),
            *listed("carried along", report.carried, verbose),
            *listed("excluded", report.left_out, verbose),
            *unknown_inputs(report, verbose),
            *_metadata(report),
        ),
        warnings=report.warnings,
        verdict=tuple(_verdict(report, exact)),
        verbose=verbose,
    )


def is_exact(report: CombineReport) -> bool:
    """Return whether the output is the sum of the changes, but for the rounding of its factors."""
    return report.method == "cat" and report.kept >= EXACT


def combine_columns(report: CombineReport, exact: bool) -> list[Category[ModuleCombine] | Measure[ModuleCombine]]:
    """Return the columns. An exact sum has no column for energy, as all rows have 100%."""
    quantity_kept = q.SHARED if report.rank_method == "ctm" else q.ENERGY
    energy: list[Category[ModuleCombine] | Measure[ModuleCombine]] = [
        Measure(quantity_kept, lambda row: row.kept, kept_share, priority=1, drawn=True, from_least=True)
    ]
    return [
        Category(q.RANKS, lambda row: "+".join(map(str, row.ranks)), priority=3, right=True),
        Category(q.RANK, lambda row: str(row.rank), priority=2, right=True),
        Measure(q.DELTA, lambda row: row.norm, measure, priority=7),
        *([] if exact else energy),
        *(output_columns(report.modules, priority=8) or [Measure(q.ERROR, lambda row: row.error, share, priority=8)]),
    ]


def combine_issue(row: ModuleCombine) -> Issue | None:
    """Return the issue of a module, if any."""
    return Issue(1, "delta is 0") if row.norm == 0 else None


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
        yield line(f"metadata not copied, since the adapters differ: {', '.join(names)}{more}")


def _verdict(report: CombineReport, exact: bool) -> Iterator[Line]:
    if exact and report.error > LOST:
        dtype = "/".join(report.dtypes)
        yield line(TextSpan(f"{share(report.error)} of the sum is lost", "bad"), f": it is too small for {dtype}")
    elif exact:
        yield line(f"exact sum (error {measure(report.error)})")
    elif report.rank_method == "ctm":
        ranks = spread([min(row.rank, sum(row.ranks)) for row in report.modules], rank)
        modules = plural(len(report.modules), "module")
        hold = "shared direction holds" if ranks == "1" else "shared directions hold"
        yield line(f"{ranks} {hold} {kept_share(report.kept)} of the deltas' energy in {modules}")
    else:
        share_kept, modules = kept_share(report.kept), plural(len(report.modules), "module")
        yield line(f"{share_kept} of {energy_of_what(report)} kept in {modules}")
    yield from output_lines(report, report.modules)
    yield wrote_adapter(report)


def combine_page(report: CombineReport) -> Page:
    """Return the page of a combination."""
    rows, columns = report.modules, combine_columns(report, is_exact(report))
    curves: Sequence[Curve[ModuleCombine]] = spectrum_curves(
        lambda row: {"result": row.spectrum}, lambda row: {"rank": row.rank}
    )
    sheet = Sheet(rows, columns, find_issue=combine_issue, curves=curves)
    return Page(
        figures=tuple(_figures(report)),
        sheets=(sheet,),
        heatmaps=shared_heatmaps(report.shared) if report.shared else (),
        arithmetic=tuple(_arithmetic(report)),
        hashes=report.sha256,
    )


def _figures(report: CombineReport) -> Iterator[Figure]:
    if report.rank_method == "ctm":
        yield Figure("shared", kept_share(report.kept), "of the deltas' energy, in the shared directions")
        yield Figure("error", share(report.error), "of the result's norm")
    else:
        yield from kept_figures(report)
    if report.modules:
        yield Figure("rank", spread([row.rank for row in report.modules], rank), f"by {report.method}")
    yield Figure("output", nbytes(report.nbytes), f"{quantity(report.parameters)} parameters")
    if report.shared and len(report.adapters) > 2:
        yield from shared_figures(report.shared)


def _arithmetic(report: CombineReport) -> Iterator[str]:
    yield "the deltas s B A of each module are combined, each times the weight of its adapter"
    if report.rank_method == "ctm":
        yield (
            "the deltas are compressed to shared directions, then combined; shared is the mean share of their energies "
            "in these directions"
        )
    else:
        yield what_energy_is(report)
    yield "error is the norm of the stored adapter minus the result, relative to the norm of the result"
