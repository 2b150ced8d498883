"""Multiply a weight by small matrices, each number of the product rounded to 36 bits (`norms.NORM_BITS`).

The numbers that an update depends on beside the weight, such as W U, are inputs of X like DoRA's norms. The product is
the exact one of the first bits and a small one of the rest, with its bound. Where both ends of the interval round to
one number of 36 bits, that is the number. The few others are summed again from exact products.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from .arrays import Numbers
from .decide import LEAST, SLACK, U
from .derived import power_above
from .error_free import two_product, two_sum
from .forms import Wide, exponent, power
from .norms import NORM_BITS, Blocks

TOGETHER = 1 << 20  # products of doubtful numbers at a time
Sums = tuple[Wide, Wide, Wide]  # high, low and a bound


def row_products(base: Numbers, right: Numbers) -> Wide:
    """Return W @ right, each number rounded, half away from 0; below LEAST they count as 0.

    Args:
        base: W, (rows, n), finite.
        right: (n, p).
    """
    W, R = Numbers(base.host(), base.form).wide(), right.wide()
    low, high = _short_ends(_products(W, R))
    i, j = np.nonzero(low != high)
    for part in _parts(len(i), W.shape[1]):
        a, b = i[part], j[part]
        first, last = _short_ends(_dots(W[a], R.T[b]))
        for k in np.flatnonzero(first != last):
            first[k] = _short(_exact(W[a[k]], R[:, b[k]]))
        low[a, b] = first
    low[np.abs(low) < LEAST] = 0.0
    return low


def column_products(left: Numbers, blocks: Blocks, columns: int) -> Wide:
    """Return L @ W, (p, n), rounded as by `row_products`, for a weight that is read by blocks of rows.

    Args:
        left: L, (p, rows), rows counted from the first of the weight.
    """
    L, sums = left.wide(), _zeros(len(left), columns)

    def parts() -> Iterator[tuple[Wide, Wide]]:
        for first, base in blocks():
            yield L[:, first : first + len(base)], Numbers(base.host(), base.form).wide()

    for x, W in parts():
        sums = _added(sums, _turned(_products(W.T, x.T)))
    low, high = _short_ends(sums)
    i, j = np.nonzero(low != high)
    if len(i):
        again, exact = _zeros(len(i)), [Fraction(0)] * len(i)
        for x, W in parts():
            for part in _parts(len(i), x.shape[1]):
                some: Sums = tuple(each[part] for each in again)  # type: ignore[assignment]
                for each, more in zip(again, _added(some, _dots(x[i[part]], W.T[j[part]])), strict=True):
                    each[part] = more
        first, last = _short_ends(again)
        low[i, j] = first
        doubt = np.flatnonzero(first != last)
        for x, W in parts() if len(doubt) else ():
            for k in doubt:
                exact[k] += _exact(x[i[k]], W[:, j[k]])
        low[i[doubt], j[doubt]] = [_short(exact[k]) for k in doubt]
    low[np.abs(low) < LEAST] = 0.0
    return low


def _zeros(*shape: int) -> Sums:
    return np.zeros(shape), np.zeros(shape), np.zeros(shape)


def _turned(x: Sums) -> Sums:
    return x[0].T, x[1].T, x[2].T


def _added(x: Sums, y: Sums) -> Sums:
    """Return the sum of sums."""
    high, e = two_sum(x[0], y[0])
    low, off = two_sum(x[1], y[1])
    low, more = two_sum(low, e)
    return high, low, (x[2] + y[2] + np.abs(off) + np.abs(more)) * SLACK


@np.errstate(all="ignore")
def _products(x: Wide, y: Wide) -> Sums:
    """Return x @ y. The products of the numbers' first bits add up to float64 numbers in any order.

    Args:
        x: (m, n). A few of its rows are cut at a time.
        y: (n, p), the smaller matrix.
    """
    bits = (52 - (x.shape[1] - 1).bit_length()) // 2  # n products of such numbers are below 2**52 units
    y1, y2, _ = (each.T for each in _cut(y.T, bits))
    sizes = np.sqrt(np.square(y2).sum(0)) + np.sqrt(np.square(y).sum(0)) * 2.0**-bits
    sums = np.zeros((3, len(x), y.shape[1]))
    for part in _parts(len(x), 8 * x.shape[1]):
        x1, x2, most = _cut(x[part], bits)
        sums[0, part], sums[1, part] = x1 @ y1, x1 @ y2 + x2 @ y
        sums[2, part] = (x.shape[1] + 4) * U * SLACK * x.shape[1] ** 0.5 * most * sizes + LEAST
    return sums[0], sums[1], sums[2]


def _cut(x: Wide, bits: int) -> tuple[Wide, Wide, Wide]:
    """Return the numbers of rows cut to as many bits as in the row's largest, the rest, and 2**k above it, (m, 1)."""
    most = power_above(np.maximum(x.max(1, initial=0.0), -x.min(1, initial=0.0)))[:, None]
    shift = most * (1.5 * 2.0 ** (52 - bits))
    first = x + shift
    first -= shift
    return first, x - first, most


@np.errstate(all="ignore")
def _dots(x: Wide, y: Wide) -> Sums:
    """Return the dot products of rows of x and y, (k, n), from exact products."""
    total, rest = two_product(x, y)
    is_small = ((np.abs(total) < LEAST) & (x != 0) & (y != 0)).any(1)
    low, size = rest.sum(1), np.abs(rest).sum(1)
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        sums, e = two_sum(total[:, :half], total[:, half : 2 * half])
        if total.shape[1] % 2:
            sums[:, 0], more = two_sum(sums[:, 0], total[:, -1])
            low, size = low + more, size + np.abs(more)
        low, size, total = low + e.sum(1), size + np.abs(e).sum(1), sums
    bound = np.where((size > 0) | is_small, (x.shape[1] + 64) * U * size * SLACK + LEAST, 0.0)  # else it is exact
    usual = np.isfinite(total[:, 0]) & (size < 2.0**500)
    return total[:, 0], low, np.where(usual, bound, np.inf)


def _parts(count: int, width: int) -> Iterator[slice]:
    step = max(1, TOGETHER // max(1, width))
    return (slice(k, k + step) for k in range(0, count, step))


def _short_ends(sums: Sums) -> tuple[Wide, Wide]:
    """Round both ends of intervals to NORM_BITS bits, by integers; nan where nothing is known."""
    total, low, bound = sums
    total, rest = two_sum(total, low)
    off, drop = (np.abs(rest) + bound) * SLACK, 53 - NORM_BITS
    off += np.where(off > 0, np.abs(total) * U, 0.0)  # without any, ties are decided
    first, last = (
        ((np.ascontiguousarray(end).view(np.int64) + (1 << (drop - 1))) >> drop << drop).view(np.float64)
        for end in (total - off, total + off)
    )
    return np.where(np.isfinite(total) & np.isfinite(off), first, np.nan), last


def _exact(x: Wide, y: Wide) -> Fraction:
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    return sum((Fraction(a) * Fraction(b) for a, b in pairs if a and b), Fraction(0))


def _short(x: Fraction) -> float:
    """Return a number rounded to NORM_BITS bits, half away from 0."""
    if not x:
        return 0.0
    unit = power(exponent(x) - NORM_BITS + 1)
    rounded = (abs(x) / unit + Fraction(1, 2)).__floor__() * unit
    return float(rounded if x > 0 else -rounded)
