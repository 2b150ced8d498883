"""Share one command among the ranks of a torchrun job, through counters and texts in torch.distributed's store.

Every rank runs the same command on the same files and makes the same plan; `agree` compares the plans' digests. Work
items have numbers. A rank draws a number when it is ready for an item, so a slow rank takes fewer. Rank 0 alone does
what costs reading (`on_rank0`) and finishes the output; the other ranks exit by `RankDone`. There is no process group:
weights pass through files alone.

torchrun restarts all ranks when one dies, but its store stays, with the texts of the dead ranks. A rank cannot know
which start it belongs to: TORCHELASTIC_RESTART_COUNT differs between nodes, as only the dead rank's node counts it up
(`_invoke_run` of torch/distributed/elastic/agent/server/api.py). So rank 0 counts the starts in the store and sends the
number to each rank that greets it (`rendezvous`). All later keys begin with that number.

A program that uses the library under torchrun remains a job of one rank, as it may call it on one rank only:
`join_job` is for the command line.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from threading import Thread
from typing import Protocol

from ..errors import InputError, MachineError

RUN_ID = "TORCHELASTIC_RUN_ID"  # the environment variable that marks torchrun's ranks

PREFIX = "loratool/"  # of our keys in the store

PART = 1 << 20  # characters, of 4 bytes at most

STARTS, HELLO, WELCOME, MET = "starts", "hello", "welcome", "met"  # keys of the rendezvous

BEAT = "beat"  # the key that counts while a rank lives

CONNECTING = 60  # seconds until the store must have answered: torchrun opens it before it starts a rank

BEATING, SILENCE = 5.0, 120.0  # seconds between heartbeats, and without one until a rank counts as dead

TELLING = 60  # seconds after which a rank reports that it waits for others

CALLED = f"if this is not a rank of torchrun but is called by one, unset {RUN_ID}"

GIVEN_UP = "given up"  # the key of a run that is undone

POLL, LONGEST_POLL = 0.002, 0.25  # seconds between two polls of the store, at first and after a long while


class RankDone(BaseException):
    """A rank other than 0 has done its part. It is not an Exception, so no handler of errors catches it."""


class Store(Protocol):
    """The methods of torch.distributed's stores that we use. Each call is one exchange and waits for no other rank."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...


class _OwnStore:
    """Store of a process without other ranks."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str, /) -> None:
        self._values[key] = value

    def get(self, key: str, /) -> bytes:
        return self._values[key].encode()

    def add(self, key: str, amount: int, /) -> int:
        value = int(self._values.get(key, 0)) + amount
        self._values[key] = str(value)
        return value

    def check(self, keys: list[str], /) -> bool:
        return self._values.keys() >= set(keys)


class _SharedStore:
    """Store of torch.distributed, which torchrun uses too. It raises our errors.

    TCPStore takes values of 8 MiB at most, so a long text is stored in parts. The first part begins with the number of
    the further parts and a line break.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, key: str, value: str, /) -> None:
        first, *others = [value[start : start + PART] for start in range(0, len(value), PART)] or [""]
        with _reached():
            for number, part in enumerate(others):
                self._store.set(f"{PREFIX}{key}/part {number}", part)
            self._store.set(PREFIX + key, f"{len(others)}\n{first}")

    def get(self, key: str, /) -> bytes:
        with _reached():
            stored = self._store.get(PREFIX + key)
            count, mark, first = stored.partition(b"\n")
            if not mark:  # a counter
                return stored
            return first + b"".join(self._store.get(f"{PREFIX}{key}/part {number}") for number in range(int(count)))

    def add(self, key: str, amount: int, /) -> int:
        with _reached():
            return self._store.add(PREFIX + key, amount)

    def check(self, keys: list[str], /) -> bool:
        with _reached():
            return self._store.check([PREFIX + key for key in keys])


class _OutOfReach(MachineError):
    """The store does not answer."""


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # DistNetworkError and others; ValueError: no MASTER_ADDR
        reason = str(error).partition("\n")[0]
        raise _OutOfReach(f"torchrun's store is out of reach: {reason}", remedy="is the first node up?") from error


