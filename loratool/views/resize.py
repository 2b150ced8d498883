"""Reports on resized adapters: the new rank and the energy kept for each module, and the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..numerics.spectrum import SpectrumPoints
from .page.curves import spectrum_curves
from .parts import quantities as q
from .parts.content import Curve, Figure, Page, Sheet
from .parts.document import Document, Line, line, path
from .parts.numbers import kept_share, measure, nbytes, plural, rank, spread
from .parts.outputs import (
    energy_of_what,
    kept_figures,
    output_columns,
    output_lines,
    unknown_inputs,
    what_energy_is,
)
from .parts.report import WritingReport
from .parts.rows import Issue, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import dry_run_mark, listed, wrote_adapter


@dataclass(frozen=True)
class ModuleResize:
    """One module and its delta D (of DoRA, the direction's).

    Attributes:
        norm: ||D||.
        kept: the share of ||D||^2 that the new rank holds; with --imatrix of ||D W||^2, W the inputs' weights.
        error: ||D' - D|| / ||D|| of the output, with the rounding to its type.
        weighted_error: the same for D' W and D W; None without --imatrix, or if it does not have the inputs.
        effective_rank: by the same singular values as `kept`.
        spectrum: the curve of these.
    """

    name: str
    rank: int
    new_rank: int
    norm: float
    kept: float
    error: float
    weighted_error: float | None
    effective_rank: float
    spectrum: SpectrumPoints | None = None


@dataclass(frozen=True)
class ResizeReport(WritingReport):
    """The result of `resize`.

    Attributes:
        kept, error, weighted_error: over all modules; the last over those that have it.
        parameters, nbytes: of the output.
        carried: tensors other than factors, copied unchanged.
        left_out: modules that --drop excluded.
        dtypes: of the output without scalars, the commonest first.
        adapter_nbytes: of the tensors in the adapter's file.
        imatrix: the file that --imatrix named.
        unweighted: modules whose inputs it does not have; they have the best factors of the plain change.
        sha256: the adapter -> the hash of its weights file.
    """

    document_function: ClassVar[str] = "resize_document"
    page_function: ClassVar[str] = "resize_page"
    rows: ClassVar[str] = "modules"

    adapter: str
    out: str
    dry_run: bool
    modules: tuple[ModuleResize, ...]
    kept: float
    error: float
    weighted_error: float | None
    parameters: int
    nbytes: int
    carried: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    adapter_nbytes: int = 0
    imatrix: str | None = None
    unweighted: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


def resize_document(report: ResizeReport, verbose: bool) -> Document:
    """Return the document of a resize."""
    rows = report.modules
    table = make_table(
        rows,
        resize_columns(rows),
        GroupColumns(layers=4, by_layer=5, count=9),
        find_issue=resize_issue,
        verbose=verbose,
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
    """Return the columns of a resize. Ranks that all rows share get none."""
    differed, differ = len({row.rank for row in rows}) > 1, len({row.new_rank for row in rows}) > 1
    return [
        *([Measure[ModuleResize](q.RANK, lambda row: row.rank, rank, priority=6)] * differed),
        *([Measure[ModuleResize](q.NEW_RANK, lambda row: row.new_rank, _mean_rank, priority=2, drawn=True)] * differ),
        Measure(q.DELTA, lambda row: row.norm, measure, priority=8),
        Measure(q.EFFECTIVE_RANK, lambda row: row.effective_rank, rank, priority=7),
        Measure(q.ENERGY, lambda row: row.kept, kept_share, priority=1, drawn=not differ, from_least=True),
        *output_columns(rows, priority=3),
    ]


def _mean_rank(x: float) -> str:
    """Return in words a rank, or the mean rank of a layer."""
    return rank(x).removesuffix(".0")


def resize_issue(row: ModuleResize) -> Issue | None:
    """Return the issue of a module, if any."""
    return Issue(1, "delta is 0") if row.norm == 0 else None


def _lists(report: ResizeReport, verbose: bool) -> Iterator[Line]:
    yield from listed("carried along", report.carried, verbose)
    yield from listed("excluded", report.left_out, verbose)
    yield from unknown_inputs(report, verbose)


def resize_page(report: ResizeReport) -> Page:
    """Return the page of a resize."""
    rows = report.modules
    old, new = (spread(ranks, rank) for ranks in ([row.rank for row in rows], [row.new_rank for row in rows]))
    curves: Sequence[Curve[ModuleResize]] = spectrum_curves(
        lambda row: {"delta": row.spectrum}, lambda row: {"new rank": row.new_rank}
    )
    product = "the product s B A" if report.weighted_error is None else "s B A W"
    return Page(
        figures=(
            *kept_figures(report),
            Figure("rank", new, f"was {old}"),
            Figure("output", nbytes(report.nbytes), f"was {nbytes(report.adapter_nbytes)}"),
        ),
        sheets=(Sheet(rows, resize_columns(rows), "module", resize_issue, curves=curves),),
        arithmetic=(
            what_energy_is(report),
            f"the singular values are those of {product}, computed from an r x r core in float64",
            "error is the norm of the stored delta minus the original one, relative to the norm of the original",
        ),
        hashes=report.sha256,
    )
