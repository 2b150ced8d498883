"""Let a signal end the process at any moment: undo what is unfinished, or leave it to a run that goes on, and say so.

For `stop_on_signals`, which the command line calls, an exception would not do: where a signal comes, a finalizer or an
import may swallow it, a thread's long step may keep it waiting, and a block that it should leave may not have been
entered yet. So its handler itself does what an error would (`unless_done`), and ends the process. A program that uses
the library keeps its own handlers, which may raise: that is an error then.

Inside `held_back` a signal is only noted, and comes when the block ends, so that none comes between two steps that
belong together; `let_in` is for the long work between two such steps.
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

# Errors of a run that died, by no fault of its inputs; RuntimeError is torch's, of full memory and of a lost GPU
DEATHS = (OSError, MemoryError, MachineError, RuntimeError)

PATIENCE = 0.5  # seconds in which a stopped process may tell of it: nobody may read its output

# What a stop does, the last first: `undo`, but after a death only if `stays` says nothing
at_stop: list[tuple[Callable[[], object], Callable[[], str]]] = []

staying: list[str] = []  # what is left of runs that died, which another run can go on with

_handlers: dict[int, Any] = {}  # those that wait while signals are held back
_came: list[int] = []
_others = threading.RLock()  # for the blocks of other threads than the main one


@contextmanager
def unless_done(undo: Callable[[], object], stays: Callable[[], str] = str) -> Iterator[None]:
    """Call `undo` if the block raises, or if a signal stops the process before its end; what it cannot do stays.

    Args:
        stays: says what is there that another run can go on with. That is noted in `staying` and not undone if the run
            died: the machine failed, or a signal came that is not the user's ^C, as when a batch system takes the
            machine back.
    """
    entry = undo, stays
    at_stop.append(entry)
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, DEATHS) and _note_staying(stays)):
            with suppress(OSError):  # the error to tell is the first one
                undo()
        raise
    finally:
        at_stop.remove(entry)


def _note_staying(stays: Callable[[], str]) -> bool:
    what = stays()
    staying.extend([what] if what else [])
    return bool(what)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back during the block; in another thread than the main one, where none come, a stop waits for it."""
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
    """Let signals come during the block, which is inside one of `held_back`."""
    out, back = (_release, hold) if _in_main_thread() else (_others.release, _others.acquire)
    out()
    try:
        yield
    finally:
        back()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def hold() -> None:
    """Hold signals back from now on. One that is ignored, as in the background or under nohup, remains so."""
    _came.clear()
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler not in (None, signal.SIG_IGN):  # None: one that Python did not set
            _handlers[number] = handler
            signal.signal(number, _note)


def stop_on_signals(tell: Callable[[int, Exception | None], int]) -> None:
    """From now on let the first signal end this process, those too that were held back so far.

    Args:
        tell: says which signal it was, and what kept something from being undone, and returns the exit code.
    """
    stopped: list[int] = []
    order = _arrivals()

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        if len(stopped) > 1:
            return
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        _others.acquire()
        threading.excepthook = lambda _: None  # threads lose their files now
        left: Exception | None = None
        first = os.read(order, 1)[0] if order is not None else number
        while at_stop:
            undo, stays = at_stop.pop()
            try:
                if first == signal.SIGINT or not _note_staying(stays):
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
    """Return a pipe in which the numbers of signals arrive in their order, in which Python does not call handlers."""
    if os.name != "posix":
        return None
    order, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    return order


def _exit_soon(code: int) -> None:
    """End the process after a while, even if it then waits for the reader of a pipe."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)


def _note(number: int, _: Any) -> None:
    _came.append(number)


def _release() -> None:
    if not _handlers:
        return
    try:
        with ExitStack() as stack:  # a handler that raises in between keeps none from its place
            while _handlers:
                stack.callback(signal.signal, *_handlers.popitem())
    finally:
        with ExitStack() as stack:  # nor another signal from its handler
            for number in reversed(dict.fromkeys(_came)):
                stack.callback(signal.raise_signal, number)
