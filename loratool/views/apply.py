"""Report on models that patches make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Document, line, path
from .parts.numbers import nbytes, plural
from .parts.report import WritingReport
from .parts.writing import dry_run_mark, outcome


@dataclass(frozen=True)
class ApplyReport(WritingReport):
    """The result of `apply`.

    Attributes:
        patches: in their order.
        nbytes: of the weights files.
        tensors, spans: of the model that is made.
        reverse: whether the patches were taken off.
        files: its weights files.
        checked: the checksums in the patches that the output was held against; empty if it was held against none. Only
            sha256 and blake3 protect from intent, and only if the patch comes from whom you trust.
        done: the model that was given was already what the first patch makes.
    """

    document_function: ClassVar[str] = "apply_document"

    base: str
    patches: tuple[str, ...]
    out: str
    dry_run: bool
    nbytes: int
    tensors: int
    spans: int
    reverse: bool
    files: tuple[str, ...]
    done: bool
    checked: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def apply_document(report: ApplyReport, verbose: bool) -> Document:
    """Return the document of applied patches."""
    spans = [path(report.base)]
    for patch in report.patches:
        spans += [*line(" - " if report.reverse else " + "), path(patch)]
    how = f"{plural(report.tensors, 'tensor')}, held against {' and '.join(report.checked) or 'nothing'}"
    if report.checked == ("sha256",):
        how = f"{plural(report.tensors, 'tensor')} bit for bit, by all hashes"
    return Document(
        subject=line(*spans, " -> ", path(report.out), dry_run_mark(report)),
        warnings=report.warnings,
        verdict=(
            *([line(path(report.base), " is already what ", path(report.patches[0]), " makes")] if report.done else []),
            line(f"would make {how}" if report.dry_run else how),
            outcome(report.out, report.dry_run, nbytes(report.nbytes)),
        ),
        verbose=verbose,
    )
