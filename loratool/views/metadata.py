"""Reports on edited metadata: the keys that were set and unset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Document, Line, line, path
from .parts.numbers import nbytes
from .parts.report import WritingReport
from .parts.writing import dry_run_mark, outcome


@dataclass(frozen=True)
class MetadataChange:
    """One key. was, now: its values; None where the file does not have it."""

    key: str
    was: str | None
    now: str | None


@dataclass(frozen=True)
class MetadataReport(WritingReport):
    """The result of `convert` of a file whose metadata alone is edited.

    Attributes:
        changes: those that were asked for, and hashes that they made stale.
        kept: how many keys stay as they are.
        nbytes: of the output.
    """

    document_function: ClassVar[str] = "metadata_document"
    rows: ClassVar[str] = "changes"

    source: str
    out: str
    dry_run: bool
    changes: tuple[MetadataChange, ...]
    kept: int
    nbytes: int


LONGEST = 60  # characters of a value


def metadata_document(report: MetadataReport, verbose: bool) -> Document:
    """Return the document of a file whose metadata was edited."""
    return Document(
        subject=line(path(report.source), " -> ", path(report.out), dry_run_mark(report)),
        lists=tuple(_changes(report, verbose)),
        verdict=(outcome(report.out, report.dry_run, f"{nbytes(report.nbytes)}, tensors copied byte for byte"),),
        verbose=verbose,
    )


def _changes(report: MetadataReport, verbose: bool) -> Iterator[Line]:
    for change in report.changes:
        value = change.now or ""
        shown = value if verbose or len(value) <= LONGEST else f"{value[:LONGEST]}..."
        yield line(f"unset: {change.key}") if change.now is None else line(f"set: {change.key} = {shown}")
    yield line(f"unchanged: {report.kept} other keys")
