"""Handlers that let a signal end the process at any moment.

Unfinished work is undone, or it stays for a run with `--resume`; the message says which.

`stop_on_signals`, which the command line calls, does not raise an exception. A finalizer or an import could swallow
one, a thread's long step could delay it, and it could come before the block that it should leave is entered. So the
handler itself undoes what an error would (`unless_done`), and ends the process. A program that uses the library keeps
its own handlers. If they raise, that is treated as an error.

Inside `held_back` a signal is only noted. It is delivered when the block ends, so no signal comes between two steps
that belong together. `let_in` is for long work between two such steps.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ..errors import MachineError

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: two

# Errors that end a run through no fault of its inputs; torch raises RuntimeError for full memory and a failed GPU
DEATHS = (OSError, MemoryError, MachineError, RuntimeError)

PATIENCE = 0.5  # seconds for a stopped process to write its message: nobody may read it

# (undo, stays) of each open `unless_done`; a stop runs them last to first
at_stop: list[tuple[Callable[[], object], Callable[[], str]]] = []

resumable_outputs: list[str] = []  # partial outputs of runs that died, as messages name them

changing_models: list[str] = []  # models that a run has left in the middle of a change in place

_handlers: dict[int, Any] = {}  # the handlers that `_note` replaces while signals are held back
_arrived: list[int] = []
_others = threading.RLock()  # held in the blocks of threads other than the main one


@contextmanager
def unless_done(undo: Callable[[], object], stays: Callable[[], str] = str) -> Iterator[None]:
    """Call `undo` if the block raises, or if a signal stops the process before the end; ignore its OSErrors.

    Args:
        stays: names the partial output that another run can resume, or returns "". If there is one and the run died,
            it is added to `resumable_outputs` and not undone. A run died if the machine failed, or if a signal came
            that is not the user's ^C, as when a batch system takes the machine back.
    """
    entry = undo, stays
    at_stop.append(entry)
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, DEATHS) and _note_resumable(stays)):
            with suppress(OSError):  # the first error is the one to report
                undo()
        raise
    finally:
        at_stop.remove(entry)


def _note_resumable(stays: Callable[[], str]) -> bool:
    output = stays()
    resumable_outputs.extend([output] if output and output not in resumable_outputs else [])
    return bool(output)


@contextmanager
def held_back() -> Iterator[None]:
    """Delay signals until the block ends. Threads other than the main one get none; a stop waits for their blocks."""
    if not _in_main_thread():
        with _others:
            yield
    elif _handlers:
        yield
    else:
        try:
            hold()
            yield
        finally:
            _release()


@contextmanager
def let_in() -> Iterator[None]:
    """Deliver signals during the block, which is inside a block of `held_back`."""
    out, back = (_release, hold) if _in_main_thread() else (_others.release, _others.acquire)
    out()
    try:
        yield
    finally:
        back()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def hold() -> None:
    """Delay signals from now on. Signals that are ignored, as in the background or under nohup, stay ignored."""
    _arrived.clear()
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler not in (None, signal.SIG_IGN):  # None: one that Python did not set
            _handlers[number] = handler
            signal.signal(number, _note)


def stop_on_signals(tell: Callable[[int, Exception | None], int]) -> None:
    """End this process at the first signal from now on, including those delayed so far.

    Args:
        tell: reports the signal, and the error that prevented an undo, if any. It returns the exit code.
    """
    stopped: list[int] = []
    order = _arrivals()

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        if len(stopped) > 1:
            return
        for ignored in SIGNALS:
            signal.signal(ignored, signal.SIG_IGN)
        _others.acquire()
        threading.excepthook = lambda _: None  # threads lose their files now
        left: Exception | None = None
        first = os.read(order, 1)[0] if order is not None else number
        while at_stop:
            undo, stays = at_stop.pop()
            try:
                if first == signal.SIGINT or not _note_resumable(stays):
                    undo()
            except Exception as error:
                left = left or error
        _exit_soon(128 + first)
        os._exit(tell(first, left))

    if not _handlers:
        hold()
    _handlers.update(dict.fromkeys(_handlers, stop))
    _release()


def _arrivals() -> int | None:
    """Return a pipe that receives the signals' numbers in order of arrival; Python calls handlers in another order."""
    if os.name != "posix":
        return None
    order, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    return order


def _exit_soon(code: int) -> None:
    """End the process after PATIENCE, even if it waits for the reader of a pipe."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)


def _note(number: int, _: Any) -> None:
    _arrived.append(number)


def _release() -> None:
    if not _handlers:
        return
    try:
        with ExitStack() as stack:  # all are restored even if a handler raises meanwhile
            while _handlers:
                stack.callback(signal.signal, *_handlers.popitem())
    finally:
        with ExitStack() as stack:  # all are delivered even if a handler raises
            for number in reversed(dict.fromkeys(_arrived)):
                stack.callback(signal.raise_signal, number)
