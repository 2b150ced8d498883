"""Grids of a sheet's rows: a column for each layer, a row for each kind of module, a grid for each part of a model.

A UNet has blocks instead of layers. Modules of which a layer has many, as experts, are a part by themselves. The rows
of that grid are their numbers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..parts.places import ModulePlace, find_place, joined, labels, order
from ..parts.rows import Item

MANY = 4  # numbers of a module within a layer, from which on they are rows of a grid

NOWHERE = "–"  # where a module stands that is in no layer


@dataclass(frozen=True)
class Grid:
    """A part of a model.

    Attributes:
        label: empty for the main part.
        x, y: what the columns and the rows are.
        columns, rows: their names, in order.
        cells: (index of the sheet's row, column, row) each, row by row.
    """

    label: str
    x: str
    y: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Spot:
    """A row of the sheet in its grid. `rows` are candidate names of the grid's row; the first that fits is taken."""

    part: str
    x: str
    y: str
    columns: tuple[str, ...]
    rows: tuple[str, str, str]
    order: tuple[Any, ...]


def make_grids(items: Sequence[Item[Any]], members: Sequence[Sequence[str]] | None = None) -> list[Grid]:
    """Return the grids of a sheet's rows.

    Args:
        members: the names that each row stands for, which differ only in numbers; None for the row's own.
    """
    stands = [[find_place(name) for name in names] for names in members] if members else [[e.place] for e in items]
    label_of = labels([place for places in stands for place in places])
    inner: dict[Hashable, set[tuple[int, ...]]] = defaultdict(set)
    for places in stands:
        if len(places) == 1:
            inner[_kind(places[0])].add(_inner(places[0]))
    spots = [
        _spot(item.name, label_of[places[0].component, places[0].stack], places, len(inner[_kind(places[0])]) >= MANY)
        for item, places in zip(items, stands, strict=True)
    ]
    parts: dict[str, list[int]] = defaultdict(list)
    for i, spot in enumerate(spots):
        parts[spot.part].append(i)
    return [_grid(label, spots, rows) for label, rows in parts.items()]


def _grid(label: str, spots: Sequence[_Spot], members: Sequence[int]) -> Grid:
    columns = list(dict.fromkeys(column for i in members for column in spots[i].columns))
    if all(column.isdigit() for column in columns if column != NOWHERE):
        columns.sort(key=lambda column: -1 if column == NOWHERE else int(column))
    row_of = _row_names(spots, members)
    rows = list(dict.fromkeys(row_of[i] for i in sorted(members, key=lambda i: spots[i].order)))
    across, down = ({name: i for i, name in enumerate(names)} for names in (columns, rows))
    cells = ((i, across[column], down[row_of[i]]) for i in members for column in spots[i].columns)
    first = spots[members[0]]
    x = next((spots[i].x for i in members if spots[i].x), "")
    return Grid(
        label, x, first.y, tuple(columns), tuple(rows), tuple(sorted(cells, key=lambda cell: (cell[2], cell[1])))
    )


def _row_names(spots: Sequence[_Spot], members: Sequence[int]) -> dict[int, str]:
    """Return the name of each member's row. It is longer if one cell would hide another."""
    length = dict.fromkeys(members, 0)
    while True:
        names = {i: spots[i].rows[length[i]] for i in members}
        counts = Counter((column, names[i]) for i in members for column in spots[i].columns)
        hiding = {row for (_, row), count in counts.items() if count > 1}
        short = [i for i in members if names[i] in hiding and length[i] < len(spots[i].rows) - 1]
        if not short:
            return names
        length |= {i: length[i] + 1 for i in short}


def _kind(place: ModulePlace) -> Hashable:
    return place.component, place.stack, place.texts if place.layer is not None else place.tail


def _split(place: ModulePlace) -> int:
    """Return how many texts and numbers of a place belong to its block. None behind a layer."""
    return 0 if place.layer is not None else len(place.texts) - len(place.tail)


def _inner(place: ModulePlace) -> tuple[int, ...]:
    return place.numbers[_split(place) :]


def _spot(name: str, label: str, places: Sequence[ModulePlace], is_many: bool) -> _Spot:
    first, cut = places[0], _split(places[0])
    texts, numbers = first.texts[cut:], _inner(first)
    x = "layer" if first.layer is not None else "block" if cut else ""
    columns = tuple(dict.fromkeys(map(_column, places)))
    if is_many and numbers and len(places) == 1:
        kind = "*".join(texts).strip("._")
        part = " ".join(filter(None, (label, kind)))
        number = ".".join(map(str, numbers))
        y = "expert" if "expert" in kind else "number"
        return _Spot(part, x, y, columns, (number, number, name), numbers)
    row = joined(texts, map(_inner, places))
    behind_block = "*".join((*first.texts[:cut], texts[0][: bool(cut)] + row))
    return _Spot(label, x, "kind", columns, (row, behind_block, name), order(first))


def _column(place: ModulePlace) -> str:
    if place.layer is not None:
        return str(place.layer)
    cut = _split(place)
    return _block(place.texts[0], place.numbers[:cut]) if cut else NOWHERE


def _block(text: str, numbers: Sequence[int]) -> str:
    """Return a short name of a UNet's block: `down 1.0.1`."""
    stage = text.strip("._").partition(".")[0].partition("_block")[0]
    return " ".join(filter(None, (stage, ".".join(map(str, numbers)))))
