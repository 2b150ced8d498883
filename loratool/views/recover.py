"""Reports on changes in place that were ended after their process died."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Document, line, path
from .parts.numbers import plural
from .parts.report import Report


@dataclass(frozen=True)
class RecoverReport(Report):
    """The result of `recover`.

    Attributes:
        command: that changes the model: merge, unmerge or apply; empty if the change never began.
        windows: how many parts of the model were changed when it began.
        is_new: whether the model is changed then; otherwise it is what it was.
    """

    document_function: ClassVar[str] = "recover_document"

    model: str
    command: str
    windows: int
    dry_run: bool
    is_new: bool


def recover_document(report: RecoverReport, verbose: bool) -> Document:
    """Return the document of a recovery."""
    found = plural(report.windows, "part was", "parts were") if report.windows else "no part was"
    would = "would be" if report.dry_run else "is"
    state = f"changed as {report.command} does" if report.is_new else "what it was, bit for bit"
    mark = " (dry run, nothing is changed)" if report.dry_run else ""
    return Document(
        subject=line(path(report.model), f": {report.command or 'a change'} in place, {found} changed{mark}"),
        verdict=(line(f"the model {would} {state}"),),
        verbose=verbose,
    )
