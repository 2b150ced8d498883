"""Find the codes nearest to exact reals: for a merge, W' = RN(X) on a grid of codes, and for the way back.

A GEMM with a bound gives an interval for each real. If both ends have the same nearest code, so has the real, as
`nearest` is monotone. The few others are computed as fractions. So the result does not depend on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from .arrays import Numbers, fetched, widen
from .code_levels import Codes
from .decide import Reals
from .dense import DenseRows
from .forms import F64, IntArray, Wide, fraction
from .rounding_stats import RoundingStats
from .workspace import Workspace

FACTOR_ERROR = 2.0**-40  # of a quotient: exceeds the error of a, which is float64
MARGIN = 2.0**-44  # of the largest number: exceeds what scales, offsets and their rounding errors move a midpoint by


class CodeGrid(Protocol):
    """The numbers that codes stand for in some rows. `row` counts from the first of these rows."""

    def nearest(self, row: int, numbers: Wide) -> Codes:
        """Return the codes nearest to numbers (rows, n) of rows from `row` on. Monotone, the same on every machine."""

    def values(self, row: int, codes: Codes) -> Wide:
        """Return the numbers of codes (rows, n) of rows from `row` on."""

    def ordinals(self, codes: Codes) -> IntArray:
        """Return integers in the order of the codes' numbers."""

    def from_ordinals(self, ordinals: IntArray) -> Codes:
        """Return the codes of integers; the inverse of `ordinals`."""


@np.errstate(all="ignore")
def round_to_codes(
    x: Reals, base: Numbers, former: Codes, grid: CodeGrid, work: Workspace
) -> tuple[Codes, RoundingStats]:
    """Return the codes nearest to X (rows, n), ties to even codes, and the statistics of their rounding.

    Where W is not finite, or W's number is the nearest to X, the former code stays. So codes of -0, of equal entries,
    and codes that no writer uses survive, but only there.

    Args:
        base: W of the rows of `x`, (rows, n), float64.
        former: the codes of W, (rows, n).
    """
    dense = DenseRows(x, base.form, F64, base.bits)
    bounds = dense.bounds(base, 0)
    weight = base.wide()
    change = np.empty(base.shape)

    def parts() -> Iterator[tuple[slice, Wide, Wide]]:
        for here in _tiles(dense, base):
            total, delta, _ = dense.fill(base[here], here.start, bounds.shift, work)
            upper = fetched(total)
            change[here] = (upper - weight[here] if x.factor else fetched(delta)) - bounds.shift
            margin = MARGIN * float(np.abs(np.nan_to_num(upper, posinf=0.0, neginf=0.0)).max(initial=0.0))
            yield here, *_ends(upper - (bounds.span + margin), upper + margin)

    chosen, doubt = _decide(grid, base.shape, parts())
    places, used = grid.ordinals(former), _used_ordinals(grid, base.shape[1])
    doubt += [(i, j) for i, j in np.argwhere((places < used.start) | (places >= used.stop)).tolist()]
    for i, j in doubt:
        if math.isfinite(weight[i, j]):
            exact = x.exact(number := Fraction(float(weight[i, j])), i, j)
            chosen[i, j] = _nearest_to(grid, exact, i, j, former[i], used)
            change[i, j] = _as_float(exact - number)
    moved = np.where(np.isfinite(weight), grid.values(0, chosen) - weight, 0.0)
    stays = moved == 0
    chosen[stays] = former[stays]
    return chosen, _sums(weight, change, moved)


def _sums(weight: Wide, change: Wide, moved: Wide) -> RoundingStats:
    """Return the statistics of weights W with changes D. moved: W' - W, 0 where W is not finite."""
    fine = np.isfinite(weight)
    W, D = np.where(fine, weight, 0.0), np.where(fine, change, 0.0)
    return RoundingStats(
        base_squared=float(np.vdot(W, W)),
        change_squared=float(np.vdot(D, D)),
        kept=float(np.vdot(moved, D)),
        changed=int(np.count_nonzero(moved)),
        not_finite=int(np.count_nonzero(~fine)),
        moved_squared=float(np.vdot(moved, moved)),
    )


