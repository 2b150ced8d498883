"""Pictures of numbers as lines of text: bars and grids. All are legible without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .columns import RAMP, shade, text_width
from .document import Line, TextSpan, heat, line, text_of
from .numbers import Formatter

WIDTH = 60  # columns of a narrow terminal

BAR = 36  # cells of the longest

CELL = 5  # columns of a number with its sign and shade


def bars(values: Mapping[str, float], title: str, write: Formatter) -> list[Line]:
    """Draw a horizontal bar for each of a few numbers."""
    if not values:
        return []
    highest = max(values.values()) or 1.0
    width = max(map(text_width, values))
    lines = [line(title)]
    for name, value in values.items():
        share = max(0.0, value / highest)
        bar = TextSpan(RAMP[-1] * round(share * BAR), heat(share))
        lines.append(line(name + " " * (width + 2 - text_width(name)), bar, f" {write(value)}"))
    return lines


def grid(title: str, rows: Sequence[int], columns: Sequence[int], values: Sequence[Sequence[float]]) -> list[Line]:
    """Draw numbers from 0 to 1 by row and column, each with its shade."""
    lines = [line(title), line("  i\\j" + "".join(f"{j:>5}" for j in columns))]
    for i, row in zip(rows, values, strict=True):
        lines.append(line(f"{i:>5}", *(TextSpan(f" {shade(v)}{_hundredths(v)}", heat(v)) for v in row)))
    return lines


def triangle(title: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> list[Line]:
    """Draw numbers from -1 to 1 for each pair of several things, each with its shade, and a minus before negative ones.

    Greater numbers have the darkest shade. Columns beyond WIDTH are drawn below.
    """
    label = max(map(text_width, names))
    lines, step = [line(title)], max(1, (WIDTH - label) // CELL)
    for start in range(0, len(names) - 1, step):
        columns = range(start, min(start + step, len(names) - 1))
        lines.append(line(" " * label, *(f"{names[j]:>{CELL}}" for j in columns)))
        for i in range(start + 1, len(names)):
            cells = [values[i][j] for j in columns if j < i]
            lines.append(line(f"{names[i]:>{label}}", *(TextSpan(_signed(v), heat(abs(v))) for v in cells)))
    return lines


def _signed(value: float) -> str:
    digits = _hundredths(abs(value))
    return f"{'-' if value < 0 and digits.strip('.0') else ' '}{shade(abs(value))}{digits:<3}"


def side_by_side(left: Sequence[Line], right: Sequence[Line]) -> list[Line]:
    """Put two pictures of equally many lines side by side, or one below the other if both are wider than WIDTH."""
    width = max(text_width(text_of(each)) for each in left)
    if width + 2 + max(text_width(text_of(each)) for each in right) > WIDTH:
        return [*left, *right]
    return [
        line(*one, " " * (width + 2 - text_width(text_of(one))), *two) for one, two in zip(left, right, strict=True)
    ]


def _hundredths(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else f"{value:.{int(value < 9.95)}f}"
