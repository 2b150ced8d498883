"""Share one command among the ranks of a torchrun job, by nothing but counters and words in torch.distributed's store.

Every rank runs the same command on the same files and makes the same plan, whose digest `agree` compares. Work items
have numbers, which a rank draws when it is ready for one, so that a slow rank takes fewer. What costs reading is made
`once`, by rank 0, which also finishes the output; the others leave by `RankDone`. No process group is made: weights
pass through files alone.

torchrun starts all ranks anew when one dies, but its store lives on, with all that the dead have said. Nor do ranks
know which start they are of: TORCHELASTIC_RESTART_COUNT is each node's own, as only that of the dead rank counts up
(`_invoke_run` of torch/distributed/elastic/agent/server/api.py). So rank 0 counts the starts in the store and tells
each rank that greets it (`meet`); all that is said after that has the start's number before it.

A program that uses the library under torchrun remains alone, as it may call it on one rank only: `join_job` is for the
command line.
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

RUN_ID = "TORCHELASTIC_RUN_ID"  # the variable of the environment by which torchrun's ranks are known

PREFIX = "loratool/"  # of our keys in the store

PART = 1 << 20  # characters, of 4 bytes at most

STARTS, HELLO, WELCOME, MET = "starts", "hello", "welcome", "met"  # the keys by which ranks meet

BEAT = "beat"  # the key that counts while a rank lives

CONNECTING = 60  # seconds until the store must have answered: torchrun opens it before it starts a rank

BEATING, SILENCE = 5.0, 120.0  # seconds between beats, and without one until a rank is taken for dead

TELLING = 60  # seconds after which a rank says that it waits for others

CALLED = f"if this is no rank of torchrun's but called by one, unset {RUN_ID}"

POLL, LONGEST_POLL = 0.002, 0.25  # seconds between two looks at the store, at first and after a long while


class RankDone(BaseException):
    """A rank other than 0 has done its part. It is no Exception, so that nothing takes it for an error to mend."""


class Store(Protocol):
    """The part of torch.distributed's stores that is used: each call is one exchange, and waits for no other rank."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...


class _OwnStore:
    """The store of a process that is alone."""

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
    """A store of torch.distributed, which torchrun uses too; its errors are ours.

    A long text is cut into parts, as TCPStore takes 8 MiB at most; the first says before a line break how many more
    there are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, key: str, value: str, /) -> None:
        first, *others = [value[at : at + PART] for at in range(0, len(value), PART)] or [""]
        with _reached():
            for number, part in enumerate(others):
                self._store.set(f"{PREFIX}{key}/part {number}", part)
            self._store.set(PREFIX + key, f"{len(others)}\n{first}")

    def get(self, key: str, /) -> bytes:
        with _reached():
            found = self._store.get(PREFIX + key)
            count, mark, first = found.partition(b"\n")
            if not mark:  # a counter
                return found
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
    """The ranks that share a command; as it is made by default, this process alone. A name is used once in a job."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among the ranks of this machine
    local_count: int = 1
    start: int = 0  # how often rank 0 was started before, of which all ranks know
    restarts: int = 0  # the same as far as this rank knows, also where each start has a store of its own
    store: Store = field(default_factory=_OwnStore, repr=False)

    def numbers(self, name: str) -> Iterator[int]:
        """Yield numbers from 0, rising, that no other rank gets, without end."""
        while True:
            yield self.add(name, 1) - 1

    def add(self, name: str, amount: int) -> int:
        """Add to a counter of all ranks, and return its new value."""
        return self.store.add(self._key(name), amount)

    def once(self, name: str, make: Callable[[], str]) -> str:
        """Return what rank 0 made; an error there ends rank 0, and torchrun ends the others."""
        if self.rank:
            return self._await(name, 0)
        text = make()
        self.store.set(self._key(name), text)
        return text

    def agree(self, name: str, digest: str) -> None:
        """Raise InputError if this rank's digest is not rank 0's, which goes on when all others have the same."""
        if self.once(name, lambda: digest) != digest:
            import socket

            message = f"rank {self.rank}, on host {socket.gethostname()}, sees another plan than rank 0"
            raise InputError(message, remedy="are its files and options the same?")
        if self.rank:
            self._tell(name, digest)
        else:
            self._await_others(name)

    def reach(self, name: str) -> None:
        """Tell the others, as rank 0, that it has come so far."""
        self.store.set(self._key(name), "reached")

    def wait(self, name: str) -> None:
        """Wait until rank 0 has come so far; it does not wait for itself."""
        if self.rank:
            self._await(name, 0)

    def gather(self, name: str, own: str) -> Iterator[str]:
        """Return the texts of all ranks in their order to rank 0, which waits for each.

        Raises:
            RankDone: to the others, when their text is told.
        """
        if self.rank:
            self._tell(name, own)
        self.leave()
        return chain([own], self._texts(name))

    def come(self, name: str) -> None:
        """Wait until all ranks have come so far."""
        if self.rank:
            self._tell(name, "here")
            self.wait(name)
        else:
            self._await_others(name)
            self.reach(name)

    def hand_over(self, name: str) -> None:
        """Leave to rank 0 what follows, which waits until the others have come so far.

        Raises:
            RankDone: to the others.
        """
        if self.rank:
            self._tell(name, "here")
        self.leave()
        self._await_others(name)

    def leave(self) -> None:
        """Leave to rank 0 what follows: raise RankDone to the others."""
        if self.rank:
            raise RankDone

    def finish(self, code: int = 0) -> int:
        """End the job: rank 0 tells the others its exit code, which wait for that and return it.

        With one of their own the torchrun of another node would wait for minutes at its exit for the one that failed.
        A rank that had ended could not be restarted with rank 0: its node's torchrun would be waiting at its exit.
        """
        if not self.rank:
            self.store.set(self._key("end"), str(code))
            return code
        with suppress(_OutOfReach):  # rank 0 has ended, and the store was its own
            return int(self._await("end", 0))
        return 0

    def _tell(self, name: str, text: str) -> None:
        """Tell rank 0 something, as another rank."""
        self.store.set(self._key(f"{name}/{self.rank}"), text)

    def _await_others(self, name: str) -> None:
        deque(self._texts(name), maxlen=0)

    def _texts(self, name: str) -> Iterator[str]:
        """Yield what each other rank tells rank 0, which waits for it."""
        return (self._await(f"{name}/{rank}", rank) for rank in range(1, self.count))

    def _key(self, name: str) -> str:
        return f"{self.start}/{name}"

    def _await(self, name: str, rank: int) -> str:
        """Return what a rank tells, however long that takes.

        Raises:
            MachineError: torchrun has restarted that rank without this one, as nodes without a rendezvous do; or it
                died on a node that is not to be restarted, which torchrun does not tell the other nodes.
        """
        key, beat, heard = self._key(name), -1, time.monotonic()
        for _ in _looks():
            if self.store.check([key]):
                return self.store.get(key).decode()
            before, beat = beat, self.add(f"{BEAT}/{rank}", 0)
            heard = heard if beat == before else time.monotonic()
            if time.monotonic() - heard > SILENCE:
                raise MachineError(f"nothing was heard of rank {rank} for {SILENCE:.0f} seconds")
            if self._is_another(rank):
                remedy = "give torchrun --rdzv-backend c10d, by which nodes restart together"
                raise MachineError(f"rank {rank} was restarted, and rank {self.rank} was not", remedy=remedy)
        raise AssertionError("looks have no end")

    def _is_another(self, rank: int) -> bool:
        """Return whether a rank is another process than that which has met this one."""
        if rank == 0:
            return int(self.store.get(STARTS)) != self.start + 1
        return self.store.get(f"{HELLO}/{rank}") != self.store.get(self._key(f"{MET}/{rank}"))


