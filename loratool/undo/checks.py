"""Checks that a merge can have written each part of an undo file's index; a ValueError names the fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, lcm, prod
from typing import Any

from ..files.codecs.codec import Parts
from ..files.containers.indexed_file import are_hashes, is_count, is_number, is_place, require
from ..files.dtypes import BLOCK_TYPES, DTYPES, FLOATS, TORCH_FLOATS, TensorSpec

ROWS = 5  # the index of `rows` in a placement
RECORD = 1 << 22  # weights of a record; at least one row
SHARED = 8  # rows of codes that all records are multiples of: as many share bytes in AWQ


def record_rows(columns: int, coded: bool = False, together: int = 1) -> int:
    """Return the rows of a record: blocks of `together` rows.

    If the weight is stored as codes (`coded`), records do not share bytes of it.
    """
    unit = SHARED if coded else 1
    if together > 1:
        unit = lcm(unit, together)
    return max(unit, RECORD // max(1, columns) // unit * unit)


def rows_sharing(parts: Parts, columns: int) -> int:
    """Return the rows of `columns` numbers whose codes share bytes; 1 if records of SHARED rows do not part them."""
    together = parts.weight.format.row_multiple(parts)
    rows = together // gcd(together, columns // parts.weight.spec.shape[-1])
    return rows if SHARED % rows else 1


def spec_of(entry: Iterable[Any]) -> TensorSpec:
    dtype, shape = entry
    return TensorSpec(dtype, tuple(shape))


def prefix_of(file: str) -> str:
    """Return a pipeline component's folder and a slash, the prefix of its names; empty without a pipeline."""
    folder, slash, _ = file.rpartition("/")
    return folder + slash


def strange(name: str) -> str:
    return f"it names {name!r}, which is not a file of a model that a merge edits"


def require_plain(name: str) -> None:
    require(is_place(name), strange(name))


def checked_spec(entry: Any) -> TensorSpec:
    spec = spec_of(entry)
    require(
        spec.dtype in (DTYPES | BLOCK_TYPES) and isinstance(entry[1], list) and all(map(is_count, spec.shape)),
        f"{entry} is not a type",
    )
    return spec


def check_adapter(adapter: Mapping[str, Any]) -> None:
    components, listed = adapter.get("components", {}), adapter.get("module_weights", [])
    require(are_hashes([adapter["sha256"], adapter["scales_sha256"]], 2), "an adapter without hashes")
    require(isinstance(adapter["name"], str) and is_number(adapter["weight"]), "an adapter without name or weight")
    require(all(map(is_number, components.values())), "an adapter's weights")
    require(all(isinstance(name, str) and is_number(weight) for name, weight in listed), "an adapter's weights")


def check_placement(name: str, placement: Sequence[Any], adapters: int) -> None:
    number, module, value, weight, transposed, rows, start, stop, skip, expert = placement
    counts = [number, rows, start, stop, skip, *([] if expert is None else [expert])]
    fits = all(map(is_count, counts)) and number < adapters and start <= stop <= rows
    fits = fits and isinstance(module, str) and (value is None or isinstance(value, str))
    require(fits and is_number(weight) and type(transposed) is bool, f"{name}: a placement")


def tiling(
    name: str, spec: TensorSpec, was: TensorSpec, placements: Sequence[Sequence[Any]]
) -> tuple[list[tuple[int, int]], int | None]:
    """Return the runs of rows that a changed tensor's records tile, and the first row that is copied.

    No record crosses the end of a run. The copied row is None if no rows are copied.

    Args:
        spec: the merged tensor's.
        was: the base tensor's.
    """
    is_float = was.dtype in FLOATS
    if placements:
        require(spec == was and is_float, f"{name} is {spec}, and was {was}")
        _check_rows(name, was, placements)
        return _covered([(start, stop) for *_, start, stop, _, _ in placements]) if was.size else [], None
    widened = len(spec.shape) == len(was.shape) == 2 and spec.shape[0] == was.shape[0] and spec.shape[1] > was.shape[1]
    same = (widened or spec.shape[1:] == was.shape[1:]) and bool(spec.shape) is bool(was.shape)
    require(spec.dtype == was.dtype and same, f"{name} is {spec}, and was {was}")
    if widened or not is_float or not was.shape or not was.size:
        return [], 0
    shared = min(spec.shape[0], was.shape[0])
    return [(0, shared)], (shared if shared < was.shape[0] else None)


