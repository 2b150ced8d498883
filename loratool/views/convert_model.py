"""Reports on conversions of checkpoints: the types that changed, the numbers that became 0, and the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..architectures.families import FAMILIES
from ..files.folder.side_files import LeftBehind
from .parts import quantities as q
from .parts.document import Document, Line, line, path
from .parts.numbers import all_digits, dimensions, nbytes, plural
from .parts.report import WritingReport
from .parts.rows import Category, Measure
from .parts.table import GroupColumns, make_table
from .parts.writing import dry_run_mark, labelled, listed, not_copied, outcome


@dataclass(frozen=True)
class CastTensor:
    """A tensor with a new type. flushed: how many numbers became 0; None in a dry run."""

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    flushed: int | None


@dataclass(frozen=True)
class CheckpointConvertReport(WritingReport):
    """The result of `convert` of a checkpoint. `copied` counts the tensors that keep their bytes.

    not_copied: names of `left_behind`: what is beside the checkpoint and not in the output.
    left_out: what --drop left out, and tensors for which the other naming of a denoiser has no place.
    family: of a denoiser whose tensors were renamed, a key of FAMILIES.
    renamed: tensors with another name; regrouped: those that are rows of another tensor, or of several.
    shared: tensors that are another one -> that one: in a torch file its storage has both names; in a safetensors file
    it is written once, and its metadata says so.
    """

    document_function: ClassVar[str] = "converted_document"
    rows: ClassVar[str] = "cast"

    checkpoint: str
    source_format: str
    out: str
    to: str
    dry_run: bool
    nbytes: int
    cast: tuple[CastTensor, ...]
    copied: int
    shared: Mapping[str, str]
    files: tuple[str, ...]
    not_copied: tuple[str, ...]
    warnings: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    family: str | None = None
    renamed: int = 0
    regrouped: int = 0
    left_behind: tuple[LeftBehind, ...] = ()


COLUMNS: tuple[Category[CastTensor] | Measure[CastTensor], ...] = (
    Category(q.SHAPE, lambda row: dimensions(row.shape), priority=6, right=True, always=True),
    Category(q.FROM_TYPE, lambda row: row.source_dtype, priority=4),
    Category(q.TO_TYPE, lambda row: row.dtype, priority=5),
    Measure(q.BECAME_0, lambda row: row.flushed, all_digits, priority=1, summed=True),
)


def converted_document(report: CheckpointConvertReport, verbose: bool) -> Document:
    """Return the document of a converted checkpoint, with a row for each tensor with numbers that became 0."""
    rows = [row for row in report.cast if verbose or row.flushed]
    table = make_table(rows, COLUMNS, GroupColumns(layers=3, by_layer=7, count=2), title="tensor", verbose=verbose)
    return Document(
        subject=line(path(report.checkpoint), " -> ", path(report.out), dry_run_mark(report)),
        facts=tuple(map(line, _facts(report))),
        tables=(table,) if rows else (),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=(_verdict(report),),
        verbose=verbose,
    )


def _facts(report: CheckpointConvertReport) -> Iterator[str]:
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in report.cast:
        kinds.setdefault((row.source_dtype, row.dtype), []).append(row.flushed or 0)
    for (old, new), flushed in kinds.items():
        zeros = plural(sum(flushed), "number") if any(flushed) else "no number"
        became_zero = "" if report.dry_run else f", {zeros} became 0"
        yield f"{plural(len(flushed), 'tensor')} {old} -> {new}{became_zero}"
    if report.family:
        renamed = plural(report.renamed, "tensor")
        yield f"{renamed} of {FAMILIES[report.family].title} renamed, {report.regrouped:,} split or concatenated"
    if report.copied:
        yield f"{plural(report.copied, 'tensor')} copied byte for byte"


def _lists(report: CheckpointConvertReport, verbose: bool) -> Iterator[Line]:
    yield from listed("excluded", report.left_out, verbose)
    yield from labelled("shared", [f"{name} is {kept}" for name, kept in report.shared.items()], verbose)
    yield from not_copied(report.left_behind, verbose)


def _verdict(report: CheckpointConvertReport) -> Line:
    files = plural(max(1, len(report.files)), "file")
    return outcome(report.out, report.dry_run, f"{nbytes(report.nbytes)}, {report.to}, {files}")
