"""Run commands by IEEE 754 whatever the caller's process does, or refuse the machine.

The bounds of `numerics` require sums that are rounded to the nearest number, and reading files requires a little-endian
machine. Other differences between machines are within the bounds.

`torch.set_flush_denormal(True)`, or a library built with -ffast-math, makes a thread treat the smallest numbers of
every type as zero. New threads inherit that, and torch's own threads then keep it for good. So it would not be enough
to turn it off in the caller's thread, and would change the caller's state.

`with torch.device("meta")`, modes of fake tensors and the like apply to one thread, so a new thread is free of them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import wraps
from typing import ParamSpec, TypeVar

from ..errors import MachineError
from ..numerics.passes.native import NATIVE, describe_native, native

VARIABLES = (NATIVE,)  # of the environment, that set no option

P = ParamSpec("P")

R = TypeVar("R")


def require_ieee(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a command so that it runs in a new thread if the caller's flushes denormals or makes no CPU tensors.

    Raises:
        MachineError: the machine is big-endian, its sums are not rounded to the nearest number, or it has no compiled
            passes and `LORATOOL_NATIVE` is 1.
    """

    @wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> R:
        if sys.byteorder != "little":
            raise MachineError("this machine is big-endian; loratool supports only little-endian machines")
        if not rounds_to_nearest():
            raise MachineError("this process does not round to the nearest number, which loratool needs")
        _require_native()
        apart = flushes() or makes_other_tensors()
        return _run_in_thread(lambda: command(*args, **options)) if apart else command(*args, **options)

    return run


def native_line() -> str:
    """Return a line on the compiled passes in use."""
    return f"native: {describe_native()}"


def _require_native() -> None:
    """Refuse a `LORATOOL_NATIVE` that is neither 0 nor 1, or that asks for passes that are not there."""
    wanted = os.environ.get(NATIVE, "")
    if wanted not in ("", "0", "1"):
        raise MachineError(f"{NATIVE}={wanted} is neither 0 nor 1", remedy=f"unset {NATIVE}")
    if wanted == "1" and native() is None:
        raise MachineError(f"{NATIVE}=1, but the compiled passes are {describe_native()}", remedy=f"unset {NATIVE}")


def flushes() -> bool:
    """Return whether this thread treats denormals as zero, as operands or as results."""
    return sys.float_info.min / 2 == 0


def makes_other_tensors() -> bool:
    """Return whether torch, by default, makes something other than CPU tensors of numbers in this thread."""
    if (torch := sys.modules.get("torch")) is None:
        return False
    tensor = torch.empty(0, dtype=torch.float32)
    return type(tensor) is not torch.Tensor or tensor.device.type != "cpu"


def rounds_to_nearest() -> bool:
    """Return whether this thread rounds sums to the nearest number: not up (first term), not down or to zero."""
    step = sys.float_info.epsilon  # 1 + step follows 1; not a literal, since sums of literals are compiled
    return 1 + step / 2 == 1 and 1 + step * 0.75 == 1 + step


def _run_in_thread(call: Callable[[], R]) -> R:
    """Return the result of a call in a new thread that keeps denormals. Interrupts are raised in that thread too."""
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
        raise MachineError("this process flushes denormal numbers to zero, and torch cannot disable it")


def _raise_in(thread: threading.Thread, kind: type[BaseException]) -> None:
    """Raise an exception in another thread as soon as it runs Python code, as a signal does in the main thread."""
    import ctypes

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(kind))