def coded_tiling(
    name: str, spec: TensorSpec, was: TensorSpec, codes: TensorSpec, placements: Sequence[Sequence[Any]]
) -> list[tuple[int, int]]:
    """Return the runs of rows that the records tile of a weight stored as codes: all rows, split at each edge.

    Without placements the weight was dequantized without an update.

    Args:
        spec: the merged tensor's.
        was: the weight's.
        codes: of the stored tensor.
    """
    require(spec.shape == was.shape and spec.dtype in TORCH_FLOATS, f"{name} is {spec}, and was {was}")
    if not was.size or not codes.size:
        return []
    if not placements:
        return [(0, was.shape[0])]
    _check_rows(name, was, placements)
    rows = placements[0][ROWS]
    edges = sorted({0, rows, *(edge for *_, start, stop, _, _ in placements for edge in (start, stop))})
    return list(pairwise(edges))


def _check_rows(name: str, was: TensorSpec, placements: Sequence[Sequence[Any]]) -> None:
    rows = placements[0][ROWS]
    possible = {was.shape[0], was.shape[0] * was.shape[1]} if len(was.shape) > 2 else {(*was.shape, 1)[0]}
    require(rows in possible and all(placement[ROWS] == rows for placement in placements), f"{name}: its rows")


def _covered(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of runs of rows, split at every start and end."""
    rising = sorted(places)
    edges = sorted({edge for place in rising for edge in place})
    runs, reach, index = [], 0, 0
    for first, last in pairwise(edges):
        while index < len(rising) and rising[index][0] <= first:
            reach, index = max(reach, rising[index][1]), index + 1
        runs += [(first, last)] if reach >= last else []
    return runs


def recoded_shape(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of a weight that was rounded to codes."""
    size = prod(entry["recoded"]["shape"])
    return counted_rows(entry), size // max(1, counted_rows(entry))


def recoded_tiling(entry: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the runs of rows that the records of recoded weights tile: all rows, split at each edge."""
    edges = {0, counted_rows(entry), *(edge for *_, start, stop, _, _ in entry["placements"] for edge in (start, stop))}
    return list(pairwise(sorted(edges)))


def counted_rows(entry: Mapping[str, Any]) -> int:
    """Return the number of rows of a changed tensor, as its records count them."""
    rows: int = entry["placements"][0][ROWS] if entry["placements"] else (*entry["spec"][1], 1)[0]
    return rows


@dataclass(frozen=True)
class Tiles:
    """The rows of a changed tensor that are in the undo file.

    Attributes:
        runs: rows with records. Each run is divided into records of `height` rows; the last may be shorter.
        copied: the first of the rows that are stored unchanged; None without any.
    """

    runs: list[tuple[int, int]]
    height: int
    copied: int | None = None

    def count(self) -> int:
        """Return how many records there are."""
        return sum(-(-(last - first) // self.height) for first, last in self.runs)

    def records(self) -> Iterator[tuple[int, int]]:
        """Yield the rows start:stop of each record."""
        for first, last in self.runs:
            yield from ((start, min(start + self.height, last)) for start in range(first, last, self.height))


def tiles_of(name: str, entry: Mapping[str, Any], was: TensorSpec | None, codes: TensorSpec | None) -> Tiles:
    """Return the rows of a changed tensor that are in the undo file.

    Args:
        was: the base's tensor or weight; None if it has none of this name.
        codes: of the stored tensor, if the weight was stored as codes.

    Raises:
        ValueError: no merge writes this entry for this tensor.
    """
    rows, sharing, together = counted_rows(entry), entry.get("sharing", 1), entry.get("together", 1)
    require(all(is_count(each) and 0 < each <= max(1, rows) for each in (sharing, together)), f"{name}: its blocks")
    if "recoded" in entry:
        return Tiles(recoded_tiling(entry), record_rows(recoded_shape(entry)[1], True, sharing))
    if was is None:
        return Tiles([], 1)
    spec, placements, copied = spec_of(entry["spec"]), entry["placements"], None
    if codes:
        runs = [] if is_replaced(entry) else coded_tiling(name, spec, was, codes, placements)
    else:
        runs, copied = tiling(name, spec, was, placements)
    return Tiles(runs, record_rows(spec.size // max(1, rows), bool(codes), lcm(sharing, together)), copied)


def is_recorded(entry: Mapping[str, Any], tiles: Tiles) -> bool:
    """Return whether the records of a changed tensor have the sums of all bytes that the merge wrote."""
    covered = sum(last - first for first, last in tiles.runs) == counted_rows(entry)
    return "recoded" not in entry and covered


def is_replaced(entry: Mapping[str, Any]) -> bool:
    """Return whether an update replaced the base's tensor."""
    return bool(entry.get("replaced"))


def kept_names(entry: Mapping[str, Any]) -> list[str]:
    """Return the stored tensors of a coded weight that an undo file has unchanged: all, or all except the codes."""
    tensors: list[str] = entry["coded"]["tensors"] if "coded" in entry else []
    return tensors if is_replaced(entry) else tensors[1:]


def bytes_before(spec: TensorSpec, row: int) -> int:
    return row * (spec.nbytes // spec.shape[0]) if row else 0
