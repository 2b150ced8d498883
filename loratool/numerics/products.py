"""Sum low-rank products: D = sum of scale * left @ right over the terms, as exact reals, with bounds.

`Products` holds what all rows share; `ProductRows` is the delta of some rows. Several small matrices of one shape, one
below the other, count as one sum, and cost the calls of one. In the following, b and a are the norms of a row of the
left side and of a column of the right side, R is the sum of the ranks, u the unit roundoff, t the least normal number
and M the largest number in either side, after each rank is balanced by a power of two.

A GEMM in any order, with or without FMA, is off by (R + 8) u b a + 4 R t max(1, M) at most: gamma_R times the sum of
|B A|, which is at most b a (Cauchy, Schwarz), the factors' rounding errors, and flushed numbers (Higham, Accuracy and
Stability of Numerical Algorithms, 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array, Kind, matmul, sent
from .decide import LEAST, PAIR, SLACK, DenseDelta, Factor, PerMatrix, U, anything
from .error_free import halves, two_product, two_sum
from .forms import Bits, Form, IntArray, Positions, Wide, exponent, integers, power, wide
from .tensors import AnyNumbers, numbers_of

GATHER = 1 << 15  # numbers of a factor read at a time, so that they stay in a core's cache
LEAST_OF: dict[Kind, float] = {np.float32: 2.0**-126, np.float64: 2.0**-1022}
UNIT_OF: dict[Kind, float] = {np.float32: 2.0**-24, np.float64: U}
EXPONENTS = 480  # lowest bits beyond 2**-480 and 2**480 do not count as known
BITS_OF_EXACT_SUMS = 24  # of both factors together: products of such numbers leave room to sum them in float64


@dataclass(frozen=True)
class Term:
    """`scale * left @ right`.

    Attributes:
        left: (m, r), in any of FORMS.
        right: (r, n), in any of FORMS.
        columns: a factor for each column of the product, (n,).
        by_rows: each row is also multiplied by its factor in `Products.rows`.
    """

    left: AnyNumbers
    right: AnyNumbers
    scale: Fraction
    columns: Factor | None = None
    by_rows: bool = False


@dataclass(frozen=True)
class _Side:
    """A term's factors as bit patterns, and its scale as significand * 2**exponent + tail."""

    left: Bits  # (m, r)
    right: Bits  # (n, r)
    forms: tuple[Form, Form]
    scale: Fraction
    columns: Factor | None
    by_rows: bool
    significand: float  # from 1/2 to 1 in size
    exponent: int
    tail: float  # about the rounding error of the significand

    @property
    def is_power(self) -> bool:
        """Return whether the scale is a power of two; the product of a scale and a weight may be next to one."""
        return abs(self.significand) == 0.5 and not self.tail


def split_scale(scale: Fraction) -> tuple[float, int, float]:
    """Return a significand from 1/2 to 1 in size, the exponent of its power of two, and about its rounding error."""
    e = exponent(scale) + 1
    significand = float(scale / power(e))
    return significand, e, float(scale / power(e) - Fraction(significand))


def _side(term: Term) -> _Side:
    significand, e, tail = split_scale(term.scale)
    left, right = numbers_of(term.left), numbers_of(term.right)
    return _Side(
        left=np.ascontiguousarray(left.bits),
        right=np.ascontiguousarray(right.bits.T),
        forms=(left.form, right.form),
        scale=term.scale,
        columns=term.columns,
        by_rows=term.by_rows,
        significand=significand,
        exponent=e,
        tail=tail,
    )


def _is_usual(side: _Side) -> bool:
    """Return whether all factors but 0 are 2**-300 or more; only float64 ones can be smaller."""
    factors = zip((side.left, side.right), side.forms, strict=True)
    sizes = [bits & form.size for bits, form in factors if form.precision == 53]
    return all(bool(((size == 0) | (size >= 723 << 52)).all()) for size in sizes)


def _is_known(ratio: Factor | None) -> bool:
    """Return whether all numbers of a ratio are known as pairs: no part of them was flushed."""
    return ratio is None or bool(np.isfinite(ratio.size).all())


