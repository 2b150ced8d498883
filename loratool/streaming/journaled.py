"""Run work with a journal: shared among the ranks of a job, and resumed after a death.

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
from ..files.stores.outgoing import outgoing_of
from .ranks import Job, RankDone
from .workers import run_threads

T = TypeVar("T")

SIGHT = 60  # seconds for which NFS caches a folder's entries, by default (`acdirmax`)

WRITTEN = "written"  # name of the barrier after which all ranks' output and records are on the disk


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
    """Open an output and its journal, on all ranks. The journal is removed when the output is complete.

    Ranks share both in one folder; if the output goes to a store, each rank has its own.

    A run that dies leaves both. A run that fails because of its inputs leaves neither, on whichever rank.

    Args:
        path: of the output.
        kinds: as in `Journal`.
        head: all that determines the output's bytes, by name, with `inputs`: name -> list, whose last item identifies
            the content.
        resume: resume a run that died, as after torchrun's restart.
        opened: opens the output on rank 0, and on ranks with their own folders. Its argument returns whether this run
            resumes; call it inside the lock.
        joined: opens on another rank the output that rank 0 has opened.

    Raises:
        UsageError: the journal to resume has other inputs or options.
        RankDone: at the end, on ranks other than 0. Their block may raise it too.
    """
    shared = {**head, "inputs": {name: identity[-1] for name, identity in head["inputs"].items()}}
    job.agree("plan", hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest())
    journal = Journal(path, kinds, job.rank)

    def goes_on() -> bool:
        try:
            return (resume or job.restarts > 0) and require_same(path, head)
        except UsageError:
            if resume:
                raise
            return False  # torchrun's rank 0 died before it began the journal; this one is an earlier run's

    is_joined = job.rank > 0 and not outgoing_of(path)
    with ExitStack() as stack:
        job.wait("opened")
        if is_joined:
            _await_sight(path)
            stack.enter_context(unless_done(partial(void_journal, path), partial(what_stays, path)))
            output = stack.enter_context(joined())
        else:
            output = stack.enter_context(opened(goes_on))
            if outgoing_of(path):
                stays = partial(_stays, job, path)
                stack.enter_context(unless_done(partial(void_journal, path), stays))
        stack.enter_context(closing(journal))
        stack.enter_context(unless_done(journal.close))
        if not is_joined:
            journal.begin(head if is_resumable else None)
        journal.open()
        if job.rank:
            with suppress(RankDone):
                yield journal, output
        else:
            job.announce("opened")
            yield journal, output
    if job.rank:
        job.hand_over(WRITTEN)


def _stays(job: Job, path: Path) -> str:
    """Name what a run can resume. A rank that gives up cannot void the journals in the folders of the others."""
    return "" if job.has_given_up() else what_stays(path)


def send_records(name: str, job: Job, journal: Journal) -> None:
    """Put this rank's records where the others find them under this name."""
    journal.sync()
    if outgoing := outgoing_of(journal.path):
        outgoing.put_records(name, journal.file_of(job.rank))


def read_records(name: str, job: Job, journal: Journal) -> None:
    """Read the records of all ranks, which have sent them under this name."""
    outgoing = outgoing_of(journal.path)
    if not outgoing:
        journal.read_all(job.count)
        return
    for rank in {*range(job.count)} - {job.rank}:
        copy = journal.file_of(f"{rank} {name}")
        outgoing.fetch_records(name, rank, copy)
        journal.read_copy(copy)


def read_others(job: Job, journal: Journal) -> None:
    """Wait for the other ranks to finish, and read their records. Call it on rank 0 within `journaled`."""
    if job.count > 1:
        job.hand_over(WRITTEN)
        read_records(WRITTEN, job, journal)


def _await_sight(path: Path) -> None:
    """Wait until this machine sees the files that rank 0 created; NFS caches for a while that they are missing.

    Raises:
        MachineError: the files do not appear.
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
    """Work whose result is one item of a journal."""

    item: int
    place: Place  # identifies the input: another run's result is reused if this is the same
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
    """Run tasks, shared among the ranks, and return the results of all of them.

    Each worker is a thread that computes with one thread, so that no sum depends on the number of workers.

    Args:
        name: of this set of tasks; all ranks have the same name and tasks.
        finished: called after each task, also after those that an earlier run has done.
        is_last: rank 0 goes on alone.

    Raises:
        RankDone: on ranks other than 0, if `is_last`.
    """
    computed = dict[int, Any]()  # by this rank

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
            computed[number] = journal.add(task.item, task.place, "", result)
            finished()
    if job.count > 1:
        if job.rank or not is_last:
            send_records(name, job, journal)
        (job.hand_over if is_last else job.barrier)(f"{name} done")
        read_records(name, job, journal)
    return [computed[n] if n in computed else journal.results(task.item) for n, task in enumerate(tasks)]
