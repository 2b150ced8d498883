"""Add and multiply float64 numbers without error. Of arrays each result is a pair, high + low.

Source: Dekker, Numerische Mathematik 18, 1971.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from .forms import Wide


def two_sum(a: Wide, b: Wide) -> tuple[Wide, Wide]:
    """Return (s, e): s is a + b rounded, and s + e is a + b."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def halves(x: Wide) -> tuple[Wide, Wide]:
    """Return two numbers of at most 26 bits each that sum to x; products of such numbers are exact."""
    high: Wide = ((x.view(np.int64) + (1 << 26)) & ~np.int64((1 << 27) - 1)).view(np.float64)
    return high, x - high


def two_product(a: Wide, b: Wide) -> tuple[Wide, Wide]:
    """Return (p, e): p is a * b rounded, and p + e is a * b, where nothing of it falls below float64's least number."""
    (a1, a2), (b1, b2) = halves(a), halves(b)
    p = a * b
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def sums_of_rows(x: Wide, less: Wide) -> tuple[Wide, Wide, Wide]:
    """Return the sum of each row of x and of `less` as high + low, and its error at most, which is 0 if none was made.

    Args:
        x: (rows, n).
        less: (rows, n), much smaller numbers.
    """
    rest, size, count = less.sum(1), np.abs(less).sum(1), 2 * x.shape[1]
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        total, error = two_sum(x[:, :half], x[:, half : 2 * half])
        rest, size = rest + error.sum(1), size + np.abs(error).sum(1)
        x = np.concatenate([total, x[:, 2 * half :]], axis=1)
    high, low = two_sum(x[:, 0], rest)
    return high, low, size * (count * 2.0**-52)


def exact_sum(values: list[float]) -> Fraction:
    """Return an exact sum; each round subtracts the rounded sum of what is left."""
    total, rest = Fraction(0), [*values]
    while part := math.fsum(rest):
        total += Fraction(part)
        rest.append(-part)
    return total
