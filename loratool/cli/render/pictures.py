"""Draw small pictures of numbers over modules, as lines of cells with a heat from 0 to 1, which `text` colours.

Every cell is legible without colour: the height of a block, or the number itself. Nothing is wider than 80 columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...architectures.numbered_names import split_numbers

RAMP = "▁▂▃▄▅▆▇█"


ASCII_RAMP = ".:-=+*#@"


EIGHTHS = " ▏▎▍▌▋▊▉"


WIDTH = 80


LABEL = 26  # columns at most


STRIP = 36


@dataclass(frozen=True)
class Cell:
    """A run of text of one colour."""

    text: str
    heat: float | None = None  # from 0 to 1, None for plain text


Line = list[Cell]


Formatter = Callable[[float], str]


def strips(
    values: Mapping[str, float],
    title: str,
    formatter: Formatter = "{:.2g}".format,
    low: float | None = 0.0,
    plain: bool = False,
) -> list[Line]:
    """Draw the numbers of modules as heat strips: a row for each kind with its mean, and a column for each layer.

    Modules whose paths differ only in numbers are one kind. Fewer than three modules make no picture.

    Args:
        values: by module path.
        low: what the lowest block stands for, None for the least value.
        plain: draw in ASCII.
    """
    kinds = _kinds(values)
    if len(values) < 3:
        return []
    lowest, highest = min(values.values()) if low is None else low, max(values.values())
    labels = _short(list(kinds), plain)
    width = max(len(label) for label in labels.values())
    ramp = ASCII_RAMP if plain else RAMP
    lines = [[Cell(f"{title}  {ramp[0]} {formatter(lowest)} .. {ramp[-1]} {formatter(highest)}")]]
    for kind, row in kinds.items():
        cells = [_cell(value, lowest, highest, ramp) for value in _binned(row, STRIP)]
        pad = " " * (min(STRIP, max(map(len, kinds.values()))) - len(cells))
        mean = sum(row) / len(row)
        lines.append([Cell(labels[kind].ljust(width) + "  "), *cells, Cell(f"{pad}  {formatter(mean)}")])
    return lines


def bars(
    values: Mapping[str, float], title: str, formatter: Formatter = "{:.3g}".format, plain: bool = False
) -> list[Line]:
    """Draw a horizontal bar for each of a few numbers."""
    if not values:
        return []
    highest = max(values.values()) or 1.0
    labels = _short(list(values), plain)
    width = max(len(label) for label in labels.values())
    lines = [[Cell(title)]]
    for name, value in values.items():
        length = max(0.0, value / highest) * STRIP
        full_cells = int(length)
        bar = "#" * round(length) if plain else "█" * full_cells + EIGHTHS[int((length - full_cells) * 8)].strip()
        lines.append([Cell(labels[name].ljust(width) + "  "), Cell(bar, value / highest), Cell(f" {formatter(value)}")])
    return lines


def grid(
    title: str, rows: Sequence[int], columns: Sequence[int], values: Sequence[Sequence[float]], plain: bool = False
) -> list[Line]:
    """Draw numbers from 0 to 1 by row and column, each with its shade."""
    ramp = ASCII_RAMP if plain else RAMP
    lines = [[Cell(title)], [Cell("  i\\j" + "".join(f"{j:>5}" for j in columns))]]
    for i, row in zip(rows, values, strict=True):
        cells = [Cell(f" {_cell(v, 0.0, 1.0, ramp).text}{_percent(v)}", min(max(v, 0.0), 1.0)) for v in row]
        lines.append([Cell(f"{i:>5}"), *cells])
    return lines


def side_by_side(left: Sequence[Line], right: Sequence[Line]) -> list[Line]:
    """Put two pictures of equally many lines side by side, or one below the other if 80 columns do not hold both."""
    width = max(_length(line) for line in left)
    if width + 2 + max(_length(line) for line in right) > WIDTH:
        return [*left, *right]
    return [[*one, Cell(" " * (width + 2 - _length(one))), *two] for one, two in zip(left, right, strict=True)]


def is_ascii_terminal(encoding: str | None) -> bool:
    """Return whether the terminal cannot show blocks."""
    return "utf" not in (encoding or "").lower() or os.environ.get("TERM") == "dumb"


def _length(line: Line) -> int:
    return sum(len(cell.text) for cell in line)


def _percent(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.0"


def _kinds(values: Mapping[str, float]) -> dict[str, list[float]]:
    """Return the values of each kind by rising numbers in their paths."""
    found: dict[str, list[tuple[tuple[int, ...], float]]] = {}
    for name, value in values.items():
        parts, numbers = split_numbers(name.removesuffix(".weight"), underscores="." not in name)
        found.setdefault("*".join(parts), []).append((numbers, value))
    return {kind: [value for _, value in sorted(row)] for kind, row in found.items()}


def _short(kinds: Sequence[str], plain: bool) -> dict[str, str]:
    """Return labels without the parts that all names begin with.

    What is too long is also without those that all have anywhere, and without its middle.
    """
    dot = "." if any("." in kind for kind in kinds) else "_"  # kohya's names have no other
    parts = [kind.split(dot) for kind in kinds]
    common = 0
    while len(kinds) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    if len(kinds) == 1:
        common = max(0, len(parts[0]) - 2)
    labels = {kind: dot.join(p[common:]) for kind, p in zip(kinds, parts, strict=True)}
    if max(map(len, labels.values()), default=0) > LABEL and len(kinds) > 1:
        everywhere = set.intersection(*(set(p) for p in parts))
        fewer = {kind: dot.join(part for part in kind.split(dot) if part not in everywhere) for kind in kinds}
        labels = fewer if all(fewer.values()) and len(set(fewer.values())) == len(kinds) else labels
    gap = "..." if plain else "…"
    length = LABEL // 3
    return {
        kind: label if len(label) <= LABEL else label[:length] + gap + label[length + len(gap) - LABEL :]
        for kind, label in labels.items()
    }


def _binned(row: Sequence[float], max_cells: int) -> list[float]:
    """Return means of neighbours if there are more values than fit."""
    if len(row) <= max_cells:
        return list(row)
    edges = [i * len(row) // max_cells for i in range(max_cells + 1)]
    return [sum(row[a:b]) / (b - a) for a, b in pairwise(edges)]


def _cell(value: float, lowest: float, highest: float, ramp: str) -> Cell:
    heat = min(max((value - lowest) / (highest - lowest), 0.0), 1.0) if highest > lowest else 0.0
    return Cell(ramp[min(int(heat * len(ramp)), len(ramp) - 1)], heat)
