"""Map an image adapter's modules to those of another format: the rows of each, and its path there.

If one format fuses modules that the other splits, a split module gets its rows of B and the ranks that reach them. A
fused module gets the ranks of its slices one after the other (`factors` computes them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..adapters.updates.dora import DoRA
from ..architectures.families import ENCODERS, FAMILIES
from ..architectures.families.lookup import Span, locate, names_maker, parts_of
from ..architectures.families.table import DENOISERS, ModelFamily, Naming
from ..binding.modules.image_modules import SourceModule, settle_components
from ..errors import InputError, NeedsFlag, shell_word


@dataclass(frozen=True)
class RowSlice:
    """A run of rows of a source module's B, and its place in the target's B."""

    source: SourceModule
    start: int  # the first row in the source
    stop: int  # the row after the last
    target_start: int = 0  # the first row in the target


@dataclass(frozen=True)
class TargetModule:
    """A module of the output, made of rows of source modules."""

    component: str  # `unet`, `text_encoder`, `text_encoder_2`, ...; empty for a language model
    path: str
    rows: int  # all rows of B; some may be in no slice
    parts: tuple[RowSlice, ...]
    how: str  # `exact` (the stored factors), `split`, `fused` or `swapped`


def runs_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return rows as runs, each with its first row and the row after its last."""
    starts = [i for i, row in enumerate(rows) if not i or row != rows[i - 1] + 1]
    return [(rows[i], rows[j - 1] + 1) for i, j in pairwise([*starts, len(rows)])]


def plan_target_modules(sources: list[SourceModule], family: str, naming: Naming) -> list[TargetModule]:
    """Return the targets that an image adapter's modules become, under the names of a spelling.

    Args:
        family: a key of FAMILIES.
        naming: the spelling of the denoiser's modules; text encoders have one only.

    Raises:
        InputError: two modules would become one, or rows do not fit.
        NeedsFlag: DoRA could not be split or fused.
    """
    settled = settle_components(sources, FAMILIES[family])
    spans = [(source, table := table_of(source, family), _spans(source, table)) for source in settled]
    _refuse_twice(spans)
    of_denoiser = [module_spans for source, _, module_spans in spans if source.component in DENOISERS]
    part_rows = {span.module: span.module_rows for module_spans in of_denoiser for span in module_spans}
    slices: dict[tuple[str, str], list[RowSlice]] = {}
    rows: dict[tuple[str, str], int] = {}
    for source, table, module_spans in spans:
        for span in module_spans:
            placed = [(span.module, span.module_rows, RowSlice(source, span.start, span.stop, span.skip))]
            if naming is not Naming.DIFFUSERS and table is FAMILIES[family]:
                placed = _in_naming(source, table, span, part_rows, naming)
            for path, size, part in placed:
                slices.setdefault((source.component, path), []).append(part)
                rows[source.component, path] = size
    targets = [_target(*key, _joined(parts), rows[key]) for key, parts in slices.items()]
    refuse_column_norms(targets)
    return sorted(targets, key=lambda target: target.how == "fused")


def refuse_column_norms(targets: Iterable[TargetModule]) -> None:
    """Raise NeedsFlag for DoRA along the inputs that would be split or fused."""
    for target in targets:
        columns = [part.source.module for part in target.parts if part.source.update.along_inputs]
        if columns and target.how in ("split", "fused"):
            raise NeedsFlag(
                f"would be {target.how}, but is DoRA along the inputs, whose norms are those of the complete module",
                culprit=columns[0],
                flags=f"--exclude {shell_word(','.join(columns))}",
                why="to exclude them",
            )


def _refuse_twice(spans: Iterable[tuple[SourceModule, ModelFamily | None, tuple[Span, ...]]]) -> None:
    """Raise InputError if two modules hold the same rows, under different names or as a part and a fused module."""
    taken: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for source, _, module_spans in spans:
        for span in module_spans:
            stop = span.skip + span.stop - span.start
            others = taken.setdefault((source.component, span.module), [])
            if any(span.skip < end and start < stop for start, end in others):
                raise InputError("two modules of the adapter would become this one", culprit=span.module)
            others.append((span.skip, stop))


def table_of(source: SourceModule, family: str) -> ModelFamily | None:
    """Return the table of a module's names; None for a module that keeps its name."""
    if source.component in DENOISERS:
        return FAMILIES[family]
    return ENCODERS["clip"] if names_maker(ENCODERS["clip"], source.path) else None