class Products:
    """A sum of low-rank terms of one shape.

    Args:
        matrices: the number of matrices, one below the other in D. The terms have their left sides one below the other,
            their right sides side by side, and no factors of rows or columns.

    Raises:
        ValueError: a factor has inf or nan.
    """

    def __init__(self, terms: Sequence[Term], matrices: int = 1) -> None:
        self.matrices = matrices
        self.shape = len(terms[0].left), terms[0].right.shape[1] // matrices
        self.sides = [_side(term) for term in terms if term.scale]
        ranks = np.cumsum([0, *(side.left.shape[1] for side in self.sides)]).tolist()
        self.ranks = [slice(start, stop) for start, stop in pairwise(ranks)]  # of each side
        self.rank = ranks[-1]
        self.scaled = any(side.columns or side.by_rows for side in self.sides)
        # sums of such products may be exact in float64, and so is a power of two times them
        precisions = [left.precision + right.precision for left, right in self._forms]
        self.narrow = not self.scaled and all(count <= BITS_OF_EXACT_SUMS for count in precisions)
        self.binary = self.narrow and all(side.is_power for side in self.sides)
        self._halves = [self._balance(side) for side in self.sides]  # (matrices, r) exponents for each right side
        # else balancing can underflow a factor, and all is left to the integers
        self.in_range = all(
            max(np.abs(half).max(initial=0), np.abs(side.exponent - half).max(initial=0)) < 500
            and _is_usual(side)
            and _is_known(side.columns)
            for side, half in zip(self.sides, self._halves, strict=True)
        )
        self._made: dict[tuple[Kind, str], Array] = {}  # made here, as threads share it
        self.panels: dict[int, tuple[Wide, npt.NDArray[Any]]] = {}  # of the passes: right, and as packed for a type

    @cached_property
    def live(self) -> npt.NDArray[np.bool_]:
        """The columns that may be other than 0."""
        return self.may_be_live(self.column_norms)

    def may_be_live(self, norms: Wide) -> npt.NDArray[np.bool_]:
        """Return which rows or columns may be other than 0, by their norms and by whether a factor may be flushed."""
        return (norms > 0) | self.scaled | (not self.in_range)

    @property
    def _forms(self) -> list[tuple[Form, Form]]:
        return [side.forms for side in self.sides]

    def _balance(self, side: _Side) -> IntArray:
        """Return, for each matrix, the powers of two that balance the sizes of each rank's column and row."""
        exponents = []
        for bits, form in zip((side.left, side.right), side.forms, strict=True):
            most = _by_matrix(bits & form.size, self.matrices).max(1, initial=0)
            if most.max(initial=0) >= form.inf:
                raise ValueError("a factor has inf or nan")
            m, e = integers(most.astype(form.bits_type), form)
            exponents.append(np.where(m == 0, 0, e + np.frexp(m.astype(np.float64))[1]))
        half: IntArray = (exponents[0] + side.exponent - exponents[1]) // 2
        return half

    def rows(self, start: int, stop: int, ratio: Factor | None = None) -> ProductRows:
        """Return the delta of some rows.

        Args:
            ratio: a factor for each of the rows, if a term is `by_rows`.
        """
        return ProductRows(self, start, stop, ratio)

    @cached_property
    def plain_right(self) -> list[Wide]:
        """(n, r) of each side, balanced."""
        return [
            _scaled(wide(side.right, side.forms[1]), half) for side, half in zip(self.sides, self._halves, strict=True)
        ]

    @cached_property
    @np.errstate(all="ignore")
    def right(self) -> Wide:
        """(n, R), balanced, times the ratios of columns."""
        parts = [
            x * side.columns.value[:, None] if side.columns else x
            for side, x in zip(self.sides, self.plain_right, strict=True)
        ]
        nothing = np.empty((self.matrices * self.shape[1], 0))
        return parts[0] if len(parts) == 1 else np.concatenate([nothing, *parts], 1)

    @cached_property
    def column_norms(self) -> Wide:
        return norms(self.right)

    @cached_property
    def gram(self) -> Wide:
        """(matrices, R, R), right.T @ right of each."""
        right = _by_matrix(self.right, self.matrices)
        gram: Wide = _turned(right) @ right
        return gram

    @cached_property
    def lowest(self) -> IntArray:
        return lowest_bits(self.plain_right, self.matrices * self.shape[1])

    @cached_property
    def most(self) -> float:
        return largest(self.right)

    def right_of(self, kind: Kind, like: Array) -> Array:
        """Return the right sides (matrices, R + 1, n) in a type. The last row is ones: a GEMM adds the shift by it."""
        place = kind, "" if isinstance(like, np.ndarray) else str(like.device)
        if place not in self._made:
            right = np.ones((self.matrices, self.rank + 1, self.shape[1]), kind)
            right[:, :-1] = _turned(_by_matrix(self.right, self.matrices))
            self._made[place] = sent(right, like)
        return self._made[place]

    @np.errstate(all="ignore")
    def left(self, start: int, stop: int, ratio: Factor | None) -> tuple[list[Wide], Wide]:
        """Return rows of the left side, balanced: (rows, r) of each term, and (rows, R) times significands and ratios.

        Of several matrices, the rows must be all rows.
        """
        plain, scaled = [], np.empty((stop - start, self.rank))
        for side, ranks, half in zip(self.sides, self.ranks, self._halves, strict=True):
            x = _scaled(wide(side.left[start:stop], side.forms[0]), side.exponent - half)
            plain.append(x)
            np.multiply(x, side.significand, out=scaled[:, ranks])
            if side.by_rows and ratio:
                scaled[:, ranks] *= ratio.value[:, None]
        return plain, scaled

    def right_rows(self, i: Positions, j: Positions) -> Positions:
        """Return which rows of `right` belong to rows i and columns j of D."""
        return j if self.matrices == 1 else i // (self.shape[0] // self.matrices) * self.shape[1] + j


