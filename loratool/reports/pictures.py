"""Draw numbers as lines: bars of a few, and grids by row and column; each is legible without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .columns import RAMP, shade, text_width
from .document import Line, Toned, heat, line, text_of
from .numbers import Formatter

WIDTH = 60  # columns of a narrow terminal


BAR = 36  # cells of the longest


def bars(values: Mapping[str, float], title: str, write: Formatter) -> list[Line]:
    """Draw a horizontal bar for each of a few numbers."""
    if not values:
        return []
    highest = max(values.values()) or 1.0
    width = max(map(text_width, values))
    lines = [line(title)]
    for name, value in values.items():
        share = max(0.0, value / highest)
        bar = Toned(RAMP[-1] * round(share * BAR), heat(share))
        lines.append(line(name + " " * (width + 2 - text_width(name)), bar, f" {write(value)}"))
    return lines


def grid(title: str, rows: Sequence[int], columns: Sequence[int], values: Sequence[Sequence[float]]) -> list[Line]:
    """Draw numbers from 0 to 1 by row and column, each with its shade."""
    lines = [line(title), line("  i\\j" + "".join(f"{j:>5}" for j in columns))]
    for i, row in zip(rows, values, strict=True):
        lines.append(line(f"{i:>5}", *(Toned(f" {shade(v)}{_hundredths(v)}", heat(v)) for v in row)))
    return lines


def side_by_side(left: Sequence[Line], right: Sequence[Line]) -> list[Line]:
    """Put two pictures of equally many lines side by side, or one below the other if WIDTH does not hold both."""
    width = max(text_width(text_of(each)) for each in left)
    if width + 2 + max(text_width(text_of(each)) for each in right) > WIDTH:
        return [*left, *right]
    return [
        line(*one, " " * (width + 2 - text_width(text_of(one))), *two) for one, two in zip(left, right, strict=True)
    ]


def _hundredths(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.0"
