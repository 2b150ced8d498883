"""Say which keys of a file's metadata were set and unset."""

from __future__ import annotations

from collections.abc import Iterator

from ...reports.document import Document, Line, line, path
from ...reports.numbers import nbytes
from .metadata import MetadataReport

LONGEST = 60  # characters of a value


def metadata_document(report: MetadataReport, verbose: bool) -> Document:
    """Make the document of a file whose metadata was edited."""
    dry = " (dry run, nothing is written)" if report.dry_run else ""
    word = "would write " if report.dry_run else "wrote "
    return Document(
        subject=line(path(report.source), " -> ", path(report.out), dry),
        lists=tuple(_changes(report, verbose)),
        verdict=(line(word, path(report.out), f"  {nbytes(report.nbytes)}, the tensors byte for byte"),),
        verbose=verbose,
    )


def _changes(report: MetadataReport, verbose: bool) -> Iterator[Line]:
    for change in report.changes:
        value = change.now or ""
        shown = value if verbose or len(value) <= LONGEST else f"{value[:LONGEST]}..."
        yield line(f"unset: {change.key}") if change.now is None else line(f"set: {change.key} = {shown}")
    yield line(f"kept: {report.kept} other keys")
