"""Say on stderr what is wrong: one shape for errors, warnings and what to do about them.

    error: WHERE: WHAT
    hint: REMEDY

A terminal gets the text wrapped at words and cut after a few lines, a pipe whole lines.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from ..errors import LoratoolError

MOST_LINES = 6  # of an error and its hint on a terminal, and of warnings


HINT_LINES = 3  # of them the hint's: a command must be whole to be of use


COLOURS = {"error": "red", "warning": "yellow"}


def print_error(error: LoratoolError) -> None:
    """Print where, what, and what to do."""
    hint = _wrapped(f"hint: {error.remedy}", HINT_LINES) if error.remedy else []
    first, *others = error.what
    room = MOST_LINES - len(hint)
    lines = [line for text in (f"error: {first}", *others) for line in _wrapped(text, room)]
    if sys.stderr.isatty() and len(lines) > room:
        lines[room - 1 :] = ["  ..."]
    _print([*lines, *hint])


def warn(warnings: Sequence[str]) -> None:
    """Print warnings, with --json too: who reads the one may not look into the other."""
    shown = warnings[:MOST_LINES] if sys.stderr.isatty() else warnings
    for warning in shown:
        _print(_wrapped(f"warning: {warning}", MOST_LINES))
    if len(shown) < len(warnings):
        _print([f"and {len(warnings) - len(shown)} more: --json has them"])


def escape(text: str) -> str:
    """Escape control characters: names come from files, and none in them may reach the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def terminal_width(stream: TextIO) -> int:
    """Return the columns of the terminal that a stream writes to; COLUMNS goes before what it says itself."""
    if (given := os.environ.get("COLUMNS", "")).isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def has_colours(stream: TextIO) -> bool:
    """Return whether colours are wanted: on a terminal, unless NO_COLOR or TERM=dumb; FORCE_COLOR anywhere."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def _wrapped(line: str, most: int) -> list[str]:
    """Return a line, on a terminal wrapped, with two blanks before what follows, and in at most `most` lines."""
    if not sys.stderr.isatty():
        return [escape(line)]
    return textwrap.wrap(
        escape(line),
        terminal_width(sys.stderr),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" ...",
    )


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        word, colon, rest = line.partition(":")
        styled = click.style(word + colon, fg=COLOURS[word]) + rest if word in COLOURS else line
        click.echo(click.style(line, dim=True) if word == "hint" else styled, err=True, color=has_colours(sys.stderr))
