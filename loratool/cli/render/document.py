"""Print documents: the table on stdout, warnings and hints on stderr, and the verdict last.

A terminal gets lines of its width, in colour; a pipe gets all columns in lines of any length. Both say the same.
stdout is flushed before a warning is written and stderr before the verdict, so that a terminal shows them in order.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import click

from ...reports.columns import lay_out, text_width, without_end
from ...reports.document import HEATS, Line, Toned, escaped, line, text_of
from .text import to_json

if TYPE_CHECKING:
    from ...reports.document import Document
    from ...reports.report import Report

WIDEST = 120  # columns: longer rows are hard to follow


BUDGET = 25  # lines of a report without --verbose


MAX_WARNINGS = 6


VIRIDIS = (97, 61, 67, 31, 36, 71, 149, 220)  # among xterm's 256 colours


STYLES: dict[str, dict[str, Any]] = {
    "path": {"bold": True},
    "good": {"fg": "green"},
    "bad": {"fg": "red"},
    "attention": {"fg": "yellow"},
    "faint": {"dim": True},
    **{f"heat{i}": {"fg": VIRIDIS[i]} for i in range(HEATS)},
}


@dataclass(frozen=True)
class Surface:
    """A stream with the width and the signs that it can show."""

    stream: TextIO
    width: int | None  # None for lines of any width
    colour: bool
    plain: bool  # ASCII alone

    def print(self, lines: Sequence[Line]) -> None:
        for spans in lines:
            text = "".join(self._styled(span) for span in escaped(spans))
            print(text, file=self.stream)
        self.stream.flush()

    def _styled(self, span: Toned) -> str:
        return click.style(span.text, **STYLES[span.tone]) if self.colour and span.tone else span.text

    def wrap(self, spans: Line) -> list[Line]:
        """Break a line at words, with two blanks before what follows; a longer word is never broken."""
        if self.width is None or text_width(text_of(spans)) <= self.width:
            return [spans]
        lines: list[list[Toned]] = [[]]
        used = 0
        for span in spans:
            for word in _words(span.text):
                if used + text_width(word.rstrip()) > self.width and used > 2:
                    lines.append([Toned("  ")])
                    used, word = 2, word.lstrip()
                lines[-1].append(Toned(word, span.tone))
                used += text_width(word)
        return [without_end(each) for each in lines]


def _words(text: str) -> list[str]:
    """Return the words of a text, each with the blanks behind it."""
    return re.findall(r"\s*\S+\s*", text) or [text]


def surface_of(stream: TextIO) -> Surface:
    """Return what a stream shows, by the usual variables: COLUMNS, NO_COLOR, FORCE_COLOR and TERM."""
    is_terminal = stream.isatty()
    dumb = os.environ.get("TERM") == "dumb"
    colour = bool(os.environ.get("FORCE_COLOR")) or (is_terminal and not dumb)
    return Surface(
        stream,
        min(shutil.get_terminal_size().columns, WIDEST) if is_terminal else None,
        colour and not os.environ.get("NO_COLOR"),
        dumb or "utf" not in (getattr(stream, "encoding", None) or "").lower(),
    )


def print_report(
    command: str, report: Report, *, json: bool, quiet: bool = False, verbose: bool = False, status: str | None = None
) -> None:
    """Print a report as its document or as the one JSON object; warnings go to stderr with --json too.

    Args:
        status: what a check found that said no.
    """
    if json:
        print(to_json(command, report, status=status))
        sys.stdout.flush()
        _print_warnings(surface_of(sys.stderr), getattr(report, "warnings", ()), None)
        return
    print_document(report.document(verbose), surface_of(sys.stdout), surface_of(sys.stderr), quiet)


def print_document(document: Document, out: Surface, err: Surface, quiet: bool = False) -> None:
    """Print a document; with `quiet` only verdict, warnings and hint."""
    verdict = [each for spans in document.verdict for each in out.wrap(spans)]
    if quiet and not verdict:
        verdict = out.wrap(document.subject)
    if not quiet:
        out.print(_body(document, out, len(verdict)))
    _print_warnings(err, document.warnings, None if document.verbose or err.width is None else MAX_WARNINGS)
    out.print(verdict)
    if document.hint:
        err.print(err.wrap(line(Toned("hint: ", "faint"), document.hint)))
    elif document.next and not quiet and out.width is not None and err.width is not None:
        err.print([line(Toned("next: ", "faint"), document.next)])


def _body(document: Document, out: Surface, reserved: int) -> list[Line]:
    """Return all of a document but warnings and verdict; remarks of the table give way to the rest of the budget."""
    head = [each for spans in (document.subject, *document.facts) if spans for each in out.wrap(spans)]
    lists = [each for spans in document.lists for each in out.wrap(spans)]
    used = len(head) + len(lists) + reserved + min(len(document.warnings), MAX_WARNINGS) + 2
    used += bool(document.next)
    lines = head
    for table in document.tables:
        room = None if document.verbose else BUDGET - used
        lines = [*lines, *([()] if lines else []), *lay_out(table, out.width, out.plain, room)]
    lines += [(), *document.pictures] if document.pictures else []
    return [*lines, *lists, *([()] if document.tables or document.pictures else [])]


def _print_warnings(err: Surface, warnings: Sequence[str], limit: int | None) -> None:
    shown = warnings if limit is None or len(warnings) <= limit else warnings[: limit - 1]
    for text in shown:
        err.print(err.wrap(line(Toned("warning: ", "attention"), text)))
    if len(shown) < len(warnings):
        rest = f"and {len(warnings) - len(shown)} more: --json has them"
        err.print([line(Toned("warning: ", "attention"), rest)])
