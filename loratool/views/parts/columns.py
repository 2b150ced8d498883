"""Layout of a table in lines of a given width: columns by priority, full names, issues below their groups."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from unicodedata import combining, east_asian_width

from .document import Line, Row, Strip, TextSpan, TextTable, escape, heat, line, text_of
from .numbers import DEGREE

GAP = 2  # columns of space between two of a table

RAMP = "▁▂▃▄▅▆▇█"

ASCII_RAMP = ".:-=+*#@"

MAX_ISSUES = 8


def text_width(text: str) -> int:
    """Return how many columns a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 1 + (east_asian_width(c) in "WF") for c in text)


def shade(value: float, ramp: str = RAMP) -> str:
    """Return the sign of a value from 0 to 1."""
    return ramp[min(max(int(value * len(ramp)), 0), len(ramp) - 1)]


def choose_columns(widths: Sequence[int], priorities: Sequence[int], width: int) -> list[int]:
    """Return the indices of the columns that fit the width. The first, the name, always does."""
    chosen, used = [0], widths[0]
    for i in sorted(range(1, len(widths)), key=priorities.__getitem__):
        if used + GAP + widths[i] <= width:
            chosen.append(i)
            used += GAP + widths[i]
    return sorted(chosen)


def lay_out(table: TextTable, width: int | None = None, plain: bool = False, room: int | None = None) -> list[Line]:
    """Return a table's lines.

    Args:
        width: None for all columns but the strips, in lines of any width.
        plain: draw strips in ASCII.
        room: how many lines there are; issues beyond it are only counted, rows are all shown. None for all.
    """
    ramp = ASCII_RAMP if plain else RAMP
    below = None  # the column of words that matters most, where it is wider than a line: they stand below their rows
    titles = [column.title.replace(RAMP[-1], ramp[-1]) for column in table.columns]
    grid = [titles, *([_text(cell, ramp) for cell in row.cells] for row in table.rows)]
    widths = [max(text_width(row[i]) for row in grid) for i in range(len(titles))]
    if width is None:
        shown = [i for i, column in enumerate(table.columns) if not column.strips]
    else:
        priorities = [column.priority for column in table.columns]
        first = min(range(1, len(widths)), key=priorities.__getitem__, default=0)
        if first and not table.columns[first].right and GAP + widths[first] > width:
            below, widths[first] = first, 0
        widths[0] = _name_width(grid, widths, table, width)
        shown = [i for i in choose_columns(widths, priorities, width) if i != below]
    lines: list[Line] = [(TextSpan(text_of(spans), "faint"),) for spans in _row(grid[0], titles, table, shown, widths)]
    rows = [_row(cells, row.cells, table, shown, widths) for cells, row in zip(grid[1:], table.rows, strict=True)]
    if below is not None and width is not None:
        for row, cells, after in zip(rows, grid[1:], [*grid[2:], None], strict=True):
            if after is None or cells[below] != after[below]:  # the same of many rows is told once
                row += map(line, _broken(cells[below], width))
    issues = _issue_lines(table.rows, width, None if room is None else room - len(lines) - sum(map(len, rows)))
    for i, row in enumerate(rows):
        lines += [*row, *issues.get(i, ())]
    return lines + issues.get(len(rows), [])


def _text(cell: str | Strip, ramp: str) -> str:
    if isinstance(cell, str):
        return escape(cell if ramp != ASCII_RAMP else cell.replace(DEGREE, " deg"))
    return "".join(shade(value, ramp) for value in cell.heats)


def _broken(words: str, width: int) -> list[str]:
    return wrap(words, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False)


def _name_width(grid: Sequence[Sequence[str]], widths: Sequence[int], table: TextTable, width: int) -> int:
    """Return the width of names that leaves room for the most important column. Longer names get their own line."""
    if len(widths) == 1:
        return widths[0]
    first = min(range(1, len(widths)), key=lambda i: table.columns[i].priority)
    room = width - GAP - widths[first]
    return max((text_width(row[0]) for row in grid if text_width(row[0]) <= room), default=0)


def _row(
    texts: Sequence[str], cells: Sequence[str | Strip], table: TextTable, shown: Sequence[int], widths: Sequence[int]
) -> list[Line]:
    """Return the line of a row, or two if its name is too long."""
    is_long = text_width(texts[0]) > widths[0]
    spans: list[TextSpan] = []
    for i in shown:
        text = "" if is_long and i == 0 else texts[i]
        pad = TextSpan(" " * (widths[i] - text_width(text)))
        cell = cells[i]
        drawn = [TextSpan(c, heat(v)) for c, v in zip(text, cell.heats, strict=True)] if isinstance(cell, Strip) else []
        filled = drawn or [TextSpan(text)]
        spans += [pad, *filled] if table.columns[i].right else [*filled, pad]
        spans.append(TextSpan(" " * GAP))
    values = without_end(spans)
    return [line(texts[0]), values] if is_long else [values]


def without_end(spans: Sequence[TextSpan]) -> Line:
    """Return the spans of a line without blanks at its end."""
    last = max((i for i, span in enumerate(spans) if span.text.strip()), default=-1)
    return (*spans[:last], TextSpan(spans[last].text.rstrip(), spans[last].style)) if last >= 0 else ()


def _issue_lines(rows: Sequence[Row], width: int | None, room: int | None) -> dict[int, list[Line]]:
    """Return the lines below each row. Below the last row is the count of hidden issues."""
    issues = [(i, issue) for i, row in enumerate(rows) for issue in row.issues]
    laid = {(i, issue.name): _issue_line(issue.name, issue.reason, width) for i, issue in issues}
    worst = sorted(issues, key=lambda each: each[1].severity)
    if room is not None:
        worst = worst[:MAX_ISSUES]
        while worst and sum(len(laid[i, issue.name]) for i, issue in worst) + (len(worst) < len(issues)) > room:
            worst.pop()
    chosen = {(i, issue.name) for i, issue in worst}
    below: dict[int, list[Line]] = {}
    for i, issue in issues:
        if (i, issue.name) in chosen:
            below.setdefault(i, []).extend(laid[i, issue.name])
    hidden = len(issues) - len(chosen)
    if hidden:
        more = f"{hidden:,} more" if chosen else f"{hidden:,} modules need attention"
        below[len(rows)] = [
            line(TextSpan("! ", "attention"), f"and {more}: -v shows them" if chosen else f"{more}: -v")
        ]
    return below


def _issue_line(name: str, reason: str, width: int | None) -> list[Line]:
    mark, why = TextSpan("! ", "attention"), TextSpan(escape(reason), "attention")
    name = escape(name)
    if width is None or 2 + text_width(name) + GAP + text_width(why.text) <= width:
        return [line(mark, f"{name}  ", why)]
    return [line(mark, name), line("    ", why)]
