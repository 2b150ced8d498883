"""Make a command compute by IEEE 754 whatever the caller's process does, or refuse the machine by name.

The bounds of `numerics` hold where a sum is rounded to the nearest number, and a file's bytes are read as numbers where
the machine is little-endian. What else may differ between machines is within the bounds.

`torch.set_flush_denormal(True)`, or a library built with -ffast-math, makes a thread take the smallest numbers of every
type for zero. A thread inherits that from the one that starts it, and torch's own threads then keep it for good, so
that turning it off in the caller's thread would neither suffice nor leave the caller as it was.

`with torch.device("meta")`, modes of fake tensors and the like hold for one thread, so a new one is without them too.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import wraps
from typing import ParamSpec, TypeVar

from ..errors import MachineError

P = ParamSpec("P")

R = TypeVar("R")


def require_ieee(command: Callable[P, R]) -> Callable[P, R]:
    """Make a command run in a new thread if the caller's flushes denormals, or makes other tensors than the CPU's.

    Raises:
        MachineError: the machine is big-endian, or its sums are not rounded to the nearest number.
    """

    @wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> R:
        if sys.byteorder != "little":
            raise MachineError("this machine is big-endian, and loratool reads numbers of little-endian ones only")
        if not rounds_to_nearest():
            raise MachineError("this process rounds another way than to the nearest number, by which all is defined")
        apart = flushes() or makes_other_tensors()
        return _run_in_thread(lambda: command(*args, **options)) if apart else command(*args, **options)

    return run


def flushes() -> bool:
    """Return whether this thread takes denormals for zero, as operands or as results."""
    return sys.float_info.min / 2 == 0


def makes_other_tensors() -> bool:
    """Return whether what torch makes in this thread is no tensor of numbers on the CPU unless that is asked for."""
    if (torch := sys.modules.get("torch")) is None:
        return False
    tensor = torch.empty(0, dtype=torch.float32)
    return type(tensor) is not torch.Tensor or tensor.device.type != "cpu"


def rounds_to_nearest() -> bool:
    """Return whether sums in this thread are rounded to the nearest number: not up (the first), not down or to zero."""
    step = sys.float_info.epsilon  # 1 + step follows 1; not a literal, since sums of literals are compiled
    return 1 + step / 2 == 1 and 1 + step * 0.75 == 1 + step


def _run_in_thread(call: Callable[[], R]) -> R:
    """Return the result of a call in a new thread that keeps denormals; an interrupt is raised in that thread too."""
    from concurrent.futures import Future, wait

    import torch

    result: Future[R] = Future()
    context = copy_context()
    threads = torch.get_num_threads()  # torch counts them anew in each thread

    def work() -> None:
        try:
            _keep()
            torch.set_num_threads(threads)
            result.set_result(context.run(call))
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
    """Raise an exception in another thread as soon as it runs Python code, as a signal does in the main thread."""
    import ctypes

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(kind))
