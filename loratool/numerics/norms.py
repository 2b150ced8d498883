"""Compute DoRA's norms ||W + D|| of rows or columns, each the exact square root rounded to 36 significant bits.

The norm of a float64 sum has an error bound. If both ends of its interval round to the same number of 36 bits, that is
the norm. If not (one in a thousand), the squares are summed from pairs of numbers with a bound, and if that does not
decide, as exact numbers. So the norms are the same numbers on every machine, and inputs of X like any other.

36 bits are off by 2**-37 at most; compared with an unrounded root, this moves one bfloat16 in 10**9 by a step. A norm
too small for 36 bits in float64 is negative here, 2**TINY_BY times as large. The caller refuses a norm that is not
finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from math import isqrt

import numpy as np

from .arrays import Array, Numbers, fetched, matmul, sent, widen
from .decide import LEAST, SLACK, Delta, Factor, U
from .dense import TILE
from .error_free import two_product, two_sum
from .forms import Wide, exponent, fraction, integers, power, wide
from .products import ProductRows, norms
from .tensors import AnyNumbers, numbers_of
from .workspace import Workspace

NORM_BITS = 36
TINY_BY = 1000  # a norm below 2**-1039, whose 36 bits float64 does not hold, is stored as -2**1000 times it
FLUSHED = 2.0**-110  # upper bound of the norm of a row's subnormal weights, which may be flushed
LARGEST_SQUARE = 2.0**1000  # larger squares are left to the exact numbers, as their sum may overflow float64

# Each call yields (first row, rows of W) of blocks that cover a weight
Blocks = Callable[[], Iterable[tuple[int, Numbers]]]
# Each call yields (delta, W) of the same rows
Parts = Callable[[], Iterable[tuple[Delta, Numbers]]]
Line = tuple[slice, slice]  # the rows and columns that have one norm


@np.errstate(all="ignore")
def row_norms(delta: Delta, base: Numbers, work: Workspace) -> Wide:
    """Return the norm of each row of W + D. base: W, (rows, n), finite; its first row is the first of `delta`."""
    columns, about, sums = base.shape[1], np.empty(len(base)), _Sums(delta, base.bits)
    for start in range(0, len(base), height := max(1, TILE[np.float64] // max(1, columns))):
        here = slice(start, start + height)
        about[here] = np.sqrt(fetched(_folded(_squared(sums.take(start, base[here], work)), 1)))
    sizes, errors = (x[: len(base)] for x in sums.of_rows())
    low, high = _ends(about, sizes, errors, columns.bit_length() + 1 + sums.roundings)
    doubt = np.flatnonzero(low != high)
    low[doubt] = _settled(lambda: [(delta, base)], [(slice(i, i + 1), slice(None)) for i in doubt])
    return low


@np.errstate(all="ignore")
def column_norms(rows: Callable[[int, int], Delta], blocks: Blocks, work: Workspace, together: int = 1) -> Wide:
    """Return the norm of each column of a weight that is read by blocks of rows.

    Args:
        rows: (start, stop) -> the delta of these rows.
        together: the number of adjacent columns with one norm, as for an input channel of a flattened kernel.
    """
    total, rest, sizes, errors = np.zeros((4, 1))
    folds = roundings = 0
    for first, base in blocks():
        height = max(1, TILE[np.float64] // max(1, base.shape[1]))
        sums = _Sums(rows(first, first + len(base)), base.bits)
        for start in range(0, len(base), height):
            squares = _folded(_squared(sums.take(start, base[start : start + height], work)), 0)
            total, e = two_sum(total, fetched(_folded(squares.reshape(-1, together), 1)))
            rest = rest + e
        size, error = (np.square(x).reshape(-1, together).sum(1) for x in sums.of_columns())
        sizes, errors = sizes + size, errors + error
        folds, roundings = height.bit_length() + together.bit_length() + 3, max(roundings, sums.roundings)
    low, high = _ends(np.sqrt(total + rest), np.sqrt(sizes) * SLACK, np.sqrt(errors) * SLACK, folds + roundings)
    doubt = np.flatnonzero(low != high)
    lines = [(slice(None), slice(j * together, (j + 1) * together)) for j in doubt]
    low[doubt] = _settled(lambda: ((rows(first, first + len(base)), base) for first, base in blocks()), lines)
    return low


def _squared(x: Array) -> Array:
    x *= x
    return x


def _folded(x: Array, axis: int) -> Array:
    """Return the sums along an axis of a matrix, by halves: 2 log2(numbers) roundings."""
    if axis:
        while x.shape[1] > 1:
            half = x.shape[1] // 2
            sums = x[:, :half] + x[:, half : 2 * half]
            if x.shape[1] % 2:
                sums[:, :1] += x[:, 2 * half :]
            x = sums
        return x.sum(1)
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        sums = x[:half] + x[half : 2 * half]
        if x.shape[0] % 2:
            sums[:1] += x[2 * half :]
        x = sums
    return x.sum(0)


class _Sums:
    """W + D of some rows in float64, summed in any order.

    Attributes:
        roundings: of each sum.
    """

    def __init__(self, delta: Delta, like: Array) -> None:
        self._products = delta if isinstance(delta, ProductRows) else None
        self._dense = None if isinstance(delta, ProductRows) else delta.dense(np.float64, like)
        self._columns = delta.shape[1]
        self.roundings = self._products.products.rank + 2 if self._products else 2

    def take(self, row: int, base: Numbers, work: Workspace) -> Array:
        """Return the sums of some rows, from row `row` of the delta on, in a buffer."""
        sums, rows = widen(base, work.take("sums", np.float64, *base.shape)), slice(row, row + len(base))
        change = work.take("change", np.float64, *base.shape)
        if self._dense:
            self._dense.fill(rows, 0.0, change)
        else:
            assert self._products
            matmul(sent(self._products.left[rows], sums), sent(self._products.products.right, sums).T, change)
        sums += change
        return sums

    def of_rows(self) -> tuple[Wide, Wide]:
        """Return upper bounds of the norm of D in each row, and of the norm of its error."""
        if self._dense:
            width = math.sqrt(self._columns)
            return self._dense.sizes * width, self._dense.errors * width
        assert self._products
        sizes = self._products.row_norms * float(norms(self._products.products.column_norms[None])[0])
        return sizes, self._products.bound(sizes)

    def of_columns(self) -> tuple[Wide, Wide]:
        """Return the same bounds for each column."""
        if self._dense:
            size, error = (float(norms(x[None])[0]) for x in (self._dense.sizes, self._dense.errors))
            return np.full(self._columns, size), np.full(self._columns, error)
        assert self._products
        sizes = float(norms(self._products.row_norms[None])[0]) * self._products.products.column_norms
        return sizes, self._products.bound(sizes)


def _ends(about: Wide, sizes: Wide, errors: Wide, roundings: int) -> tuple[Wide, Wide]:
    """Round the norms at both ends of their intervals to NORM_BITS bits, by integers.

    Args:
        sizes: upper bounds of ||D||.
        errors: upper bounds of the norm of D's error.
        roundings: the number of rounding errors in the sum of squares and in W + D.
    """
    error = (errors + (roundings + 5) * U * (about + 2 * sizes) + FLUSHED) * SLACK
    drop = 53 - NORM_BITS
    low, high = (
        ((np.maximum(x, 0.0).view(np.int64) + (1 << (drop - 1))) >> drop << drop).view(np.float64)
        for x in (about - error, about + error)
    )
    return np.where(np.isfinite(about), low, np.nan), high  # nan, so that an overflow counts as undecided


def _settled(parts: Parts, lines: Sequence[Line]) -> list[float]:
    """Return the norms of some lines from pairs of numbers, or, if these do not decide, from exact numbers."""
    low, high = ([Fraction(0)] * len(lines) for _ in range(2))
    unknown = set()
    for delta, base in parts() if lines else ():
        for k, line in enumerate(lines):
            ends = _pair_squares(delta, base, line)
            if ends is None:
                unknown.add(k)
            else:
                low[k], high[k] = low[k] + ends[0], high[k] + ends[1]
    doubt = [k for k in range(len(lines)) if k in unknown or _root(low[k]) != _root(high[k])]
    for k in doubt:
        low[k] = Fraction(0)
    for delta, base in parts() if doubt else ():
        for k in doubt:
            low[k] += _exact_squares(delta, base, *lines[k])
    return [_root(x) for x in low]


def _pair_squares(delta: Delta, base: Numbers, line: Line) -> tuple[Fraction, Fraction] | None:
    """Return the ends of an interval around the sum of the squares of W + D in a line; None if it is unbounded."""
    rows, columns = (np.arange(*part.indices(length)) for part, length in zip(line, base.shape, strict=True))
    i, j = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
    bits, form = base[line].host().reshape(-1), base.form
    high, low, bound = delta.nearer(i, j)
    sums, rest = two_sum(wide(bits, form), high)
    rest, rounding = two_sum(rest, low)
    sums, rest = two_sum(sums, rest)
    bound = bound + np.abs(rounding)
    square, e = two_product(sums, sums)
    zero = ((bits & form.size) == 0) & (high == 0) & (low == 0) & (bound == 0)
    # (sums + rest)**2 is taken without the square of the rest, and the double product is rounded
    error = (2 * (np.abs(sums) + np.abs(rest)) + bound) * bound + square * (4 * U * U)
    if not (square < LARGEST_SQUARE).all() or not np.isfinite(error).all():
        return None
    total = math.fsum(np.concatenate([square, e, 2 * sums * rest]))
    off = (math.fsum(error) + int((~zero).sum()) * LEAST + U * abs(total)) * SLACK
    return Fraction(total) - Fraction(off), Fraction(total) + Fraction(off)


def short_root(x: Fraction) -> Fraction:
    """Return the square root rounded to NORM_BITS bits, half up."""
    if x <= 0:
        return Fraction(0)
    e = exponent(x) // 2 - NORM_BITS - 2
    root = isqrt((x / power(2 * e)).__floor__())  # with two or three bits more than NORM_BITS
    drop = root.bit_length() - NORM_BITS
    return ((root + (1 << (drop - 1))) >> drop) * power(e + drop)


def _exact_squares(delta: Delta, base: Numbers, i: slice, j: slice) -> Fraction:
    """Return the sum of the squares of W + D in some rows and columns."""
    bits, form = base[i, j].host(), base.form
    if not isinstance(delta, ProductRows):
        rows, columns = (range(*part.indices(length)) for part, length in zip((i, j), base.shape, strict=True))
        places = zip(bits.reshape(-1), ((a, b) for a in rows for b in columns), strict=True)
        return sum(((fraction(w, form) + delta.exact(*place)) ** 2 for w, place in places), Fraction(0))
    if len(bits) > 1 and bits.shape[1] > 1:  # integers take one line at a time
        columns = range(*j.indices(base.shape[1]))
        return sum((_exact_squares(delta, base, i, slice(b, b + 1)) for b in columns), Fraction(0))
    if not (bits & form.size).any() and not (delta.live[i].any() and delta.products.live[j].any()):
        return Fraction(0)
    change, least = delta.exact_line(i, j)
    m, e = integers(bits.reshape(-1), form)
    low = min(least, int(e.min(initial=0)))
    total = (change << (least - low)) + (m.astype(object) << (e - low).astype(object))
    return int((total * total).sum()) * power(2 * low)


def _root(x: Fraction) -> float:
    """Return `short_root` in float64, negative and scaled if it is tiny; inf or nan if float64 cannot hold it."""
    root = short_root(x)
    try:
        nearest = float(root)
    except OverflowError:
        return math.inf
    if nearest == root:
        return nearest
    tiny = float(root * power(TINY_BY))
    return -tiny if norm_of(-tiny) == root else math.nan


def norm_of(n: float) -> Fraction:
    """Return the norm that a number of `row_norms` or `column_norms` stands for."""
    return Fraction(n) if n >= 0 else -Fraction(n) / power(TINY_BY)


@np.errstate(all="ignore")
def magnitude_ratio(magnitude: AnyNumbers, norm: Wide, weight: float, axis: int) -> tuple[Factor, Factor]:
    """Return w m / n and a = (1 - w) + w m / n of each row (axis 0) or column of DoRA; m / n counts as 0 where n is 0.

    Args:
        magnitude: m, (k,), in any of FORMS, finite.
        norm: n, (k,), as `row_norms` returns it.
        weight: w.
    """
    bits, form = (stored := numbers_of(magnitude)).host(), stored.form
    m, size, up = wide(bits, form), np.abs(norm), np.where(norm < 0, TINY_BY, 0).astype(np.intc)
    quotient = np.where(norm == 0, 0.0, m / size)
    back, e = two_product(quotient, size)
    value, low = two_product(quotient, np.full_like(quotient, weight))
    tail = np.ldexp(low + np.where(norm == 0, 0.0, ((m - back) - e) / size) * weight, up)
    is_whole = (np.abs(back) > 2.0**-700) & (np.abs(value) > 2.0**-700)  # else the tail may have been flushed
    known = (norm == 0) | ((bits & form.size) == 0)
    value = np.where((norm < 0) & ~(is_whole | known), np.inf, np.ldexp(value, up))

    def exact(k: int) -> Fraction:
        n = norm_of(float(norm[k]))
        return Fraction(weight) * fraction(bits[k], form) / n if n else Fraction(0)

    def exact_total(k: int) -> Fraction:
        return 1 - Fraction(weight) + exact(k)

    error = np.where(known, 0.0, np.abs(value) * (4 * U) + LEAST)
    size = np.where(known, 0.0, np.where(is_whole, np.abs(value), np.inf))
    ratio = Factor(axis, value, error, np.where(known, 0.0, tail), size, exact)
    if weight == 1:
        return ratio, ratio
    left, rest = two_sum(np.ones_like(value), np.full_like(value, -weight))
    total, e = two_sum(left, value)
    error = error + (np.abs(left) + np.abs(value)) * (2 * U)
    return ratio, Factor(axis, total, error, e + (rest + ratio.tail), size + np.abs(left), exact_total)
