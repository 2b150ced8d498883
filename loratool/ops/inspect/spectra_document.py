"""Say how the singular values of weights, or of an adapter's deltas, fall off."""

from __future__ import annotations

from ...reports.document import Document, line, path
from ...reports.numbers import dimensions, measure, plural, rank, whole
from ...reports.pictures import bars
from ...reports.rows import Category, Measure
from ...reports.table import make_table
from ...reports.untargeted import untargeted
from ...reports.writing import listed
from .intruders import IntruderRule, intruder_verdict
from .spectra import SpectraReport, Spectrum

PRIORITY = (
    *("new", "eff. rank", "90%", "layers", "first new", "50%", "99%", "by layer", "count", "of", "stable", "largest"),
    *("norm", "shape"),
)


COLUMNS: tuple[Category[Spectrum] | Measure[Spectrum], ...] = (
    Category("kind", lambda row: row.kind),
    Category("shape", lambda row: dimensions(row.shape), right=True, always=True),
    Measure("norm", lambda row: row.norm, measure),
    Measure("largest", lambda row: row.top[0] if row.top else 0.0, measure),
    Measure("stable", lambda row: row.stable_rank, rank),
    Measure("eff. rank", lambda row: row.effective_rank, rank, watched=True, drawn=True),
    Measure("50%", lambda row: row.rank_50, rank),
    Measure("90%", lambda row: row.rank_90, rank),
    Measure("99%", lambda row: row.rank_99, rank),
    Measure("of", lambda row: row.full, rank),
    Measure("new", lambda row: row.intruders.new if row.intruders else None, whole, watched=True, drawn=True),
    Measure("first new", lambda row: row.intruders.first if row.intruders else None, whole),
)


def spectra_document(report: SpectraReport, verbose: bool) -> Document:
    """Make the document of singular values."""
    rows = report.modules
    what = "the deltas" if report.what == "adapter" else "the weights"
    table = make_table(rows, lambda row: row.name, COLUMNS, PRIORITY, verbose=verbose)
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
