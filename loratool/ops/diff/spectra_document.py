"""Say what is new in the leading singular vectors of the weights that a fine-tune changed."""

from __future__ import annotations

from ...reports.document import Document, line, path
from ...reports.numbers import dimensions, plural, share, whole
from ...reports.rows import Category, Measure
from ...reports.table import make_table
from ...reports.untargeted import untargeted
from ...reports.writing import listed
from ..inspect.intruders import IntruderRule, intruder_verdict
from .spectra import SpectraDiff, WeightSpectra

PRIORITY = ("new", "change", "layers", "first new", "by layer", "count", "of", "shape")


COLUMNS: tuple[Category[WeightSpectra] | Measure[WeightSpectra], ...] = (
    Category("kind", lambda row: row.kind),
    Category("shape", lambda row: dimensions(row.shape), right=True, always=True),
    Measure("change", lambda row: row.relative, share),
    Measure("new", lambda row: row.intruders.new, whole, watched=True, drawn=True),
    Measure("of", lambda row: row.intruders.examined, whole),
    Measure("first new", lambda row: row.intruders.first, whole),
)


def spectra_diff_document(report: SpectraDiff, verbose: bool) -> Document:
    """Make the document of what is new in a fine-tune's singular vectors."""
    rows = report.weights
    table = make_table(rows, lambda row: row.name, COLUMNS, PRIORITY, verbose=verbose)
    equal = plural(report.equal, "selected weight")
    verdict = [line(f"{plural(len(rows), 'weight')} changed; {equal} did not")]
    if rows:
        rule = IntruderRule(report.top, report.threshold)
        verdict += intruder_verdict([row.intruders for row in rows], rule)
    return Document(
        subject=line("BASE   ", path(report.base)),
        facts=(line("TUNED  ", path(report.tuned)),),
        tables=(table,) if rows else (),
        lists=(*listed("not compared", report.not_compared, verbose), *untargeted(report.left_out)),
        verdict=tuple(verdict),
        verbose=verbose,
    )
