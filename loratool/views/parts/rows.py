"""Group the rows of a report over layers, so that a model of 3,191 modules is a table of 13 rows.

Modules are one group if their names differ only in numbers and they agree in all categories. If that makes more than
MAX_GROUPS, names are compared more coarsely, level by level. Rows with issues get their own lines, so that ranges stay
narrow. The counts of groups and of such rows add up to the number of rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, Protocol, TypeVar

from .numbers import Formatter, measure
from .places import NORMS, ModulePlace, find_place, joined, labels, order
from .quantities import Quantity

DEVIATIONS = 5.0  # robust ones: 1.4826 times the median distance from the median

FACTOR = 3.0

FEWEST = 4  # siblings, of which a median says something

NEAREST = 8  # layers that one is compared with

MOST = 1 / 3  # of the siblings: if more have one issue, none is shown

ALONE_IN = 2  # modules of one value that are no group of their own


def far_from_siblings(values: Sequence[float | None], by_depth: bool = False) -> dict[int, float]:
    """Return outliers: the index of each value far from the median -> its ratio to the median. Zeros are no values.

    Args:
        by_depth: the values are of consecutive layers. Each is compared with the nearest NEAREST, so that a trend over
            depth neither makes outliers nor hides them.
    """
    logs = {i: math.log(value) for i, value in enumerate(values) if value and 0 < value < math.inf}
    if len(logs) < FEWEST:
        return {}
    places = list(logs)
    if by_depth and len(places) > NEAREST:
        middles = [median(logs[j] for j in _nearest(places, i)) for i in range(len(places))]
    else:
        middles = [median(logs.values())] * len(places)
    off = {i: logs[i] - middle for i, middle in zip(places, middles, strict=True)}
    spread = 1.4826 * median(map(abs, off.values()))
    bound = max(DEVIATIONS * spread, math.log(FACTOR))
    factors = {i: math.exp(distance) for i, distance in off.items() if abs(distance) > bound}
    return factors if len(factors) <= MOST * len(values) else {}


def _nearest(places: Sequence[int], center: int) -> Sequence[int]:
    """Return the NEAREST places around the one at index `center`, without it."""
    start = min(max(center - NEAREST // 2, 0), len(places) - NEAREST - 1)
    return [place for i, place in enumerate(places[start : start + NEAREST + 1], start) if i != center]


def times(factor: float) -> str:
    """Return a factor in words: 6.40x, 1/12.0 of."""
    return f"{measure(factor)}x" if factor >= 1 else f"1/{measure(1 / factor)} of"


def alone_with(values: Sequence[str]) -> tuple[set[int], str]:
    """Return the indices of the one or two outliers, and the value of the others.

    The others are at least 3/4 of all; else there are no outliers, and the value is empty.
    """
    if len(values) < FEWEST:
        return set(), ""
    (common, count), *others = Counter(values).most_common()
    outliers = {i for i, value in enumerate(values) if value != common and dict(others)[value] <= ALONE_IN}
    return (outliers, common) if 4 * count >= 3 * len(values) and len(outliers) <= ALONE_IN else (set(), "")


R = TypeVar("R")


class NamedRow(Protocol):
    """A row of a report, with the path of its module or the name of its weight."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=NamedRow)

LAST = 99  # of priorities

MAX_GROUPS = 13

LOOSE = 3  # values of a category within modules of one name, above which it is no part of the key

NAMED = 3  # modules of a coarse group that its name lists


@dataclass(frozen=True)
class Category(Generic[R]):
    """A column of words in which the rows of a group agree, as shape or rank.

    Attributes:
        priority: among the columns of its table: 1 stays longest in a narrow terminal.
        alone: one or two modules with another value than the rest are no group but outliers.
        always: show the column even if all rows agree.
    """

    what: Quantity
    of: Callable[[R], str]
    priority: int = LAST
    right: bool = False
    alone: bool = False
    always: bool = False