def _by_matrix(x: npt.NDArray[Any], matrices: int) -> npt.NDArray[Any]:
    """Return rows as (matrices, rows of each, r)."""
    return x.reshape(matrices, len(x) // matrices, x.shape[1])


def _turned(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return each matrix transposed."""
    return x.transpose(0, 2, 1)


@np.errstate(all="ignore")
def _scaled(x: Wide, e: IntArray) -> Wide:
    """Return rows times powers of two, e being (matrices, r)."""
    e = e.astype(np.intc)[:, None]  # the one type of exponents that ldexp takes everywhere
    parts = _by_matrix(x, len(e))
    scaled: Wide = parts * np.ldexp(1.0, e) if np.abs(e).max(initial=0) < 500 else np.ldexp(parts, e)
    return scaled.reshape(x.shape)


@np.errstate(all="ignore")
def norms(x: Wide) -> Wide:
    """Return an upper bound of each row's norm, nearly equal to it."""
    squares: Wide = np.einsum("ij,ij->i", x, x)
    out_of_range = np.flatnonzero(~((squares > 1e-200) & (squares < 1e200)))  # of float64
    most = np.abs(x[out_of_range]).max(1, initial=LEAST)
    roots: Wide = np.sqrt(squares)
    roots[out_of_range] = np.sqrt(np.square(x[out_of_range] / most[:, None]).sum(1)) * most
    roots *= SLACK + x.shape[1] * 1e-15
    return roots


def largest(x: Wide) -> float:
    """Return the largest |x|."""
    return max(float(x.max(initial=0.0)), -float(x.min(initial=0.0)))


def lowest_bits(parts: Sequence[Wide], rows: int) -> IntArray:
    """Return the exponent of the lowest bit in each row of all parts."""
    lowest: IntArray = np.full(rows, EXPONENTS)
    for part in parts:
        step = max(1, GATHER // max(1, part.shape[1]))
        for start in range(0, rows, step):  # in parts, as the intermediate results are several times as large
            x, least = part[start : start + step], lowest[start : start + step]
            bits = x.view(np.int64)
            m = (bits & ((1 << 52) - 1)) | (1 << 52)
            e = ((bits >> 52) & 2047) - 1076 + np.frexp((m & -m).astype(np.float64))[1]
            e[x == 0] = EXPONENTS
            np.minimum(least, e.min(1, initial=EXPONENTS), out=least)
    return np.maximum(lowest, -EXPONENTS)


def dots(left: Wide, right: Wide, i: Positions, j: Positions) -> Wide:
    """Return the dot products of rows i of one and j of the other."""
    sums, step = np.empty(len(i)), max(1, GATHER // max(1, left.shape[1]))
    for k in range(0, len(i), step):
        part = slice(k, k + step)
        np.einsum("ij,ij->i", left.take(i[part], 0), right.take(j[part], 0), out=sums[part])
    return sums


class ProductRows:
    """The delta of rows start:stop of a sum of products."""

    def __init__(self, products: Products, start: int, stop: int, ratio: Factor | None = None) -> None:
        self.products, self.start, self.shape = products, start, (stop - start, products.shape[1])
        self._ratio, self.in_range = ratio, products.in_range and _is_known(ratio)
        self._plain, self.left = products.left(start, stop, ratio)
        self.row_norms = norms(self.left)
        self.largest = max(largest(self.left), products.most)
        self.live = products.may_be_live(self.row_norms)

    @cached_property
    def lowest(self) -> IntArray:
        return lowest_bits(self._plain, self.shape[0])

    @np.errstate(all="ignore")
    def bound(self, size: Wide, kind: Kind = np.float64) -> Wide:
        """Return the error bound of a product summed in any order. size: b a."""
        rank = self.products.rank
        # a ratio is right to 4 u, and its product with a factor is rounded too
        roundings = rank + (16 if self.products.scaled else 8)
        bounds: Wide = roundings * UNIT_OF[kind] * size + 4 * rank * LEAST_OF[kind] * max(1.0, self.largest)
        return bounds if self.in_range else np.full_like(bounds, np.inf)

    @np.errstate(all="ignore")
    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        right, matrices = self.products.right_of(kind, like), self.products.matrices
        both = np.zeros((len(self.left), self.left.shape[1] + 1), kind)
        both[:, :-1] = self.left
        left, shifted = sent(both, like), None

        def fill(rows: slice, shift: PerMatrix, out: Array) -> None:
            nonlocal shifted
            if shift is not shifted:
                left[:, -1:] = shifted = shift  # the GEMM adds it as one more rank
            if matrices == 1:
                matmul(left[rows], right[0], out)
            else:  # all rows
                matmul(left.reshape(matrices, -1, left.shape[1]), right, out.reshape(matrices, -1, out.shape[1]))

        longest = self.products.column_norms.reshape(matrices, -1).max(1, initial=0.0)
        sizes = self.row_norms * np.repeat(longest, len(left) // matrices)
        return DenseDelta(sizes, self.bound(sizes, kind), fill, _squares(self))

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        products = self.products
        if not self.in_range:
            return anything(len(i))
        j = products.right_rows(i, j)
        size = self.row_norms.take(i) * products.column_norms.take(j)
        dead = ~(self.live.take(i) & products.live.take(j))
        if not products.narrow:  # of wider factors few sums are exact
            bound = np.where(dead, 0.0, self.bound(size))
            return dots(self.left, products.right, i, j), np.zeros(len(i)), bound
        high, low, error = np.zeros((3, len(i)))
        for side, left, right in zip(products.sides, self._plain, products.plain_right, strict=True):
            product = dots(left, right, i, j)
            if side.is_power:
                first, second = product * side.significand, np.zeros(len(i))
            else:
                first, second = two_product(product, np.full_like(product, side.significand))
                error += np.abs(product) * abs(side.tail)
            if len(products.sides) == 1:
                high, low = first, second
            else:
                high, e = two_sum(high, first)
                low, e1 = two_sum(low, second)
                low, e2 = two_sum(low, e)
                error += np.abs(e1) + np.abs(e2)
        # each product is a multiple of the lowest bits' product, and each partial sum below 2**53 of these
        least = self.lowest.take(i) + products.lowest.take(j)
        exact = dead | ((size * 2.0**-50 < np.ldexp(1.0, least.astype(np.intc))) & (least > -EXPONENTS))
        return high, low, np.where(exact, error * SLACK, self.bound(size))

    def nearer(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        if not self.in_range:
            return anything(len(i))
        of_right = self.products.right_rows(i, j)
        high, low, bound = np.zeros((3, len(i)))
        for side in self.products.sides:
            left = side.left[self.start : self.start + self.shape[0]]
            parts = [
                [x] if form.precision < 53 else list(halves(x))
                for x, form in (
                    (wide(np.ascontiguousarray(left.T.take(i, 1)), side.forms[0]), side.forms[0]),
                    (wide(np.ascontiguousarray(side.right.T.take(of_right, 1)), side.forms[1]), side.forms[1]),
                )
            ]
            s, rest, error = np.zeros((3, len(i)))
            for product in (p for x in parts[0] for y in parts[1] for p in x * y):  # exact: of 52 bits at most
                s, e = two_sum(s, product)
                rest, e = two_sum(rest, e)
                error += np.abs(e)
            scale, e0 = np.full_like(s, side.significand), side.exponent
            first, second = two_product(s, scale)
            third = rest * scale + s * side.tail
            if not side.is_power:
                error += np.abs(s) * 2.0**-100 + np.abs(rest) * 2.0**-50
            for ratio in filter(None, (side.columns, self._ratio if side.by_rows else None)):
                first, second, more = ratio.times(first, second + third, i, j)
                error = error * (np.abs(ratio.at(i, j)[0]) * SLACK) + more + np.abs(first) * PAIR
                third = np.zeros(len(i))
            for part in (first, second, third):
                high, e = two_sum(high, np.ldexp(part, np.intc(e0)))
                low, e = two_sum(low, e)
                bound += np.abs(e)
            in_range = abs(e0) < 500 and all(form.precision < 53 for form in side.forms)  # else it may flush
            bound += np.ldexp(error, np.intc(e0)) + (0.0 if in_range else np.ldexp(LEAST, np.intc(max(e0, 0))))
        return high, low, bound * SLACK

    def exact(self, i: int, j: int) -> Fraction:
        total = Fraction(0)
        of_right = int(self.products.right_rows(np.array(i), np.array(j)))
        for side, numbers, e in self._integer_products(slice(i, i + 1), slice(of_right, of_right + 1)):
            value = side.scale * int(numbers[0]) * power(e)
            if side.columns:
                value *= side.columns.exact(j)
            if side.by_rows and self._ratio:
                value *= self._ratio.exact(i)
            total += value
        return total

    def exact_line(self, i: slice, j: slice) -> tuple[IntArray, int]:
        """Return (m, e) with m * 2**e the numbers of D in one row or one column; m are Python's integers.

        There must be one matrix only.
        """
        parts = [
            (numbers * side.scale.numerator, e - side.scale.denominator.bit_length() + 1)
            for side, numbers, e in self._integer_products(i, j)
        ]
        least = min((e for _, e in parts), default=0)
        zero = np.zeros(max(len(range(*i.indices(self.shape[0]))), len(range(*j.indices(self.shape[1])))), object)
        return sum((numbers << (e - least) for numbers, e in parts), zero), least

    def _integer_products(self, i: slice, j: slice) -> Iterator[tuple[_Side, IntArray, int]]:
        """Yield (side, m, e) with m * 2**e the numbers of left @ right in one row or one column."""
        for side in self.products.sides:
            left = side.left[self.start : self.start + self.shape[0]][i]
            sides = [integers(bits, form) for bits, form in zip((left, side.right[j]), side.forms, strict=True)]
            least = [int(e.min(initial=0)) for _, e in sides]
            x, y = (m.astype(object) << (e - low).astype(object) for (m, e), low in zip(sides, least, strict=True))
            yield side, (x * y).sum(1), sum(least)


@np.errstate(all="ignore")
def _squares(rows: ProductRows) -> Wide:
    """Return ||D||^2 of each row; where terms cancel, a mere rounding error counts as 0."""
    products, matrices = rows.products, rows.products.matrices
    left, right = (_by_matrix(x, matrices) for x in (rows.left, products.right))
    squared: Wide = ((left @ products.gram) * left).sum(2)
    squares = np.square(products.column_norms).reshape(matrices, -1).sum(1, keepdims=True)
    size = np.square(rows.row_norms).reshape(matrices, -1) * squares
    doubtful = squared <= 4 * products.rank * U * size
    for k in np.flatnonzero(doubtful.any(1)):
        doubt = np.flatnonzero(doubtful[k])
        for start in range(0, len(doubt), step := max(1, GATHER // max(1, products.shape[1]))):
            some = doubt[start : start + step]
            squared[k, some] = np.square(left[k, some] @ right[k].T).sum(1)
            squared[k, some[squared[k, some] <= np.square((products.rank + 8) * U) * size[k, some]]] = 0.0
    return squared.reshape(-1)
