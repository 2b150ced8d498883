"""Reports on initialized adapters: the weights with factors, the error of residual plus adapter, and the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..files.folder.side_files import LeftBehind
from .parts import quantities as q
from .parts.document import Document, Line, line, path
from .parts.numbers import dimensions, measure, nbytes, plural, quantity, rank, scaling, share, spread
from .parts.report import WritingReport
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.untargeted import untargeted
from .parts.writing import dry_run_mark, not_copied, outcome, wrote_adapter


@dataclass(frozen=True)
class ModuleInit:
    """One weight with factors.

    Attributes:
        gap: how far the energy of B A may be below the best of its rank, relative; None but for pissa.
        error: ||residual + s B A - W|| / ||W||; None if no residual was written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    parameters: int
    gap: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class ResidualReport:
    """The residual base, which has the initial factors taken out.

    Attributes:
        error: ||residual + s B A - W|| / ||W|| over all weights that were changed; None in a dry run.
        dtypes: those of the weights that were changed.
        left_behind: what is beside the base and not beside the residual.
    """

    out: str
    nbytes: int
    error: float | None
    dtypes: tuple[str, ...]
    undo: str | None
    undo_bytes: int | None
    left_behind: tuple[LeftBehind, ...] = ()


@dataclass(frozen=True)
class InitReport(WritingReport):
    """The result of `init`.

    Attributes:
        parameters, nbytes: of the adapter.
        left_out: weights that the selection would take if they were not what they map to: routers, MTP layers, ...
    """

    document_function: ClassVar[str] = "init_document"
    rows: ClassVar[str] = "modules"

    base: str
    out: str
    method: str
    dora: bool
    rslora: bool
    dry_run: bool
    modules: tuple[ModuleInit, ...]
    parameters: int
    nbytes: int
    residual: ResidualReport | None
    left_out: Mapping[str, str]
    warnings: tuple[str, ...] = ()


COLUMNS: tuple[Category[ModuleInit] | Measure[ModuleInit], ...] = (
    Category(q.SHAPE, lambda row: dimensions(row.shape), priority=5, right=True, always=True),
    Category(q.KIND, lambda row: row.kind, priority=9),
    Category(q.RANK, lambda row: str(row.rank), priority=6, right=True),
    Category(q.SCALE, lambda row: scaling(row.scale), priority=8, right=True),
    Measure(q.PARAMETERS, lambda row: row.parameters, quantity, priority=1, summed=True),
    Measure(q.GAP, lambda row: row.gap, measure, priority=7),
    Measure(q.START_ERROR, lambda row: row.error, share, priority=2),
)


def init_document(report: InitReport, verbose: bool) -> Document:
    """Return the document of an initialization."""
    rows = report.modules
    method = " + ".join([report.method, *["DoRA"] * report.dora, *["rsLoRA"] * report.rslora])
    scales = sorted({row.scale for row in rows})
    scale = f"scale{'s' * (len(scales) > 1)} {spread(scales, scaling)}"
    ranks = spread([row.rank for row in rows], rank)
    columns = [column for column in COLUMNS if column.what != q.GAP or any(row.gap for row in rows)]
    table = make_table(rows, columns, GroupColumns(layers=3, count=4), verbose=verbose)
    return Document(
        subject=line("adapter for ", path(report.base), f", by {method}{dry_run_mark(report)}"),
        facts=(line(f"rank {ranks}, {scale}, F32, {plural(len(rows), 'matrix', 'matrices')}"),) if rows else (),
        tables=(table,) if rows else (),
        lists=(
            *untargeted(report.left_out),
            *not_copied(report.residual.left_behind if report.residual else (), verbose),
        ),
        warnings=report.warnings,
        verdict=tuple(_verdict(report)),
        verbose=verbose,
    )


def _verdict(report: InitReport) -> Iterator[Line]:
    if report.residual and report.residual.error is not None and not report.warnings:
        yield line(f"residual + adapter differs from the base by {share(report.residual.error)}")
    yield wrote_adapter(report)
    if report.residual:
        yield from _residual(report.residual, report.dry_run)


def _residual(residual: ResidualReport, dry_run: bool) -> Iterator[Line]:
    yield outcome(residual.out, dry_run, f"{nbytes(residual.nbytes)}: train on this base")
    if residual.undo and residual.undo_bytes is not None:
        yield line("undo  ", path(residual.undo), f"  {nbytes(residual.undo_bytes)}")
