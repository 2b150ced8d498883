"""Simulate torchrun's ranks in a merge of the largest models: python schedule.py [deepseek-v3|kimi-k2] [bf16].

The items are those of the real plan of a checkpoint that `trillion` makes. Their costs (COSTS) were measured, as was
what all ranks wait for: the plan before the first item, and rank 0's end after the last. All workers share one limit
of bandwidth, first come first served, and one counter. A worker reads, computes, and writes, one after the other; each
rank draws the numbers and keeps the journal for its workers (`streaming/forked.py`). What is compared with the time is
the least that any schedule could take: the bytes at that bandwidth, or the work shared evenly, whichever is more.
"""

from __future__ import annotations

import heapq
import math
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import trillion

import loratool
from loratool.commands.merge import command
from loratool.files.output.output import Output
from loratool.streaming import rewrite
from loratool.streaming.forked import AHEAD
from loratool.streaming.items import HashBatch, Item, MapBatch, MapRows

SIZES = ((1, 1), (1, 8), (8, 8), (64, 8))  # ranks, and workers of each
BANDWIDTHS = (10e9, 40e9, 100e9, math.inf)  # bytes/s, of reading and writing together


@dataclass(frozen=True)
class Costs:
    """Seconds of one core."""

    copied: float  # a byte
    hashed: float  # a byte
    merged: float  # a weight, rounded and recorded for undo
    coded: float  # the same, from codes
    call: float  # an item, beside these
    enumerated: float  # an item of the plan that a process passes over, its own or another's
    journaled: float  # a record, by the rank
    asked: float  # a counter's answer, of the store's one thread; a rank asks two counters for an item
    finished: float  # a record, by rank 0 at the end: read, decoded, and put into the undo file
    planned: float  # a changed tensor, from the start to the first item: the plan, and rank 0's checks of factors
    closed: float  # a changed tensor, by rank 0 at the end: its row of the report


# Of one core of the machine of the guide `benchmarks`: 4 M weights an item, Gaussian, with their undo records
COSTS = Costs(
    copied=1.0e-9,
    hashed=0.9e-9,
    merged=10.8e-9,
    coded=78e-9,
    call=0.3e-3,
    enumerated=11e-6,
    journaled=0.2e-3,
    asked=10e-6,
    finished=60e-6,
    planned=490e-6,
    closed=65e-6,
)


@dataclass(frozen=True)
class Task:
    """An item, as far as time goes: seconds of computing, and bytes."""

    seconds: float
    read: int
    written: int


@dataclass(frozen=True)
class Times:
    """Seconds from the start to the first item, to the end of the last one, and to the end of rank 0."""

    planned: float
    worked: float
    ended: float


def items_of(folder: Path) -> Iterator[Item]:
    """Yield the items of the merge of `folder`'s base and adapter, of which nothing is written."""
    kept: list[Any] = []

    class Planned(BaseException):
        """The plan is made."""

    def keep(output: Output, sources: Any, changed: Any, *others: Any, **_: Any) -> None:
        targets = {file.name: file for file in output.files}
        groups = rewrite._groups(output, sources, changed, targets, others[-1].read, False)  # type: ignore[arg-type]
        kept.extend(rewrite._items(output, [items for _, items in groups]))
        raise Planned

    with mock.patch.object(command, "rewrite", keep):
        try:
            loratool.merge(str(folder / "base"), str(folder / "adapter"), str(folder / "merged"))
        except Planned:
            yield from kept


def task_of(item: Item, costs: Costs) -> Task:
    """Return what an item costs."""
    if isinstance(item, HashBatch):
        length = sum(part.length for part in item.parts)
        return Task(costs.call + costs.hashed * length, length, 0)
    if isinstance(item, MapBatch):
        parts = [task_of(part, costs) for part in item.parts]
        seconds = sum(part.seconds - costs.call for part in parts) + costs.call
        return Task(seconds, sum(part.read for part in parts), item.nbytes)
    if not isinstance(item, MapRows):
        return Task(costs.call + costs.copied * item.nbytes, item.nbytes, item.nbytes)
    weights = (item.stop - item.start) * item.columns
    if item.source.weight:  # codes, of a byte each
        return Task(costs.call + costs.coded * weights, weights, item.nbytes)
    return Task(costs.call + costs.merged * weights, weights * item.source.form.itemsize, item.nbytes)


