"""Find the codes that are nearest to exact reals: those of a merge, W' = RN(X) on a grid of codes, and on the way back.

A GEMM with a bound gives an interval for each real. Where both of its ends have one nearest code, so has the real, as
nearest is monotone; the few others are worked out as fractions. So no machine shows in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .decide import Reals
from .dense import DenseRows
from .forms import FORMS, Codes, Wide, codes, fraction, widen
from .rounding_stats import RoundingStats
from .workspace import Workspace

FACTOR_ERROR = 2.0**-40  # of a quotient: more than the error of a, which is float64
MARGIN = 2.0**-44  # of the largest number: more than scales, offsets and their roundings move a midpoint


class CodeGrid(Protocol):
    """The numbers that some rows can have: those of their codes. `row` counts from the first of these rows."""

    def nearest(self, row: int, numbers: Wide) -> Codes:
        """Return the codes nearest to numbers of rows from `row` on, (rows, n): monotone, the same on every machine."""

    def values(self, row: int, codes: Codes) -> Wide:
        """Return the numbers of codes of rows from `row` on, (rows, n)."""

    def ordinals(self, codes: Codes) -> Codes:
        """Return integers that order codes as their numbers."""

    def from_ordinals(self, ordinals: Codes) -> Codes:
        """Return the codes of integers that `ordinals` can have returned."""


@np.errstate(all="ignore")
def round_to_codes(
    x: Reals, base: Tensor, former: Codes, grid: CodeGrid, work: Workspace
) -> tuple[Codes, RoundingStats]:
    """Return the codes nearest to X, ties to even codes, (rows, n), and what they did to the weights.

    Where W is not finite, or X has W's own number as nearest, the former code stays: of -0, of equal entries, and one
    that no writer uses. Only such a weight can have such a code.

    Args:
        base: W of the rows of `x`, (rows, n), float64.
        former: its codes, (rows, n).
    """
    dense = DenseRows(x, base.dtype, torch.float64, base.device)
    bounds = dense.bounds(base, 0)
    weight = base.cpu().numpy()
    change = np.empty(base.shape)

    def parts() -> Iterator[tuple[slice, Wide, Wide]]:
        for here in _tiles(dense, base):
            total, delta, _ = dense.fill(base[here], here.start, bounds.shift, work)
            upper = total.cpu().numpy()
            change[here] = (upper - weight[here] if x.factor else delta.cpu().numpy()) - bounds.shift
            margin = MARGIN * float(np.abs(np.nan_to_num(upper, posinf=0.0, neginf=0.0)).max(initial=0.0))
            yield here, *_ends(upper - (bounds.span + margin), upper + margin)

    found, doubt = _decide(grid, base.shape, parts())
    places, used = grid.ordinals(former), _used_ordinals(grid, base.shape[1])
    doubt += [(i, j) for i, j in np.argwhere((places < used.start) | (places >= used.stop)).tolist()]
    for i, j in doubt:
        if math.isfinite(weight[i, j]):
            exact = x.exact(number := Fraction(float(weight[i, j])), i, j)
            found[i, j] = _nearest_to(grid, exact, i, j, former[i], used)
            change[i, j] = _as_float(exact - number)
    moved = np.where(np.isfinite(weight), grid.values(0, found) - weight, 0.0)
    stays = moved == 0
    found[stays] = former[stays]
    return found, _sums(weight, change, moved)


def _sums(weight: Wide, change: Wide, moved: Wide) -> RoundingStats:
    """Return what codes did to weights: W, D and W' - W, which is 0 where W is not finite."""
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
def guess_codes(merged: Tensor, x: Reals | None, first: int, grid: CodeGrid, work: Workspace) -> Codes:
    """Return the codes nearest to (W' - D) / a, which nearly always are W's own; of W' itself where `x` is None.

    Where a is 0 or W' not finite, nothing is known of W, and 0 is as good a guess as any.

    Args:
        merged: W', (rows, n).
        first: of its first row in `x`.
    """
    if x is None:
        return grid.nearest(0, np.nan_to_num(merged.double().cpu().numpy(), posinf=0.0, neginf=0.0))
    kind = merged.dtype if merged.itemsize <= 2 else torch.float64  # float32 has a way of its own, without a bound
    dense = DenseRows(x, merged.dtype, kind, merged.device)
    bounds = dense.bounds(merged, first, backward=True)
    both = bounds.shift + bounds.span
    size = merged.shape
    a = _factor(x, slice(first, first + len(merged)))

    def parts() -> Iterator[tuple[slice, Wide, Wide]]:
        for here in _tiles(dense, merged):
            total, change, _ = dense.fill(merged[here], first + here.start, bounds.shift, work)
            low = widen(merged[here], total).sub_(change).double().cpu().numpy()
            low += bounds.shift - 2 * both
            high = low + 4 * both
            if a is not None:
                by = a[here] if a.shape[0] > 1 else a
                one, two = low / by, high / by
                reach = np.maximum(np.abs(one), np.abs(two)) * FACTOR_ERROR
                low, high = np.minimum(one, two) - reach, np.maximum(one, two) + reach
            yield here, *_ends(low, high)

    form = FORMS[merged.dtype]
    stored = codes(merged.cpu())

    def exact(i: int, j: int) -> float:
        if (stored[i, j] & form.size) >= form.inf:
            return 0.0
        by = Fraction(1) if x.factor is None else x.factor.exact((first + i, j)[x.factor.axis])
        return _as_float((fraction(stored[i, j], form) - x.delta.exact(first + i, j)) / by) if by else 0.0

    found, doubt = _decide(grid, size, parts())
    for i, places in groupby(doubt, itemgetter(0)):
        numbers, at = np.zeros((1, size[1])), [j for _, j in places]
        numbers[0, at] = [exact(i, j) for j in at]
        found[i, at] = grid.nearest(i, numbers)[0, at]
    return found


