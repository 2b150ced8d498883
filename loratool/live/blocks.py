"""Bring the tensors of a model from one merge to another, in place, block by block; after an error, all the way back.

A block has the rows of one undo record. An item has blocks that cover the same numbers before and after: a worker
takes the former merge out in a buffer, merges there, and copies the result into the tensor. So nobody finds the base
in the tensors during a swap. The steps are those of `streaming.apply`, the records those of an undo file.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from ..binding.merge.merge_plan import MergePlan
from ..binding.modules.placement import Placement
from ..durable.fileio import word_sum
from ..durable.interrupts import held_back
from ..errors import InputError, MachineError
from ..files.tensor_ref import TensorRef
from ..numerics.arrays import Array, Device, Numbers, bytes_of, like_of, sent
from ..numerics.forms import FORMS
from ..numerics.rounding_stats import RoundingStats
from ..numerics.workspace import Workspace
from ..streaming.apply import plan_changed_tensors, restore_tensor
from ..streaming.items import Batching, Prepare
from ..streaming.parallel import map_in_order
from ..streaming.rewrite import BATCH, ChangedTensor, RowRange
from ..streaming.segment import UpdateLoader
from ..streaming.workers import run_threads
from ..undo.kept_records import KeptRecords
from ..undo.records import NOT_RESTORED, RecordedBlock
from .memory_files import MemoryFile
from .strided import StridedMemory

Hash = Callable[[memoryview], bytes]  # of the bytes of W in a block


def _sha256(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _sum(data: memoryview) -> bytes:
    return word_sum(data).to_bytes(8, "little")


CHECKS: dict[str, Hash] = {"sha256": _sha256, "sum": _sum}


@dataclass(frozen=True)
class KeptRecord:
    """The record of a block.

    Attributes:
        payload: as in an undo file.
        sum: of W', as in an undo file.
        hash: of W.
    """

    start: int
    stop: int
    payload: bytes
    sum: int
    hash: bytes

    @property
    def nbytes(self) -> int:
        return len(self.payload) + len(self.hash) + 8


@dataclass(frozen=True)
class RowBlock:
    """Rows of a tensor that one step changes.

    Attributes:
        columns: of the tensor as a matrix.
        hash: what W must have after the step; None if the step is a merge.
        source: the values that replace W; None if W is the step's input.
        batching: if these are all rows of a small tensor.
    """

    start: int
    stop: int
    columns: int
    prepare: Prepare
    hash: bytes | None = None
    source: TensorRef | None = None
    batching: Batching | None = None

    @property
    def first(self) -> int:
        """The number of the tensor that is the block's first."""
        return self.start * self.columns

    @property
    def end(self) -> int:
        return self.stop * self.columns

    def of(self, numbers: Numbers, first: int) -> Numbers:
        """Return the block as a matrix, from flat numbers of the tensor that begin at `first`."""
        return numbers[self.first - first : self.end - first].reshape(self.stop - self.start, self.columns)


@dataclass(frozen=True)
class Merged:
    """A merge that is, or is to be, in the tensors of a model.

    Attributes:
        changed: tensor -> its steps.
        records: tensor -> its records by their first rows; empty until it is merged.
        stats: tensor -> the statistics of its blocks.
    """

    plan: MergePlan
    changed: Mapping[str, ChangedTensor]
    records: dict[str, dict[int, KeptRecord]] = field(default_factory=dict)
    stats: dict[str, list[RoundingStats]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: MergePlan, memory: Mapping[str, StridedMemory]) -> Merged:
        """Return the merge of a plan, each tensor's steps on the tensor's device."""
        devices = {memory[name].device for name in plan.changed}
        steps = {device: plan_changed_tensors(plan, UpdateLoader(device), record=True) for device in devices}
        names = (name for name in plan.sources if name in plan.changed and memory[name].spec.size)
        return cls(plan, {name: steps[memory[name].device][name] for name in names})

    @property
    def nbytes(self) -> int:
        """Return the bytes of all records."""
        return sum(kept.nbytes for records in self.records.values() for kept in records.values())

    def placements(self, name: str) -> Sequence[Placement]:
        """Return the updates that are added to a tensor's own numbers; none if they were replaced."""
        is_own = self.plan.sources[name] == self.plan.base.ref(name)
        return self.plan.placements.get(name, ()) if is_own else ()

    def merging(self, name: str) -> list[RowBlock]:
        """Return the blocks that merge a tensor."""
        changed = self.changed[name]
        spec, source = self.plan.base.specs[name], self.plan.sources[name]
        columns = spec.size // changed.rows
        value = None if source == self.plan.base.ref(name) else source.as_stored(spec.dtype)
        return [
            RowBlock(start, min(start + part.item_rows, part.stop), columns, part.prepare, None, value, part.batching)
            for part in changed.ranges()
            if isinstance(part, RowRange)
            for start in range(part.start, part.stop, part.item_rows)
        ]

    def restoring(self, name: str, kept: Iterable[KeptRecord], device: Device) -> list[RowBlock]:
        """Return the blocks that restore W from records of a tensor."""
        by_row = {each.start: each for each in kept}
        undo = KeptRecords((name, each.start, each.stop, each.payload, each.sum) for each in by_row.values())
        base = self.plan.base.specs[name]
        tensor = restore_tensor(base, undo, name, self.placements(name), UpdateLoader(device))
        return [
            RowBlock(part.start, part.stop, tensor.columns, part.prepare, by_row[part.start].hash)
            for part in tensor.ranges()
            if isinstance(part, RowRange)
        ]

    def needs_all_rows(self, name: str) -> bool:
        """Return whether each block needs W of the whole tensor: for the norms of its columns."""
        others = (p for p in self.plan.placements.get(name, ()) if not p.update.additive)
        return any(p.update.cls.reads_columns or p.update.cls.norm_axis(p.update, p.transposed) == 1 for p in others)


