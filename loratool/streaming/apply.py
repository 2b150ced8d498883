"""Plan the steps that a rewrite runs over a tensor's rows, from the placements of updates on it.

The rows of a tensor are split into segments of rows with the same placements: one segment for a plain weight, one per
expert for a stack. `segment.RowSegment` gives each its exact reals.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from ..binding.merge.merge_plan import MergePlan
from ..binding.modules.placement import Placement
from ..binding.modules.resolve import rows_together
from ..files.codecs.codec import Parts, StoredTensor
from ..files.dtypes import FLOATS, TensorSpec
from ..files.tensor_ref import TensorRef
from ..numerics.arrays import Numbers, sent
from ..numerics.forms import F64, FORMS, Form, Wide
from ..numerics.merge import RowMerge
from ..numerics.rounding_stats import RoundingStats, cast_rounded, replaced_change
from ..numerics.workspace import Workspace
from ..undo.checks import record_rows, rows_sharing
from ..undo.kept_records import RecordSource
from ..undo.reader import Record, UndoFile
from ..undo.records import CodedRows, Doubted, RecordedBlock, Recorder, Restorer, subtract
from .items import Batching, Step
from .rewrite import ChangedTensor, CopiedRows, RowRange
from .scattered import Scattered, Written
from .segment import RowSegment, UpdateLoader, reals_of_batch

SMALL = 1 << 16  # numbers of a tensor that is merged in a batch: more are worth the calls


def plan_changed_tensors(plan: MergePlan, load: UpdateLoader, record: bool) -> dict[str, ChangedTensor]:
    """Return the tensors that are neither copied, nor cast, nor written as codes: name -> tensor."""
    changed = {}
    for name in plan.sources.keys() - plan.coded:
        source, placements = plan.sources[name], plan.placements.get(name, ())
        base = plan.base.ref(name) if name in plan.base.specs else None
        is_decoded = name in plan.decoded and record  # otherwise it is cast
        if source.spec.size and (placements or is_decoded or (base and base != source and _has_rows(base.spec))):
            changed[name] = merge_tensor(base, source, placements, load, record and plan.restores_base(name))
    return changed


def _has_rows(spec: TensorSpec) -> bool:
    """Return whether a tensor has rows of numbers, which a replacement can be compared with."""
    return bool(spec.size and spec.shape) and spec.dtype in FLOATS


def merge_tensor(
    base: TensorRef | None, source: TensorRef, placements: Sequence[Placement], load: UpdateLoader, record: bool
) -> ChangedTensor:
    """Return a tensor with its placements merged in; all placements have the same number of rows.

    Args:
        base: the base's tensor; None if the base has no tensor of this name.
        source: the tensor whose rows are read, `base` or another one.
        record: the steps return a `RecordedBlock` instead of `RoundingStats`, except for rows that the
            base lacks.
    """
    rows = placements[0].rows if placements else source.spec.shape[0]
    columns = source.spec.size // max(1, rows)
    together = rows_together(placements)
    if base and base.parts:
        together = lcm(together, rows_sharing(base.parts, columns))
    height = record_rows(columns, bool(base and base.weight), together)
    replaced = base if base and base != source and base.spec.shape[1:] == source.spec.shape[1:] else None
    shared = min(rows, replaced.spec.shape[0]) if replaced else 0
    codes = source if record and base == source and source.weight else None

    def ranges() -> Iterator[RowRange]:
        for start, stop, inside in segments(placements, {0, rows} if replaced or codes else set()):
            segment = RowSegment(source, columns, start, stop, inside, load)
            if replaced and start < shared:
                differs = record and not replaced.weight  # else the undo file keeps the stored tensors unchanged
                step = partial(_replace, replaced, segment if inside else None, differs)
                yield RowRange(start, min(stop, shared), step, height, height)
            if inside and stop > shared:
                step = partial(_merge, segment, record and base == source, codes)
                is_whole = base == source and stop - start == rows <= height and not source.parts
                batching = _batching(segment, record) if is_whole else None
                yield RowRange(max(start, shared), stop, step, height, height, batching)
            elif codes:
                yield RowRange(start, stop, partial(_decode, codes), height, height)

    return ChangedTensor(rows, ranges)


def segments(placements: Sequence[Placement], ends: set[int]) -> Iterator[tuple[int, int, list[Placement]]]:
    """Yield the runs of rows with the same placements, and these placements."""
    edges = sorted(ends | {edge for p in placements for edge in (p.start, p.stop)})
    for start, stop in pairwise(edges):
        yield start, stop, [p for p in placements if p.start <= start and stop <= p.stop]


def _decode(source: TensorRef, start: int, stop: int) -> Step:
    """Return the step that only decodes rows start:stop of a coded tensor, and records their codes."""

    def step(base: Numbers, row: int, out: Numbers, work: Workspace) -> RecordedBlock:
        stats = cast_rounded(base, out, work)
        recorder = Recorder(base.form, _rows_of(source, start + row, base.shape[1]), work)
        recorder.difference(base, out)
        return recorder.result(stats, out)

    return step


def _rows_of(source: TensorRef, start: int, columns: int) -> CodedRows:
    assert source.parts
    return CodedRows(source.parts, start, columns)


def _merge(segment: RowSegment, record: bool, codes: TensorRef | None, start: int, stop: int) -> Step:
    """Return the step that merges rows start:stop of a tensor. codes: the tensor if its codes are to be recorded."""

    def step(base: Numbers, row: int, out: Numbers, work: Workspace) -> RoundingStats | RecordedBlock:
        if not record:
            return segment.merge(base, start + row, out, work)
        x, norms = segment.reals_of(start + row, start + row + len(base), base, work)
        recorder = Recorder(base.form, _rows_of(codes, start + row, base.shape[1]) if codes else None, work)
        if segment.mixes:
            stats = RowMerge(x, base.form, out.form, base.bits).apply(base, 0, out, work)
            recorder.predicted(base, out, segment.undone(start + row, start + row + len(base), out), work)
            return recorder.result(stats, out)
        if norms is not None and (segment.norms_of_rows or start + row == segment.start):
            recorder.head(norms)
        stats = RowMerge(x, base.form, out.form, base.bits).apply(base, 0, out, work, recorder)
        return recorder.result(stats, out)

    return step


def _batching(segment: RowSegment, record: bool) -> Batching | None:
    """Return a tensor's share in a batch; None if it has many rows, or updates other than LoRA."""
    rows, columns = segment.stop - segment.start, segment.columns
    size = max(rows * columns, segment.rank * (rows + columns))
    if size > SMALL or not segment.is_low_rank:
        return None
    return Batching((segment.alike(), record), size, segment, partial(_merge_batch, record))