def _factor(x: Reals, rows: slice) -> Wide | None:
    """Return a for some rows, (rows, 1) or (1, n); None if it is 1."""
    if x.factor is None:
        return None
    return x.factor.value[rows, None] if x.factor.axis == 0 else x.factor.value[None]


def _ends(low: Wide, high: Wide) -> tuple[Wide, Wide]:
    """Return the ends of intervals, of what is not known all numbers."""
    if not (math.isfinite(float(low.sum())) and math.isfinite(float(high.sum()))):
        odd = ~(np.isfinite(low) & np.isfinite(high))
        low[odd], high[odd] = -np.inf, np.inf
    return low, high


def _tiles(dense: DenseRows, rows: Tensor) -> Iterator[slice]:
    """Yield the rows that are worked out at a time, which bounds the memory."""
    height = dense.height(rows.shape[1], rows.device)
    yield from (slice(row, min(row + height, len(rows))) for row in range(0, len(rows), height))


def _decide(
    grid: CodeGrid, shape: torch.Size, parts: Iterator[tuple[slice, Wide, Wide]]
) -> tuple[Codes, list[tuple[int, int]]]:
    """Return the codes of both ends of intervals where they agree, and the places where they do not."""
    found: Codes | None = None
    doubt: list[tuple[int, int]] = []
    for here, low, high in parts:
        one, two = grid.nearest(here.start, low), grid.nearest(here.start, high)
        if found is None:
            found = np.empty(tuple(shape), one.dtype)
        found[here] = one
        at = np.argwhere(grid.ordinals(one) != grid.ordinals(two))
        doubt += [(here.start + int(i), int(j)) for i, j in at]
    return np.empty(tuple(shape), np.uint8) if found is None else found, doubt


def _used_ordinals(grid: CodeGrid, columns: int) -> range:
    """Return the ordinals of the codes that writers use: those between the codes nearest to -inf and to inf."""
    ends = [int(grid.ordinals(grid.nearest(0, np.full((1, columns), end)))[0, 0]) for end in (-np.inf, np.inf)]
    return range(min(ends), max(ends) + 1)


def _nearest_to(grid: CodeGrid, number: Fraction, i: int, j: int, former: Codes, used: range) -> Any:
    """Return the code nearest to a number at one place; of two, the even one, or else the lower.

    It is one of the `used` ordinals, the grid's own answer, of floats, or a neighbor; or else the former code.

    Args:
        former: the codes of the row, (n,).
    """
    row = np.zeros((1, len(former)))
    row[0, j] = _as_float(number)
    near = grid.nearest(i, row)
    about = grid.ordinals(near)[0, j]
    best: tuple[Fraction, bool, int] | None = None
    chosen = near[0, j]
    own = grid.ordinals(former[j : j + 1])[0]
    for ordinal in (about - 1, about, about + 1, own):
        candidate = _code(grid, ordinal)
        if candidate is None or (ordinal not in used and ordinal != own):
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
    """Return the code of an ordinal, None if there is none."""
    try:
        code = grid.from_ordinals(np.array([ordinal]))[0]
    except IndexError:
        return None
    return code if grid.ordinals(np.array([code]))[0] == ordinal else None


def _as_float(number: Fraction) -> float:
    """Return the nearest float64, inf for what is beyond."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