@dataclass(frozen=True)
class _Item:
    """Numbers of a tensor that change together.

    Attributes:
        first, end: of its flat numbers.
        undo: the blocks that take the former merge out.
        do: the blocks of the next merge.
    """

    name: str
    first: int
    end: int
    undo: tuple[RowBlock, ...] = ()
    do: tuple[RowBlock, ...] = ()

    def of(self, undo: Iterable[RowBlock], do: Iterable[RowBlock]) -> _Item:
        """Return the item with those of a tensor's blocks that are inside of it."""

        def inside(blocks: Iterable[RowBlock]) -> tuple[RowBlock, ...]:
            return tuple(block for block in blocks if self.first <= block.first and block.end <= self.end)

        return replace(self, undo=inside(undo), do=inside(do))


@dataclass(frozen=True)
class _Batch:
    """Items of small tensors that are alike, which are only merged: one step does all of them."""

    items: tuple[_Item, ...]


@dataclass(frozen=True)
class _Done:
    """A finished item, without its blocks, which hold their factors."""

    item: _Item
    records: list[KeptRecord]
    stats: list[RoundingStats]


class Mover:
    """Brings tensors from one merge to the next.

    Args:
        file: the tensors.
        hash: a value of CHECKS.
    """

    def __init__(self, file: MemoryFile, hash: Hash, workers: int) -> None:
        self._file, self._hash = file, hash
        self._gpus = {memory.device for memory in file.memory.values() if memory.device.is_gpu}
        self._workers = 1 if self._gpus else workers

    def move(self, old: Merged | None, new: Merged | None) -> None:
        """Bring the tensors from one merge to the next; None is the base.

        Raises:
            InputError: a tensor was changed since, or the result overflows. The tensors are then as before.
        """
        if old:
            self._require_unchanged(old)
        done: list[_Done] = []
        try:
            self._run(self._items(old, new), done)
        except BaseException as error:
            with held_back():
                self._go_back(done, old, new, error)
            raise
        if new:
            for each in done:
                new.records.setdefault(each.item.name, {}).update((kept.start, kept) for kept in each.records)
                new.stats.setdefault(each.item.name, []).extend(each.stats)

    def _go_back(self, done: Sequence[_Done], old: Merged | None, new: Merged | None, error: BaseException) -> None:
        """Undo the finished items of a move that failed."""
        items: dict[str, list[_Done]] = defaultdict(list)
        for each in done:
            items[each.item.name].append(each)

        def backwards() -> Iterator[_Item]:
            for name, some in items.items():
                kept = [record for each in some for record in each.records]
                undo = new.restoring(name, kept, self._device(name)) if new and kept else []
                do = old.merging(name) if old and name in old.changed else []
                yield from (each.item.of(undo, do) for each in some)

        try:
            self._run(backwards(), [])
        except Exception as second:
            what = f"{second}; so some tensors are not as they were before the first error ({error})"
            raise MachineError(what, remedy="load the weights again") from error

    def _device(self, name: str) -> Device:
        return self._file.memory[name].device

    def _require_unchanged(self, merged: Merged) -> None:
        """Raise InputError for a tensor that does not have the numbers of its merge."""
        kept = [(name, each) for name, records in merged.records.items() for each in records.values()]

        def is_same(place: tuple[str, KeptRecord]) -> bool:
            name, each = place
            memory = self._file.memory[name]
            rows = merged.changed[name].rows
            columns = memory.spec.size // rows
            bits = Numbers.empty(FORMS[memory.spec.dtype], (each.stop - each.start) * columns).bits
            memory.read(each.start * columns, bits)
            return word_sum(bytes_of(bits)) == each.sum

        with closing(map_in_order(is_same, kept, self._workers)) as same:
            changed = dict.fromkeys(name for (name, _), is_kept in zip(kept, same, strict=True) if not is_kept)
        if changed:
            others = f", and {len(changed) - 1} tensors more" if len(changed) > 1 else ""
            what = f"was changed since it was merged{others}"
            remedy = "set it back, or load the weights again: the record does not fit"
            raise InputError(what, culprit=next(iter(changed)), remedy=remedy)

    def _items(self, old: Merged | None, new: Merged | None) -> Iterator[_Item]:
        names = dict.fromkeys([*(old.changed if old else ()), *(new.changed if new else ())])
        for name in names:
            here, there = (each if each and name in each.changed else None for each in (old, new))
            undo = here.restoring(name, here.records[name].values(), self._device(name)) if here else []
            do = there.merging(name) if there else []
            spans: Iterable[tuple[int, int]] = [(0, self._file.specs[name].size)]
            if not any(each.needs_all_rows(name) for each in (here, there) if each):
                spans = _joined((block.first, block.end) for block in (*undo, *do))
            yield from (_Item(name, first, end).of(undo, do) for first, end in spans)

    def _run(self, items: Iterator[_Item], done: list[_Done]) -> None:
        self._synchronize()
        gate = _Gate()
        work = partial(_Worker, self._file, self._hash, done, gate)
        try:
            with closing(run_threads(enumerate(self._grouped(items)), work, self._workers, ahead=1)) as runs:
                for _ in runs:
                    pass
        except BaseException:
            with held_back():
                gate.close()
            raise
        self._synchronize()

    def _grouped(self, items: Iterable[_Item]) -> Iterator[_Item | _Batch]:
        """Yield items, but those of small tensors in batches, as `streaming.rewrite` does."""
        waiting: dict[Hashable, list[_Item]] = {}
        for item in items:
            block = item.do[0] if len(item.do) == 1 and not item.undo else None
            if block is None or block.batching is None:
                yield item
                continue
            memory = self._file.memory[item.name]
            alike = block.batching.alike, memory.spec.dtype, memory.device, block.stop, block.columns
            some = waiting.setdefault(alike, [])
            some.append(item)
            if (len(some) + 1) * block.batching.size > BATCH:
                yield _Batch(tuple(waiting.pop(alike)))
        yield from (_Batch(tuple(some)) for some in waiting.values())

    def _synchronize(self) -> None:
        """Wait for all streams of the GPUs: the caller may use others than the worker."""
        for device in self._gpus:
            torch.cuda.synchronize(device)


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the union of spans as runs that none of them crosses; spans that only touch are apart."""
    run: tuple[int, int] | None = None
    for first, end in sorted(spans):
        if run and first < run[1]:
            run = run[0], max(run[1], end)
        else:
            yield from [run] if run else ()
            run = first, end
    yield from [run] if run else ()


class _Gate:
    """Lets items begin until it is closed, which waits for those under way.

    The pool alone does not: an interrupt while it starts a thread leaves one that it does not know.
    """

    def __init__(self) -> None:
        self._state, self._inside, self._is_open = threading.Condition(), 0, True

    def enter(self) -> bool:
        """Return whether an item may begin."""
        with self._state:
            self._inside += self._is_open
            return self._is_open

    def leave(self) -> None:
        with self._state:
            self._inside -= 1
            self._state.notify_all()

    def close(self) -> None:
        with self._state:
            self._is_open = False
            self._state.wait_for(lambda: not self._inside)


class _Worker:
    """Does one item after another, with buffers of its own."""

    def __init__(self, file: MemoryFile, hash: Hash, done: list[_Done], gate: _Gate) -> None:
        self._file, self._hash, self._done, self._gate = file, hash, done, gate
        self._work: dict[Device, Workspace] = {}

    def __call__(self, work: _Item | _Batch) -> None:
        if not self._gate.enter():
            return
        try:
            if isinstance(work, _Batch):
                self._batch(work.items)
            else:
                self._item(work)
        finally:
            self._gate.leave()

    def _workspace(self, memory: StridedMemory) -> Workspace:
        if memory.device not in self._work:
            self._work[memory.device] = Workspace(like_of(memory.device))
        return self._work[memory.device]

    def _batch(self, items: Sequence[_Item]) -> None:
        """Merge small tensors, one below the other."""
        blocks, memories = [item.do[0] for item in items], [self._file.memory[item.name] for item in items]
        batchings = [block.batching for block in blocks if block.batching]
        work, form = self._workspace(memories[0]), FORMS[memories[0].spec.dtype]
        shape = len(items) * blocks[0].stop, blocks[0].columns
        base, merged = (work.numbers(f"live {use}", form, *shape) for use in ("before", "merged"))
        parts, results = base.split(len(items)), merged.split(len(items))
        for memory, part in zip(memories, parts, strict=True):
            memory.read(0, part.bits.reshape(-1))
        merged.bits[...] = base.bits
        recorded = batchings[0].prepare([each.part for each in batchings])(base, 0, merged, work)
        kept = [
            self._record(item.name, block, one, part)
            for item, block, one, part in zip(items, blocks, recorded, parts, strict=True)
        ]
        for item, one, part, record, result in zip(items, recorded, parts, kept, results, strict=True):
            self._write(item, part.bits.reshape(-1), result.bits.reshape(-1), [record], [one.change])

    def _item(self, item: _Item) -> None:
        memory = self._file.memory[item.name]
        work, form, size = self._workspace(memory), FORMS[memory.spec.dtype], item.end - item.first
        buffers = (work.numbers(f"live {use}", form, 1, size).reshape(size) for use in ("before", "base", "merged"))
        before, weights, merged = buffers
        memory.read(item.first, before.bits)
        if item.undo:
            weights.bits[...] = before.bits
            for block in item.undo:
                self._restore(item.name, block, block.of(before, item.first), block.of(weights, item.first), work)
        else:
            weights = before
        records, stats = list[KeptRecord](), list[RoundingStats]()
        if item.do:
            merged.bits[...] = weights.bits
            with self._file.showing(item.name, item.first, weights.bits):
                for block in item.do:
                    base, out = block.of(weights, item.first), block.of(merged, item.first)
                    value = _read(block.source, block, base) if block.source else base
                    recorded = block.prepare(block.start, block.stop)(value, 0, out, work)
                    records.append(self._record(item.name, block, recorded, base))
                    stats.append(recorded.change)
        else:
            merged = weights
        self._write(item, before.bits, merged.bits, records, stats)

    def _record(self, name: str, block: RowBlock, recorded: RecordedBlock, base: Numbers) -> KeptRecord:
        """Return the record of a merged block, W in `base`; raise InputError if it overflows."""
        _refuse_overflow(name, recorded.change, base.form.name)
        assert isinstance(recorded.payload, bytes), "it is in a journal only where files are written"
        hashed = self._hash(bytes_of(base.host()))
        return KeptRecord(block.start, block.stop, recorded.payload, recorded.sum, hashed)

    def _write(
        self, item: _Item, before: Array, merged: Array, records: list[KeptRecord], stats: list[RoundingStats]
    ) -> None:
        memory = self._file.memory[item.name]
        try:
            memory.write(item.first, merged)
        except BaseException:
            memory.write(item.first, before)
            raise
        self._done.append(_Done(replace(item, undo=(), do=()), records, stats))

    def _restore(self, name: str, block: RowBlock, merged: Numbers, out: Numbers, work: Workspace) -> None:
        block.prepare(block.start, block.stop)(merged, 0, out, work)
        if self._hash(bytes_of(out.host())) != block.hash:
            raise InputError(NOT_RESTORED, culprit=name)


def _read(source: TensorRef, block: RowBlock, like: Numbers) -> Numbers:
    """Return the values that replace a block, where `like` is."""
    value = Numbers.empty(source.form, *like.shape)
    source.read(block.start, value)
    return Numbers(sent(value.bits, like.bits), value.form)


def _refuse_overflow(name: str, stats: RoundingStats, dtype: str) -> None:
    if stats.overflowed:
        what = f"{stats.overflowed} weights would become infinite in {dtype}"
        raise InputError(what, culprit=name, remedy="is this the adapter's base? Or cast the model to a wider type")


# Held while a merge begins or ends: the moves of one model must not overlap, and each uses all cores.
MOVING = threading.RLock()
