"""Turn the placements of updates on a tensor into the steps that a rewrite runs over its rows.

The rows of a tensor are split into segments of rows with the same placements: one segment for a plain weight, one per
expert for a stack. The additive updates of a segment are one exact product. At most one update that is not additive is
added to it, which gives a and c of `W' = a * W + c` (`numerics.exact.Fill`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.updates import ADDITIVE, AddDelta, DoRA, Experts, LowRank, ReplaceRows, Update
from ..binding.merge_plan import MergePlan
from ..binding.placement import Placement
from ..files.dtypes import TORCH_FLOATS, TensorSpec
from ..files.tensor_ref import TensorRef
from ..files.undo_file import Record, UndoFile
from ..numerics.exact import (
    ExactProduct,
    Factors,
    Fill,
    RoundingStats,
    Workspace,
    apply_rounded,
    cast_rounded,
    replaced_change,
)
from ..numerics.filtered import FORMS, FilteredProduct, FilteredRows
from ..undo.records import (
    CELL_COLUMNS,
    Doubted,
    Doubter,
    RecordedBlock,
    Recorder,
    Restorer,
    bit_patterns,
    cell_rows,
    record_rows,
)
from .nonadditive import DoRAColumns, DoRARows, NonAdditive, ReplacedRows, ReplacedTensor, column_norms, magnitude_ratio
from .rewrite import ChangedTensor, CopiedRows, RowRange
from .workers import Step

KEPT_STACKS = 2  # updates of all experts of a layer that are kept in memory


FILTERED_BLOCK = 1 << 20  # weights of a block: what the filter does once per block is then a tenth of its cost


class UpdateLoader:
    """Reads updates, and keeps a few of stacks, since each has the factors of all experts of a layer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[int, Update] = {}
        self._lock = threading.Lock()

    def __call__(self, placement: Placement) -> Update:
        if placement.expert is None:
            return self._load(placement)
        key = id(placement.update)
        with self._lock:
            if key not in self._kept:
                if len(self._kept) >= KEPT_STACKS:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = self._load(placement)
            return self._kept[key]

    def _load(self, placement: Placement) -> Update:
        return placement.adapter.load(placement.update).to(self.device)


def plan_changed_tensors(plan: MergePlan, load: UpdateLoader, record: bool) -> dict[str, ChangedTensor]:
    """Return every tensor that is not just copied or cast, by name."""
    found = {}
    for name in plan.sources:
        base = TensorRef(plan.base.shard_of[name], name) if name in plan.base.specs else None
        placements = plan.placements.get(name, ())
        moved = base is not None and base != plan.sources[name]
        if not plan.sources[name].spec.size:
            continue
        if placements or (moved and base and base.spec.size and base.spec.shape and base.spec.dtype in TORCH_FLOATS):
            found[name] = merge_tensor(base, plan.sources[name], placements, load, record)
    return found


def merge_tensor(
    base: TensorRef | None, source: TensorRef, placements: Sequence[Placement], load: UpdateLoader, record: bool
) -> ChangedTensor:
    """Return a tensor with its placements merged in; all placements have the same number of rows.

    Args:
        base: the base's tensor, None if the base has none of this name
        source: where its rows come from, `base` or another tensor
        record: the steps return a `RecordedBlock` instead of `RoundingStats`, except for rows that the base lacks
    """
    rows = placements[0].rows if placements else source.spec.shape[0]
    columns = source.spec.size // max(1, rows)
    cells = (record_rows(columns), cell_rows(columns)) if record else (0, 0)
    moved = base is not None and base != source
    shared = min(rows, base.spec.shape[0]) if moved and base is not None else 0

    def ranges() -> Iterator[RowRange]:
        ends = {0, rows} if moved else set()
        edges = sorted(ends | {edge for p in placements for edge in (p.start, p.stop)})
        for start, stop in pairwise(edges):
            inside = [p for p in placements if p.start <= start and stop <= p.stop]
            segment = RowSegment(source, start, stop, inside, load, record and base == source)
            sizes = (cells[0], _filtered_rows(columns, cells[1])) if segment.is_filtered else cells
            if moved and base is not None and start < shared:
                both = _ReplaceRows(base, segment if inside else None, record).prepare
                yield RowRange(start, min(stop, shared), both, *cells)
            if inside and stop > (shared if moved else 0):
                yield RowRange(max(start, shared), stop, segment.prepare, *((0, 0) if moved else sizes))

    return ChangedTensor(rows, ranges)


