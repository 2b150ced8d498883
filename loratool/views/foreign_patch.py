"""Report on patches in the dialects of other programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .parts.document import Document, line, path
from .parts.numbers import nbytes, plural, share
from .parts.report import WritingReport
from .parts.writing import command_line, dry_run_mark, listed, outcome


@dataclass(frozen=True)
class ForeignPatchReport(WritingReport):
    """The result of `patch` with --to.

    Attributes:
        dialect: the program's format.
        nbytes: of the files of weights.
        model_nbytes: of the target's tensors.
        changed: the tensors that it has.
        unchanged: how many others the target has.
    """

    document_function: ClassVar[str] = "foreign_patch_document"

    base: str
    tuned: str
    out: str
    dry_run: bool
    dialect: str
    nbytes: int
    model_nbytes: int
    changed: tuple[str, ...]
    unchanged: int
    warnings: tuple[str, ...] = ()


def foreign_patch_document(report: ForeignPatchReport, verbose: bool) -> Document:
    """Return the document of a patch in another program's dialect."""
    of, count = share(report.nbytes / max(1, report.model_nbytes)), len(report.changed) + report.unchanged
    return Document(
        subject=line(path(report.base), " -> ", path(report.tuned), " = ", path(report.out), dry_run_mark(report)),
        lists=tuple(listed("changed", report.changed, verbose)),
        warnings=report.warnings,
        verdict=(
            line(f"{report.dialect}: {plural(len(report.changed), 'tensor')} of {count:,} change: {of} of the model"),
            outcome(report.out, report.dry_run, nbytes(report.nbytes)),
            line("apply it with ", command_line("apply", report.base, report.out, "-o", "tuned")),
        ),
        verbose=verbose,
    )
