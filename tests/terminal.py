"""Stand in for a terminal within a test: what is written, and what the screen then shows."""

from __future__ import annotations

import io
import sys

import pytest


class Terminal(io.StringIO):
    """A terminal that keeps what is written since the last look."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True

    def look(self) -> str:
        written = self.getvalue()
        self.seek(0)
        self.truncate()
        return written


def open_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 70) -> Terminal:
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    return made


def screen(written: str) -> str:
    """The line that a terminal shows after this: each carriage return goes back to the first column."""
    line = ""
    for text in written.split("\r"):
        line = text + line[len(text) :]
    return line.rstrip()
