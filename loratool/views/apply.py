"""Report on models that patches make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, line, path
from .parts.numbers import nbytes, plural, share
from .parts.report import WritingReport
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import dry_run_mark, outcome


@dataclass(frozen=True)
class AppliedTensor:
    """A tensor that patches change.

    Attributes:
        dtype, nbytes: of the tensor in the model that is made.
        patch_nbytes: what the patches have of it; of a span with several tensors its share, by its bytes.
    """

    name: str
    dtype: str
    nbytes: int
    patch_nbytes: int


@dataclass(frozen=True)
class ApplyReport(WritingReport):
    """The result of `apply`.

    Attributes:
        patches: in their order.
        nbytes: of the weights files.
        tensors, spans: of the model that is made.
        reverse: whether the patches were taken off.
        files: its weights files.
        changed: tensors that the patches change; of a span with several tensors all, if one of them changes.
        checked: the checksums in the patches that the output was held against; empty if it was held against none. Only
            sha256 and blake3 protect from intent, and only if the patch comes from whom you trust.
        done: the model that was given was already what the first patch makes.
    """

    document_function: ClassVar[str] = "apply_document"
    page_function: ClassVar[str] = "apply_page"
    rows: ClassVar[str] = "changed"

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
    changed: tuple[AppliedTensor, ...]
    warnings: tuple[str, ...] = ()


COLUMNS: tuple[Category[AppliedTensor] | Measure[AppliedTensor], ...] = (
    Category(q.DTYPE, lambda row: row.dtype, priority=4),
    Measure(q.PATCH_SIZE, lambda row: float(row.patch_nbytes), nbytes, priority=1, summed=True),
    Measure(q.OF_SIZE, lambda row: row.patch_nbytes / max(1, row.nbytes), share, priority=3),
)


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
        tables=(make_table(report.changed, COLUMNS, GroupColumns(layers=5, count=6), title="tensor", verbose=True),)
        if verbose and report.changed
        else (),
        warnings=report.warnings,
        verdict=(
            *([line(path(report.base), " is already what ", path(report.patches[0]), " makes")] if report.done else []),
            line(f"would make {how}" if report.dry_run else how),
            outcome(report.out, report.dry_run, nbytes(report.nbytes)),
        ),
        verbose=verbose,
    )


def apply_page(report: ApplyReport) -> Page:
    """Return the page of applied patches."""
    return Page(
        figures=(
            Figure(
                "model", nbytes(report.nbytes), f"{plural(len(report.files), 'file')} of {report.tensors:,} tensors"
            ),
            Figure("patches", f"{len(report.patches):,}", "taken off" if report.reverse else ""),
            Figure("tensors", f"{len(report.changed):,}", f"{report.tensors - len(report.changed):,} do not change"),
            Figure("held against", " and ".join(report.checked) or "nothing"),
        ),
        sheets=(Sheet(report.changed, COLUMNS, "tensor"),),
        arithmetic=("the sizes of tensors in one span are shared by their bytes",),
    )
