"""Reports on the singular values of weights, or of an adapter's deltas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ..numerics.spectrum import SpectrumPoints
from .intruders import IntruderCount, IntruderRule, intruder_verdict, what_is_new
from .page.curves import spectrum_curves
from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, line, path
from .parts.numbers import all_digits, dimensions, measure, plural, rank, spread
from .parts.pictures import bars
from .parts.report import Report
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.untargeted import untargeted
from .parts.writing import listed


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix, or of a stack of matrices as root mean squares over the stack.

    Attributes:
        full: how many singular values there can be.
        norm: of a stack that of all matrices.
        top: the largest singular values.
        rank_50, rank_90, rank_99: how many singular values hold that share of the energy.
        intruders: of the merged weight; None without a base.
        spectrum: the curve of all singular values.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    full: int
    norm: float
    top: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    rank_50: int
    rank_90: int
    rank_99: int
    intruders: IntruderCount | None = None
    spectrum: SpectrumPoints | None = None


@dataclass(frozen=True)
class SpectraReport(Report):
    """The result of `inspect --spectra`.

    Attributes:
        what: `adapter` or `checkpoint`.
        without_factors: selected modules of an adapter whose change has no singular values here.
        left_out: weights of a model that a pattern alone selects -> what they are: experts, convolutions, ...
        base: the model beside which intruder dimensions were counted.
        top, threshold: how many leading singular vectors, and the least |cosine| of a match; None without a base.
        sha256: an adapter -> the hash of its weights file.
    """

    document_function: ClassVar[str] = "spectra_document"
    page_function: ClassVar[str] = "spectra_page"
    rows: ClassVar[str] = "modules"

    path: str
    what: str
    modules: tuple[Spectrum, ...]
    kind: str = "spectra"
    without_factors: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    top: int | None = None
    threshold: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


COLUMNS: tuple[Category[Spectrum] | Measure[Spectrum], ...] = (
    Category(q.KIND, lambda row: row.kind),
    Category(q.SHAPE, lambda row: dimensions(row.shape), priority=14, right=True, always=True),
    Measure(q.NORM, lambda row: row.norm, measure, priority=13),
    Measure(q.LARGEST, lambda row: row.top[0] if row.top else 0.0, measure, priority=12),
    Measure(q.STABLE_RANK, lambda row: row.stable_rank, rank, priority=11),
    Measure(q.EFFECTIVE_RANK, lambda row: row.effective_rank, rank, priority=2, watched=True, drawn=True),
    Measure(q.RANK_50, lambda row: row.rank_50, rank, priority=6),
    Measure(q.RANK_90, lambda row: row.rank_90, rank, priority=3),
    Measure(q.RANK_99, lambda row: row.rank_99, rank, priority=7),
    Measure(q.OUT_OF, lambda row: row.full, rank, priority=10),
    Measure(
        q.NEW,
        lambda row: row.intruders.new if row.intruders else None,
        all_digits,
        priority=1,
        watched=True,
        drawn=True,
    ),
    Measure(q.FIRST_NEW, lambda row: row.intruders.first if row.intruders else None, all_digits, priority=5),
)


def spectra_document(report: SpectraReport, verbose: bool) -> Document:
    """Return the document of singular values."""
    rows = report.modules
    what = "the deltas" if report.what == "adapter" else "the weights"
    table = make_table(rows, COLUMNS, GroupColumns(layers=4, by_layer=8, count=9), verbose=verbose)
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(row.name.removesuffix(".weight").rpartition(".")[2], []).append(row.effective_rank)
    means = {kind: sum(ranks) / len(ranks) for kind, ranks in kinds.items()}
    verdict = [line(f"{plural(len(rows), 'matrix', 'matrices')}; 50%, 90%, 99%: the ranks that hold that energy")]
    if report.top is not None and report.threshold is not None:
        counts = [row.intruders for row in rows if row.intruders]
        verdict += intruder_verdict(counts, IntruderRule(report.top, report.threshold))
    return Document(
        subject=line(path(report.path), f": singular values of {what}"),
        tables=(table,) if rows else (),
        lists=(*listed("without factors", report.without_factors, verbose), *untargeted(report.left_out)),
        pictures=tuple(bars(means, "effective rank by kind, mean", "{:.1f}".format)) if verbose else (),
        verdict=tuple(verdict),
        verbose=verbose,
    )


ARITHMETIC = {
    "adapter": "the singular values are those of the delta s B A, in float64 from a core of its factors",
    "checkpoint": "the singular values are the roots of the eigenvalues of the smaller of W^T W and W W^T, in float64: "
    "below 1e-7 of the largest they count as 0",
}


def spectra_page(report: SpectraReport) -> Page:
    """Return the page of singular values."""
    rows = report.modules
    what = "delta" if report.what == "adapter" else "weight"
    figures = [
        Figure("matrices", f"{len(rows):,}", "of deltas" if what == "delta" else "of weights"),
        Figure("eff. rank", spread([row.effective_rank for row in rows], rank), "how many directions they use"),
        Figure("rank of 90%", spread([row.rank_90 for row in rows], rank), "has this share of the energy"),
    ]
    counts = [row.intruders for row in rows if row.intruders]
    if counts:
        examined = f"of {sum(each.examined for each in counts):,} leading singular vectors match none of the base"
        figures.append(Figure("new", all_digits(sum(each.new for each in counts)), examined))

    def spectra(row: Spectrum) -> dict[str, SpectrumPoints | None]:
        beside = {"weight with its delta": row.intruders.spectrum} if row.intruders else {}
        return {what: row.spectrum, **beside}

    curves = spectrum_curves(spectra, lambda row: {"first new": row.intruders.first} if row.intruders else {})
    is_stack = any(len(row.shape) > 2 for row in rows)
    arithmetic = [ARITHMETIC[report.what]]
    arithmetic += (
        ["for a stack of matrices, a singular value is the root mean square over the stack"] if is_stack else []
    )
    if report.top is not None and report.threshold is not None:
        arithmetic.append(what_is_new(report.top, report.threshold))
    return Page(
        figures=tuple(figures),
        sheets=(Sheet(rows, COLUMNS, "module" if what == "delta" else "weight", curves=curves),),
        arithmetic=tuple(arithmetic),
        hashes=report.sha256,
    )
