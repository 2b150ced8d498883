"""Progress on stderr: a bar on a terminal, a line every 10 s elsewhere, nothing with --quiet.

A bar appears after a second, so that short work leaves no trace, and disappears at the end. The rate is that of the
last 10 s.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque

from ..views.parts.numbers import duration, nbytes
from .surface import terminal_width

DELAY, REDRAW, INTERVAL = 1.0, 0.1, 10.0  # seconds: to the bar, between two of its states, between two lines

SETTLING = 2.0  # seconds in which the rate is unknown

BAR = 32  # cells at most


class ProgressBar:
    """A bar that is called with the amounts done and in total, in bytes or in `unit`.

    `last` is shown when all is done, as the disk may be busy for long.
    """

    def __init__(self, label: str, quiet: bool, unit: str = "", last: str = "") -> None:
        self._label, self._quiet, self._unit, self._last = label, quiet, unit, last
        self._next = time.monotonic() + (DELAY if sys.stderr.isatty() else INTERVAL)
        self._samples: deque[tuple[float, int]] = deque()  # (time, done) of the last INTERVAL, and one before
        self._drawn = 0  # columns of the bar that is on the screen

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - INTERVAL:
            self._samples.popleft()
        if self._quiet or (now < self._next and not (self._drawn and done == total)):
            return
        if sys.stderr.isatty():
            self._next = now + REDRAW
            self._draw(done, total)
        else:
            self._next = now + INTERVAL
            print(f"{self._label}: {', '.join(self._texts(done, total))}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._drawn:
            self._write("")

    def _texts(self, done: int, total: int) -> list[str]:
        """Return texts of the amount done, the rate and the time left, as far as known."""
        amount = f"{done:,} of {total:,} {self._unit}" if self._unit else _amount(done, total)
        if done == total:
            return [self._last or amount]
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        if last - first < SETTLING or after == before:
            return [amount]
        rate = (after - before) / (last - first)
        speed = [] if self._unit else [f"{nbytes(rate)}/s"]
        return [amount, *speed, f"{duration((total - done) / rate)} left"]

    def _draw(self, done: int, total: int) -> None:
        texts = "  ".join(self._texts(done, total))
        cells = min(BAR, terminal_width(sys.stderr) - len(self._label) - len(texts) - 5)
        bar = f"{draw_bar(done / total, cells)}  " if cells > 0 and done < total else ""
        self._write(f"{self._label}  {bar}{texts}"[: terminal_width(sys.stderr) - 1])

    def _write(self, line: str) -> None:
        """Replace the bar on the screen without escape sequences, which dumb terminals do not have."""
        clear = f"\r{' ' * self._drawn}\r" if len(line) < self._drawn else "\r"
        print(clear + line, end="", file=sys.stderr, flush=True)
        self._drawn = len(line)


def draw_bar(share: float, cells: int) -> str:
    """Return a bar of `cells` columns, `share` of it done."""
    done = min(int(share * cells), cells)
    if "utf" in (sys.stderr.encoding or "").lower() and os.environ.get("TERM") != "dumb":
        return "━" * done + "╸" * (done < cells) + "─" * (cells - done - 1)
    return "=" * done + ">" * (done < cells) + "-" * (cells - done - 1)


def _amount(done: int, total: int) -> str:
    """Return the bytes done and in total as text, with the unit once if it is the same."""
    number, _, unit = nbytes(done).partition(" ")
    whole_text = nbytes(total)
    return f"{number} of {whole_text}" if whole_text.endswith(f" {unit}") else f"{number} {unit} of {whole_text}"
