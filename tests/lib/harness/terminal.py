"""Stand in for a terminal within a test: what is written, and what the screen then shows."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

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


def run_in_terminal(command: Sequence[str], typed: Sequence[tuple[str, str]] = (), **environment: str | None) -> str:
    """All that a process writes to a terminal of its own, which has to end with exit code 0.

    Args:
        typed: texts, each after which a user types another.
        environment: variables that differ there; None removes one.
    """
    import pty  # which Windows does not have

    pid, fd = pty.fork()
    if pid == 0:
        kept = {name: value for name, value in os.environ.items() if name not in environment}
        added = {name: value for name, value in environment.items() if value is not None}
        os.execve(command[0], [*command], {**kept, **added})
    output, waiting, place = b"", [*typed], 0
    while True:
        try:
            output += os.read(fd, 4096)
        except OSError:
            break
        if waiting and waiting[0][0].encode() in output[place:]:
            place = len(output)
            os.write(fd, waiting.pop(0)[1].encode())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return output.decode()


def screen(written: str) -> str:
    """The line that a terminal shows after this: each carriage return goes back to the first column."""
    line = ""
    for text in written.split("\r"):
        line = text + line[len(text) :]
    return line.rstrip()