def _filtered_rows(columns: int, cell: int) -> int:
    """Return the rows of a block for the filter, a multiple of `cell`: many, since each block has a fixed cost."""
    rows = max(1, FILTERED_BLOCK // max(1, columns))
    return max(1, rows // cell) * cell if cell else rows


def restore_tensor(
    spec: TensorSpec, undo: UndoFile, name: str, placements: Sequence[Placement], load: UpdateLoader
) -> ChangedTensor:
    """Return a merged tensor that is restored to the base's from its undo records. spec: the base's."""
    entry, records = undo.index["tensors"][name], undo.records(name)
    rows = placements[0].rows if placements else (spec.shape or (1,))[0]
    columns = spec.size // rows if rows else 0
    dtype = getattr(torch, TORCH_FLOATS.get(spec.dtype, "uint8"))

    def ranges() -> Iterator[RowRange | CopiedRows]:
        edges = sorted({edge for p in placements for edge in (p.start, p.stop)}) or [0, rows]
        for start, stop in pairwise(edges):
            inside = [p for p in placements if p.start <= start and stop <= p.stop]
            segment = RowSegment(None, start, stop, inside, load, False) if inside else None
            for record in (r for r in records if start <= r.start and r.stop <= stop):
                if segment and record.start == start:
                    segment.stored_ratio = lambda at=record.at: np.frombuffer(undo.bytes(at, 8 * columns), np.float64)
                prepare = _RestoreRows(undo, record, name, dtype, segment).prepare
                yield RowRange(record.start, record.stop, prepare, record.stop - record.start, cell_rows(columns))
        if "copied" in entry:
            first, at = entry["copied"]
            yield CopiedRows(first, rows, undo.file, at)

    return ChangedTensor(rows, ranges)


def subtract_tensor(source: TensorRef, placements: Sequence[Placement], load: UpdateLoader) -> ChangedTensor:
    """Return a merged tensor without additive placements, whose weights are negated; its steps return `Doubted`."""
    dtype = getattr(torch, TORCH_FLOATS[source.spec.dtype])

    def prepare(segment: RowSegment, start: int, stop: int) -> Step:
        def step(base: Tensor, row: int, out: Tensor, work: Workspace) -> Doubted:
            counter = Doubter(dtype)
            stats = apply_rounded(base, segment.fill_for(base, start + row, work), out, work, counter.witness)
            return Doubted(stats, counter.doubtful, counter.farthest)

        return step

    def ranges() -> Iterator[RowRange]:
        edges = sorted({edge for p in placements for edge in (p.start, p.stop)})
        for start, stop in pairwise(edges):
            inside = [p for p in placements if p.start <= start and stop <= p.stop]
            if inside:
                yield RowRange(start, stop, partial(prepare, RowSegment(source, start, stop, inside, load, False)))

    return ChangedTensor(placements[0].rows, ranges)


class _RestoreRows:
    """The rows of one record. If there is no segment, they were replaced, and the record has the difference."""

    def __init__(
        self, undo: UndoFile, record: Record, name: str, dtype: torch.dtype, segment: RowSegment | None
    ) -> None:
        self._undo, self._record, self._name, self._dtype, self._segment = undo, record, name, dtype, segment

    def prepare(self, start: int, stop: int) -> Step:
        record, segment = self._record, self._segment
        restorer = Restorer(self._name, self._dtype, self._undo.bytes(record.at, record.length), record.sha256)
        with restorer.damage():
            left = segment.left_factor(start, stop) if segment else None
            if segment and start == segment.start:
                restorer.skip(segment.undo_head)

        def step(merged: Tensor, row: int, out: Tensor, work: Workspace) -> None:
            with restorer.damage():
                if segment:
                    state = restorer.numbers(len(merged)) if segment.has_state else None
                    tensor = None if state is None else torch.from_numpy(state.copy()).to(merged.device)
                    restorer.block(merged, segment.fill(left, row, len(merged), start + row, tensor, work), out, work)
                else:
                    restorer.replaced(merged, out)
            restorer.check(out, merged, start + row + len(merged) == stop)

        return step


class _ReplaceRows:
    """Rows with values of another tensor; the base's are read too, for the statistics and for undo."""

    def __init__(self, base: TensorRef, segment: RowSegment | None, record: bool) -> None:
        self._base, self._segment, self._record = base, segment, record

    def prepare(self, start: int, stop: int) -> Step:
        inner = self._segment.prepare(start, stop) if self._segment else None
        recorder = Recorder(getattr(torch, TORCH_FLOATS[self._base.spec.dtype])) if self._record else None

        def step(value: Tensor, row: int, out: Tensor, work: Workspace) -> RoundingStats | RecordedBlock:
            done = inner(value, row, out, work) if inner else cast_rounded(value, out, work)
            first = start + row
            weight = self._base.file.rows(self._base.name, first, first + len(value)).to(out.device)
            stats = replaced_change(weight, value, out, work, done)
            if recorder is None:
                return stats
            recorder.difference(bit_patterns(weight), bit_patterns(out))
            return recorder.take(stats, weight, out)

        return step


class RowSegment:
    """Rows start:stop of a tensor under the same placements; the first item that needs their factors loads them."""

    def __init__(
        self,
        source: TensorRef | None,
        start: int,
        stop: int,
        placements: Sequence[Placement],
        load: UpdateLoader,
        record: bool,
    ) -> None:
        self.start, self.stop, self._record = start, stop, record
        # reads magnitude / norm of each column from the undo file, when there is no W to compute it from
        self.stored_ratio: Callable[[], np.ndarray[Any, Any]] | None = None
        self._source, self._placements, self._load, self._device = source, placements, load, load.device
        self._lock = threading.Lock()
        self._ready: tuple[ExactProduct | None, NonAdditive | None] | None = None
        self._filtered: FilteredProduct | None = None

    @property
    def _dtype(self) -> torch.dtype | None:
        name = TORCH_FLOATS.get(self._source.spec.dtype) if self._source else None
        return getattr(torch, name) if name else None

    @property
    def is_filtered(self) -> bool:
        """Return whether the float32 filter can be used, if the output has the same dtype."""
        additive = bool(self._placements) and all(p.update.kind in ADDITIVE for p in self._placements)
        return additive and self._dtype in FORMS and self._device.type == "cpu"

    def prepare(self, start: int, stop: int) -> Step:
        """Return the step for rows start:stop of the tensor."""
        _, nonadditive = self._get()
        left, rows = cache(partial(self.left_factor, start, stop)), None
        if self.is_filtered:
            product = self._filter()
            rows = FilteredRows(product, product.exact.balanced(start - self.start, stop - self.start))
        recorder = Recorder(self._dtype) if self._record and self._dtype else None
        if recorder and nonadditive and start == self.start:
            recorder.head(nonadditive.head)

        def exactly(base: Tensor, row: int, out: Tensor, work: Workspace) -> RoundingStats:
            state = nonadditive.state(base, start + row, work) if nonadditive else None
            if recorder is None:
                return apply_rounded(base, self.fill(left(), row, len(base), start + row, state, work), out, work)
            if state is not None:
                recorder.head(state.cpu().numpy().tobytes())
            stats, height = RoundingStats(), cell_rows(base.shape[1])
            for first in range(0, len(base), height):  # a single one if there is a state
                part = slice(first, min(first + height, len(base)))
                fill = self.fill(left(), row + first, part.stop - first, start + row + first, state, work)
                stats += apply_rounded(base[part], fill, out[part], work, recorder.witness, CELL_COLUMNS)
            return stats

        def step(base: Tensor, row: int, out: Tensor, work: Workspace) -> RoundingStats | RecordedBlock:
            stats = rows.apply(base, row, out, work, recorder) if rows and base.dtype == out.dtype else None
            if stats is None:
                stats = exactly(base, row, out, work)
            return stats if recorder is None else recorder.take(stats, base, out)

        return step

    def fill_for(self, base: Tensor, start: int, work: Workspace) -> Fill:
        """Return the Fill for the weights `base`, which are the tensor's rows from `start` on."""
        _, nonadditive = self._get()
        state = nonadditive.state(base, start, work) if nonadditive else None
        return self.fill(self.left_factor(start, start + len(base)), 0, len(base), start, state, work)

    def left_factor(self, start: int, stop: int) -> Tensor | None:
        """Return the left side of the additive updates for rows start:stop of the tensor, if there are any."""
        product, _ = self._get()
        return None if product is None else product.left(start - self.start, stop - self.start)

    @property
    def undo_head(self) -> bytes:
        _, nonadditive = self._get()
        return nonadditive.head if nonadditive else b""

    @property
    def has_state(self) -> bool:
        _, nonadditive = self._get()
        return nonadditive is not None and nonadditive.has_state

    def fill(self, left: Tensor | None, row: int, rows: int, first: int, state: Tensor | None, work: Workspace) -> Fill:
        """Return the Fill for some rows, the first of which is row `first` of the tensor and `row` of `left`."""
        product, nonadditive = self._get()
        fill = product.fill(left[row : row + rows]) if product is not None and left is not None else None
        if nonadditive is not None:
            fill = nonadditive.fill(state, first, rows, fill, work)
        assert fill is not None
        return fill

    def _get(self) -> tuple[ExactProduct | None, NonAdditive | None]:
        with self._lock:
            if self._ready is None:
                terms = [t for p in self._placements if p.update.kind in ADDITIVE for t in self._terms(p, p.weight)]
                others = [p for p in self._placements if p.update.kind not in ADDITIVE]
                assert len(others) <= 1, "resolve.refuse_second_nonadditive lets no second one through"
                nonadditive = self._nonadditive(others[0]) if others else None
                self._ready = ExactProduct(terms) if terms else None, nonadditive
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()  # since the streams of other workers read it
            return self._ready

    def _filter(self) -> FilteredProduct:
        product, _ = self._get()
        assert product is not None
        with self._lock:
            # in bfloat16 the rounding of float32 sums outweighs that of products, and is equal in all columns
            even = self._record or self._dtype == torch.bfloat16
            self._filtered = self._filtered or FilteredProduct(product, even)
            return self._filtered

    def _terms(self, placement: Placement, weight: float) -> list[Factors]:
        """Return the factors of an additive update, for the rows of the segment only."""
        update = self._load(placement)
        if isinstance(update, Experts):
            assert placement.expert is not None
            update = update.expert(placement.expert)
        assert isinstance(update, LowRank | AddDelta)
        first = placement.skip + self.start - placement.start
        rows = slice(first, first + self.stop - self.start)
        terms = update.terms(weight, placement.transposed)
        return [Factors(term.left[rows], term.multiplier, term.right) for term in terms]

    def _nonadditive(self, placement: Placement) -> NonAdditive:
        weight, file = placement.weight, placement.adapter.file
        if placement.update.kind == "replace":
            return ReplacedTensor(TensorRef(file, placement.update.tensors["value"]), weight, self._device)
        update = self._load(placement)
        if isinstance(update, ReplaceRows):
            return ReplacedRows(update, weight)
        assert isinstance(update, DoRA)
        product = ExactProduct(self._terms(placement, 1.0))
        magnitude = update.magnitude.double().flatten()
        if placement.transposed:
            if self.stored_ratio:
                found = torch.from_numpy(self.stored_ratio().copy()).to(self._device)
            else:
                assert self._source is not None
                norms = column_norms(self._source, product, self._device)
                found = magnitude_ratio(magnitude, norms, self._source.name)
            return DoRAColumns(product, found, weight, self.start)
        first = placement.skip + self.start - placement.start
        return DoRARows(
            product,
            magnitude[first : first + self.stop - self.start],
            weight,
            self.start,
            self._source.name if self._source else "",
        )
