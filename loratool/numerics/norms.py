"""Compute DoRA's norms ||W + D|| of rows or columns, each the exact square root rounded to 36 significant bits.

The norm of a float64 sum has a bound on its error; where both ends round to one number of 36 bits, that is it. Where
not (one in a thousand), the squares are summed as integers. So the norms are the same numbers everywhere, and an input
of X like any other.

36 bits are off by 2**-37 at most, which moves one bfloat16 in 10**9 by a step against a root without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from .decide import LEAST, SLACK, Factor, U
from .dense import TILE
from .error_free import two_product, two_sum
from .forms import FORMS, Wide, codes, exponent, fraction, integers, power, wide
from .products import ProductRows, Products, norms
from .workspace import Workspace

NORM_BITS = 36
FLUSHED = 2.0**-110  # no less than the norm of the subnormal weights of a row, which may be flushed

# (first row, rows of W) of blocks that cover a weight, as often as it is called
Blocks = Callable[[], Iterable[tuple[int, Tensor]]]


def row_norms(delta: ProductRows, base: Tensor, work: Workspace) -> Wide:
    """Return the norm of each row of `base`, (rows, n), finite, the rows of `delta` from its first on."""
    columns, about = base.shape[1], np.empty(len(base))
    for start in range(0, len(base), height := max(1, TILE[torch.float64] // max(1, columns))):
        here = slice(start, start + height)
        about[here] = np.sqrt(_folded(_sums(delta, start, base[here], work).square_(), 1).cpu().numpy())
    # of D's row; and by `bound` of its error
    sizes = delta.row_norms[: len(base)] * float(norms(delta.products.column_norms[None])[0])
    low, high = _ends(about, sizes, delta, columns.bit_length() + 1)
    for i in np.flatnonzero(low != high):
        low[i] = _root(_exact_squares(delta, base, slice(i, i + 1), slice(None)))
    return low


def column_norms(products: Products, blocks: Blocks, work: Workspace) -> Wide:
    """Return the norm of each column of a weight that is read by blocks of rows."""
    columns = products.shape[1]
    total, rest, sizes = np.zeros((3, columns))
    height = max(1, TILE[torch.float64] // max(1, columns))
    for first, base in blocks():
        delta = products.rows(first, first + len(base))
        sizes += np.square(delta.row_norms).sum()
        for start in range(0, len(base), height):
            sums = _sums(delta, start, base[start : start + height], work)
            total, e = two_sum(total, _folded(sums.square_(), 0).cpu().numpy())
            rest += e
    sizes = np.sqrt(sizes) * products.column_norms * SLACK
    low, high = _ends(np.sqrt(total + rest), sizes, products.rows(0, 0), height.bit_length() + 3)
    doubt, squares = np.flatnonzero(low != high), np.zeros(columns, object)
    for first, base in blocks() if len(doubt) else ():
        delta = products.rows(first, first + len(base))
        for j in doubt:
            squares[j] += _exact_squares(delta, base, slice(None), slice(j, j + 1))
    low[doubt] = [_root(squares[j]) for j in doubt]
    return low


def _folded(x: Tensor, dim: int) -> Tensor:
    """Return the sums along a dimension, by halves: 2 log2(numbers) roundings."""
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        sums = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        if x.shape[dim] % 2:
            sums.narrow(dim, 0, 1).add_(x.narrow(dim, 2 * half, 1))
        x = sums
    return x.sum(dim)


def _sums(delta: ProductRows, row: int, base: Tensor, work: Workspace) -> Tensor:
    """Return W + D of some rows in float64, in a buffer, from row `row` of the delta on."""
    sums = work.take("sums", torch.float64, *base.shape).copy_(base)
    left, right = torch.from_numpy(delta.left[row : row + len(base)]), torch.from_numpy(delta.products.right)
    return sums.addmm_(left.to(sums.device), right.T.to(sums.device))


def _ends(about: Wide, sizes: Wide, delta: ProductRows, folds: int) -> tuple[Wide, Wide]:
    """Round the norms at both ends of their bounds, by integers. sizes: no ||D|| is larger."""
    roundings = folds + 5 + delta.products.rank + 2  # of the sum of squares and the root; of W + D, in any order
    error = (delta.bound(sizes) + roundings * U * (about + 2 * sizes) + FLUSHED) * SLACK
    drop = 53 - NORM_BITS
    low, high = (
        ((np.maximum(x, 0.0).view(np.int64) + (1 << (drop - 1))) >> drop << drop).view(np.float64)
        for x in (about - error, about + error)
    )
    return np.where(np.isfinite(about), low, np.nan), high  # what overflowed is in doubt


def short_root(x: Fraction) -> Fraction:
    """Return the square root rounded to NORM_BITS bits, half up."""
    if x <= 0:
        return Fraction(0)
    e = exponent(x) // 2 - NORM_BITS - 2
    root = isqrt((x / power(2 * e)).__floor__())  # of two or three bits more than are asked for
    drop = root.bit_length() - NORM_BITS
    return ((root + (1 << (drop - 1))) >> drop) * power(e + drop)


def _exact_squares(delta: ProductRows, base: Tensor, i: slice, j: slice) -> Fraction | int:
    """Return the sum of the squares of W + D in one row or one column."""
    code, form = codes(base[i, j].cpu().contiguous()).reshape(-1), FORMS[base.dtype]
    if not (code & form.size).any() and not (delta.live[i].any() and delta.products.live[j].any()):
        return 0
    change, least = delta.exact_line(i, j)
    m, e = integers(code, form)
    low = min(least, int(e.min(initial=0)))
    total = (change << (least - low)) + (m.astype(object) << (e - low).astype(object))
    return int((total * total).sum()) * power(2 * low)


def _root(x: Fraction | int) -> float:
    """Return `short_root` in float64; inf beyond its range."""
    try:
        return float(short_root(Fraction(x)))
    except OverflowError:
        return math.inf


def magnitude_ratio(magnitude: Tensor, norm: Wide, weight: float, axis: int) -> tuple[Factor, Factor]:
    """Return w m / n and a = (1 - w) + w m / n of each row (axis 0) or column of DoRA; m / n counts as 0 where n is 0.

    Args:
        magnitude: m, (k,), any type of FORMS, finite.
        norm: n, (k,).
        weight: w.
    """
    code, form = codes(magnitude.cpu().contiguous()), FORMS[magnitude.dtype]
    with np.errstate(all="ignore"):
        m = wide(code, form)
        quotient = np.where(norm == 0, 0.0, m / norm)
        back, e = two_product(quotient, norm)
        value, low = two_product(quotient, np.full_like(quotient, weight))
        tail = low + np.where(norm == 0, 0.0, ((m - back) - e) / norm) * weight

    def exact(k: int) -> Fraction:
        n = Fraction(float(norm[k]))
        return Fraction(weight) * fraction(code[k], form) / n if n else Fraction(0)

    def whole(k: int) -> Fraction:
        return 1 - Fraction(weight) + exact(k)

    known = (norm == 0) | ((code & form.size) == 0)
    error = np.where(known, 0.0, np.abs(value) * (4 * U) + LEAST)
    in_range = (np.abs(back) > 2.0**-700) & (np.abs(value) > 2.0**-700)  # else the tail may have been flushed
    size = np.where(known, 0.0, np.where(in_range, np.abs(value), np.inf))
    ratio = Factor(axis, value, error, np.where(known, 0.0, tail), size, exact)
    if weight == 1:
        return ratio, ratio
    left, rest = two_sum(np.ones_like(value), np.full_like(value, -weight))
    total, e = two_sum(left, value)
    error = error + (np.abs(left) + np.abs(value)) * (2 * U)
    return ratio, Factor(axis, total, error, e + (rest + ratio.tail), size + np.abs(left), whole)
