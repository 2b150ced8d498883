"""Print what all reports are made of: lines, tables, pictures, and the one JSON object.

`to_json` keeps a schema that is versioned: the report's own field names under a header that every command shares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from ...reports.document import escape
from .pictures import Line

if TYPE_CHECKING:
    from rich.console import Console

    from ...errors import LoratoolError

SCHEMA_VERSION = 1


GAP = 2  # columns of space between two of a table


UNBOUNDED = 1 << 16  # columns: a pipe gets each row on one line


# A heat from 0 to 1 is viridis among xterm's 256 colours: numbers stand on them, and blocks are drawn in them, since a
# block hides what is behind it. Legible on any theme.
HEATS = (
    ("white on color(54)", "color(97)"),
    ("white on color(60)", "color(61)"),
    ("white on color(24)", "color(67)"),
    ("white on color(30)", "color(31)"),
    ("white on color(29)", "color(36)"),
    ("black on color(71)", "color(71)"),
    ("black on color(149)", "color(149)"),
    ("black on color(220)", "color(220)"),
)


def to_json(
    command: str | None, report: Any = None, error: LoratoolError | None = None, status: str | None = None
) -> str:
    """Return one object: `schema`, `verb`, `ok`, `exit_code`, and either `report` or `error`.

    `cli/schemas/` has it in full. `status` is there if a check said no (exit code 1), and says what it found. `verb` is
    null for a call that names no command.
    """
    value: dict[str, Any] = {"schema": SCHEMA_VERSION, "verb": command, "ok": error is None and status is None}
    value["exit_code"] = 0 if status is None else 1
    if status is not None:
        value["status"] = status
    if error is not None:
        value["exit_code"] = error.exit_code
        value["error"] = {
            "kind": error.kind,
            "message": error.message,
            "tensor": error.culprit,
            "remedy": error.remedy,
        }
    else:
        value["report"] = asdict(report)
    return json.dumps(value, allow_nan=False)  # ASCII, so that any terminal or pipe takes it


def grouped_digits(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M" if n >= 1e6 else f"{n:,}"


def percent(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if value >= 0.001 or value <= 0 else f"{value:.1e}"


def print_table(columns: list[tuple[str, bool]], rows: list[list[str]]) -> None:
    """Print rows under columns, which are (title, right-aligned).

    Lines are never cut or wrapped if stdout is not a terminal. If a terminal is too narrow for a row but not for what
    follows its name, that comes on a line below the name.
    """
    from rich.cells import cell_len
    from rich.console import Console

    console = Console(highlight=False)
    columns = [(escape(title), right) for title, right in columns]
    rows = [[escape(cell) for cell in row] for row in rows]
    titles, sides = [title for title, _ in columns], [right for _, right in columns]
    widths = [max(map(cell_len, column)) for column in zip(titles, *rows, strict=True)]
    if not console.is_terminal:  # rich takes half a millisecond a row, and has nothing to add here
        for row in [titles, *rows]:
            spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
            cells = [
                space + cell if right else cell + space for cell, space, right in zip(row, spaces, sides, strict=True)
            ]
            print((" " * GAP).join(cells).rstrip())
        return
    if not sys.stdout.isatty():  # colours can be forced there, a width not
        console.width = UNBOUNDED
    below = sum(widths) + GAP * (len(widths) - 1) > console.width >= sum(widths[1:]) + GAP * len(widths[1:])
    if below:
        lines = _drawn(console, [("", False), *columns[1:]], [["", *row[1:]] for row in rows])
    else:
        lines = _drawn(console, columns, rows)
    names = ["", *(row[0] for row in rows)] if below else [""] * len(lines)
    for name, line in zip(names, lines, strict=True):
        line = line.rstrip()
        print(f"{name}\n{line}" if name else line)


def _drawn(console: Console, columns: list[tuple[str, bool]], rows: list[list[str]]) -> list[str]:
    """Return a table's lines, with a terminal's bold."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, right in columns:
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    with console.capture() as text:  # rich would turn a closed pipe into exit 1
        console.print(table)
    return text.get().splitlines()


def print_lines(text: str, file: TextIO | None = None) -> None:
    """Print one or more lines for a person."""
    print("\n".join(escape(line) for line in text.split("\n")), file=file or sys.stdout)


def print_picture(lines: Sequence[Line]) -> None:
    """Print a picture after a blank line, in colour if stdout is a terminal that has it."""
    from rich.console import Console
    from rich.text import Text

    if not lines:
        return
    console = Console(highlight=False, width=UNBOUNDED)
    with console.capture() as found:
        for line in [[], *lines]:
            text = Text()
            for cell in line:
                number, block = HEATS[min(int((cell.heat or 0.0) * len(HEATS)), len(HEATS) - 1)]
                style = number if any(c.isdigit() for c in cell.text) else block
                text.append(escape(cell.text), "" if cell.heat is None else style)
            console.print(text)
    print(found.get(), end="")
