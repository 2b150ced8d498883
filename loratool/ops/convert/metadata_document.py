"""Say which keys of a file's metadata were set and unset."""

from __future__ import annotations

from collections.abc import Iterator

from ...reports.document import Document, Line, line, path
from ...reports.numbers import nbytes
from ...reports.writing import dry_run_mark, outcome
from .metadata import MetadataReport

LONGEST = 60  # characters of a value


def metadata_document(report: MetadataReport, verbose: bool) -> Document:
    """Make the document of a file whose metadata was edited."""
    return Document(
        subject=line(path(report.source), " -> ", path(report.out), dry_run_mark(report)),
        lists=tuple(_changes(report, verbose)),
        verdict=(outcome(report.out, report.dry_run, f"{nbytes(report.nbytes)}, the tensors byte for byte"),),
        verbose=verbose,
    )


def _changes(report: MetadataReport, verbose: bool) -> Iterator[Line]:
    for change in report.changes:
        value = change.now or ""
        shown = value if verbose or len(value) <= LONGEST else f"{value[:LONGEST]}..."
        yield line(f"unset: {change.key}") if change.now is None else line(f"set: {change.key} = {shown}")
    yield line(f"kept: {report.kept} other keys")
