"""Run independent items on a device with a bounded pool of workers.

A worker reads, computes and writes block by block in buffers of its own; while one waits for the disk, another
computes.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from typing import Any, BinaryIO, TypeVar

import numpy as np

from ..durable.fileio import copy_checked, copy_range, has_bytes, read_into, write_at
from ..files.weights_file import copy_bytes, read_parts
from ..numerics.arrays import Device, Numbers, bytes_of, like_of, send, stream_of
from ..numerics.forms import Form
from ..numerics.passes.hashes import page_sums, sha256_each
from ..numerics.workspace import Workspace
from .forked import CAN_FORK, chosen, run_forked
from .items import (
    CopyBytes,
    FinishedItem,
    GatherBytes,
    HashBatch,
    Item,
    MapBatch,
    MapRows,
    Outcome,
    Step,
    each_part,
)
from .scattered import Strided, add_place
from .threads import restore_threads, set_threads

KEPT_BYTES = 1 << 24  # of half the memory that a worker keeps between blocks

WORTH_A_FORK = 1 << 26  # with so many bytes of output, forking pays, which costs 20 ms a worker

T = TypeVar("T")

R = TypeVar("R")


class Worker:
    """Runs items one by one, with buffers of its own and, on a GPU, a stream, so that copies and kernels overlap."""

    def __init__(self, device: Device) -> None:
        self.like = like_of(device)
        self.work, self.host = Workspace(self.like), Workspace(pinned=device.is_gpu)
        self._crc, self._digest, self._places = 0, hashlib.sha256(), list[Strided]()
        # glibc returns freed memory to the system above twice the largest block freed so far; without this allocation
        # every block's temporary arrays would fault in their pages again
        np.empty(KEPT_BYTES, np.uint8)
        self.stream, self._streaming = stream_of(device)  # made once: it takes as long as a small item

    def __call__(self, item: Item | FinishedItem) -> Outcome:
        """Run one item."""
        if isinstance(item, FinishedItem):
            return Outcome(item.digest, None) if self._is_written(item) else self(item.item)
        if isinstance(item, CopyBytes):
            place = item.source, item.source_offset, item.target, item.target_offset, item.nbytes
            if item.checked:
                return Outcome("", [copy_checked(*place)])
            copy_range(*place)
            return Outcome("", [])
        if isinstance(item, GatherBytes):
            crc = copy_bytes(item.source, item.name, item.first, item.nbytes, item.target, item.target_offset)
            return Outcome("", [crc] if item.checked else [])
        if isinstance(item, HashBatch):
            parts = [read_parts(each.source, each.tensor, each.first, each.length) for each in item.parts]
            return Outcome("", [[each] for each in sha256_each(parts)])
        self._digest = hashlib.sha256()
        with self._streaming:
            results = self._batch(item) if isinstance(item, MapBatch) else self._rows(item)
        return Outcome(self._digest.hexdigest(), results)

    def _is_written(self, finished: FinishedItem) -> bool:
        """Return whether an earlier run's output of an item is still there."""
        item, digest = finished.item, hashlib.sha256()
        if isinstance(item, HashBatch):
            return True
        if isinstance(item, CopyBytes | GatherBytes):
            return has_bytes(item.target, item.target_offset, item.nbytes, item.read)
        for target, offset, nbytes in chain.from_iterable(part.places(finished.written) for part in each_part(item)):
            data = memoryview(bytearray(nbytes))
            read_into(target, data, offset)
            digest.update(page_sums(data))
        return digest.hexdigest() == finished.digest

    def _rows(self, item: MapRows) -> list[Any]:
        """Run the steps of an item."""
        step = item.prepare(item.start, item.stop)
        self._crc, self._places = 0, []
        results = [self._block(item, step, row, end) for row, end in item.blocks]
        return [*([self._crc] if item.checked else [self._places] if item.scattered else []), *results]

    def _batch(self, batch: MapBatch) -> list[list[Any]]:
        parts, step = batch.parts, batch.prepare()
        base, out = self._buffers(parts[0], sum(part.stop - part.start for part in parts))
        for part, rows in zip(parts, base.split(len(parts)), strict=True):
            part.source.read(part.start, rows)
        results, outcomes = self._run(step, base, 0, out), []
        for part, rows, result in zip(parts, out.split(len(parts)), results, strict=True):
            self._crc = 0
            self._write(part, 0, rows)
            outcomes.append([self._crc, result] if part.checked else [result])
        return outcomes

    def _buffers(self, item: MapRows, rows: int) -> tuple[Numbers, Any]:
        """Return the buffers of a block: of what is read, and of the numbers or codes that are written."""
        source = self.host.numbers("base", item.source.form, rows, item.columns)
        if isinstance(item.written, Form):
            return source, self.host.numbers("out", item.written, rows, item.target_columns)
        return source, self.host.take("out", item.written, rows, item.target_columns)

    def _run(self, step: Step, base: Numbers, row: int, out: Any) -> Any:
        """Run a step on the device; codes are written on the host."""
        if self.stream is None:
            return step(base, row, out, self.work)
        moved = self.work.numbers("base", base.form, *base.shape)
        send(base.bits, moved.bits)
        if isinstance(out, Numbers):
            on_device = self.work.numbers("out", out.form, *out.shape)
            result = step(moved, row, on_device, self.work)
            send(on_device.bits, out.bits)
        else:
            result = step(moved, row, out, self.work)
        self.stream.synchronize()
        return result

    def _block(self, item: MapRows, step: Step, row: int, end: int) -> Any:
        base, out = self._buffers(item, end - row)
        item.source.read(item.start + row, base)
        result = self._run(step, base, row, out)
        if item.scattered:
            scattered, locate, _ = item.scattered
            result, written = scattered.write(item.start + row, out, result)
            for tensor, first, data in written:
                target, offset = locate(tensor)
                self._put(target, memoryview(data), offset + first)
                add_place(self._places, tensor, first, len(data))
            return result
        self._write(item, row, out)
        return result

    def _write(self, item: MapRows, row: int, out: Numbers) -> None:
        data = bytes_of(out.bits)
        if item.checked:
            self._crc = zlib.crc32(data, self._crc)
        self._put(item.target, data, item.target_offset + row * item.target_columns * item.itemsize)

    def _put(self, target: BinaryIO, data: memoryview, offset: int) -> None:
        self._digest.update(page_sums(data))
        write_at(target, data, offset)


