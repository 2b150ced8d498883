"""Keeps a caller's arithmetic from changing ours: denormal numbers count, whatever the process does with its own.

`torch.set_flush_denormal(True)`, or a library built with -ffast-math, makes a thread take the smallest numbers of every
type for zero. A thread inherits that from the one that starts it, and torch's own threads then keep it for good, so
that turning it off in the caller's thread would neither suffice nor leave the caller as it was.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import wraps
from typing import ParamSpec, TypeVar

from .errors import MachineError

P = ParamSpec("P")
R = TypeVar("R")


def keep_denormals(verb: Callable[P, R]) -> Callable[P, R]:
    """Run a verb where denormals are kept: in a thread of its own, if the caller's flushes them."""

    @wraps(verb)
    def run(*args: P.args, **options: P.kwargs) -> R:
        return _apart(lambda: verb(*args, **options)) if flushes() else verb(*args, **options)

    return run


def flushes() -> bool:
    """Whether this thread takes denormals for zero, as operands or as results."""
    return sys.float_info.min / 2 == 0


def _apart(call: Callable[[], R]) -> R:
    """The result of a call in a new thread that keeps denormals; an interrupt of the caller's is one of the call."""
    import torch

    result: Future[R] = Future()
    threads = torch.get_num_threads()  # torch counts them anew in each thread

    def work() -> None:
        try:
            _keep()
            torch.set_num_threads(threads)
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        return result.result()
    except BaseException as error:
        if not result.done():
            _raise_in(thread, type(error))
            wait([result])
        raise


def _keep() -> None:
    import torch

    torch.set_flush_denormal(False)
    if flushes():
        raise MachineError("this process flushes denormal numbers to zero, and torch cannot turn that off")


def _raise_in(thread: threading.Thread, kind: type[BaseException]) -> None:
    """Raise an exception in another thread once it is back from what it waits for, as a signal does in the main one."""
    import ctypes

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(kind))