def _merge_batch(record: bool, segments: Sequence[RowSegment]) -> Step:
    """Return the step that merges all rows of several tensors, as one sum if `reals_of_batch` can."""

    def step(base: Numbers, row: int, out: Numbers, work: Workspace) -> list[RoundingStats] | list[RecordedBlock]:
        x = reals_of_batch(segments)
        if x is None:
            blocks = zip(segments, base.split(len(segments)), out.split(len(segments)), strict=True)
            return [_merge(segment, record, None, 0, len(b))(b, 0, merged, work) for segment, b, merged in blocks]
        recorder = Recorder(base.form, matrices=len(segments)) if record else None
        stats = RowMerge(x, base.form, out.form, base.bits).apply_each(base, 0, out, work, recorder)
        return recorder.results(stats, out) if recorder else stats

    return step


def _replace(base: TensorRef, segment: RowSegment | None, record: bool, start: int, stop: int) -> Step:
    """Return the step for rows with values of another tensor; it reads the base's too, for statistics and undo."""
    inner = _merge(segment, False, None, start, stop) if segment else None

    def step(value: Numbers, row: int, out: Numbers, work: Workspace) -> RoundingStats | RecordedBlock:
        done = inner(value, row, out, work) if inner else cast_rounded(value, out, work)
        first = start + row
        rows = base.as_stored(out.form.name).read_matrix(base.spec.shape[0], first, first + len(value))
        weight = Numbers(sent(rows.bits, out.bits), rows.form)
        stats = replaced_change(weight, value, out, work, done)
        if not record:
            return stats
        recorder = Recorder(weight.form)
        recorder.difference(weight, out)
        return recorder.result(stats, out)

    return step


