"""Document of a report: its parts in reading order, without width, colours or streams.

A line is a row of spans. Each span has a style, and each surface decides how to show a style. Every line is as legible
without styles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import without_credentials

# style -> its use; `heat0` to `heat7` are the cells of strips and pictures, from little to much
SPAN_STYLES = {
    "path": "a path in the subject, and of what was written",
    "good": "a check that said yes",
    "bad": "a check that said no",
    "attention": "a mark of what needs attention, and why",
    "faint": "titles of columns",
}

HEATS = 8


@dataclass(frozen=True)
class TextSpan:
    """A run of text of one style, a key of SPAN_STYLES or empty."""

    text: str
    style: str = ""


Line = tuple[TextSpan, ...]


def line(*parts: str | TextSpan) -> Line:
    """Return a line of texts and spans."""
    return tuple(part if isinstance(part, TextSpan) else TextSpan(part) for part in parts if part)


def path(text: str) -> TextSpan:
    return TextSpan(text, "path")


def text_of(spans: Line) -> str:
    return "".join(span.text for span in spans)


def heat(value: float) -> str:
    """Return the style of a value from 0 to 1."""
    return f"heat{min(max(int(value * HEATS), 0), HEATS - 1)}"


def escape(text: str) -> str:
    """Return a text without control characters and credentials, as surfaces show it.

    Names come from files and callers, and people send on what a terminal shows.
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
class NamedIssue:
    """A row that gets a line of its own below its group, and the reason.

    Attributes:
        severity: if there is no room for all, lesser numbers are shown first.
    """

    name: str
    reason: str
    severity: int = 0


@dataclass(frozen=True)
class Row:
    """A group of modules, or one. The first cell is the name, which is never truncated."""

    cells: tuple[str | Strip, ...]
    issues: tuple[NamedIssue, ...] = ()


@dataclass(frozen=True)
class TextTable:
    """Rows under columns; the first column is the name and has no priority."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Document:
    """A report for readers.

    Attributes:
        subject: the input, as the user wrote it, and its kind.
        facts: values that hold for all rows of the table.
        pictures: for verbose documents.
        lists: a line for each thing excluded, not copied or chosen.
        warnings: without the word "warning".
        verdict: the result, and the files written; its last line is the last of stdout.
        hint: a command or option to try after a failed check.
        next: the command to run after a passed check.
        verbose: whether nothing is truncated.
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
