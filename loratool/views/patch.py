"""Report on patches: how much of each tensor changes, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..files.folder.side_files import LeftBehind
from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, line, path
from .parts.numbers import nbytes, plural, share
from .parts.report import WritingReport
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import command_line, dry_run_mark, listed, not_copied, outcome


@dataclass(frozen=True)
class PatchRow:
    """A tensor that a patch changes.

    Attributes:
        dtype, was: its type, and the base's; the latter is empty if the base does not have it.
        nbytes: of the tensor.
        changed: how many of its numbers differ from the base's, rounded to its type; of blocks of codes, of its bytes.
        numbers: how many it has.
        patch_nbytes: its share of what the patch has of its span, by the numbers that change.
    """

    name: str
    dtype: str
    was: str
    nbytes: int
    changed: int
    numbers: int
    patch_nbytes: int


@dataclass(frozen=True)
class BodySize:
    """What one way of coding takes: how many spans, their bytes in the model, and in the patch."""

    spans: int
    nbytes: int
    patch_nbytes: int


@dataclass(frozen=True)
class PatchReport(WritingReport):
    """The result of `patch`.

    Attributes:
        nbytes: of the patch; of a dry run about that of its bodies, by samples.
        model_nbytes: of the target's tensors.
        tensors: those that change.
        unchanged: how many do not.
        bodies: a way of coding -> what it takes.
        renamed: tensors that the base has bit for bit under another name: name -> the base's.
        new: tensors that the base does not have, or not in this shape.
        removed: tensors of the base that the target does not have.
        reversible: whether the patch also makes the base of the target; None if that is not known yet.
        files: the target's weights files.
        adapters: those whose merge predicts the target; what counts as changed is what differs from that.
        left_behind: files beside the target that are not in the patch.
    """

    document_function: ClassVar[str] = "patch_document"
    page_function: ClassVar[str] = "patch_page"
    rows: ClassVar[str] = "tensors"

    base: str
    tuned: str
    out: str
    dry_run: bool
    nbytes: int
    model_nbytes: int
    tensors: tuple[PatchRow, ...]
    unchanged: int
    bodies: Mapping[str, BodySize]
    renamed: Mapping[str, str]
    new: tuple[str, ...]
    removed: tuple[str, ...]
    reversible: bool | None
    files: tuple[str, ...]
    adapters: tuple[str, ...] = ()
    left_behind: tuple[LeftBehind, ...] = ()
    warnings: tuple[str, ...] = ()


COLUMNS: tuple[Category[PatchRow] | Measure[PatchRow], ...] = (
    Category(q.DTYPE, lambda row: row.dtype, priority=4),
    Measure(q.CHANGED, lambda row: row.changed / row.numbers, share, priority=2),
    Measure(q.PATCH_SIZE, lambda row: float(row.patch_nbytes), nbytes, priority=1, summed=True),
    Measure(q.OF_SIZE, lambda row: row.patch_nbytes / max(1, row.nbytes), share, priority=3),
)


def patch_document(report: PatchReport, verbose: bool) -> Document:
    """Return the document of a patch."""
    table = make_table(report.tensors, COLUMNS, GroupColumns(layers=5, count=6), title="tensor", verbose=verbose)
    return Document(
        subject=line(path(report.base), " -> ", path(report.tuned), " = ", path(report.out), dry_run_mark(report)),
        tables=(table,) if report.tensors else (),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=tuple(_verdict(report)),
        verbose=verbose,
    )


def _lists(report: PatchReport, verbose: bool) -> Iterator[Line]:
    yield from listed("renamed", [f"{was} -> {name}" for name, was in report.renamed.items()], verbose)
    yield from listed("new", report.new, verbose)
    yield from listed("removed", report.removed, verbose)
    for key, body in report.bodies.items() if verbose else ():
        yield line(f"{key}: {plural(body.spans, 'span')}, {nbytes(body.nbytes)} in {nbytes(body.patch_nbytes)}")
    yield from not_copied(report.left_behind, verbose)


def _verdict(report: PatchReport) -> Iterator[Line]:
    differ = f"differ from the merge of {', '.join(report.adapters)}" if report.adapters else "change"
    about = "about " if report.dry_run else ""
    of = share(report.nbytes / max(1, report.model_nbytes))
    yield line(
        f"{plural(len(report.tensors), 'tensor')} of {len(report.tensors) + report.unchanged:,} {differ}: "
        f"{about}{of} of the model's {nbytes(report.model_nbytes)}"
    )
    if report.reversible is not None:
        yield line("it also makes the base of the target" if report.reversible else "one way: it does not lead back")
    yield outcome(report.out, report.dry_run, nbytes(report.nbytes))
    if not report.dry_run:
        yield line("apply it with ", command_line("apply", report.base, report.out, "-o", "tuned"))


def patch_page(report: PatchReport) -> Page:
    """Return the page of a patch."""
    return Page(
        figures=(
            Figure(
                "patch", nbytes(report.nbytes), f"{share(report.nbytes / max(1, report.model_nbytes))} of the model"
            ),
            Figure("way back", {True: "yes", False: "no", None: "not known yet"}[report.reversible]),
            Figure("tensors", f"{len(report.tensors):,}", f"{report.unchanged:,} do not change"),
        ),
        sheets=(Sheet(report.tensors, COLUMNS, "tensor"),),
        arithmetic=("numbers are counted as changed where their bits differ from the base's",),
    )
