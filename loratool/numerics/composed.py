"""Compose deltas of deltas: products element by element, Kronecker products, and multiples of rows or columns.

The bounds follow the product rule: if x is off by d and y by e, then x y is off by |x| e + |y| d + d e at most, plus
its rounding error. A base that stores (in, out) composes the parts' transposes: that gives the result's transpose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .arrays import ON_CPU, Array, Kind, Numbers, empty, sent
from .decide import LEAST, SLACK, Delta, DenseDelta, Factor, U, anything
from .error_free import two_product
from .forms import Positions, Wide
from .products import LEAST_OF, UNIT_OF, split_scale
from .stored import Stored

Mask = npt.NDArray[np.bool_]
Pair = tuple[Wide, Wide, Wide]  # high, low and a bound, as `Delta.near` has them
REACH = 400  # pairs with numbers beyond 2**-400 and 2**400 are left to the fractions, as their products may underflow
SCALES = 300  # all pairs are, if the scale is beyond 2**-300 and 2**300
ROUNDINGS = 5  # of a product of two numbers and a scale: three casts to the type and two products


class _Multiplied(ABC):
    """D = scale * D1 * D2, each weight the product of one of D1 and one of D2."""

    shape: tuple[int, int]

    def __init__(self, first: Delta, second: Delta, scale: Fraction) -> None:
        self._first, self._second, self._scale = first, second, scale
        significand, e, _ = self._split = split_scale(scale)
        self._in_range = abs(e) <= SCALES or not scale
        with np.errstate(all="ignore"):
            self._factor = float(np.ldexp(significand, e)) if scale else 0.0  # beyond float64 it is inf or 0

    @cached_property
    def largest(self) -> float:
        first, second, scale = _largest_of(self._first), _largest_of(self._second), abs(self._factor)
        products = scale, scale * first, scale * first * second
        return float(np.max([self._first.largest, self._second.largest, first, second, *products]))

    @abstractmethod
    def dense(self, kind: Kind, like: Array) -> DenseDelta: ...

    @abstractmethod
    def _places(self, i: Positions, j: Positions) -> tuple[Positions, Positions, Positions, Positions]:
        """Return the rows and columns of D1, then of D2."""

    def _bounds(self, sizes: tuple[Wide, Wide], errors: tuple[Wide, Wide], kind: Kind) -> tuple[Wide, Wide]:
        """Return the sizes and errors of products in a type. sizes, errors: of both sides, for each row."""
        scale, (first, second), (d, e) = abs(self._factor), sizes, errors
        with np.errstate(all="ignore"):
            product = (first + d) * (second + e)
            error = scale * (first * e + second * d + d * e + ROUNDINGS * UNIT_OF[kind] * product)
            flushed = 8 * LEAST_OF[kind] * (1 + scale) * (1 + first + d) * (1 + second + e)
            bounds = (scale * first * second * SLACK, (error + flushed) * SLACK if self._in_range else error + np.inf)
        return _known(bounds[0]), _known(bounds[1])

    def near(self, i: Positions, j: Positions) -> Pair:
        i1, j1, i2, j2 = self._places(i, j)
        return self._times(self._first.near(i1, j1), self._second.near(i2, j2))

    def nearer(self, i: Positions, j: Positions) -> Pair:
        i1, j1, i2, j2 = self._places(i, j)
        return self._times(self._first.nearer(i1, j1), self._second.nearer(i2, j2))

    def exact(self, i: int, j: int) -> Fraction:
        (i1,), (j1,), (i2,), (j2,) = self._places(np.array([i]), np.array([j]))
        return self._scale * self._first.exact(int(i1), int(j1)) * self._second.exact(int(i2), int(j2))

    @np.errstate(all="ignore")
    def _times(self, first: Pair, second: Pair) -> Pair:
        """Return the products of pairs and the scale, as pairs."""
        (h1, l1, d), (h2, l2, e) = first, second
        if not self._in_range:
            return anything(len(h1))
        significand, power, tail = self._split
        product, rest = two_product(h1, h2)
        cross = np.abs(h1 * l2) + np.abs(l1 * h2)
        error = (np.abs(h1) + np.abs(l1)) * e + (np.abs(h2) + np.abs(l2) + e) * d
        error += np.abs(l1 * l2) + 4 * U * (np.abs(rest) + cross)
        rest = rest + (h1 * l2 + l1 * h2)
        high, low = two_product(product, np.full_like(product, significand))
        low = low + (rest * significand + product * tail)
        error = error * abs(significand) + 4 * U * (np.abs(rest) + 2 * U * np.abs(product))
        plain = (d == 0) & (e == 0) & _is_zero(l1) & _is_zero(l2) & (abs(significand) == 0.5 and tail == 0)
        high, low, error = (np.ldexp(x, np.intc(power)) for x in (high, low, error + LEAST))
        bound = np.where(plain & (np.abs(high) > 2.0 ** -(REACH + 100)), 0.0, error * SLACK + LEAST)
        usual = _is_usual(h1, REACH) & _is_usual(h2, REACH) & _is_usual(l1, REACH + 100) & _is_usual(l2, REACH + 100)
        zero = _vanishes(first) | _vanishes(second) | (significand == 0)
        return _cleaned(high, low, np.where(usual, bound, np.inf), zero)


class Hadamard(_Multiplied):
    """D = scale * D1 * D2, element by element (LoHa).

    Args:
        first, second: of one shape.
    """

    def __init__(self, first: Delta, second: Delta, scale: Fraction) -> None:
        super().__init__(first, second, scale)
        self.shape = first.shape

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        first, second = (delta.dense(kind, like) for delta in (self._first, self._second))
        sizes, errors = self._bounds((first.sizes, second.sizes), (first.errors, second.errors), kind)

        def fill(rows: slice, shift: float, out: Array) -> None:
            first.fill(rows, 0.0, out)
            second.fill(rows, 0.0, more := empty(kind, *out.shape, like=out))
            out *= more
            out *= self._factor
            out += shift

        return DenseDelta(sizes, errors, fill)

    def _places(self, i: Positions, j: Positions) -> tuple[Positions, Positions, Positions, Positions]:
        return i, j, i, j


class Kron(_Multiplied):
    """Some rows of D[i, j] = scale * D1[i // p, j // q] * D2[i % p, j % q] with D2 (p, q) (LoKr).

    Args:
        first, second: all rows of both, which are small beside D.
        rows: start and stop among the rows of D.
    """

    def __init__(self, first: Delta, second: Delta, scale: Fraction, rows: slice) -> None:
        super().__init__(first, second, scale)
        self.shape = rows.stop - rows.start, first.shape[1] * second.shape[1]
        self._rows = np.arange(rows.start, rows.stop)

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        (values1, sizes1, errors1), (values2, sizes2, errors2) = map(_filled, (self._first, self._second))
        i, k = self._rows // len(values2), self._rows % len(values2)
        sizes, errors = self._bounds((sizes1[i], sizes2[k]), (errors1[i], errors2[k]), kind)
        first, second = (sent(x.astype(kind), like) for x in (values1 * self._factor, values2))
        outer, inner = (sent(x, like) for x in (i, k))

        def fill(rows: slice, shift: float, out: Array) -> None:
            left, right = first[outer[rows]], second[inner[rows]]
            blocks = out.reshape(len(left), left.shape[1], right.shape[1])
            blocks[...] = right[:, None]
            blocks *= left[:, :, None]
            out += shift

        return DenseDelta(sizes, errors, fill)

    def _places(self, i: Positions, j: Positions) -> tuple[Positions, Positions, Positions, Positions]:
        p, q = self._second.shape
        i = self._rows.take(i)
        return i // p, j // q, i % p, j % q


def multiple(delta: Delta, scale: Fraction) -> Kron:
    """Return scale * D."""
    return Kron(Stored(Numbers.of(np.ones((1, 1), np.float32)), 1.0), delta, scale, slice(0, delta.shape[0]))


class Scaled:
    """D = ratio * D1, with one ratio for each row or each column (DoRA)."""

    def __init__(self, delta: Delta, ratio: Factor) -> None:
        self._delta, self._ratio, self.shape = delta, ratio, delta.shape

    @cached_property
    def largest(self) -> float:
        size, ratio = _largest_of(self._delta), float(np.abs(self._ratio.value).max(initial=0.0))
        return float(np.max([self._delta.largest, size, ratio, ratio * size]))

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        inner, by_rows = self._delta.dense(kind, like), self._ratio.axis == 0
        ratio, off = np.abs(self._ratio.value), self._ratio.error
        if not by_rows:
            ratio, off = ratio.max(initial=0.0), off.max(initial=0.0)
        with np.errstate(all="ignore"):
            reach = inner.sizes + inner.errors
            error = (ratio + off) * inner.errors + inner.sizes * off + ROUNDINGS * UNIT_OF[kind] * ratio * reach
            errors = (error + 8 * LEAST_OF[kind] * (1 + ratio) * (1 + reach)) * SLACK
            sizes = (ratio + off) * inner.sizes * SLACK
        value = sent(self._ratio.value.astype(kind), like)
        value = value[:, None] if by_rows else value[None]

        def fill(rows: slice, shift: float, out: Array) -> None:
            inner.fill(rows, 0.0, out)
            out *= value[rows] if by_rows else value
            out += shift

        return DenseDelta(_known(sizes), _known(errors), fill)

    def near(self, i: Positions, j: Positions) -> Pair:
        return self._times(self._delta.near(i, j), i, j)

    def nearer(self, i: Positions, j: Positions) -> Pair:
        return self._times(self._delta.nearer(i, j), i, j)

    def exact(self, i: int, j: int) -> Fraction:
        return self._ratio.exact((i, j)[self._ratio.axis]) * self._delta.exact(i, j)

    @np.errstate(all="ignore")
    def _times(self, pair: Pair, i: Positions, j: Positions) -> Pair:
        high, low, bound = pair
        value, error = self._ratio.at(i, j)
        product, rest, rounding = self._ratio.times(high, low, i, j)
        off = (bound * (np.abs(value) + error) + rounding) * SLACK + LEAST
        total = np.where((bound == 0) & (rounding == 0), 0.0, off)
        usual = _is_usual(high, REACH) & _is_usual(low, REACH + 100) & _is_usual(value, REACH)
        return _cleaned(product, rest, np.where(usual, total, np.inf), _vanishes(pair) | ((value == 0) & (error == 0)))


def _filled(delta: Delta) -> tuple[Wide, Wide, Wide]:
    """Return all of a small delta in float64, and for each row bounds on its largest size and error."""
    dense, value = delta.dense(np.float64, ON_CPU), np.empty(delta.shape)
    dense.fill(slice(0, delta.shape[0]), 0.0, value)
    largest = np.abs(value).max(1, initial=0.0)
    return value, _known(np.minimum(dense.sizes, largest + dense.errors)), _known(dense.errors)


def _largest_of(delta: Delta) -> float:
    """Return an upper bound of |D|."""
    return float(delta.dense(np.float64, ON_CPU).sizes.max(initial=0.0))


def _known(x: Wide) -> Wide:
    """Return bounds with inf in place of nan."""
    bounds: Wide = np.where(np.isnan(x), np.inf, x)
    return bounds


def _size(x: Wide) -> npt.NDArray[np.int64]:
    """Return the bits of |x|, which no setting of the machine flushes to 0."""
    return x.view(np.int64) & np.int64(2**63 - 1)


def _is_zero(x: Wide) -> Mask:
    mask: Mask = _size(x) == 0
    return mask


def _is_usual(x: Wide, reach: int) -> Mask:
    """Return where x is 0 or from 2**-reach to 2**reach in size."""
    size = _size(x)
    mask: Mask = (size == 0) | ((size >= (1023 - reach) << 52) & (size <= (1023 + reach) << 52))
    return mask


def _vanishes(pair: Pair) -> Mask:
    """Return where a pair is certainly 0."""
    high, low, bound = pair
    mask: Mask = _is_zero(high) & _is_zero(low) & (bound == 0)
    return mask


def _cleaned(high: Wide, low: Wide, bound: Wide, zero: Mask) -> Pair:
    """Return pairs with 0 where they are certainly 0, and an infinite bound where a number is not finite."""
    fine = np.isfinite(high) & np.isfinite(low) & np.isfinite(bound) & ~zero
    return np.where(fine, high, 0.0), np.where(fine, low, 0.0), np.where(fine, bound, np.where(zero, 0.0, np.inf))
