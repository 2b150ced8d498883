"""Reports on unmerged models: the tensors restored, and how exact they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..files.folder.side_files import LeftBehind
from .parts.document import Document, Line, line, path
from .parts.numbers import nbytes, plural
from .parts.report import WritingReport
from .parts.writing import dry_run_mark, listed, not_copied, outcome


@dataclass(frozen=True)
class UnmergeReport(WritingReport):
    """The result of `unmerge`.

    Attributes:
        restored: how many tensors were changed back.
        removed: the tensors that the base does not have.
        exact_files: whether the files equal the base's byte for byte; false if the base was a torch file.
        not_copied: names of `left_behind`: files beside the merged model that were not copied.
        approximate: whether the delta was subtracted and rounded, without an undo file.
        doubtful: how many weights can then be wrong.
        farthest: the largest error of each in ulps; more if the delta is much larger than the weight.
    """

    document_function: ClassVar[str] = "unmerge_document"

    merged: str
    out: str
    undo: str
    dry_run: bool
    nbytes: int
    adapters: tuple[str, ...]
    restored: int
    copied: int
    removed: tuple[str, ...]
    files: tuple[str, ...]
    exact_files: bool
    not_copied: tuple[str, ...]
    approximate: bool = False
    doubtful: int = 0
    farthest: int = 0
    warnings: tuple[str, ...] = ()
    left_behind: tuple[LeftBehind, ...] = ()


def unmerge_document(report: UnmergeReport, verbose: bool) -> Document:
    """Return the document of an unmerge."""
    spans = [path(report.merged)]
    for adapter in report.adapters:
        spans += [*line(" - "), path(adapter)]
    how = ", approximate: without an undo file" if report.approximate else ""
    return Document(
        subject=line(*spans, " -> ", path(report.out), how, dry_run_mark(report)),
        lists=tuple(_lists(report, verbose)),
        warnings=(*report.warnings, *_doubts(report)),
        verdict=tuple(_verdict(report)),
        verbose=verbose,
    )


def _lists(report: UnmergeReport, verbose: bool) -> Iterator[Line]:
    yield from listed("removed", report.removed, verbose)
    yield from not_copied(report.left_behind, verbose)
    if not report.exact_files and not report.approximate:
        yield line("note: the base was a torch file; its tensors are restored into a safetensors file")


def _doubts(report: UnmergeReport) -> Iterator[str]:
    if report.approximate and not report.dry_run:
        number = plural(report.doubtful, "weight")
        yield f"{number} can be wrong, by up to {plural(report.farthest, 'ulp')}, or more near zero"


def _verdict(report: UnmergeReport) -> Iterator[Line]:
    tensors = plural(report.restored, "tensor")
    if report.dry_run:
        yield line(f"{tensors} would be {'subtracted' if report.approximate else 'restored'}, {report.copied:,} copied")
    else:
        how = "subtracted and rounded" if report.approximate else "restored bit for bit"
        yield line(f"{how}: {tensors}, {report.copied:,} copied")
    yield outcome(report.out, report.dry_run, nbytes(report.nbytes))
