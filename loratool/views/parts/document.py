"""Hold what is to be read of a report, in the order in which it is read, without width, colours or streams.

A line is a row of spans; a span's tone says what it is, and each surface knows how to show a tone. Every line is as
legible without tones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import without_credentials

# tone -> what has it; `heat0` to `heat7` are the cells of strips and pictures, from little to much
TONES = {
    "path": "a path in the subject, and of what was written",
    "good": "a check that said yes",
    "bad": "a check that said no",
    "attention": "a mark of what needs attention, and why",
    "faint": "titles of columns",
}

HEATS = 8


@dataclass(frozen=True)
class Toned:
    """A run of text of one tone, a key of TONES or empty."""

    text: str
    tone: str = ""


Line = tuple[Toned, ...]


def line(*parts: str | Toned) -> Line:
    """Make a line of texts and spans."""
    return tuple(part if isinstance(part, Toned) else Toned(part) for part in parts if part)


def path(text: str) -> Toned:
    return Toned(text, "path")


def text_of(spans: Line) -> str:
    return "".join(span.text for span in spans)


def heat(value: float) -> str:
    """Return the tone of a value from 0 to 1."""
    return f"heat{min(max(int(value * HEATS), 0), HEATS - 1)}"


def escape(text: str) -> str:
    """Return a text of a report as any surface shows it: without control characters and without credentials.

    Names come from files and from whoever calls, and what a terminal shows is sent on.
    """
    text = without_credentials(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def escaped(spans: Line) -> Line:
    return tuple(replace(span, text=escape(span.text)) for span in spans)


@dataclass(frozen=True)
class Strip:
    """Values over the layers of a group, each from 0 to 1."""

    heats: tuple[float, ...]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: of a column of strips with a full block for the greatest value, which a surface draws as it can.
        priority: where the width is too small, columns of greater numbers go first.
        right: aligned to the right.
        strips: its cells are strips.
    """

    title: str
    priority: int = 0
    right: bool = True
    strips: bool = False


@dataclass(frozen=True)
class Remark:
    """A module that needs a line of its own below its group, and why.

    Attributes:
        severity: where not all are shown, lesser numbers come first.
    """

    name: str
    reason: str
    severity: int = 0


@dataclass(frozen=True)
class Row:
    """A group of modules, or one; the first cell is the name, which is never cut."""

    cells: tuple[str | Strip, ...]
    remarks: tuple[Remark, ...] = ()


@dataclass(frozen=True)
class TextTable:
    """Rows under columns; the first column is the name and has no priority."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Document:
    """A report to be read.

    Attributes:
        subject: what was read, as the user wrote it, and what it is.
        facts: what holds for all rows of the table.
        pictures: for those who asked for more.
        lists: what was left out, not copied, chosen: a line each.
        warnings: without the word.
        verdict: what is true now, and what was written; its last line is the last of stdout.
        hint: a command or option for a verdict that is no.
        next: the command that follows one that is yes.
        verbose: nothing is cut short.
    """

    subject: Line = ()
    facts: tuple[Line, ...] = ()
    tables: tuple[TextTable, ...] = ()
    pictures: tuple[Line, ...] = ()
    lists: tuple[Line, ...] = ()
    warnings: tuple[str, ...] = ()
    verdict: tuple[Line, ...] = ()
    hint: str | None = None
    next: str | None = None
    verbose: bool = False
