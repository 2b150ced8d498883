"""Hold signals back while files change their names, so that none comes between two steps that belong together.

A signal's handler raises in the main thread, wherever that is. Inside `held_back` it is only noted, and comes when the
block ends; `let_in` is for the long work between two such steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

_handlers: dict[int, Any] = {}  # those that wait while signals are held back
_came: list[int] = []


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back during the block; outside of the main thread, where none come, do nothing."""
    if _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    _hold()
    try:
        yield
    finally:
        _release()


@contextmanager
def let_in() -> Iterator[None]:
    """Let signals come during the block, which is inside one of `held_back`."""
    held = bool(_handlers)
    if held:
        _release()
    try:
        yield
    finally:
        if held:
            _hold()


def _hold() -> None:
    _came.clear()
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not None:  # None: a handler that Python did not set
            _handlers[number] = signal.signal(number, lambda came, _: _came.append(came))


def _release() -> None:
    for number, handler in _handlers.items():
        signal.signal(number, handler)
    _handlers.clear()
    if _came:
        signal.raise_signal(_came[0])