@dataclass(frozen=True)
class Job:
    """The ranks that share a command; by default this process alone. Use each name once in a job."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the ranks of this machine
    local_count: int = 1
    start: int = 0  # how often rank 0 was started before; the same on all ranks
    restarts: int = 0  # how often this rank was started before, also where each start has a new store
    store: Store = field(default_factory=_OwnStore, repr=False)

    def numbers(self, name: str) -> Iterator[int]:
        """Yield rising numbers from 0, without end. No other rank gets the same ones."""
        while True:
            yield self.add(name, 1) - 1

    def add(self, name: str, amount: int) -> int:
        """Add to a counter of all ranks, and return its new value."""
        return self.store.add(self._key(name), amount)

    def on_rank0(self, name: str, make: Callable[[], str]) -> str:
        """Run `make` on rank 0 and return its text on all ranks. An error ends rank 0, and torchrun ends the others."""
        if self.rank:
            return self._await(name, 0)
        text = make()
        self.store.set(self._key(name), text)
        return text

    def agree(self, name: str, digest: str) -> None:
        """Raise InputError if this rank's digest differs from rank 0's. Rank 0 waits until all others agree."""
        if self.on_rank0(name, lambda: digest) != digest:
            import socket

            message = f"rank {self.rank}, on host {socket.gethostname()}, sees another plan than rank 0"
            raise InputError(message, remedy="are its files and options the same?")
        if self.rank:
            self._send(name, digest)
        else:
            self._await_others(name)

    def announce(self, name: str) -> None:
        """Release the ranks that `wait` for this name. Call it on rank 0."""
        self.store.set(self._key(name), "reached")

    def wait(self, name: str) -> None:
        """Wait for rank 0's `announce` of this name; rank 0 does not wait."""
        if self.rank:
            self._await(name, 0)

    def gather(self, name: str, text: str) -> Iterator[str]:
        """Return the texts of all ranks on rank 0, in the order of ranks, waiting for each.

        Raises:
            RankDone: on the other ranks, when their text is in the store.
        """
        if self.rank:
            self._send(name, text)
        self.exit_unless_rank0()
        return chain([text], self._texts(name))

    def barrier(self, name: str) -> None:
        """Wait until all ranks have called this."""
        if self.rank:
            self._send(name, "here")
            self.wait(name)
        else:
            self._await_others(name)
            self.announce(name)

    def give_up(self) -> None:
        """Announce to all ranks that this run is undone, and not to be resumed."""
        with suppress(_OutOfReach):
            self.announce(GIVEN_UP)

    def has_given_up(self) -> bool:
        """Return whether a rank has given up; False if the store is out of reach."""
        with suppress(_OutOfReach):
            return self.store.check([self._key(GIVEN_UP)])
        return False

    def hand_over(self, name: str) -> None:
        """Continue on rank 0 alone, after all other ranks have called this.

        Raises:
            RankDone: on the other ranks.
        """
        if self.rank:
            self._send(name, "here")
        self.exit_unless_rank0()
        self._await_others(name)

    def exit_unless_rank0(self) -> None:
        """Raise RankDone on every rank but rank 0."""
        if self.rank:
            raise RankDone

    def finish(self, code: int = 0) -> int:
        """End the job and return rank 0's exit code on all ranks; the others wait for it.

        If exit codes differed, the torchrun of another node would wait for minutes at its exit for the failed one. If a
        rank ended before rank 0, it could not be restarted with it: its node's torchrun would be waiting at its exit.
        """
        if not self.rank:
            self.store.set(self._key("end"), str(code))
            return code
        with suppress(_OutOfReach):  # rank 0 held the store, and has ended
            return int(self._await("end", 0))
        return 0

    def _send(self, name: str, text: str) -> None:
        """Send rank 0 a text. Call it on another rank."""
        self.store.set(self._key(f"{name}/{self.rank}"), text)

    def _await_others(self, name: str) -> None:
        deque(self._texts(name), maxlen=0)

    def _texts(self, name: str) -> Iterator[str]:
        """Yield the text that each other rank sent, waiting for it. Call it on rank 0."""
        return (self._await(f"{name}/{rank}", rank) for rank in range(1, self.count))

    def _key(self, name: str) -> str:
        return f"{self.start}/{name}"

    def _await(self, name: str, rank: int) -> str:
        """Wait for a rank's text, however long it takes, and return it.

        Raises:
            MachineError: torchrun has restarted that rank without this one, as nodes without a rendezvous do; or it
                died on a node that is not to be restarted, which torchrun does not tell the other nodes.
        """
        key, beat, heard = self._key(name), -1, time.monotonic()
        for _ in _polls():
            if self.store.check([key]):
                return self.store.get(key).decode()
            before, beat = beat, self.add(f"{BEAT}/{rank}", 0)
            heard = heard if beat == before else time.monotonic()
            if time.monotonic() - heard > SILENCE:
                raise MachineError(f"rank {rank} has not answered for {SILENCE:.0f} seconds")
            if self._is_another(rank):
                remedy = "give torchrun --rdzv-backend c10d, so that nodes restart together"
                raise MachineError(f"rank {rank} was restarted, and rank {self.rank} was not", remedy=remedy)
        raise AssertionError("looks have no end")

    def _is_another(self, rank: int) -> bool:
        """Return whether a rank was restarted since the rendezvous with this one."""
        if rank == 0:
            return int(self.store.get(STARTS)) != self.start + 1
        return self.store.get(f"{HELLO}/{rank}") != self.store.get(self._key(f"{MET}/{rank}"))


