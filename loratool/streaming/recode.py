"""Merge rows of a coded weight back into codes, with the base's scales, and restore the former codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ..binding.modules.placement import Placement
from ..files.codecs.codec import Parts
from ..files.tensor_ref import TensorRef
from ..numerics.arrays import Numbers
from ..numerics.code_grid import round_to_codes
from ..numerics.code_levels import Codes
from ..numerics.forms import F64
from ..numerics.rounding_stats import RoundingStats
from ..numerics.workspace import Workspace
from ..undo.checks import recoded_shape, record_rows, rows_sharing
from ..undo.reader import UndoFile
from ..undo.records import CodedRows, RecordedBlock, Restorer, record_recoded
from .apply import scattered_codes, segments
from .items import Step
from .rewrite import ChangedTensor, RowRange
from .segment import RowSegment, UpdateLoader


def recode_tensor(
    source: TensorRef, placements: Sequence[Placement], load: UpdateLoader, record: bool
) -> ChangedTensor:
    """Return the codes of a weight with its placements merged in.

    Args:
        source: the weight, stored as codes.
        placements: one or more; none of them replaces the weight.
        record: the steps return a `RecordedBlock` instead of `RoundingStats`.
    """
    assert source.parts
    parts, rows = source.parts, placements[0].rows
    columns = source.spec.size // max(1, rows)
    height = record_rows(columns, True, rows_sharing(parts, columns))

    def ranges() -> Iterator[RowRange]:
        for start, stop, inside in segments(placements, {0, rows}):
            segment = RowSegment(source, columns, start, stop, inside, load) if inside else None
            yield RowRange(start, stop, partial(_recode, parts, segment, record), height, height)

    return ChangedTensor(rows, ranges, columns, scattered_codes(parts, columns))


def _recode(parts: Parts, segment: RowSegment | None, record: bool, start: int, stop: int) -> Step:
    """Return the step that rounds rows start:stop to codes. segment: None for rows that keep their codes."""

    def step(base: Numbers, row: int, out: Codes, work: Workspace) -> RoundingStats | RecordedBlock:
        first = start + row
        rows = CodedRows(parts, first, base.shape[1])
        former = rows.read(len(base))
        codes, stats = out.reshape(former.shape), RoundingStats()
        codes[...] = former
        if segment:
            x, _ = segment.reals_of(first, first + len(base), base, work)
            merged, stats = round_to_codes(x, base, rows.without_padding(former), rows, work)
            columns = parts.weight.spec.shape[-1]
            codes[:, :columns] = merged.reshape(-1, columns)
        return record_recoded(rows, former, codes, stats) if record else stats

    return step


def restore_recoded(parts: Parts, undo: UndoFile, name: str) -> ChangedTensor:
    """Return the former codes of a weight that a merge rounded to codes.

    Args:
        parts: the weight as the merged model stores it.
        name: of the tensor of codes, its key in the undo file.
    """
    rows, columns = recoded_shape(undo.index["tensors"][name])

    def ranges() -> Iterator[RowRange]:
        for record in undo.records(name):
            data = undo.bytes(record.offset, record.length)
            coded = CodedRows(parts, record.start, columns)
            restorer = Restorer(name, F64, data, record.sum, coded)
            height = record.stop - record.start
            yield RowRange(record.start, record.stop, partial(_restore, restorer, coded), height, height)

    return ChangedTensor(rows, ranges, columns, scattered_codes(parts, columns))


def _restore(restorer: Restorer, rows: CodedRows, start: int, stop: int) -> Step:
    """Return the step that restores a record's codes; the weight's numbers, which a rewrite reads, are not used."""

    def step(merged: Numbers, row: int, out: Codes, work: Workspace) -> None:
        codes = rows.read(stop - start)
        with restorer.damage():
            restorer.recoded(codes, out)
        restorer.check(codes)

    return step
