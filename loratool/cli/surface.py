"""Print lines on a stream: in colour and wrapped on a terminal, unchanged in a pipe."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import click

from ..views.parts.columns import ASCII_RAMP, RAMP, text_width, without_end
from ..views.parts.document import HEATS, Line, TextSpan, escaped, text_of
from .as_json import naming
from .help import has_colour

WIDEST = 120  # columns: longer rows are hard to follow

VIRIDIS = (97, 61, 67, 31, 36, 71, 149, 220)  # among xterm's 256 colours

STYLES: dict[str, dict[str, Any]] = {
    "path": {"bold": True},
    "good": {"fg": "green"},
    "bad": {"fg": "red"},
    "attention": {"fg": "yellow"},
    "faint": {"dim": True},
    **{f"heat{i}": {"fg": VIRIDIS[i]} for i in range(HEATS)},
}

ASCII = str.maketrans(RAMP, ASCII_RAMP)


@dataclass(frozen=True)
class Surface:
    """A stream with the width and the characters that it can show."""

    stream: TextIO
    width: int | None  # None for lines of any width
    colour: bool
    plain: bool  # ASCII alone

    def print(self, lines: Sequence[Line]) -> None:
        with naming(self.stream):
            for spans in lines:
                text = inert("".join(self._styled(span) for span in escaped(spans)))
                print(text.translate(ASCII) if self.plain else text, file=self.stream)
            self.stream.flush()

    def _styled(self, span: TextSpan) -> str:
        return click.style(span.text, **STYLES[span.style]) if self.colour and span.style else span.text

    def wrap(self, spans: Line) -> list[Line]:
        """Break a line at words and indent the following lines by two blanks. Long words are never broken."""
        if self.width is None or text_width(text_of(spans)) <= self.width:
            return [spans]
        lines: list[list[TextSpan]] = [[]]
        used = 0
        for span in spans:
            for word in _words(span.text):
                if used + text_width(word.rstrip()) > self.width and used > 2:
                    lines.append([TextSpan("  ")])
                    used, word = 2, word.lstrip()
                lines[-1].append(TextSpan(word, span.style))
                used += text_width(word)
        return [without_end(each) for each in lines]


def inert(text: str) -> str:
    """Return a text without workflow commands: a log of GitHub Actions may have it, and a name from a file may be one.

    A command is a line that starts with `::`, or what follows `##[`: ActionCommand.cs in actions/runner.
    """
    return re.sub(r"^(\s*):(?=:)", r"\1\\x3a", text, flags=re.MULTILINE).replace("##[", r"##\x5b")


def _words(text: str) -> list[str]:
    """Return the words of a text, each with the blanks after it."""
    return re.findall(r"\s*\S+\s*", text) or [text]


def surface_of(stream: TextIO) -> Surface:
    """Return the surface of a stream, by the usual variables: COLUMNS, NO_COLOR, FORCE_COLOR and TERM."""
    return Surface(
        stream,
        min(terminal_width(stream), WIDEST) if stream.isatty() else None,
        has_colour(stream),
        os.environ.get("TERM") == "dumb" or "utf" not in (getattr(stream, "encoding", None) or "").lower(),
    )


def terminal_width(stream: TextIO) -> int:
    """Return the columns of a stream's terminal. COLUMNS overrides the terminal's own number."""
    if (given := os.environ.get("COLUMNS", "")).isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
