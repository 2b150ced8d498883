"""Content of a page beside the document: figures, rows with their numbers, curves and heatmaps.

A view makes it from its report alone. Nothing here knows HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from .quantities import Quantity
from .rows import Category, Issue, Measure, N, R

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Figure:
    """A number that matters, in large letters.

    Attributes:
        label: its name, in two or three words.
        value: the number as text.
        note: its meaning, in small letters.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """A quantity along an axis, whose numbers are given in its unit.

    Attributes:
        log: whether equal steps are equal factors; all numbers are above 0 then.
        ends: the range of the axis, so that the pictures of two rows compare; None for that of the points.
    """

    what: Quantity
    log: bool = False
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve(Generic[R]):
    """A picture of the row that the reader selects: lines over a common axis.

    Attributes:
        lines: name of a line -> its points for a row; empty if there are none.
    """

    title: str
    x: Axis
    y: Axis
    lines: Callable[[R], Mapping[str, Points]]


@dataclass(frozen=True)
class Sheet(Generic[N]):
    """All rows of a table, which are also drawn as a grid of layers x kinds.

    Attributes:
        rows: a module or weight each, as in `make_table`.
        columns: as in `make_table`. The drawn measure colours the grid first.
        title: of the column of names.
        find_issue: the reason why a row needs attention.
        members: the names that a row stands for, which differ only in numbers; None for its own name.
        curves: pictures of the selected row.
    """

    rows: Sequence[N]
    columns: Sequence[Category[N] | Measure[N]]
    title: str = "module"
    find_issue: Callable[[N], Issue | None] = lambda _: None
    members: Callable[[N], Sequence[str]] | None = None
    curves: Sequence[Curve[N]] = ()


@dataclass(frozen=True)
class Heatmap:
    """Numbers by row and column, as the cosines of adapters.

    Attributes:
        x, y: what the columns and the rows are.
        cell: what the numbers are.
        columns, rows: their names.
        values: a row each; None where there is none.
        write: how a number is written.
    """

    title: str
    x: str
    y: str
    cell: Quantity
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    write: Callable[[float], str]


@dataclass(frozen=True)
class Page:
    """The content of a page besides the document.

    Attributes:
        figures: eight at most.
        sheets: sheets without rows are not shown; if none is left, the document's tables are shown.
        arithmetic: exact definitions of the numbers, a sentence each.
        hashes: a file or folder, as the user wrote it -> the sha256 of its weights.
    """

    figures: tuple[Figure, ...] = ()
    sheets: tuple[Sheet[Any], ...] = ()
    heatmaps: tuple[Heatmap, ...] = ()
    arithmetic: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
