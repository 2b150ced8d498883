"""Report on a patch of another program from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Document, line, path
from .parts.numbers import nbytes, plural
from .parts.report import Report
from .parts.writing import command_line, listed


@dataclass(frozen=True)
class DeltaInspection(Report):
    """What `inspect` shows of a patch of another program.

    Attributes:
        dialect: its format.
        version, base_version: of the models that it makes and that it is for; None where the format has none.
        how: its encoding, compression and checksum.
        tensors: those that it changes.
        nbytes: of all changes.
    """

    document_function: ClassVar[str] = "delta_document"

    path: str
    dialect: str
    version: int | None
    base_version: int | None
    how: tuple[str, ...]
    tensors: tuple[str, ...]
    nbytes: int


def delta_document(report: DeltaInspection, verbose: bool) -> Document:
    """Return the document of a patch of another program."""
    versions = "" if report.base_version is None else f" from version {report.base_version} to {report.version}"
    how = f"{report.dialect}: {', '.join(report.how)}"
    return Document(
        subject=line(path(report.path), f": a patch{versions} ({how})"),
        lists=tuple(listed("changes", report.tensors, verbose)),
        verdict=(
            line(f"it changes {plural(len(report.tensors), 'tensor')}, {nbytes(report.nbytes)}"),
            line("apply it with ", command_line("apply", "BASE", report.path, "-o", "tuned")),
        ),
        verbose=verbose,
    )
