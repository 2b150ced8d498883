"""Say on stderr what is wrong: one shape for errors, warnings and what to do about them.

    error: WHERE: WHAT
    hint: REMEDY

A terminal gets the text wrapped at words and cut after a few lines, a pipe whole lines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import is_debugging, without_credentials
from ..views.parts.document import Line, Toned, line, text_of
from .surface import Surface, surface_of

if TYPE_CHECKING:
    from ..errors import LoratoolError

MAX_LINES = 6  # of an error and its hint on a terminal


HINT_LINES = 3  # of them the hint's: a command must be whole to be of use


MAX_WARNINGS = 6  # lines


def print_error(error: LoratoolError, speaker: str = "") -> None:
    """Print who says it if that is not clear, where, what, and what to do."""
    err = surface_of(sys.stderr)
    hint = _cut(err, err.wrap(line(Toned("hint: ", "faint"), error.remedy)), HINT_LINES) if error.remedy else []
    first, *others = error.what
    what = [line(Toned(f"{speaker}error: ", "bad"), first), *map(line, others)]
    err.print([*_cut(err, [each for spans in what for each in err.wrap(spans)], MAX_LINES - len(hint)), *hint])


def print_hint(err: Surface, hint: str) -> None:
    """Print a command or option that follows what was printed before."""
    err.print(err.wrap(line(Toned("hint: ", "faint"), hint)))


def show_traceback() -> None:
    """Print the traceback of the error under way, if that is asked for."""
    if is_debugging():
        import traceback

        print(without_credentials(traceback.format_exc()), end="", file=sys.stderr)


def warning_line(text: str) -> Line:
    return line(Toned("warning: ", "attention"), text)


def warn(warnings: Sequence[str]) -> None:
    """Print warnings, with --json too: who reads the one may not look into the other."""
    err = surface_of(sys.stderr)
    err.print([each for text in warnings for each in err.wrap(warning_line(text))])


def _cut(err: Surface, lines: list[Line], most: int) -> list[Line]:
    """Return the first lines, of which the last tells that there are more; a pipe gets all."""
    if err.width is None or len(lines) <= most:
        return lines
    words = text_of(lines[most - 1])
    while len(words) + len(" ...") > err.width:
        words = words.rpartition(" ")[0]
    return [*lines[: most - 1], line(f"{words} ...")]