def _spans(source: SourceModule, table: ModelFamily | None) -> tuple[Span, ...]:
    """Return the rows of a module as parts of diffusers' modules."""
    rows, columns = source.update.shape[:2]
    located = locate(table, source.path) if table else None
    if located is None:
        return (Span(0, rows, source.path, 0, rows),)
    spans = parts_of(located, columns, rows)
    if spans is None:
        parts = len(located.diffusers)
        raise InputError(f"has {rows} rows, which are not those of {parts} parts", culprit=source.module)
    return spans


def _in_naming(
    source: SourceModule, table: ModelFamily, span: Span, part_rows: Mapping[str, int], naming: Naming
) -> list[tuple[str, int, RowSlice]]:
    """Return (path, rows, slice) for the modules of a spelling that contain some rows of diffusers' module.

    Args:
        part_rows: diffusers' module -> the number of its rows.
    """
    placed: list[tuple[str, int, RowSlice]] = []
    located = locate(table, span.module)
    for path in located.names(naming) if located else ():
        other = locate(table, path)
        parts = parts_of(other, source.update.shape[1], known=part_rows) if other else None
        if parts is None:
            raise InputError(f"has {span.module_rows} rows, too many for its part of {path}", culprit=source.module)
        for part in parts:
            low, high = (
                max(part.skip, span.skip),
                min(part.skip + part.stop - part.start, span.skip + span.stop - span.start),
            )
            if part.module == span.module and low < high:
                start = span.start + low - span.skip
                target_row = part.start + low - part.skip
                placed.append((path, parts[-1].stop, RowSlice(source, start, start + high - low, target_row)))
    return placed


def _joined(parts: list[RowSlice]) -> tuple[RowSlice, ...]:
    """Return slices in the order of the target's rows; slices that continue each other become one."""
    joined: list[RowSlice] = []
    for part in sorted(parts, key=lambda part: part.target_start):
        last = joined[-1] if joined else None
        goes_on = last and (last.source, last.stop, last.target_start + last.stop - last.start) == (
            part.source,
            part.start,
            part.target_start,
        )
        if last and goes_on:
            joined[-1] = RowSlice(last.source, last.start, part.stop, last.target_start)
        else:
            joined.append(part)
    return tuple(joined)


def _target(component: str, path: str, parts: tuple[RowSlice, ...], rows: int) -> TargetModule:
    first = parts[0].source
    several = any(part.source is not first for part in parts)
    if several or sum(part.stop - part.start for part in parts) < rows:
        return fuse_modules(component, path, list(parts), rows)
    is_complete = first.update.shape[0] == rows
    how = "split" if not is_complete else "exact" if len(parts) == 1 else "swapped"
    return TargetModule(component, path, rows, parts, how)


def fuse_modules(component: str, path: str, parts: list[RowSlice], rows: int) -> TargetModule:
    """Return the target that fuses these slices into `rows` rows.

    Raises:
        NeedsFlag: some of its rows would have a magnitude and others none.
        InputError: the slices have different inputs, or too many rows.
    """
    other = next((p.source for p in parts if p.source.update.shape[1:] != parts[0].source.update.shape[1:]), None)
    if other:
        first = parts[0].source
        raise InputError(
            f"is {other.update.shape} and {first.path} {first.update.shape}: not parts of one matrix",
            culprit=other.path,
        )
    ordered = sorted(parts, key=lambda part: part.target_start)
    ends = [part.target_start + part.stop - part.start for part in ordered]
    starts = [part.target_start for part in ordered[1:]] + [rows]
    wrong = next((p for p, end, start in zip(ordered, ends, starts, strict=True) if end > start), None)
    if wrong:
        raise InputError(
            f"has {wrong.stop - wrong.start} rows, too many for its part of {path}", culprit=wrong.source.module
        )
    magnitudes = sum(part.source.update.cls is DoRA for part in parts)
    if magnitudes and (magnitudes < len(parts) or sum(part.stop - part.start for part in parts) != rows):
        raise NeedsFlag(
            "is fused there, but only some of its parts are DoRA: the others have no magnitude",
            culprit=path,
            flags=f"--exclude {shell_word(','.join(part.source.module for part in parts))}",
            why="to exclude them",
        )
    return TargetModule(component, path, rows, tuple(ordered), "fused")
