"""Add and multiply float64 arrays without error, each result a pair high + low (Dekker, Numerische Mathematik 18)."""

from __future__ import annotations

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