def restore_tensor(
    spec: TensorSpec, undo: RecordSource, name: str, placements: Sequence[Placement], load: UpdateLoader
) -> ChangedTensor:
    """Return a merged tensor that is restored to the base's from its undo records. spec: of the base's tensor."""
    rows = placements[0].rows if placements else (spec.shape or (1,))[0]
    columns = spec.size // rows if rows else 0
    form = FORMS.get(spec.dtype, F64)
    parts = undo.parts_of(name) if name in undo.weights else None

    def ranges() -> Iterator[RowRange | CopiedRows]:
        records = deque(undo.records(name))
        for start, stop, inside in segments(placements, {0, rows} if parts or not placements else set()):
            segment = RowSegment(None, columns, start, stop, inside, load) if inside else None
            while records and records[0].stop <= stop:
                record = records.popleft()
                if segment and record.start == start:
                    segment.stored_norms = partial(_read_norms, undo, record, name, form)
                codes = CodedRows(parts, record.start, columns) if parts else None
                prepare = partial(_restore, undo, record, name, form, segment, codes)
                height = record.stop - record.start
                yield RowRange(record.start, record.stop, prepare, height, height)
        if copied := undo.copied_rows(name):
            first, offset = copied
            yield CopiedRows(first, rows, undo.file, offset)

    return ChangedTensor(rows, ranges, columns, scattered_codes(parts, columns) if parts else None)


def scattered_codes(parts: Parts, columns: int) -> Scattered:
    """Return how the codes of a weight are written. columns: of its rows, each of which is one or more codec rows."""
    codec, codes = parts.weight.format, parts.weight.tensors[0]
    fold, width = columns // parts.weight.spec.shape[-1], codec.width(parts)

    def write(start: int, out: npt.NDArray[Any], result: Any) -> tuple[Any, Iterator[Written]]:
        places = codec.places(parts, start * fold, out.reshape(-1, width))
        return result, ((codes, offset, data) for offset, data in places)

    return Scattered(np.dtype(codec.code), width * fold, parts.codes_spec.nbytes, [codes], write)


def restore_codes(
    undo: UndoFile, name: str, placements: Sequence[Placement], load: UpdateLoader
) -> dict[str, ChangedTensor]:
    """Return the stored tensors of a weight that the base stores as codes: copies from the undo file, and the codes."""

    def ranges(stored: StoredTensor) -> Iterator[CopiedRows]:
        yield CopiedRows(0, 1, stored.file.file, stored.file.begin[stored.name])

    weight = undo.weights[name]
    restored = {stored.name: ChangedTensor(1, partial(ranges, stored)) for stored in undo.kept(name)}
    if weight.tensors[0] not in restored:
        restored[weight.tensors[0]] = restore_tensor(weight.spec, undo, name, placements, load)
    return restored


def _restorer(undo: RecordSource, record: Record, name: str, form: Form, codes: CodedRows | None = None) -> Restorer:
    return Restorer(name, form, undo.bytes(record.offset, record.length), record.sum, codes)


def _read_norms(undo: RecordSource, record: Record, name: str, form: Form, count: int) -> Wide:
    restorer = _restorer(undo, record, name, form)
    with restorer.damage():
        return restorer.norms(count)


def _restore(
    undo: RecordSource,
    record: Record,
    name: str,
    form: Form,
    segment: RowSegment | None,
    codes: CodedRows | None,
    start: int,
    stop: int,
) -> Step:
    """Return the step that restores a record's rows. segment: None for rows that were replaced or only decoded."""
    restorer = _restorer(undo, record, name, form, codes)

    def step(merged: Numbers, row: int, out: Any, work: Workspace) -> None:
        with restorer.damage():
            if segment is None:
                restorer.replaced(merged, out, work)
            elif segment.mixes:
                restorer.predicted(merged, segment.undone(start + row, start + row + len(merged), merged), out, work)
            else:
                norms = None
                if segment.norms_of_rows:
                    norms = restorer.norms(len(merged) * segment.count_row_norms())
                elif segment.norms_of_columns and start == segment.start:
                    restorer.norms(segment.count_column_norms())
                x, _ = segment.reals_of(start + row, start + row + len(merged), None, work, norms)
                restorer.block(merged, x, out, work)
        restorer.check(merged)

    return step


def subtract_tensor(source: TensorRef, placements: Sequence[Placement], load: UpdateLoader) -> ChangedTensor:
    """Return a merged tensor with its additive placements subtracted; its steps return `Doubted`."""
    columns = source.spec.size // max(1, placements[0].rows)
    height = record_rows(columns)

    def prepare(segment: RowSegment, start: int, stop: int) -> Step:
        def step(merged: Numbers, row: int, out: Numbers, work: Workspace) -> Doubted:
            x, _ = segment.reals_of(start + row, start + row + len(merged), merged, work)
            return subtract(merged, x, out, work)

        return step

    def ranges() -> Iterator[RowRange]:
        for start, stop, inside in segments(placements, set()):
            if inside:
                segment = RowSegment(source, columns, start, stop, inside, load)
                yield RowRange(start, stop, partial(prepare, segment), height, height)

    return ChangedTensor(placements[0].rows, ranges)