@dataclass(frozen=True)
class Measure(Generic[R]):
    """A column of numbers, of which a group shows the range.

    Attributes:
        priority: as of a category.
        watched: outliers need attention.
        drawn: show a strip by layer.
        summed: show the sum of a group.
        from_least: the strip begins at the least value instead of 0.
    """

    what: Quantity
    of: Callable[[R], float | None]
    write: Formatter
    priority: int = LAST
    watched: bool = False
    drawn: bool = False
    summed: bool = False
    from_least: bool = False


@dataclass(frozen=True)
class Issue:
    """The reason why a row needs a line of its own.

    If more than a third of a group have issues of one severity, a table shows none of them. A page has room, and shows
    all of the worst.
    """

    severity: int  # the lesser, the worse; each reason has its own
    reason: str


WORST = 0  # severity

FAR, ALONE = 100, 101  # severities of the issues that are found here


@dataclass
class Item(Generic[R]):
    """A row of the report with its place in the model, its values and its issue."""

    row: R
    name: str
    place: ModulePlace
    label: str  # of its component and stack, where there are several
    values: Mapping[str, str]  # category -> value
    issue: Issue | None = None


@dataclass(frozen=True)
class RowGroup(Generic[R]):
    """Rows that share a line, and the rows of the group that have their own."""

    name: str
    members: Sequence[Item[R]]
    with_issues: Sequence[Item[R]]