def simulate(tasks: Sequence[Task], costs: Costs, ranks: int, workers: int, bandwidth: float, tensors: int) -> Times:
    """Return the times of a run on so many ranks, of so many workers each.

    Args:
        bandwidth: bytes/s that all have together.
        tensors: that change.
    """
    first = tensors * costs.planned
    count = ranks * workers
    drawn, store, pipe = 0, 0.0, 0.0
    free, at = [first] * ranks, [0] * ranks  # a rank: when it is idle, and which item of the plan it is at
    passed, idle = [0] * count, [True] * count  # a worker: which item it is at, and whether it waits for one
    waiting: list[deque[tuple[float, int]]] = [deque() for _ in range(count)]
    events = [(first, turn, worker, 0, "ask") for turn in range(AHEAD) for worker in range(count)]

    def begin(worker: int, now: float) -> None:
        idle[worker] = not waiting[worker]
        if waiting[worker]:
            told, item = waiting[worker].popleft()
            start = max(now, told) + costs.enumerated * (item + 1 - passed[worker])
            passed[worker] = item + 1
            heapq.heappush(events, (start, 0, worker, item, "read"))

    while events:
        now, _, worker, item, what = heapq.heappop(events)
        rank = worker // workers
        if what == "read":
            pipe = max(pipe, now) + tasks[item].read / bandwidth
            heapq.heappush(events, (pipe + tasks[item].seconds, 0, worker, item, "write"))
        elif what == "write":
            pipe = max(pipe, now) + tasks[item].written / bandwidth
            heapq.heappush(events, (pipe, 0, worker, item, "end"))
        elif what == "end":
            free[rank] = max(free[rank], now) + costs.journaled
            heapq.heappush(events, (free[rank], 0, worker, item, "ask"))
            begin(worker, now)
        else:
            store = max(store, now) + 2 * costs.asked
            free[rank] = max(free[rank], store)
            if drawn < len(tasks):
                free[rank] += costs.enumerated * (drawn + 1 - at[rank])
                at[rank] = drawn = drawn + 1
                waiting[worker].append((free[rank], drawn - 1))
                if idle[worker]:
                    begin(worker, now)
    worked = max(free)
    records = costs.finished + (costs.enumerated if ranks > 1 else 0)
    return Times(first, worked, worked + len(tasks) * records + tensors * costs.closed)


def least(tasks: Sequence[Task], workers: int, bandwidth: float) -> float:
    """Return the least seconds that any schedule takes."""
    nbytes = sum(task.read + task.written for task in tasks)
    return max(sum(task.seconds for task in tasks) / workers, nbytes / bandwidth)


def table(tasks: Sequence[Task], costs: Costs, tensors: int) -> Iterator[str]:
    """Yield the lines of the guide's table: workers, then for each bandwidth seconds, and the least by them."""
    heads = [f"{bandwidth / 1e9:g} GB/s" for bandwidth in BANDWIDTHS]
    yield f"| workers | {' | '.join(heads)} |"
    yield "|---|" + "---|" * len(heads)
    for ranks, workers in SIZES:
        cells = []
        for bandwidth in BANDWIDTHS:
            ended = simulate(tasks, costs, ranks, workers, bandwidth, tensors).ended
            cells.append(f"{ended:,.0f} s, {least(tasks, ranks * workers, bandwidth) / ended:.0%}")
        yield f"| {ranks * workers} | {' | '.join(cells)} |"


if __name__ == "__main__":
    model, dtype = sys.argv[1] if len(sys.argv) > 1 else "deepseek-v3", "BF16" if "bf16" in sys.argv[2:] else "F8_E4M3"
    with tempfile.TemporaryDirectory() as made:
        trillion.make_base(Path(made) / "base", model, dtype)
        modules = trillion.make_adapter(Path(made) / "adapter", model)
        found = [task_of(item, COSTS) for item in items_of(Path(made))]
    seconds, moved = sum(task.seconds for task in found), sum(task.read + task.written for task in found)
    print(f"{len(found):,} items, {seconds:,.0f} s of a core, {moved / 1e9:,.0f} GB read and written\n")
    print("\n".join(table(found, COSTS, modules)))
    for ranks, workers in SIZES:
        times = simulate(found, COSTS, ranks, workers, math.inf, modules)
        even, worked = seconds / ranks / workers, times.worked - times.planned
        print(f"{ranks * workers} workers: plan {times.planned:.0f} s, ", end="")
        print(f"items {worked:.1f} s ({even:.1f} s evenly), end {times.ended - times.worked:.0f} s")