def run_items(
    items: Iterable[Item | FinishedItem], numbers: Iterable[int], device: Device, workers: int, nbytes: int
) -> Generator[tuple[int, Item | FinishedItem, Outcome], None, None]:
    """Run items with `workers` workers, and yield each with its number and outcome, in the order in which they end.

    On a CPU the workers are forked processes if the work is worth the forks, otherwise threads.

    Args:
        items: all of the plan; drawn lazily, so that a long plan takes little memory.
        numbers: of the items to run, rising, from 0; the run ends at the first number that is too high.
        nbytes: of the output of all items, roughly.
    """
    has_offsets = hasattr(os, "preadv") and hasattr(os, "pwrite")  # otherwise forks would share a file's position
    if CAN_FORK and has_offsets and not device.is_gpu and workers > 1 and nbytes >= WORTH_A_FORK:
        return run_forked(iter(items), numbers, lambda: Worker(device), workers)
    return run_threads(chosen(iter(items), numbers), lambda: Worker(device), workers, ahead=1)


def run_threads(
    numbered: Iterator[tuple[int, T]], make_worker: Callable[[], Callable[[T], R]], workers: int, ahead: int
) -> Generator[tuple[int, T, R], None, None]:
    """Run numbered items in threads, and yield each with its worker's result, in the order in which they end.

    After the first error, or an interrupt, no more items are drawn. The error is raised here when the items under way
    have ended. Exhaust or close the generator: that restores the libraries' numbers of threads.

    Args:
        ahead: items drawn for each worker beside the one that it runs. With 1 a worker never waits for its next item;
            use 0 for large items, as no other rank gets those that are drawn.
    """
    local = threading.local()
    threads_before = set_threads(1)

    def run_item(number: int, item: T) -> tuple[int, T, R]:
        if not hasattr(local, "worker"):
            set_threads(1)  # torch's is by thread
            local.worker = make_worker()
        return number, item, local.worker(item)

    pending: set[Future[tuple[int, T, R]]] = set()
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                while True:
                    room = (1 + ahead) * workers - len(pending)
                    pending |= {pool.submit(run_item, number, item) for number, item in islice(numbered, room)}
                    if not pending:
                        return
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                for future in pending:
                    future.cancel()
    finally:  # when all threads have ended: one may begin late, and set the number that all of them share
        restore_threads(threads_before)
