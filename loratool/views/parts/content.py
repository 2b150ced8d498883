"""Hold what a page shows beside a report's document: figures, rows with the numbers behind them, curves, heatmaps.

A view makes it of its report alone; nothing of it knows HTML.
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
        label: what it is, in two or three words.
        value: as it is written.
        note: what it is of, or what it means, in small letters.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """A quantity along an axis, whose numbers are given in its unit.

    Attributes:
        log: whether equal steps are equal factors; all numbers are above 0 then.
        ends: between which numbers it goes, so that the pictures of two rows compare; None for those of the points.
    """

    what: Quantity
    log: bool = False
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve(Generic[R]):
    """A picture of the row that the reader chooses: lines over a common axis.

    Attributes:
        lines: name of a line -> its points, of one row; empty where it has none.
    """

    title: str
    x: Axis
    y: Axis
    lines: Callable[[R], Mapping[str, Points]]


@dataclass(frozen=True)
class Sheet(Generic[N]):
    """All rows of a table, each with its place in the model, of which a grid of layers x kinds is drawn.

    Attributes:
        rows: as of `make_table`, a module or weight each.
        columns: as of `make_table`. The drawn measure colours the grid first.
        title: of the column of names.
        find_issue: why a row needs attention.
        members: names that have all places that a row stands for, and differ only in numbers; None for its own.
        curves: pictures of a chosen row.
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
    """The content of a page that a document has not.

    Attributes:
        figures: eight at most.
        sheets: those without rows are not shown; if no other is, the document's tables are.
        arithmetic: what the numbers are, exactly: a sentence each.
        hashes: a file or folder, as the user wrote it -> the sha256 of its weights.
    """

    figures: tuple[Figure, ...] = ()
    sheets: tuple[Sheet[Any], ...] = ()
    heatmaps: tuple[Heatmap, ...] = ()
    arithmetic: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