@np.errstate(all="ignore")
def guess_codes(merged: Numbers, x: Reals | None, first: int, grid: CodeGrid, work: Workspace) -> Codes:
    """Return the codes nearest to (W' - D) / a, which nearly always are W's own. If `x` is None, those nearest to W'.

    Where a is 0 or W' not finite, W is unknown, and the guess is 0.

    Args:
        merged: W', (rows, n).
        first: the row of `x` that is its first row.
    """
    if x is None:
        return grid.nearest(0, np.nan_to_num(merged.wide(), posinf=0.0, neginf=0.0))
    form = merged.form
    to = form if form.itemsize <= 2 else F64  # for float32, `bounds` may be exact sums
    dense = DenseRows(x, form, to, merged.bits)
    bounds = dense.bounds(merged, first, backward=True)
    both = bounds.shift + bounds.span
    size = merged.shape
    a = _factor(x, slice(first, first + len(merged)))

    def parts() -> Iterator[tuple[slice, Wide, Wide]]:
        for here in _tiles(dense, merged):
            total, change, _ = dense.fill(merged[here], first + here.start, bounds.shift, work)
            widen(merged[here], total)
            total -= change
            low = fetched(total).astype(np.float64)
            low += bounds.shift - 2 * both
            high = low + 4 * both
            if a is not None:
                by = a[here] if a.shape[0] > 1 else a
                from_low, from_high = low / by, high / by
                reach = np.maximum(np.abs(from_low), np.abs(from_high)) * FACTOR_ERROR
                low, high = np.minimum(from_low, from_high) - reach, np.maximum(from_low, from_high) + reach
            yield here, *_ends(low, high)

    stored = merged.host()

    def exact(i: int, j: int) -> float:
        if (stored[i, j] & form.size) >= form.inf:
            return 0.0
        by = Fraction(1) if x.factor is None else x.factor.exact_at(first + i, j)
        return _as_float((fraction(stored[i, j], form) - x.delta.exact(first + i, j)) / by) if by else 0.0

    guesses, doubt = _decide(grid, size, parts())
    for i, places in groupby(doubt, itemgetter(0)):
        numbers, columns = np.zeros((1, size[1])), [j for _, j in places]
        numbers[0, columns] = [exact(i, j) for j in columns]
        guesses[i, columns] = grid.nearest(i, numbers)[0, columns]
    return guesses


def _factor(x: Reals, rows: slice) -> Wide | None:
    """Return a for some rows, (rows, 1), (1, n) or (rows, n); None if it is 1."""
    if x.factor is None:
        return None
    return x.factor.of_rows_in(rows)[0]


def _ends(low: Wide, high: Wide) -> tuple[Wide, Wide]:
    """Return the ends of intervals, with -inf to inf where an end is not finite."""
    if not (math.isfinite(float(low.sum())) and math.isfinite(float(high.sum()))):
        not_finite = ~(np.isfinite(low) & np.isfinite(high))
        low[not_finite], high[not_finite] = -np.inf, np.inf
    return low, high


def _tiles(dense: DenseRows, rows: Numbers) -> Iterator[slice]:
    """Yield the rows to compute at a time, which bounds the memory."""
    height = dense.height(rows)
    yield from (slice(row, min(row + height, len(rows))) for row in range(0, len(rows), height))


def _decide(
    grid: CodeGrid, shape: tuple[int, ...], parts: Iterator[tuple[slice, Wide, Wide]]
) -> tuple[Codes, list[tuple[int, int]]]:
    """Return the codes of intervals whose ends have the same code, and the places of the others."""
    decided: Codes | None = None
    doubt: list[tuple[int, int]] = []
    for here, low, high in parts:
        of_low, of_high = grid.nearest(here.start, low), grid.nearest(here.start, high)
        if decided is None:
            decided = np.empty(tuple(shape), of_low.dtype)
        decided[here] = of_low
        differing = np.argwhere(grid.ordinals(of_low) != grid.ordinals(of_high))
        doubt += [(here.start + int(i), int(j)) for i, j in differing]
    return np.empty(tuple(shape), np.uint8) if decided is None else decided, doubt


def _used_ordinals(grid: CodeGrid, columns: int) -> range:
    """Return the ordinals of the codes that writers use, from the code nearest to -inf to that nearest to inf."""
    ends = [int(grid.ordinals(grid.nearest(0, np.full((1, columns), end)))[0, 0]) for end in (-np.inf, np.inf)]
    return range(min(ends), max(ends) + 1)


def _nearest_to(grid: CodeGrid, number: Fraction, i: int, j: int, former: Codes, used: range) -> Any:
    """Return the code nearest to a number at one place; of two, the even one, or else the lower.

    The candidates are the grid's float64 answer and its neighbors, if in `used`, and the former code.

    Args:
        former: the codes of the row, (n,).
    """
    row = np.zeros((1, len(former)))
    row[0, j] = _as_float(number)
    near = grid.nearest(i, row)
    about = grid.ordinals(near)[0, j]
    best: tuple[Fraction, bool, int] | None = None
    chosen = near[0, j]
    former_ordinal = grid.ordinals(former[j : j + 1])[0]
    for ordinal in (about - 1, about, about + 1, former_ordinal):
        candidate = _code(grid, ordinal)
        if candidate is None or (ordinal not in used and ordinal != former_ordinal):
            continue
        near[0, j] = candidate
        value = float(grid.values(i, near)[0, j])
        if not math.isfinite(value):
            continue
        key = abs(number - Fraction(value)), bool(int(candidate) & 1), int(ordinal)
        if best is None or key < best:
            best, chosen = key, candidate
    return chosen


def _code(grid: CodeGrid, ordinal: Any) -> Any:
    """Return the code of an ordinal; None if it has none."""
    try:
        code = grid.from_ordinals(np.array([ordinal]))[0]
    except IndexError:
        return None
    return code if grid.ordinals(np.array([code]))[0] == ordinal else None


def _as_float(number: Fraction) -> float:
    """Return the nearest float64; inf if the number is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
