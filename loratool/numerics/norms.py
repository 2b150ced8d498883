"""Compute DoRA's norms ||W + D|| of rows or columns, each the exact square root rounded to 36 significant bits.

The norm of a float64 sum has a bound on its error; where both ends round to one number of 36 bits, that is it. Where
not (one in a thousand), the squares are summed as unevaluated pairs, and where that does not tell, as fractions. So the
norms are the same numbers everywhere, and an input of X like any other.

36 bits are off by 2**-37 at most, which moves one bfloat16 in 10**9 by a step against a root without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from .decide import LEAST, SLACK, Factor, U
from .dense import TILE
from .error_free import two_product, two_sum
from .forms import FORMS, Positions, Wide, codes, exponent, fraction, power, wide
from .products import ProductRows, Products, norms
from .workspace import Workspace

NORM_BITS = 36
FLUSHED = 2.0**-110  # no less than the norm of the subnormal weights of a row, which may be flushed

# (first row, rows of W) of blocks that cover a weight, as often as it is called
Blocks = Callable[[], Iterable[tuple[int, Tensor]]]


def row_norms(delta: ProductRows, base: Tensor, work: Workspace) -> Wide:
    """Return the norm of each row of `base`, (rows, n), finite, the rows of `delta` from its first on."""
    columns, found = base.shape[1], []
    for start in range(0, len(base), height := max(1, TILE[torch.float64] // columns)):
        sums = _sums(delta, start, base[start : start + height], work).square_()
        while sums.shape[1] > 1:  # by halves: 2 log2(columns) roundings
            half = sums.shape[1] // 2
            folded = sums[:, :half] + sums[:, half : 2 * half]
            if sums.shape[1] % 2:
                folded[:, :1] += sums[:, -1:]
            sums = folded
        found.append(np.sqrt(sums[:, 0].cpu().numpy()))
    about = np.concatenate(found) if found else np.zeros(0)
    # of D's row; and by `bound` of its error
    sizes = delta.row_norms[: len(base)] * float(norms(delta.products.column_norms[None])[0])
    low, high = _ends(about, sizes, delta, columns.bit_length() + 1)
    for i in np.flatnonzero(low != high):
        low[i] = _close(int(i), delta, base, np.arange(columns))
    return low


def column_norms(products: Products, blocks: Blocks, work: Workspace) -> Wide:
    """Return the norm of each column of a weight that is read by blocks of rows."""
    columns = products.shape[1]
    total = rest = np.zeros(columns)
    count, sizes = 0, np.zeros(columns)
    for first, base in blocks():
        delta = products.rows(first, first + len(base))
        sizes += np.square(delta.row_norms).sum()
        for start in range(0, len(base), height := max(1, TILE[torch.float64] // columns)):
            sums = _sums(delta, start, base[start : start + height], work).square_()
            while len(sums) > 1:
                half = len(sums) // 2
                folded = sums[:half] + sums[half : 2 * half]
                if len(sums) % 2:
                    folded[:1] += sums[-1:]
                sums = folded
            total, e = two_sum(total, sums[0].cpu().numpy())
            rest = rest + e
            count = max(count, height.bit_length() + 1)
    sizes = np.sqrt(sizes) * products.column_norms * SLACK
    low, high = _ends(np.sqrt(total + rest), sizes, products.rows(0, 0), count + 2)
    doubt = np.flatnonzero(low != high)
    if len(doubt):
        low[doubt] = _close_columns(doubt, products, blocks)
    return low


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


@dataclass
class _Squares:
    """A sum of squares as high + low, to a bound."""

    high: Wide
    low: Wide
    bound: Wide

    def root(self) -> float | None:
        """Return the rounded root of the one sum, if the bound tells it."""
        high, low, bound = (float(x) for x in (self.high, self.low, self.bound))
        if not (2.0**-400 < high < 2.0**900 and bound < high):
            return None
        one, two = (short_root(Fraction(high) + Fraction(low) + sign * Fraction(bound)) for sign in (-1, 1))
        return float(one) if one == two else None


@np.errstate(all="ignore")
def _squares(delta: ProductRows, base: Tensor, i: Positions, j: Positions) -> _Squares:
    """Sum the squares of W + D at rows i and columns j as unevaluated pairs."""
    high, low, lost = delta.nearer(i, j)
    v, e = two_sum(wide(codes(base)[i, j], FORMS[base.dtype]), high)
    v, e = two_sum(v, e + low)
    p, q = two_product(v, v)
    q += 2 * v * e
    bound = ((np.abs(v) * lost).sum() * 2 + np.square(lost).sum() + (v * v).sum() * 2.0**-96) * SLACK
    while len(p) > 1:
        half = len(p) // 2
        s, e = two_sum(p[:half], p[half : 2 * half])
        p, q = np.append(s, p[2 * half :]), np.append(q[:half] + q[half : 2 * half] + e, q[2 * half :])
    return _Squares(p[0], q[0], bound)


def _exact_squares(delta: ProductRows, base: Tensor, i: Positions, j: Positions) -> Fraction:
    form, code = FORMS[base.dtype], codes(base)
    places = zip(i.tolist(), j.tolist(), strict=True)
    return sum(((fraction(code[k, n], form) + delta.exact(k, n)) ** 2 for k, n in places), Fraction(0))


def _close(row: int, delta: ProductRows, base: Tensor, j: Positions) -> float:
    """Return the norm of one row that float64 did not tell."""
    i, base = np.full(len(j), row), base.cpu()
    found = _squares(delta, base, i, j).root()
    return float(short_root(_exact_squares(delta, base, i, j))) if found is None else found


def _close_columns(columns: Positions, products: Products, blocks: Blocks) -> list[float]:
    """Return the norms of those columns that float64 did not tell."""
    sums = [_Squares(np.zeros(()), np.zeros(()), np.zeros(())) for _ in columns]
    for first, base in blocks():
        delta, base = products.rows(first, first + len(base)), base.cpu()
        for column, total in zip(columns, sums, strict=True):
            i = np.arange(len(base))
            more = _squares(delta, base, i, np.full(len(i), column))
            total.high, e = two_sum(total.high, more.high)
            total.low, total.bound = total.low + more.low + e, total.bound + more.bound + abs(total.high) * 2.0**-96
    return [
        total.root() or _by_fractions(column, products, blocks) for column, total in zip(columns, sums, strict=True)
    ]


def _by_fractions(column: int, products: Products, blocks: Blocks) -> float:
    total = Fraction(0)
    for first, base in blocks():
        delta, i = products.rows(first, first + len(base)), np.arange(len(base))
        total += _exact_squares(delta, base.cpu(), i, np.full(len(i), column))
    return float(short_root(total))


def magnitude_ratio(magnitude: Tensor, norm: Wide, weight: float, axis: int) -> tuple[Factor, Factor]:
    """Return w m / n and a = (1 - w) + w m / n of each row (axis 0) or column of DoRA; m / n counts as 0 where n is 0.

    Args:
        magnitude: m, (k,), any type of FORMS, finite.
        norm: n, (k,).
        weight: w.
    """
    code, form = codes(magnitude.cpu().contiguous()), FORMS[magnitude.dtype]
    with np.errstate(all="ignore"):
        value = np.where(norm == 0, 0.0, wide(code, form) / norm) * weight

    def exact(k: int) -> Fraction:
        n = Fraction(float(norm[k]))
        return Fraction(weight) * fraction(code[k], form) / n if n else Fraction(0)

    def whole(k: int) -> Fraction:
        return 1 - Fraction(weight) + exact(k)

    known = (norm == 0) | ((code & form.size) == 0)
    error = np.where(known, 0.0, np.abs(value) * (4 * U) + LEAST)
    ratio = Factor(axis, value, error, exact)
    if weight == 1:
        return ratio, ratio
    return ratio, Factor(axis, value + (1 - weight), error + (abs(1 - weight) + np.abs(value)) * (2 * U), whole)
