"""Do work that a journal keeps: on all ranks of a job, and after a death only what was not finished.

Rank 0 opens the journal and the output, and goes on alone when all ranks have done their part.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..durable.interrupts import unless_done
from ..durable.journal import Journal, Place, require_same
from ..durable.partial import journal_path, partial_path, void_journal, what_stays
from ..errors import MachineError, UsageError
from .ranks import Job, RankDone
from .workers import run_threads

T = TypeVar("T")

SIGHT = 60  # seconds for which NFS remembers what is in a folder, if nobody has set another `acdirmax`

WRITTEN = "written"  # the key by which a rank tells rank 0 that what it wrote, and its records, are on the disk


@contextmanager
def journaled(
    path: Path,
    kinds: Mapping[str, type],
    head: Mapping[str, Mapping[str, Any]],
    resume: bool,
    job: Job,
    opened: Callable[[Callable[[], bool]], AbstractContextManager[T]],
    joined: Callable[[], AbstractContextManager[T]],
    is_resumable: bool = True,
) -> Iterator[tuple[Journal, T]]:
    """Open an output and its journal, which goes with the last byte; on a rank other than 0, what rank 0 has opened.

    A run that dies leaves both; one that fails by its inputs neither, on whichever rank.

    Args:
        path: the output's.
        kinds: as in `Journal`.
        head: what decides about the output's bytes, by name, with `inputs`: name -> list, whose last tells the content.
        resume: go on with what a run that died has left, as after torchrun's restart.
        opened: opens the output on rank 0; it is told what to call, inside the lock, to ask whether this run goes on.
        joined: opens on another rank what rank 0 has opened.

    Raises:
        UsageError: the journal to go on with is of other inputs or options.
        RankDone: at the end, to a rank other than 0, which may end the block by it.
    """
    shared = {**head, "inputs": {name: told[-1] for name, told in head["inputs"].items()}}
    job.agree("plan", hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest())
    journal = Journal(path, kinds, job.rank)

    def goes_on() -> bool:
        try:
            return (resume or job.restarts > 0) and require_same(path, head)
        except UsageError:
            if resume:
                raise
            return False  # torchrun's rank 0 died before it had begun anew, and this is what an earlier run left

    with ExitStack() as stack:
        if job.rank:
            job.wait("opened")
            _await_sight(path)
            stack.enter_context(unless_done(partial(void_journal, path), partial(what_stays, path)))
            output = stack.enter_context(joined())
        else:
            output = stack.enter_context(opened(goes_on))
            journal.begin(head if is_resumable else None)
        stack.enter_context(closing(journal))
        stack.enter_context(unless_done(journal.close))
        journal.open()
        if job.rank:
            with suppress(RankDone):
                yield journal, output
            journal.sync()
        else:
            job.reach("opened")
            yield journal, output
    if job.rank:
        job.hand_over(WRITTEN)


def read_others(job: Job, journal: Journal) -> None:
    """Wait, as rank 0 within `journaled`, until the others have left theirs, and read their records."""
    if job.count > 1:
        job.hand_over(WRITTEN)
        journal.read_all(job.count)


def _await_sight(path: Path) -> None:
    """Wait until this machine sees what rank 0 has made of an output: NFS believes for a while that it is not there.

    Raises:
        MachineError: it does not.
    """
    last = time.monotonic() + SIGHT
    for place in (partial_path(path), journal_path(path)):
        while not place.exists():
            if time.monotonic() > last:
                message = f"rank 0 has made it, and {socket.gethostname()} does not see it"
                raise MachineError(message, culprit=str(place), remedy="is its folder on a disk that all nodes share?")
            time.sleep(0.05)


@dataclass(frozen=True)
class Task:
    """Work whose result a journal has as one item."""

    item: int
    place: Place  # what it is about: another run's result is taken if this is the same
    work: Callable[[], Any]


def run_tasks(
    name: str,
    tasks: Sequence[Task],
    job: Job,
    journal: Journal,
    workers: int,
    finished: Callable[[], object] = lambda: None,
    is_last: bool = False,
) -> list[Any]:
    """Return the results of tasks, which the ranks share.

    Each worker is a thread with one of torch's, so that no sum depends on how many there are.

    Args:
        name: of the tasks, the same on all ranks, which have the same tasks.
        finished: called after each, also those that a run that died has done.
        is_last: rank 0 goes on alone.

    Raises:
        RankDone: to the others, if it is the last.
    """
    own = dict[int, Any]()

    def waiting() -> Iterator[tuple[int, Task]]:
        for number in job.numbers(name):
            if number >= len(tasks):
                return
            task = tasks[number]
            record = journal.finished.get(task.item)
            if record and record.place == task.place:
                finished()
            else:
                yield number, task

    with closing(run_threads(waiting(), lambda: lambda task: task.work(), workers, ahead=0)) as runs:
        for number, task, result in runs:
            own[number] = journal.add(task.item, task.place, "", result)
            finished()
    if job.rank:
        journal.sync()
    if is_last:
        job.hand_over(f"{name} done")
    else:
        job.come(f"{name} done")
    if job.count > 1:
        journal.read_all(job.count)
    return [own[n] if n in own else journal.results(task.item) for n, task in enumerate(tasks)]
