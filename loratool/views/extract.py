"""Reports on extractions: the computed spectrum of each matrix's delta, and the share that the factors hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..numerics.spectrum import SpectrumPoints
from .page.curves import spectrum_curves
from .parts import quantities as q
from .parts.content import Figure, Page, Points, Sheet
from .parts.document import Document, Line, line, path
from .parts.numbers import all_digits, dimensions, kept_share, measure, nbytes, plural, quantity, rank, share, spread
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
from .parts.writing import command_line, dry_run_mark, listed, wrote_adapter


@dataclass(frozen=True)
class ModuleExtract:
    """One factored weight of the adapter: W is the base's, D its delta.

    Attributes:
        relative: ||D|| / ||W||; None if W = 0.
        kept: the share of ||D||^2 that the factors hold, exactly; with --imatrix of ||D W||^2, W the inputs' weights.
        residual: the norm of the part that the factors do not hold.
        error: the same, relative to ||D||.
        weighted_error: ||(D - D') W|| / ||D W||; None without --imatrix, or if it does not have the inputs.
        gap: the relative distance of `kept` from the best of this rank.
        how: how `gap` is known: exact, certified or an estimate.
        effective_rank: of the factors, by the same singular values as `kept`.
        noise: what singular values that rounding either model to its type or codes has made stay below; with the rank
            rule `noise` and float32 on both sides, the threshold for noise of unknown size, if there are rows and
            columns enough to tell. Over a stack, the root of the mean of its squares.
        above_noise: how many of the computed singular values are larger than `noise`; None of weighted ones.
        stored: the relative error that the factors' type adds.
        rank_50, rank_90: estimates of the ranks that keep 50% and 90%; None if unknown, or if as much is kept.
        spectrum: the curve of the singular values that `kept` is of, as many of the largest as were computed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    relative: float | None
    kept: float
    residual: float
    error: float
    weighted_error: float | None
    gap: float
    how: str
    effective_rank: float
    noise: float
    above_noise: int | None
    stored: float
    rank_50: int | None
    rank_90: int | None
    spectrum: SpectrumPoints | None = None


@dataclass(frozen=True)
class ExtractReport(WritingReport):
    """The result of `extract`.

    Attributes:
        kept: the share of the energy of all factored deltas that the adapter holds, weighted as those of `modules`;
            None if there are none.
        error, weighted_error: over all modules, as theirs; the second over those that have it.
        relative: ||D|| / ||W|| over the matrices that changed; None if W = 0.
        parameters, nbytes: of the adapter.
        exact: tensors that are kept exactly.
        left_out: changed tensors that are not in the adapter -> the norm of the change; None if unknown.
        unchanged: how many tensors are equal on both sides.
        only_base, only_tuned: tensors on one side only.
        dtypes: of the output without scalars, the commonest first.
        imatrix: the file that --imatrix named.
        unweighted: modules whose inputs it does not have; they have the best factors of the plain change.
    """

    document_function: ClassVar[str] = "extract_document"
    page_function: ClassVar[str] = "extract_page"
    rows: ClassVar[str] = "modules"

    base: str
    tuned: str
    out: str
    dry_run: bool
    modules: tuple[ModuleExtract, ...]
    kept: float | None
    error: float | None
    weighted_error: float | None
    relative: float | None
    parameters: int
    nbytes: int
    exact: tuple[str, ...]
    left_out: Mapping[str, float | None]
    unchanged: int
    only_base: tuple[str, ...]
    only_tuned: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    imatrix: str | None = None
    unweighted: tuple[str, ...] = ()


LITTLE = 0.5  # of the median energy of its siblings: below, a matrix has a line of its own


def extract_document(report: ExtractReport, verbose: bool) -> Document:
    """Return the document of an extraction."""
    rows = report.modules
    columns = extract_columns(rows)
    table = make_table(
        rows, columns, GroupColumns(layers=4, by_layer=5, count=10), find_issue=extract_issue, verbose=verbose
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
    """Return the columns for which the rows have values."""
    known = {row.how for row in rows}
    gap = q.GAP_AT_MOST if known == {"certified"} else q.GAP_ABOUT
    columns: list[Category[ModuleExtract] | Measure[ModuleExtract]] = [
        Category(q.SHAPE, lambda row: dimensions(row.shape), priority=9, right=True, always=True),
        Category(q.KIND, lambda row: row.kind),
        Category(q.RANK, lambda row: str(row.rank), priority=6, right=True),
        Measure(q.DELTA_OVER_W, lambda row: row.relative, share, priority=1, watched=True, drawn=True),
        Measure(q.ENERGY, lambda row: row.kept, kept_share, priority=2),
        Measure(q.EFFECTIVE_RANK, lambda row: row.effective_rank, rank, priority=8),
        Measure(q.RESIDUAL, lambda row: row.residual, measure, priority=11),
    ]
    if any(row.above_noise is not None for row in rows):
        columns.insert(5, Measure(q.OVER_NOISE, lambda row: row.above_noise, rank, priority=7))
    columns += output_columns(rows, priority=3)
    columns += [Measure(gap, lambda row: row.gap, measure)] if known - {"exact"} else []
    return columns + ([Measure(q.STORED, lambda row: row.stored, measure)] if any(row.stored for row in rows) else [])


def extract_issue(row: ModuleExtract) -> Issue | None:
    """Return the issue of a matrix, if any: little of it is kept."""
    return Issue(1, f"{kept_share(row.kept)} of its energy kept") if row.kept < LITTLE else None


def _lists(report: ExtractReport, verbose: bool) -> Iterator[Line]:
    yield from listed("stored exactly", report.exact, verbose)
    norms = {name: norm for name, norm in report.left_out.items() if norm is not None}
    if verbose:
        for name in report.left_out:
            yield line(f"not in the adapter: {name}" + (f", delta {measure(norms[name])}" if name in norms else ""))
    else:
        yield from listed("not in the adapter", report.left_out)
        if norms:
            yield line(
                f"note: the norm of the deltas that are not in the adapter is {measure(math.hypot(*norms.values()))}"
            )
    yield from unknown_inputs(report, verbose)
    yield from listed("only in the base", report.only_base, verbose)
    yield from listed("only in the tuned model", report.only_tuned, verbose)


def _verdict(report: ExtractReport) -> Iterator[Line]:
    share_in = "" if report.kept is None else f"{kept_share(report.kept)} of {energy_of_what(report)} kept in "
    matrices = plural(len(report.modules), "matrix", "matrices")
    relative = "" if report.relative is None else f"; delta/W is {share(report.relative)}"
    unchanged = f", {plural(report.unchanged, 'tensor')} unchanged" if report.unchanged else ""
    yield line(f"{share_in}{matrices}{relative}{unchanged}")
    yield from output_lines(report, report.modules)
    yield wrote_adapter(report)


KEPT = (
    "the energy kept is exact: the sum of the squared singular values of the factors, over the sum of the squares of "
    "all numbers of the delta"
)


def extract_page(report: ExtractReport) -> Page:
    """Return the page of an extraction."""
    rows = report.modules
    figures = [
        *kept_figures(report),
        *([] if report.relative is None else [Figure("delta/W", share(report.relative), "of the changed weights")]),
        *([Figure("rank", spread([row.rank for row in rows], rank))] if rows else []),
        Figure("output", nbytes(report.nbytes), f"{quantity(report.parameters)} parameters"),
        *([Figure("exact", all_digits(len(report.exact)), "tensors are stored exactly")] if report.exact else []),
        *([Figure("not in it", all_digits(len(report.left_out)), "changed tensors")] if report.left_out else []),
    ]
    curves = spectrum_curves(lambda row: {"delta": row.spectrum}, lambda row: {"rank": row.rank}, _rounding, _estimates)
    sheet = Sheet(rows, extract_columns(rows), "weight", extract_issue, curves=curves)
    return Page(
        figures=tuple(figures),
        sheets=(sheet,),
        arithmetic=(
            what_energy_is(report),
            *([KEPT] if report.weighted_error is None else []),
            "only the largest singular values of a delta are computed, so a curve may end below 100%; about is an "
            "estimate of the ranks of 50% and 90% by a power law",
            "below rounding, singular values may come from rounding the models to their dtypes only",
        ),
    )


def _rounding(row: ModuleExtract) -> dict[str, float | None]:
    """Return the threshold below which singular values may come from rounding. Only for those of the delta itself."""
    return {} if row.above_noise is None else {"rounding": row.noise}


def _estimates(row: ModuleExtract) -> dict[str, Points]:
    """Return estimates of the ranks that keep 50% and 90% of the energy, if beyond the computed values."""
    points = row.spectrum
    shares = ((row.rank_50, 50.0), (row.rank_90, 90.0))
    estimates = [(at, share) for at, share in shares if at and points and at > points.places[-1]]
    return {"about": [(points.places[-1], 100 * points.energies[-1]), *estimates]} if points and estimates else {}