def _looks(tell_late: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Wait between looks at the store, ever longer; not in the store's own wait, in which no signal would come."""
    pause, told_at = POLL, time.monotonic() + TELLING
    while True:
        yield
        if time.monotonic() > told_at:
            told_at = float("inf")
            tell_late()
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_POLL)


def is_launched() -> bool:
    """Return whether torchrun started this process, or a parent of it, as one of several ranks."""
    count = os.environ.get("WORLD_SIZE", "")
    return {RUN_ID, "RANK"} <= os.environ.keys() and count.isdecimal() and int(count) > 1


_job: Job | None = None


def current_job() -> Job:
    """Return this process's job; if it has not joined one, a new one of itself alone, whose counters are at 0."""
    return _job or Job()


def join_job(tell: Callable[[str], object]) -> None:
    """Become one of torchrun's ranks, when all have come.

    Args:
        tell: called once if some have not come for long.

    Raises:
        MachineError: the store cannot be reached, or torch has none.
    """
    global _job
    from datetime import timedelta

    import torch.distributed

    if not torch.distributed.is_available():
        raise MachineError("this torch was built without torch.distributed", remedy="run it without torchrun")
    from torch.distributed.rendezvous import rendezvous

    with _reached():
        opened, rank, count = next(rendezvous("env://", timeout=timedelta(seconds=CONNECTING)))
    store = _SharedStore(opened)
    start = meet(store, rank, count, tell)
    local_rank, local_count, restarts = (
        int(os.environ.get(name, default))
        for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("TORCHELASTIC_RESTART_COUNT", 0))
    )
    _job = Job(rank, count, local_rank, local_count, start, max(start, restarts), store)
    Thread(target=_beat, args=(_job,), daemon=True).start()


def _beat(job: Job) -> None:
    with suppress(_OutOfReach):  # the command finds that itself
        while True:
            job.add(f"{BEAT}/{job.rank}", 1)
            time.sleep(BEATING)


def meet(store: Store, rank: int, count: int, tell: Callable[[str], object]) -> int:
    """Return the number of this start, from 0, when all its ranks have met rank 0.

    A rank greets rank 0 with a word that no rank has used before, and is answered under that word: so neither takes
    what the dead have said for the other's.
    """
    return _greet(store, rank, tell) if rank else _welcome(store, count, tell)


def _greet(store: Store, rank: int, tell: Callable[[str], object]) -> int:
    word = os.urandom(8).hex()
    store.set(f"{HELLO}/{rank}", word)
    for _ in _looks(lambda: tell(f"waiting for other ranks; {CALLED}")):
        if store.check([f"{WELCOME}/{word}"]):
            start = int(store.get(f"{WELCOME}/{word}"))  # another one if rank 0 died in between
            store.set(f"{start}/{MET}/{rank}", word)
            if store.check([f"{start}/{MET}"]):
                return start
    raise AssertionError("looks have no end")


def _welcome(store: Store, count: int, tell: Callable[[str], object]) -> int:
    start = store.add(STARTS, 1) - 1
    absent = set(range(1, count))
    for _ in _looks(lambda: tell(f"waiting for {len(absent)} of {count} ranks; {CALLED}")):
        for each in absent:
            if store.check([f"{HELLO}/{each}"]):
                store.set(f"{WELCOME}/{store.get(f'{HELLO}/{each}').decode()}", str(start))
        absent.difference_update([each for each in absent if store.check([f"{start}/{MET}/{each}"])])
        if not absent:
            store.set(f"{start}/{MET}", "all")
            break
    return start
