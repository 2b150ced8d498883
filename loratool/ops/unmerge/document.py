"""Say what `unmerge` restored, and how sure it is."""

from __future__ import annotations

from collections.abc import Iterator

from ...reports.document import Document, Line, line, path
from ...reports.numbers import nbytes, plural
from ...reports.writing import dry_run_mark, listed, not_copied, outcome
from .command import UnmergeReport


def unmerge_document(report: UnmergeReport, verbose: bool) -> Document:
    """Make the document of an unmerge."""
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
        yield line("note: the base was a torch file: its tensors are the same, in a safetensors file")


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
