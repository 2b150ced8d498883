"""Run the items of `workers.run_items` in forked processes, which do not wait for each other's interpreter lock.

A block of a merge is fifty calls of torch and numpy. Each takes the lock, so two threads lose a third of their time. A
forked worker has the plan, the open files and the imports of its parent at no cost. It draws the same items from the
same iterator, receives only their numbers, and sends back the results of the steps. This is for Linux only: on macOS a
process that has used its frameworks cannot fork, and Windows has no fork.

The parent handles signals, also those to the group. The system kills a worker as soon as its parent is gone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from ..durable.interrupts import SIGNALS, unless_done
from ..errors import MachineError
from .threads import set_threads

AHEAD = 2  # items assigned to a worker, so that it never waits for the next

CAN_FORK = sys.platform == "linux"

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def chosen(items: Iterator[Any], numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Yield the items with these numbers, each with its number, until a number is too high. numbers: rising, from 0."""
    drawn = 0
    for number in numbers:
        item = next(islice(items, number - drawn, None), None)
        if item is None:
            return
        drawn = number + 1
        yield number, item


def run_forked(
    items: Iterator[Any], numbers: Iterable[int], make_worker: Callable[[], Callable[[Any], Any]], workers: int
) -> Generator[tuple[int, Any, Any], None, None]:
    """Yield each item with its number and its worker's result, in the order in which they end.

    A step's side effects stay in its process, so it must return its results. The first error is raised here.

    Args:
        numbers: of the items to run, as in `chosen`.
    """
    links: list[Connection] = []
    children: list[BaseProcess] = []
    numbered = chosen(items, numbers)
    pending: dict[int, Any] = {}

    def assign(link: Connection) -> None:
        for number, item in islice(numbered, 1):
            pending[number] = item
            with suppress(BrokenPipeError, ConnectionResetError):  # `_receive` raises for a worker that is gone
                link.send(number)

    def end() -> None:
        for child in children:
            child.kill()
        for child in children:
            child.join()
        for link in links:
            link.close()

    with unless_done(end):
        for _ in range(workers):
            _start(links, children, items, make_worker)
        for link in links * AHEAD:
            assign(link)
        while pending:
            for link in cast("list[Connection]", wait(links)):
                number, results, error = _receive(link)
                if error is not None:
                    raise error
                assign(link)
                yield number, pending.pop(number), results
        for link in links:
            link.close()  # the workers exit at the end of their link
        for child in children:
            child.join()


def _start(links: list[Connection], children: list[BaseProcess], items: Iterator[Any], make_worker: Any) -> None:
    ours, theirs = multiprocessing.Pipe()
    links.append(ours)
    child = multiprocessing.get_context("fork").Process(
        target=_serve, args=(os.getpid(), theirs, tuple(links), items, make_worker), daemon=True
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in the child for good: it has the parent's handlers
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about other threads: BLAS's idle ones, a clock
            child.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    children.append(child)


def _receive(link: Connection) -> tuple[int, Any, BaseException | None]:
    try:
        outcome: tuple[int, Any, BaseException | None] = link.recv()
    except (EOFError, OSError) as error:
        raise MachineError(
            "a worker process was killed", remedy="did the system run out of memory? its log would say so"
        ) from error
    return outcome


def _serve(
    parent: int, link: Connection, parents: tuple[Connection, ...], items: Iterator[Any], make_worker: Callable[[], Any]
) -> None:
    """Run items in a child process until the parent closes the link, or is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent was gone before that call
        return
    for other in parents:
        other.close()
    set_threads(1)
    worker = make_worker()
    try:
        for number, item in chosen(items, iter(link.recv, None)):
            try:
                link.send((number, worker(item), None))
            except (EOFError, BrokenPipeError):
                return
            except BaseException as error:
                _send_error(link, number, error)
    except (EOFError, OSError):
        return


def _send_error(link: Connection, number: int, error: BaseException) -> None:
    try:
        link.send((number, None, error))
    except (AttributeError, TypeError, pickle.PicklingError):
        link.send((number, None, RuntimeError(f"{type(error).__name__}: {error}")))
