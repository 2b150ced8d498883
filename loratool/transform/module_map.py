"""Map an image adapter's modules to those of another format: which rows each is made of, and its path there.

If one format fuses what the other splits, a split module gets its rows of B and the ranks that reach them, and a fused
one the ranks of its slices one after the other (`factors` makes them).
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
    """A run of rows of a source module's B, and its place in the target's."""

    source: SourceModule
    start: int  # the first row in the source
    stop: int  # the row after the last
    at: int = 0  # the first row in the target


@dataclass(frozen=True)
class TargetModule:
    """A module of the output, made of rows of source modules."""

    component: str  # `unet`, `text_encoder`, `text_encoder_2`, ...; empty for a language model
    path: str
    rows: int  # of B in all, some of which may be in no slice
    parts: tuple[RowSlice, ...]
    how: str  # `exact` (the stored factors), `split`, `fused` or `swapped`


def runs_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return rows as runs, each with its first row and the row after its last."""
    starts = [i for i, row in enumerate(rows) if not i or row != rows[i - 1] + 1]
    return [(rows[i], rows[j - 1] + 1) for i, j in pairwise([*starts, len(rows)])]


def plan_target_modules(sources: list[SourceModule], family: str, naming: Naming) -> list[TargetModule]:
    """Return the targets that an image adapter's modules become, under the names of a naming.

    Args:
        family: a key of FAMILIES.
        naming: of the denoiser's modules; text encoders have one only.

    Raises:
        InputError: two modules would become one, or rows do not fit.
        NeedsFlag: DoRA could not be split or fused.
    """
    settled = settle_components(sources, FAMILIES[family])
    spans = [(source, table := _table_of(source, family), _spans(source, table)) for source in settled]
    _refuse_twice(spans)
    whole = {span.module: span.whole for source, _, each in spans if source.component in DENOISERS for span in each}
    slices: dict[tuple[str, str], list[RowSlice]] = {}
    rows: dict[tuple[str, str], int] = {}
    for source, table, each in spans:
        for span in each:
            placed = [(span.module, span.whole, RowSlice(source, span.start, span.stop, span.skip))]
            if naming is not Naming.DIFFUSERS and table is FAMILIES[family]:
                placed = _in_naming(source, table, span, whole, naming)
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
                f"would be {target.how}, and is DoRA along the inputs, whose norms are of the whole",
                culprit=columns[0],
                flags=f"--exclude {shell_word(','.join(columns))}",
                why="to leave them out",
            )


def _refuse_twice(spans: Iterable[tuple[SourceModule, ModelFamily | None, tuple[Span, ...]]]) -> None:
    """Raise InputError for rows that two modules are, one under another name or a part of the other."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for source, _, each in spans:
        for span in each:
            stop = span.skip + span.stop - span.start
            others = found.setdefault((source.component, span.module), [])
            if any(span.skip < end and start < stop for start, end in others):
                raise InputError("two modules of the adapter would become this one", culprit=span.module)
            others.append((span.skip, stop))


def _table_of(source: SourceModule, family: str) -> ModelFamily | None:
    """Return the table that names a module's rows; None for a module that keeps its name."""
    if source.component in DENOISERS:
        return FAMILIES[family]
    return ENCODERS["clip"] if names_maker(ENCODERS["clip"], source.path) else None


def _spans(source: SourceModule, table: ModelFamily | None) -> tuple[Span, ...]:
    """Return the rows of diffusers' modules that a module consists of."""
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
    source: SourceModule, table: ModelFamily, span: Span, whole: Mapping[str, int], naming: Naming
) -> list[tuple[str, int, RowSlice]]:
    """Return (path, rows, slice) for the modules of a naming that some rows of diffusers' module are in.

    Args:
        whole: diffusers' module -> its rows.
    """
    found: list[tuple[str, int, RowSlice]] = []
    located = locate(table, span.module)
    for path in located.names(naming) if located else ():
        other = locate(table, path)
        parts = parts_of(other, source.update.shape[1], known=whole) if other else None
        if parts is None:
            raise InputError(f"has {span.whole} rows, too many for its part of {path}", culprit=source.module)
        for part in parts:
            low, high = (
                max(part.skip, span.skip),
                min(part.skip + part.stop - part.start, span.skip + span.stop - span.start),
            )
            if part.module == span.module and low < high:
                start = span.start + low - span.skip
                at = part.start + low - part.skip
                found.append((path, parts[-1].stop, RowSlice(source, start, start + high - low, at)))
    return found


def _joined(parts: list[RowSlice]) -> tuple[RowSlice, ...]:
    """Return slices in the order of the target's rows, those that go on in source and target as one."""
    found: list[RowSlice] = []
    for part in sorted(parts, key=lambda part: part.at):
        last = found[-1] if found else None
        goes_on = last and (last.source, last.stop, last.at + last.stop - last.start) == (
            part.source,
            part.start,
            part.at,
        )
        if last and goes_on:
            found[-1] = RowSlice(last.source, last.start, part.stop, last.at)
        else:
            found.append(part)
    return tuple(found)


def _target(component: str, path: str, parts: tuple[RowSlice, ...], rows: int) -> TargetModule:
    first = parts[0].source
    several = any(part.source is not first for part in parts)
    if several or sum(part.stop - part.start for part in parts) < rows:
        return fuse_modules(component, path, list(parts), rows)
    whole = first.update.shape[0] == rows
    how = "split" if not whole else "exact" if len(parts) == 1 else "swapped"
    return TargetModule(component, path, rows, parts, how)


def fuse_modules(component: str, path: str, parts: list[RowSlice], rows: int) -> TargetModule:
    """Return the target that fuses these slices into `rows` rows.

    Raises:
        NeedsFlag: some of its rows would have a magnitude and others none.
        InputError: the slices have different inputs, or more rows than there is place for.
    """
    other = next((p.source for p in parts if p.source.update.shape[1:] != parts[0].source.update.shape[1:]), None)
    if other:
        first = parts[0].source
        raise InputError(
            f"is {other.update.shape} and {first.path} {first.update.shape}: no parts of one matrix", culprit=other.path
        )
    ordered = sorted(parts, key=lambda part: part.at)
    ends = [part.at + part.stop - part.start for part in ordered]
    starts = [part.at for part in ordered[1:]] + [rows]
    wrong = next((p for p, end, start in zip(ordered, ends, starts, strict=True) if end > start), None)
    if wrong:
        raise InputError(
            f"has {wrong.stop - wrong.start} rows, too many for its part of {path}", culprit=wrong.source.module
        )
    magnitudes = sum(part.source.update.cls is DoRA for part in parts)
    if magnitudes and (magnitudes < len(parts) or sum(part.stop - part.start for part in parts) != rows):
        raise NeedsFlag(
            "is fused there, of parts of which some are DoRA: the others have no magnitude",
            culprit=path,
            flags=f"--exclude {shell_word(','.join(part.source.module for part in parts))}",
            why="to leave them out",
        )
    return TargetModule(component, path, rows, tuple(ordered), "fused")
