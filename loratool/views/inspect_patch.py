"""Report on a patch from its index alone: what it is for, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, line, path
from .parts.numbers import nbytes, plural, share
from .parts.report import Report
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import listed
from .patch import BodySize


@dataclass(frozen=True)
class PatchedTensor:
    """A tensor that a patch changes.

    Attributes:
        was: the type of the base's tensor; empty if the base does not have it.
        patch_nbytes: its share of what the patch has of its span, by its bytes.
    """

    name: str
    dtype: str
    was: str
    nbytes: int
    patch_nbytes: int


@dataclass(frozen=True)
class PatchInspection(Report):
    """What `inspect` shows of a patch.

    Attributes:
        nbytes: of the patch.
        base_digest, digest: of the model that it was made of, and of the one that it makes.
        files: the weights files that it makes.
        side: the side files that it brings.
        tensors: those that it changes; of a span with several tensors all, if one of them changes.
        unchanged: how many it does not.
        renamed: tensors that the base has bit for bit under another name: name -> the base's.
        removed: how many tensors of the base it leaves out.
        adapters: how many it has; it changes what differs from their merge.
    """

    document_function: ClassVar[str] = "patch_inspection_document"
    page_function: ClassVar[str] = "patch_inspection_page"
    rows: ClassVar[str] = "tensors"

    path: str
    nbytes: int
    model_nbytes: int
    base_digest: str
    digest: str
    reversible: bool
    files: tuple[str, ...]
    side: tuple[str, ...]
    bodies: Mapping[str, BodySize]
    tensors: tuple[PatchedTensor, ...]
    unchanged: int
    renamed: Mapping[str, str]
    new: tuple[str, ...]
    removed: int
    adapters: int


COLUMNS: tuple[Category[PatchedTensor] | Measure[PatchedTensor], ...] = (
    Category(q.DTYPE, lambda row: row.dtype, priority=4),
    Measure(q.PATCH_SIZE, lambda row: float(row.patch_nbytes), nbytes, priority=1, summed=True),
    Measure(q.OF_SIZE, lambda row: row.patch_nbytes / max(1, row.nbytes), share, priority=3),
)


def patch_inspection_document(report: PatchInspection, verbose: bool) -> Document:
    """Return the document of a patch."""
    table = make_table(report.tensors, COLUMNS, GroupColumns(layers=5, count=6), title="tensor", verbose=verbose)
    marks = [
        f"{nbytes(report.nbytes)}, {share(report.nbytes / max(1, report.model_nbytes))} of a model of "
        f"{nbytes(report.model_nbytes)} in {plural(len(report.files), 'file')}",
        "leads back too" if report.reversible else "one way",
    ]
    return Document(
        subject=line(path(report.path), ": a patch, ", ", ".join(marks)),
        facts=(line(f"of the model {report.base_digest}"), line(f"to the model {report.digest}")),
        tables=(table,) if report.tensors else (),
        lists=tuple(_lists(report, verbose)),
        verbose=verbose,
    )


def _lists(report: PatchInspection, verbose: bool) -> Iterator[Line]:
    if report.adapters:
        yield line(f"it has {plural(report.adapters, 'adapter')}, and beside them what their merge does not tell")
    yield from listed("renamed", [f"{was} -> {name}" for name, was in report.renamed.items()], verbose)
    yield from listed("new", report.new, verbose)
    if report.removed:
        yield line(f"removed: {plural(report.removed, 'tensor')}")
    for key, body in report.bodies.items():
        yield line(f"{key}: {plural(body.spans, 'span')}, {nbytes(body.nbytes)} in {nbytes(body.patch_nbytes)}")
    if report.side:
        yield line(f"brings: {', '.join(report.side)}")


def patch_inspection_page(report: PatchInspection) -> Page:
    """Return the page of a patch."""
    of = share(report.nbytes / max(1, report.model_nbytes))
    return Page(
        figures=(
            Figure("patch", nbytes(report.nbytes), f"{of} of the model"),
            Figure("way back", "yes" if report.reversible else "no"),
            Figure("tensors", f"{len(report.tensors):,}", f"{report.unchanged:,} do not change"),
        ),
        sheets=(Sheet(report.tensors, COLUMNS, "tensor"),),
        arithmetic=("the sizes of tensors in one span are shared by their bytes",),
    )
