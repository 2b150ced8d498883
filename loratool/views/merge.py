"""Reports on merges: a row for each group of weights, the share of the delta that was kept, and the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

from ..files.folder.side_files import LeftBehind
from .parts import quantities as q
from .parts.content import Figure, Page, Sheet
from .parts.document import Document, Line, line, path
from .parts.numbers import KEPT_ENOUGH, dimensions, kept_share, measure, nbytes, plural, scaling, share, spread
from .parts.report import WritingReport
from .parts.rows import Category, Issue, Measure, common
from .parts.table import GroupColumns, make_table
from .parts.writing import command_line, dry_run_mark, labelled, listed, not_copied, weighted


@dataclass(frozen=True)
class TensorReport:
    """The result for one tensor: W is the original weight, D the requested delta, W' the result.

    A number is None if its denominator is 0, and in a dry run.

    Attributes:
        update: the kinds of its updates (`updates.UPDATES`), `untied` or `added`.
        relative: ||D|| / ||W||.
        changed: the share of weights that differ.
        kept: <W' - W, D> / <D, D>, the share of the delta that rounding kept (1 is all of it).
        source_dtype: the type of W as the base stores it, or the codec of its codes; empty if the base has none.
        nbytes: in the output, with the companions of codes.
        missed: ||W' - (W + D)|| / ||D||, only of weights that are rounded to codes with the base's scales.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    update: str
    rank: int
    scales: tuple[float, ...]
    relative: float | None = None
    changed: float | None = None
    kept: float | None = None
    source_dtype: str = ""
    nbytes: int = 0
    missed: float | None = None


@dataclass(frozen=True)
class AdapterReport:
    """An adapter of the merge.

    Attributes:
        sha256: of the weights file; empty in a dry run of one adapter, which needs no hash.
        components: those of an image model, and patterns, with another weight than the adapter's, in order: the last
            that matches a module wins.
    """

    name: str
    format: str
    weight: float
    modules: int
    sha256: str
    components: Mapping[str, float]


@dataclass(frozen=True)
class MergeReport(WritingReport):
    """The result of `merge`.

    Attributes:
        changed: how many of `tensors` have another value than in the base, or are new; None in a dry run.
        kept: over all adapted tensors.
        copied: how many tensors are untouched.
        undo_bytes: of the undo file; in a dry run an upper bound.
        quantized: how coded weights were written: a key of WAYS, or `like`; None if the merge touches none.
        base_nbytes: of the base's tensors.
        not_copied: names of `left_behind`: files beside the base that were not copied.
        notes: choices that are no warnings.
        decoded: how many weights were dequantized though no adapter changes them, or with `like` encoded.
        sizes: the bytes of the output's tensors for each possible key of WAYS, if the merge touches codes.
        free_bytes: on the output's disk, in a dry run.
        replaced: the adapters of an earlier merge that these replace; `base` is then the merged model.
    """

    document_function: ClassVar[str] = "merge_document"
    page_function: ClassVar[str] = "merge_page"
    rows: ClassVar[str] = "tensors"

    base: str
    out: str
    dry_run: bool
    nbytes: int
    adapters: tuple[AdapterReport, ...]
    tensors: tuple[TensorReport, ...]
    changed: int | None
    kept: float | None
    copied: int
    undo: str | None
    undo_bytes: int | None
    left_out: tuple[str, ...]
    files: tuple[str, ...]
    not_copied: tuple[str, ...]
    warnings: tuple[str, ...]
    quantized: str | None = None
    base_nbytes: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    decoded: int = 0
    left_behind: tuple[LeftBehind, ...] = ()
    notes: tuple[str, ...] = ()
    free_bytes: int | None = None
    replaced: tuple[str, ...] = ()


@lru_cache(1024)
def _scales(scales: tuple[float, ...]) -> str:
    return ", ".join(map(scaling, scales)) or "-"


COLUMNS: tuple[Category[TensorReport] | Measure[TensorReport], ...] = (
    Category(q.SHAPE, lambda row: dimensions(row.shape), priority=9, right=True),
    Category(q.UPDATE, lambda row: row.update, priority=10),
    Category(q.RANK, lambda row: str(row.rank) if row.rank else "-", priority=11, right=True, alone=True),
    Category(q.SCALE, lambda row: _scales(row.scales), priority=12, right=True, alone=True),
    Category(q.STORED_AS, lambda row: _stored_as(row), priority=8),
    Measure(q.DELTA_OVER_W, lambda row: row.relative, share, priority=1, watched=True, drawn=True),
    Measure(q.KEPT, lambda row: None if row.kept is None else min(row.kept, 1.0), kept_share, priority=2),
    Measure(q.MISSED, lambda row: row.missed, measure, priority=3),
)

SIZE: Measure[TensorReport] = Measure(q.SIZE, lambda row: row.nbytes, nbytes, priority=4, summed=True)


def merge_document(report: MergeReport, verbose: bool) -> Document:
    """Return the document of a merge."""
    columns = (*COLUMNS, SIZE) if report.quantized else COLUMNS
    table = make_table(
        report.tensors, columns, GroupColumns(layers=5, by_layer=6, count=7), find_issue=weight_issue, verbose=verbose
    )
    return Document(
        subject=_subject(report),
        facts=tuple(_facts(report)),
        tables=(table,) if report.tensors else (),
        lists=tuple(_lists(report, verbose)),
        warnings=report.warnings,
        verdict=tuple(_verdict(report)),
        next=_next(report),
        verbose=verbose,
    )


