"""Write W' = RN(X) for blocks of rows: the GEMM decides nearly all weights, `decide` the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .arrays import ON_CPU, Array, Numbers, doubled, empty, fetched, narrow, positions, put, sent, take, where, widen
from .decide import PerMatrix, Reals, decide
from .dense import Bounds, DenseRows, each_number, mask_apart, midpoints
from .forms import Bits, Form, Positions, Wide, wide
from .passes.blocks import RunEntries, merge_block
from .products import ProductRows
from .rounding_stats import RoundingStats, count_different, dot_by_matrix, set_quiet_nan
from .workspace import Workspace

ARITHMETIC_VERSION = 2  # named in every output: raise it when a result's bits can change

TOGETHER = 1 << 16  # weights decided at a time: a call costs as much as a thousand weights, and this bounds the memory

LOST = 2.0**-10  # times the shift: a D of this size has no digits left beside it in float32, and counts as 0

Sums = dict[str, npt.NDArray[Any]]  # fields of RoundingStats, with a number for each matrix


@dataclass(frozen=True)
class Tile:
    """All columns of some rows of a block after the GEMM, in buffers that the next tile overwrites."""

    base: Numbers  # (rows, n)
    out: Numbers  # (rows, n), not final where `hit` is set
    change: Array  # (rows, n), D + shift
    shift: PerMatrix
    hit: Array  # (rows, n), bool: undecided by the GEMM
    undecided: Positions  # the flat positions where `hit` is set
    ties: npt.NDArray[np.bool_] | None  # (rows, n): sums that are midpoints, if the GEMM is exact
    start: int  # flat position in the block


class Watcher(Protocol):
    """Observer of a merge: called with each tile of a block and then with the block, or once after a compiled pass."""

    @property
    def needs_tiles(self) -> bool:
        """Return whether no compiled pass may do the block."""

    def tile(self, tile: Tile, dense: DenseRows) -> None: ...

    def block(self, base: Numbers, out: Numbers, x: Reals, first: int, dense: DenseRows, bounds: Bounds) -> None: ...

    def passed(self, base: Numbers, out: Numbers, x: Reals, first: int, entries: RunEntries) -> None: ...


class RowMerge:
    """The merge of some rows.

    Args:
        x: their reals.
        base, out: the forms of W and W'.
        like: an array where the rows are; on the CPU by default.
    """

    def __init__(self, x: Reals, base: Form, out: Form, like: Array = ON_CPU) -> None:
        self.x, self._form, self._to, self._like = x, base, out, like
        plain = x.delta if isinstance(x.delta, ProductRows) and x.factor is None else None
        self._matrices = plain.products.matrices if plain else 1

    @cached_property
    def dense(self) -> DenseRows:
        return DenseRows(self.x, self._form, self._to, self._like)

    def apply(
        self, base: Numbers, first: int, out: Numbers, work: Workspace, watcher: Watcher | None = None
    ) -> RoundingStats:
        """Write W' of a block into `out`, and return its statistics.

        Args:
            base: (rows, n), contiguous; its first row is row `first` of these.
            out: (rows, n), contiguous.
        """
        (stats,) = self.apply_each(base, first, out, work, watcher)
        return stats

    def apply_each(
        self, base: Numbers, first: int, out: Numbers, work: Workspace, watcher: Watcher | None = None
    ) -> list[RoundingStats]:
        """Write W' of a block of all rows of one or more matrices, and return the statistics of each matrix."""
        passed = bounds = None
        if watcher is None or not watcher.needs_tiles:
            passed = merge_block(self.x, base, first, out, work, record=watcher is not None)
        if passed:
            undecided, sums = passed.undecided, [passed.sums]
        else:
            bounds = self.dense.bounds(base, first)
            undecided, sums = self._tiles(base, first, out, bounds, work, watcher)
        for start in range(0, len(undecided), TOGETHER):
            sums.append(self._decide(base, first, out, undecided[start : start + TOGETHER]))
        if watcher and passed and passed.entries:
            watcher.passed(base, out, self.x, first, passed.entries)
        elif watcher and bounds:
            watcher.block(base, out, self.x, first, self.dense, bounds)
        steps = Counter({"dense": base.size - len(undecided), **self.x.steps})
        self.x.steps.clear()
        return _statistics(sums, self._matrices, steps)

    def _tiles(
        self, base: Numbers, first: int, out: Numbers, bounds: Bounds, work: Workspace, watcher: Watcher | None
    ) -> tuple[Positions, list[Sums]]:
        """Fill `out` tile by tile, and return the flat positions that are undecided, and each tile's sums."""
        sums, undecided_parts = [], []
        height = self.dense.height(base)
        for row in range(0, len(base), height):
            part = slice(row, row + height)
            undecided, change = self._tile(base[part], out[part], first + row, row, bounds, work, watcher)
            undecided_parts.append(undecided + row * base.shape[1])
            sums.append(change)
        return np.concatenate(undecided_parts) if undecided_parts else np.zeros(0, np.intp), sums

    @np.errstate(all="ignore")
    def _tile(
        self,
        base: Numbers,
        out: Numbers,
        first: int,
        row: int,
        bounds: Bounds,
        work: Workspace,
        watcher: Watcher | None,
    ) -> tuple[Positions, Sums]:
        """Fill `out` where the GEMM decides, and return the flat positions where it does not, and the sums.

        Args:
            first: the tile's first row, counted in the rows of `x`.
            row: the same, counted in the block.
        """
        dense = self.dense
        upper, change, squared = dense.fill(base, first, bounds.shift, work)
        ties = None
        if bounds.apart:
            narrow(upper, out)
            hit = mask_apart(base, row, bounds.apart, work)
            ties = midpoints(upper, work) if watcher else None
        else:
            hit = dense.settle(upper, bounds, out, work)
        if self._to.precision == 53:
            hit[...] = True
        self._hold(base, out, positions(hit))
        kept, change_squared = self._sums(base, out, upper, change, first, bounds, work)
        changed = count_different(out, base, work, dense.matrices)
        sums: Sums = {"base_squared": squared, "change_squared": change_squared, "kept": kept, "changed": changed}
        not_finite = ~np.isfinite(squared + kept)
        if not_finite.any():
            recounted = self._not_finite(base, out, change, first, bounds.shift, hit, work)
            sums = {name: np.where(not_finite, value, sums.get(name, 0)) for name, value in recounted.items()}
        undecided = positions(hit)
        if watcher:
            watcher.tile(Tile(base, out, change, bounds.shift, hit, undecided, ties, row * base.shape[1]), dense)
        return undecided, sums

    def _sums(
        self, base: Numbers, out: Numbers, upper: Array, change: Array, first: int, bounds: Bounds, work: Workspace
    ) -> tuple[Wide, Wide]:
        """Return about <W' - W, D> and <D, D>: X - W' and the shift are small beside D, unless D is slight."""
        squares, matrices = self.dense.delta.squares, self.dense.matrices
        if squares is not None and not self.x.factor:
            change_squared: Wide = squares[first : first + len(base)].reshape(matrices, -1).sum(1)
            if not bounds.slight:
                upper -= widen(out, work.take("end", self.dense.kind, *upper.shape))
                return change_squared - dot_by_matrix(upper, change, matrices), change_squared
        weight = widen(base, work.take("start", self.dense.kind, *upper.shape))
        moved = widen(out, work.take("end", self.dense.kind, *upper.shape))
        moved -= weight
        if squares is not None and not self.x.factor:
            more = fetched(moved.reshape(matrices, -1).sum(1)).astype(np.float64)
            shift = each_number(bounds.shift, matrices)
            kept = dot_by_matrix(moved, change, matrices) - shift * more
            vanishing = change_squared <= np.square(LOST * shift) * (base.size // matrices)
            return np.where(vanishing & np.isfinite(kept), 0.0, kept), change_squared
        if self.x.factor:
            upper -= weight
        else:
            upper[...] = change
            upper -= bounds.shift
        return dot_by_matrix(moved, upper, matrices), dot_by_matrix(upper, upper, matrices)

    def _not_finite(
        self, base: Numbers, out: Numbers, change: Array, first: int, shift: PerMatrix, hit: Array, work: Workspace
    ) -> Sums:
        """Copy W's inf and nan, except where a is 0; mark other non-finite results as undecided. Return the sums."""
        not_finite = ~base.is_finite()
        if self.x.factor:
            a = sent(self.x.factor.of_rows_in(slice(first, first + len(base)))[0], base.bits)
            not_finite &= a != 0
        if out.form == base.form:
            out.bits[...] = where(not_finite, base.bits, out.bits)
        else:
            infinity = self._to.inf | where(base.bits < 0, ~self._to.size, 0)
            out.bits[...] = where(not_finite, infinity, out.bits)
            set_quiet_nan(out, not_finite & ((base.bits & base.form.size) >= base.form.inf + base.form.has_inf))
        infinite = ~out.is_finite()
        hit |= infinite
        hit &= ~not_finite
        fine = base.is_finite() & ~infinite
        weight, result = (
            where(fine, widen(each, empty(np.float64, *each.shape, like=each.bits)), 0.0) for each in (base, out)
        )
        moved = where(fine, doubled(change) - shift, 0.0)
        if self.x.factor:
            moved += where(fine, (a - 1) * weight, 0.0)
        matrices = self.dense.matrices
        return {
            "base_squared": dot_by_matrix(weight, weight, matrices),
            "change_squared": dot_by_matrix(moved, moved, matrices),
            "kept": dot_by_matrix(result - weight, moved, matrices),
            "changed": count_different(out, base, work, matrices),
            "not_finite": fetched(not_finite.reshape(matrices, -1).sum(1)),
        }

    @np.errstate(all="ignore")
    def _decide(self, base: Numbers, first: int, out: Numbers, undecided: Positions) -> Sums:
        """Write W' at these flat positions, and return the differences of the statistics."""
        i = undecided // base.shape[1]
        j = undecided - i * base.shape[1]
        bits, former = take(base, undecided), take(out, undecided)
        decided = decide(self.x, bits, self._form, i + first, j, self._to)
        put(out, undecided, decided)
        matrices = self._matrices
        which = undecided // (base.size // matrices)
        kept = np.bincount(which, self._kept(decided, bits, i + first, j), matrices)
        changed = self._changed(decided, bits).astype(np.int8) - self._changed(former, bits)
        changed = np.bincount(which, changed, matrices).astype(np.intp)
        overflowed = np.flatnonzero((decided & self._to.size) == self._to.inf)
        if not len(overflowed):
            return {"changed": changed, "kept": kept}
        which, largest = which[overflowed], np.zeros(matrices)
        i, j, bits = i[overflowed] + first, j[overflowed], bits[overflowed]
        weight = np.where((bits & self._form.size) < self._form.inf, wide(bits, self._form), 0.0)
        a = self.x.factor.at(i, j)[0] if self.x.factor else 1.0
        np.maximum.at(largest, which, np.abs(a * weight + self.x.delta.near(i, j)[0]))
        return {
            "changed": changed,
            "kept": kept,
            "overflowed": np.bincount(which, minlength=matrices),
            "largest": largest,
        }

    def _hold(self, base: Numbers, out: Numbers, undecided: Positions) -> None:
        """Write W in place of each W' that is undecided and finite, so that it adds nothing to the sums yet."""
        undecided = undecided[(take(out, undecided) & self._to.size) < self._to.inf]
        held = Numbers(take(base, undecided), self._form)
        if self._to != self._form:
            cast = Numbers.empty(self._to, len(undecided))
            narrow(held.wide(), cast)
            held = cast
        put(out, undecided, held.bits)

    def _kept(self, decided: Bits, bits: Bits, i: Positions, j: Positions) -> Wide:
        """Return (W' - W) D of weights, 0 where W or W' is not finite."""
        kept = np.zeros(len(decided))
        finite = ((decided & self._to.size) < self._to.inf) & ((bits & self._form.size) < self._form.inf)
        some = np.flatnonzero(finite & self._changed(decided, bits))
        if len(some):
            weight = wide(bits[some], self._form)
            change = self.x.delta.near(i[some], j[some])[0]
            if self.x.factor:
                change = change + (self.x.factor.at(i[some], j[some])[0] - 1) * weight
            kept[some] = (wide(decided[some], self._to) - weight) * change
        return kept

    def _changed(self, result: Bits, bits: Bits) -> npt.NDArray[np.bool_]:
        differs: npt.NDArray[np.bool_] = (
            result != bits if self._to == self._form else wide(result, self._to) != wide(bits, self._form)
        )
        return differs


@np.errstate(all="ignore")
def _statistics(sums: Sequence[Sums], matrices: int, steps: Counter[str]) -> list[RoundingStats]:
    """Return the statistics of each matrix from the sums of its parts; the steps are in the first."""
    total: dict[str, Any] = {}
    for part in sums:
        for name, value in part.items():
            total[name] = np.maximum(total.get(name, 0.0), value) if name == "largest" else total.get(name, 0) + value
    if sums:  # before all is decided, W' - W has rounding errors, even where D changes nothing
        total["kept"] = np.where(total["changed"] == 0, 0.0, total["kept"])
    by_matrix = zip(*(value.tolist() for value in total.values()), strict=True) if sums else [()] * matrices
    stats = [RoundingStats(**dict(zip(total, values, strict=True))) for values in by_matrix]
    stats[0].steps.update(steps)
    return stats
