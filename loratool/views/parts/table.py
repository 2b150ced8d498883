"""Table of a report's rows: a line for each group with ranges, or with `verbose` a line for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from .document import Column, NamedIssue, Row, Strip, TextTable
from .numbers import all_digits, number_ranges, spread
from .places import natural_order
from .rows import LAST, Category, Issue, Item, Measure, N, R, RowGroup, group_items, make_items

CELLS = 24  # of a strip

LAYERS_OF_A_STRIP = 8  # at least


@dataclass(frozen=True)
class GroupColumns:
    """The priorities of the columns that every table of groups has: layers, a strip over these, and a count."""

    layers: int = LAST
    by_layer: int = LAST
    count: int = LAST


def make_table(
    rows: Sequence[N],
    columns: Sequence[Category[N] | Measure[N]],
    of_groups: GroupColumns = GroupColumns(),
    *,
    title: str = "module",
    find_issue: Callable[[N], Issue | None] = lambda _: None,
    modules: Callable[[N], float] = lambda _: 1,
    verbose: bool = False,
) -> TextTable:
    """Return the table of a report's rows.

    A category gets no column if all rows have the same value, as a fact has it. A measure without values gets none.

    Args:
        columns: the columns after name, layers and count, in this order.
        find_issue: the reason why a row by itself needs attention.
        modules: the number of modules that a row stands for.
        verbose: a line for each row, with its full name.
    """
    items = make_items(rows, [row.name for row in rows], columns, find_issue)
    if verbose:
        items = sorted(items, key=lambda each: natural_order(each.name))
    groups = [RowGroup(e.name, [e], [e] if e.issue else []) for e in items] if verbose else group_items(items)
    shown = [column for column in columns if is_shown(column, rows)]
    drawn = next((c for c in shown if isinstance(c, Measure) and c.drawn), None)
    strips, strip_title = _strips(groups, drawn) if drawn and not verbose else ({}, "")
    if of_groups.by_layer < LAST and not all(_is_one_a_layer(group.members) for group in groups):
        # `layers` does not tell how many there are, so `count` must not go before the strip does
        of_groups = replace(of_groups, count=min(of_groups.count, of_groups.by_layer))
    # a column, and its cells by groups
    cells_by_column: list[tuple[Column, Sequence[str | Strip]]] = [
        (Column(title, right=False), [group.name for group in groups])
    ]
    if not verbose and any(each.place.layer is not None for each in items):
        cells_by_column.append((Column("layers", of_groups.layers, right=False), list(map(_layers, groups))))
    if not verbose and len(groups) < sum(modules(item.row) for item in items):
        counts = [all_digits(sum(modules(item.row) for item in group.members)) for group in groups]
        cells_by_column.append((Column("count", of_groups.count), counts))
    for column in shown:
        if column is drawn and strips:
            drawn_column = Column(strip_title, of_groups.by_layer, right=False, strips=True)
            cells_by_column.append((drawn_column, [strips.get(i, "") for i in range(len(groups))]))
        right = isinstance(column, Measure) or column.right
        cells_by_column.append(
            (Column(column.what.title, column.priority, right), [_cell(column, group) for group in groups])
        )
    rows_of_cells = zip(*(cells for _, cells in cells_by_column), strict=True)
    return TextTable(
        tuple(column for column, _ in cells_by_column),
        tuple(
            Row(cells, tuple(map(_issue_line, group.with_issues)))
            for cells, group in zip(rows_of_cells, groups, strict=True)
        ),
    )


def is_shown(column: Category[R] | Measure[R], rows: Sequence[R]) -> bool:
    """Return whether a column has something that is not the same in all rows."""
    values = {column.of(row) for row in rows}
    return values != {None} if isinstance(column, Measure) else len(values) > 1 or column.always


def _is_one_a_layer(members: Sequence[Item[R]]) -> bool:
    layers = [item.place.layer for item in members]
    return len(layers) == 1 or (None not in layers and len(set(layers)) == len(layers))


def _layers(group: RowGroup[R]) -> str:
    return number_ranges(each.place.layer for each in group.members if each.place.layer is not None)


def _cell(column: Category[R] | Measure[R], group: RowGroup[R]) -> str:
    if isinstance(column, Measure):
        values = [value for e in group.members if (value := column.of(e.row)) is not None]
        return spread([sum(values)] if column.summed and values else values, column.write)
    return _joined_words(list(dict.fromkeys(column.of(e.row) for e in group.members)))


def _joined_words(words: Sequence[str]) -> str:
    """Return the values of a category in a group as one text, as a range if they are numbers."""
    if len(words) == 1:
        return words[0]
    try:
        return spread(map(float, words), "{:g}".format)
    except ValueError:
        return "+".join(words) if len(words) <= 2 else f"{len(words)} kinds"


def _issue_line(item: Item[R]) -> NamedIssue:
    assert item.issue
    return NamedIssue(item.name.removesuffix(".weight"), item.issue.reason, item.issue.severity)


def _strips(groups: Sequence[RowGroup[R]], column: Measure[R]) -> tuple[dict[int, Strip], str]:
    """Return the strips of the groups that have enough layers, and the title with the scale that they share."""
    means = {
        i: values for i, group in enumerate(groups) if len(values := _by_layer(group, column)) >= LAYERS_OF_A_STRIP
    }
    every = [value for values in means.values() for value in values]
    if not every:
        return {}, ""
    low, high = min(every) if column.from_least else 0.0, max(every)
    width = (high - low) or 1.0
    strips = {i: Strip(tuple((v - low) / width for v in _binned(values))) for i, values in means.items()}
    start = f"{column.write(low)}.." if column.from_least else ""
    return strips, f"by layer ({start}█ {column.write(high)})"


def _by_layer(group: RowGroup[R], column: Measure[R]) -> list[float]:
    values: dict[int, list[float]] = {}
    for item in group.members:
        value = column.of(item.row)
        if item.place.layer is not None and value is not None:
            values.setdefault(item.place.layer, []).append(value)
    return [sum(values[layer]) / len(values[layer]) for layer in sorted(values)]


def _binned(values: Sequence[float]) -> list[float]:
    """Return the values, or means of neighbours if there are more values than cells."""
    if len(values) <= CELLS:
        return list(values)
    edges = [i * len(values) // CELLS for i in range(CELLS + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
