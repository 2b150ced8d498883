"""Multiply a weight by small matrices, each number of the product rounded to 36 bits (`norms.NORM_BITS`).

The numbers that an update depends on beside the weight, such as W U, are inputs of X like DoRA's norms. The product is
summed by chunks whose sums have a small bound, and these in pairs of numbers. Where both ends of the interval round to
one number of 36 bits, that is the number. The others, one in thirty, are summed again from exact products.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from .arrays import Numbers
from .decide import LEAST, SLACK, U
from .error_free import two_product, two_sum
from .forms import Wide, exponent, power
from .norms import NORM_BITS, Blocks

CHUNK = 32  # numbers summed by a GEMM
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
        sums = _added(sums, _products(x, W))
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


def _added(x: Sums, y: Sums) -> Sums:
    """Return the sum of sums."""
    high, e = two_sum(x[0], y[0])
    low, off = two_sum(x[1], y[1])
    low, more = two_sum(low, e)
    return high, low, (x[2] + y[2] + np.abs(off) + np.abs(more)) * SLACK


@np.errstate(all="ignore")
def _products(x: Wide, y: Wide) -> Sums:
    """Return x @ y by chunks."""
    count = -(-x.shape[1] // CHUNK)
    if pad := count * CHUNK - x.shape[1]:
        x, y = np.pad(x, ((0, 0), (0, pad))), np.pad(y, ((0, pad), (0, 0)))
    left, right = x.reshape(len(x), count, CHUNK).swapaxes(0, 1), y.reshape(count, CHUNK, y.shape[1])
    sizes = np.sqrt(np.einsum("cik,cik->ci", left, left)), np.sqrt(np.einsum("ckj,ckj->cj", right, right))
    high, low, error = np.zeros((3, len(x), y.shape[1]))
    for part in left @ right:
        high, e = two_sum(high, part)
        low += e
        error += np.abs(e)
    bound = ((CHUNK + 2) * U * (sizes[0].T @ sizes[1]) + count * U * error) * SLACK + LEAST
    return high, low, bound


@np.errstate(all="ignore")
def _dots(x: Wide, y: Wide) -> Sums:
    """Return the dot products of rows of x and y, (k, n), from exact products."""
    total, rest = two_product(x, y)
    low, size = rest.sum(1), np.abs(rest).sum(1)
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        sums, e = two_sum(total[:, :half], total[:, half : 2 * half])
        if total.shape[1] % 2:
            sums[:, 0], more = two_sum(sums[:, 0], total[:, -1])
            low, size = low + more, size + np.abs(more)
        low, size, total = low + e.sum(1), size + np.abs(e).sum(1), sums
    bound = (x.shape[1] + 64) * U * size * SLACK + LEAST
    usual = np.isfinite(total[:, 0]) & (size < 2.0**500)
    return total[:, 0], low, np.where(usual, bound, np.inf)


def _parts(count: int, width: int) -> Iterator[slice]:
    step = max(1, TOGETHER // max(1, width))
    return (slice(k, k + step) for k in range(0, count, step))


def _short_ends(sums: Sums) -> tuple[Wide, Wide]:
    """Round both ends of intervals to NORM_BITS bits, by integers; nan where nothing is known."""
    total, low, bound = sums
    total, rest = two_sum(total, low)
    off, drop = (np.abs(rest) + bound) * SLACK + np.abs(total) * U, 53 - NORM_BITS
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
