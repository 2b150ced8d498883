"""Place a sheet's rows in grids: a column a layer, a row a kind of module; each part of a model has a grid of its own.

A UNet has blocks in place of layers. Modules that a layer has many of, as experts, are a part by themselves, whose rows
are their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..places import ModulePlace, joined, order
from ..rows import Item

MANY = 4  # numbers of a module within a layer, from which on they are rows of a grid


NOWHERE = "–"  # where a module stands that is in no layer


@dataclass(frozen=True)
class Grid:
    """A part of a model.

    Attributes:
        label: empty for the main part.
        x, y: what the columns and the rows are.
        columns, rows: their names, in order.
        cells: (index of the sheet's row, column, row) each.
    """

    label: str
    x: str
    y: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Spot:
    """A row of the sheet in its grid."""

    part: str
    x: str
    y: str
    columns: tuple[str, ...]
    row: str
    order: tuple[Any, ...]


def make_grids(items: Sequence[Item[Any]], layers: Sequence[Sequence[int]] | None = None) -> list[Grid]:
    """Return the grids of a sheet's rows.

    Args:
        layers: of each row, where rows stand for several modules with a range in their name.
    """
    inner: dict[Hashable, set[tuple[int, ...]]] = defaultdict(set)
    for item in items:
        inner[_kind(item)].add(_inner(item.place))
    spots = [
        _spot_of_many(item, layers[i]) if layers and layers[i] else _spot(item, len(inner[_kind(item)]) >= MANY)
        for i, item in enumerate(items)
    ]
    parts: dict[str, list[int]] = defaultdict(list)
    for i, spot in enumerate(spots):
        parts[spot.part].append(i)
    return [_grid(label, spots, members) for label, members in parts.items()]


def _grid(label: str, spots: Sequence[_Spot], members: Sequence[int]) -> Grid:
    columns = list(dict.fromkeys(column for i in members for column in spots[i].columns))
    if all(column.isdigit() for column in columns if column != NOWHERE):
        columns.sort(key=lambda column: -1 if column == NOWHERE else int(column))
    rows = list(dict.fromkeys(spots[i].row for i in sorted(members, key=lambda i: spots[i].order)))
    across, down = ({name: i for i, name in enumerate(names)} for names in (columns, rows))
    cells = [(i, across[column], down[spots[i].row]) for i in members for column in spots[i].columns]
    first = spots[members[0]]
    x = next((spots[i].x for i in members if spots[i].x), "")
    return Grid(label, x, first.y, tuple(columns), tuple(rows), tuple(cells))


def _kind(item: Item[Any]) -> Hashable:
    return item.label, item.place.texts if item.place.layer is not None else item.place.tail


def _split(place: ModulePlace) -> int:
    """Return how many of a place's texts, and numbers, are its block's: none behind a layer."""
    return 0 if place.layer is not None else len(place.texts) - len(place.tail)


def _inner(place: ModulePlace) -> tuple[int, ...]:
    return place.numbers[_split(place) :]


def _spot(item: Item[Any], is_many: bool) -> _Spot:
    place, cut = item.place, _split(item.place)
    texts, numbers = place.texts[cut:], _inner(place)
    if place.layer is not None:
        x, column = "layer", str(place.layer)
    elif cut:
        x, column = "block", _block(place.texts[0], place.numbers[:cut])
    else:
        x, column = "", NOWHERE
    if is_many and numbers:
        kind = "*".join(texts).strip("._")
        part = " ".join(filter(None, (item.label, kind)))
        y = "expert" if "expert" in kind else "number"
        return _Spot(part, x, y, (column,), ".".join(map(str, numbers)), numbers)
    row = joined(texts, [numbers])
    return _Spot(item.label, x, "kind", (column,), row, order(place))


def _spot_of_many(item: Item[Any], layers: Sequence[int]) -> _Spot:
    """Return the spot of a row whose name has its layers as a range: `model.layers.{0..31}.mlp.up_proj.weight`."""
    row = item.name.partition("}")[2].strip("._").removesuffix(".weight") or item.name
    return _Spot(item.label, "layer", "kind", tuple(map(str, layers)), row, ())


def _block(text: str, numbers: Sequence[int]) -> str:
    """Return a short name of a UNet's block: `down 1.0.1`."""
    stage = text.strip("._").partition(".")[0].partition("_block")[0]
    return " ".join(filter(None, (stage, ".".join(map(str, numbers)))))