def _polls(report_late: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Yield once for each poll of the store, with growing pauses. The store's own wait would hold back signals."""
    pause, report_at = POLL, time.monotonic() + TELLING
    while True:
        yield
        if time.monotonic() > report_at:
            report_at = float("inf")
            report_late()
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_POLL)


def is_launched() -> bool:
    """Return whether torchrun started this process, or a parent of it, as one of several ranks."""
    count = os.environ.get("WORLD_SIZE", "")
    return {RUN_ID, "RANK"} <= os.environ.keys() and count.isdecimal() and int(count) > 1


_job: Job | None = None


def current_job() -> Job:
    """Return this process's job; if it has not joined one, a new job of this process alone, with counters at 0."""
    return _job or Job()


def join_job(tell: Callable[[str], object]) -> None:
    """Join the job of torchrun's ranks, after the rendezvous with all of them.

    Args:
        tell: called once with a message if some ranks are absent for long.

    Raises:
        MachineError: the store is out of reach, or torch was built without one.
    """
    global _job
    from datetime import timedelta

    import torch.distributed

    if not torch.distributed.is_available():
        raise MachineError("this torch was built without torch.distributed", remedy="run it without torchrun")
    from torch.distributed.rendezvous import rendezvous as open_store

    with _reached():
        opened, rank, count = next(open_store("env://", timeout=timedelta(seconds=CONNECTING)))
    store = _SharedStore(opened)
    start = rendezvous(store, rank, count, tell)
    local_rank, local_count, restarts = (
        int(os.environ.get(name, default))
        for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("TORCHELASTIC_RESTART_COUNT", 0))
    )
    _job = Job(rank, count, local_rank, local_count, start, max(start, restarts), store)
    Thread(target=_beat, args=(_job,), daemon=True).start()


def _beat(job: Job) -> None:
    with suppress(_OutOfReach):  # the command raises this itself
        while True:
            job.add(f"{BEAT}/{job.rank}", 1)
            time.sleep(BEATING)


def rendezvous(store: Store, rank: int, count: int, tell: Callable[[str], object]) -> int:
    """Wait for all ranks of this start, and return the start's number, from 0.

    A rank greets rank 0 with a new random word, and rank 0 answers under that word. So neither mistakes a dead rank's
    text for the other's.
    """
    return _greet(store, rank, tell) if rank else _welcome(store, count, tell)


def _greet(store: Store, rank: int, tell: Callable[[str], object]) -> int:
    word = os.urandom(8).hex()
    store.set(f"{HELLO}/{rank}", word)
    for _ in _polls(lambda: tell(f"waiting for other ranks; {CALLED}")):
        if store.check([f"{WELCOME}/{word}"]):
            start = int(store.get(f"{WELCOME}/{word}"))  # another one if rank 0 died in between
            store.set(f"{start}/{MET}/{rank}", word)
            if store.check([f"{start}/{MET}"]):
                return start
    raise AssertionError("looks have no end")


def _welcome(store: Store, count: int, tell: Callable[[str], object]) -> int:
    start = store.add(STARTS, 1) - 1
    absent = set(range(1, count))
    for _ in _polls(lambda: tell(f"waiting for {len(absent)} of {count} ranks; {CALLED}")):
        for rank in absent:
            if store.check([f"{HELLO}/{rank}"]):
                store.set(f"{WELCOME}/{store.get(f'{HELLO}/{rank}').decode()}", str(start))
        absent.difference_update([rank for rank in absent if store.check([f"{start}/{MET}/{rank}"])])
        if not absent:
            store.set(f"{start}/{MET}", "all")
            break
    return start