def weight_issue(row: TensorReport) -> Issue | None:
    """Return the issue of a weight, if any: nothing of its delta is kept, or too little."""
    if row.relative == 0:
        return Issue(1, "delta is 0")
    if row.changed == 0 and row.relative:
        return Issue(2, "unchanged: the delta rounds away")
    if row.kept is not None and row.kept < KEPT_ENOUGH:
        return Issue(3, f"{kept_share(row.kept)} kept")
    return None


def _stored_as(row: TensorReport) -> str:
    """Return the type of a merged tensor, with its type in the base if that differs."""
    return row.dtype if row.source_dtype in ("", row.dtype) else f"{row.source_dtype} -> {row.dtype}"


def _subject(report: MergeReport) -> Line:
    added = [each for adapter in report.adapters for each in weighted(adapter.name, adapter.weight, adapter.components)]
    removed = [span for name in report.replaced for span in (*line(" - "), path(name))]
    return line(path(report.base), *removed, *added, " -> ", path(report.out), dry_run_mark(report))


def _facts(report: MergeReport) -> Iterator[Line]:
    rows = report.tensors
    if not rows:
        return
    ranks = [row.rank for row in rows if row.rank]
    scales = {_scales(row.scales) for row in rows} - {"-"}
    words = [", ".join(dict.fromkeys(row.update for row in rows))]
    words += [f"rank {spread(ranks, whole_or_range)}"] if ranks else []
    words += [f"scale{'s' * (',' in ''.join(scales))} {scales.pop()}"] if len(scales) == 1 else []
    words += [", ".join(dict.fromkeys(map(_stored_as, rows)))]
    shape = common(dimensions(row.shape) for row in rows)
    yield line(", ".join([*words, shape] if shape else words))


def whole_or_range(rank: float) -> str:
    return f"{rank:g}"


def _lists(report: MergeReport, verbose: bool) -> Iterator[Line]:
    yield from listed("excluded", report.left_out, verbose)
    yield from not_copied(report.left_behind, verbose)
    yield from labelled("note", report.notes, verbose)
    if report.dry_run and report.sizes:
        sizes = ", ".join(f"{way} {nbytes(size)}" for way, size in report.sizes.items())
        yield line(f"note: with --quantized: {sizes}")


def _verdict(report: MergeReport) -> Iterator[Line]:
    changed = len(report.tensors) if report.changed is None else report.changed
    total = plural(len(report.tensors) + report.copied + report.decoded, "tensor")
    others = f", {report.decoded:,} others {'encoded' if report.quantized == 'like' else 'dequantized'}"
    others = others if report.decoded else ""
    was = f" (was {nbytes(report.base_nbytes)})" if report.quantized else ""
    if report.dry_run:
        yield line(f"{changed:,} of {total} would change{others}, {report.copied:,} would be copied")
        undo = f", undo at most {nbytes(report.undo_bytes)}" if report.undo_bytes is not None else ""
        free = "" if report.free_bytes is None else f"; {nbytes(report.free_bytes)} free"
        yield line("would write ", path(report.out), f"  {nbytes(report.nbytes)}{was}{undo}{free}")
        return
    left = "" if report.kept is None else f", {kept_share(report.kept)} of the delta kept"
    nothing = "; the merge changes nothing" if report.changed == 0 else ""
    yield line(f"{changed:,} of {total} changed{others}{left}{nothing}")
    yield line("wrote ", path(report.out), f"  {nbytes(report.nbytes)}{was}")
    if report.undo and report.undo_bytes is not None:
        yield line("undo  ", path(report.undo), f"  {nbytes(report.undo_bytes)}")


def _next(report: MergeReport) -> str | None:
    """Return the command that verifies the merge, if it needs none of the merge's options."""
    if report.dry_run or report.left_out or report.quantized == "like" or report.replaced:
        return None
    adapters = [each.name if each.weight == 1 else f"{each.name}:{each.weight:g}" for each in report.adapters]
    if any(each.components for each in report.adapters):
        return None
    return command_line("verify", report.base, adapters, report.out)


NEAREST = (
    "each merged weight that is not quantized is the number of its dtype nearest to the exact result of its update: "
    "W + s B A for LoRA"
)

# what became of coded weights -> what those are that have codes after the merge
CODES = {
    "requantize": "each quantized weight has the code nearest to the exact result, with the base's scales",
    "like": "quantized weights are quantized again, with new scales",
}


def merge_page(report: MergeReport) -> Page:
    """Return the page of a merge."""
    changed = len(report.tensors) if report.changed is None else report.changed
    total = len(report.tensors) + report.copied + report.decoded
    figures = [Figure("would change" if report.dry_run else "changed", f"{changed:,}", f"of {total:,} tensors")]
    if report.kept is not None:
        figures.append(Figure("kept", kept_share(report.kept), "of the delta, after rounding"))
    figures.append(Figure("output", nbytes(report.nbytes), f"was {nbytes(report.base_nbytes)}"))
    if report.undo_bytes is not None:
        figures.append(Figure("undo file", nbytes(report.undo_bytes), "at most" if report.dry_run else ""))
    columns = (*COLUMNS, SIZE) if report.quantized else COLUMNS
    return Page(
        figures=tuple(figures),
        sheets=(Sheet(report.tensors, columns, "weight", weight_issue),),
        arithmetic=(NEAREST, *([CODES[report.quantized]] if report.quantized in CODES else [])),
        hashes={each.name: each.sha256 for each in report.adapters if each.sha256},
    )