def common(values: Iterable[str]) -> str:
    """Return the value that all rows share, or an empty text."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else ""


def make_items(
    rows: Sequence[R],
    names: Sequence[str],
    columns: Sequence[Category[R] | Measure[R]],
    find_issue: Callable[[R], Issue | None],
) -> list[Item[R]]:
    """Return the rows with their places and issues, in their order."""
    categories = [column for column in columns if isinstance(column, Category)]
    places = list(map(find_place, names))
    parts = labels(places)
    items = [
        Item(
            row,
            name,
            place,
            parts[place.component, place.stack],
            {each.what.title: each.of(row) for each in categories},
            find_issue(row),
        )
        for row, name, place in zip(rows, names, places, strict=True)
    ]
    families = _split(items, _named)
    for column in columns:
        if isinstance(column, Measure) and column.watched:
            _mark_far(items, column)
        elif isinstance(column, Category) and column.alone:
            _mark_alone(families, column.what.title)
    return items


def _mark_far(items: Sequence[Item[R]], column: Measure[R]) -> None:
    for family in _split(items, lambda e: (e.label, e.place.tail, *e.values.values())):
        layers = [each.place.layer for each in family]
        by_depth = None not in layers and len(set(layers)) == len(layers)
        if by_depth:
            family.sort(key=lambda each: each.place.layer or 0)
        values = [None if each.issue else column.of(each.row) for each in family]
        for i, factor in far_from_siblings(values, by_depth).items():
            middle = "its neighbours" if by_depth else "the median"
            family[i].issue = Issue(FAR, f"{times(factor)} {middle}: {column.write(values[i] or 0.0)}")


def _named(item: Item[R]) -> Hashable:
    """Return the key that modules of one name share."""
    return item.label, item.place.texts


def _mark_alone(families: Sequence[Sequence[Item[R]]], title: str) -> None:
    for family in families:
        outliers, most = alone_with([item.values[title] for item in family])
        for i in outliers:
            family[i].issue = family[i].issue or Issue(ALONE, f"{title} {family[i].values[title]}, else {most}")


def group_items(items: Sequence[Item[R]]) -> list[RowGroup[R]]:
    """Return the groups in the order in which a model runs, at the finest level that has at most MAX_GROUPS."""
    titles = list(items[0].values) if items else []
    families = _split(items, _named)
    strict = [title for title in titles if not _is_loose(families, title)]
    levels: list[Callable[[Item[R]], Hashable]] = [
        lambda e: (e.label, e.place.stack, e.place.layer is None, e.place.texts, *_strict_values(e, strict)),
        lambda e: (e.label, e.place.tail),
        lambda e: (e.label, e.place.parent),
        lambda e: e.label,
    ]
    for level, key in enumerate(levels):
        groups = _split(items, key, alone=level == 0)
        if len(groups) <= MAX_GROUPS:
            break
    made_groups = [_make_group(group, level) for group in groups]
    first = {each.label: i for i, each in reversed([*enumerate(items)])}
    parents = {(each.label, each.place.parent): i for i, each in reversed([*enumerate(items)])}

    def position(group: RowGroup[R]) -> tuple[int, ...]:
        item = group.members[0]
        kind, projection = order(item.place)
        in_stack = 0 < kind < NORMS
        label = first[item.label] if item.label else 0
        return (kind if not in_stack else 1, label, kind, parents[item.label, item.place.parent], projection)

    return sorted(made_groups, key=position)


def _strict_values(item: Item[R], titles: Sequence[str]) -> tuple[str, ...]:
    return tuple(item.values[title] for title in titles)


def _is_loose(families: Sequence[Sequence[Item[R]]], title: str) -> bool:
    """Return whether a category has too many values within modules of one name, as ranks after --energy."""
    return any(len({each.values[title] for each in family}) > LOOSE for family in families)


def _split(items: Sequence[Item[R]], key: Callable[[Item[R]], Hashable], alone: bool = False) -> list[list[Item[R]]]:
    """Return the items in groups by key. With `alone`, outliers are in the groups of their siblings."""
    groups: dict[Hashable, list[Item[R]]] = {}
    outliers: list[Item[R]] = []
    for item in items:
        if alone and item.issue and item.issue.severity == ALONE:
            outliers.append(item)
        else:
            groups.setdefault(key(item), []).append(item)
    by_name = {(group[0].label, group[0].place.texts): group for group in reversed(groups.values())}
    for item in outliers:
        siblings = by_name.get((item.label, item.place.texts))
        (groups.setdefault(key(item), []) if siblings is None else siblings).append(item)
    return list(groups.values())


def _make_group(items: Sequence[Item[R]], level: int) -> RowGroup[R]:
    counts = Counter(item.issue.severity for item in items if item.issue)
    shown = {severity for severity, count in counts.items() if count <= MOST * len(items)}
    with_issues = [item for item in items if item.issue and item.issue.severity in shown]
    members = [item for item in items if not (item.issue and item.issue.severity in shown)]
    if not members:  # a few issues of many severities
        members, with_issues = list(items), []
    return RowGroup(_name(members, level), members, with_issues)


def _name(members: Sequence[Item[R]], level: int) -> str:
    """Return the name of a group: a pattern, or the full path of a lone module."""
    first = members[0]
    if len(members) == 1 and not first.label:
        return first.name.removesuffix(".weight") if first.place.layer is None else joined_place(members)
    if level == 0:
        name = joined_place(members)
    elif level == 1:
        name = _tail(members)
    elif level == 2:
        alike = {(each.place.tail, _tail_numbers(each)): each for each in members}
        tails = list(dict.fromkeys(_tail([each]) for each in alike.values()))
        in_parent = all(tail.startswith(first.place.parent) for tail in tails)
        name = first.place.parent if first.place.parent and (in_parent or len(tails) > NAMED) else _listed(tails)
    else:
        name = "" if first.label else "all"
    return " ".join(filter(None, (first.label, name)))


def joined_place(members: Sequence[Item[R]]) -> str:
    return joined(members[0].place.texts, [each.place.numbers for each in members])


def _tail(members: Sequence[Item[R]]) -> str:
    return joined(members[0].place.tail, map(_tail_numbers, members))


def _tail_numbers(item: Item[R]) -> tuple[int, ...]:
    numbers = item.place.numbers
    return numbers[len(numbers) + 1 - len(item.place.tail) :]


def _listed(names: Sequence[str]) -> str:
    more = f", {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
