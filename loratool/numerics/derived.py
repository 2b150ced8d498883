"""Compute matrices that stored numbers determine, such as rotations, so that no library's rounding shows in them.

A derived number is the float64 number nearest to a real one, ties to even; below 2**-200 it counts as 0. A function of
matrices is computed in pairs of float64 numbers with a bound on the errors. Where that does not tell the nearest
number, it is computed again in integers, 2**-256 being 1. So a number within some 2**-200 of the middle between two
numbers counts as that middle.

Products of pairs are sums of products of slices, each of so few bits that a GEMM sums them without rounding, in any
order (Ozaki et al., Numerical Algorithms 59, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .decide import SLACK, U
from .error_free import two_product, two_sum
from .forms import F64, Wide, integers

LEAST = 2.0**-200  # smaller derived numbers count as 0
KEPT = 84  # bits of the largest number in a matrix that its slices have, and more for longer sums
UNIT = 256  # bits behind the point of integers
REACH = 180  # matrices whose largest number is beyond 2**-180 and 2**180 are computed in integers
STEPS = 12  # of Newton's method at most; each doubles the right bits of an inverse


class Matrices(Protocol):
    """Matrices of reals, (n, p, q), in one of the two ways to compute them."""

    @property
    def T(self) -> Any:
        """Each matrix transposed."""

    def __matmul__(self, other: Any) -> Any: ...

    def __add__(self, other: Any) -> Any: ...

    def __sub__(self, other: Any) -> Any: ...

    def __mul__(self, factor: Fraction) -> Any: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, p, q)."""

    def moved(self, function: Callable[[Any], Any]) -> Any:
        """Return the numbers in other places, or only some of them, as a function moves them."""

    def unit(self, size: int = 0) -> Any:
        """Return the unit matrix of the size of square ones, or of another, (1, p, p)."""

    def inverse(self) -> Any:
        """Return the inverses."""


@dataclass(frozen=True)
class Pairs:
    """Matrices of unevaluated sums."""

    high: Wide  # (n, p, q)
    low: Wide
    bound: Wide  # (n,), no number of a matrix is farther from its real one; inf where nothing is known

    @classmethod
    def of(cls, high: Wide, low: Wide | None = None) -> Pairs:
        """Return exact numbers."""
        return cls(high, np.zeros_like(high) if low is None else low, np.zeros(len(high)))

    @property
    def T(self) -> Pairs:
        return Pairs(self.high.swapaxes(1, 2), self.low.swapaxes(1, 2), self.bound)

    def __add__(self, other: Pairs) -> Pairs:
        total, e = two_sum(self.high, other.high)
        rest, e1 = two_sum(self.low, other.low)
        rest, e2 = two_sum(rest, e)
        high, low = two_sum(total, rest)
        off = _largest(np.abs(e1) + np.abs(e2))
        return Pairs(high, low, (self.bound + other.bound + off) * SLACK)

    def __sub__(self, other: Pairs) -> Pairs:
        return self + Pairs(-other.high, -other.low, other.bound)

    def __mul__(self, factor: Fraction) -> Pairs:
        value = float(factor)
        rest = float(factor - Fraction(value))
        high, low = two_product(self.high, np.full_like(self.high, value))
        low = low + (self.low * value + self.high * rest)
        size = _largest(np.abs(high))
        high, low = two_sum(high, low)
        plain = not rest and abs(math.frexp(value)[0]) == 0.5
        off = self.bound * abs(value) + (0.0 if plain else size * (8 * U * U))
        return Pairs(high, low, off * SLACK)

    def __matmul__(self, other: Pairs) -> Pairs:
        count = self.high.shape[2]
        length = math.ceil(math.log2(max(2, count)))
        bits = (53 - length) // 2
        slices = -(-(KEPT + 4 * length) // bits)  # as an inverse adds up the errors of two products
        X, Y = (power_above(_largest(np.abs(x.high))) for x in (self, other))
        left, right = _sliced(self, X, bits, slices), _sliced(other, Y, bits, slices)
        shape = max(len(self.high), len(other.high)), self.high.shape[1], other.high.shape[2]
        high, low, lost = np.zeros(shape), np.zeros(shape), np.zeros(shape[0])
        for order in range(slices - 1, -1, -1):  # the small products first
            for k in range(order + 1):
                x, y = left[k], right[order - k]
                if x is not None and y is not None:
                    high, e = two_sum(high, x @ y)
                    low, e = two_sum(low, e)
                    lost = lost + _largest(np.abs(e))
        high, low = two_sum(high, low)
        dropped = count * X * Y * ((slices + 3) * 2.0 ** (-slices * bits))
        with np.errstate(invalid="ignore"):
            known = count * (self.bound * Y + X * other.bound + self.bound * other.bound)
        usual = _is_usual(X) & _is_usual(Y)
        return Pairs(high, low, np.where(usual, (dropped + known + lost) * SLACK, np.inf))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.high.shape

    def moved(self, function: Callable[[Any], Any]) -> Pairs:
        high = np.ascontiguousarray(function(self.high))
        return Pairs(high, np.ascontiguousarray(function(self.low)), np.full(len(high), self.bound.max(initial=0.0)))

    def unit(self, size: int = 0) -> Pairs:
        return Pairs.of(np.eye(size or self.high.shape[1])[None])

    def inverse(self) -> Pairs:
        one = self.unit()
        try:
            about = Pairs.of(np.linalg.inv(self.high).astype(np.float64))
        except np.linalg.LinAlgError:
            return Pairs(self.high, self.low, np.full(len(self.high), np.inf))
        rest = one - self @ about
        if _largest(np.abs(rest.high)).max(initial=0.0) > 2.0**-40:
            about = about + about @ rest
            about = Pairs.of(about.high, about.low)
            rest = one - self @ about
        found = about + about @ rest
        off = _size(rest) + rest.bound * rest.high.shape[1]  # A^-1 = Y (1 - E)^-1 with E = 1 - A Y
        with np.errstate(all="ignore"):
            error = np.where(off < 0.5, _size(about) * 2 * off * off, np.inf)
        return Pairs(found.high, found.low, (found.bound + error) * SLACK)


@dataclass(frozen=True)
class Fixed:
    """Matrices of integers, 2**UNIT being 1; each product is rounded down."""

    numbers: npt.NDArray[Any]  # (n, p, q), of Python's integers

    @classmethod
    def of(cls, x: Sequence[Wide]) -> Fixed:
        """Return the sum of float64 matrices."""
        return cls(sum((_as_integers(part) for part in x), np.zeros(x[0].shape, object)))

    @property
    def T(self) -> Fixed:
        return Fixed(self.numbers.swapaxes(1, 2))

    def __add__(self, other: Fixed) -> Fixed:
        return Fixed(self.numbers + other.numbers)

    def __sub__(self, other: Fixed) -> Fixed:
        return Fixed(self.numbers - other.numbers)

    def __mul__(self, factor: Fraction) -> Fixed:
        return Fixed(self.numbers * factor.numerator // factor.denominator)

    def __matmul__(self, other: Fixed) -> Fixed:
        length = max(len(self.numbers), len(other.numbers))
        left, right = (np.broadcast_to(x, (length, *x.shape[1:])) for x in (self.numbers, other.numbers))
        return Fixed(np.stack([x.dot(y) for x, y in zip(left, right, strict=True)]) >> UNIT)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def moved(self, function: Callable[[Any], Any]) -> Fixed:
        return Fixed(function(self.numbers))

    def unit(self, size: int = 0) -> Fixed:
        return Fixed(np.eye(size or self.numbers.shape[1], dtype=np.int64).astype(object)[None] << UNIT)

    def inverse(self) -> Fixed:
        """Return the inverses.

        Raises:
            ValueError: a matrix has none, or one too large for the method.
        """
        one, near = self.unit(), self.wide()
        try:
            about = Fixed.of([np.linalg.inv(near).astype(np.float64)])
        except np.linalg.LinAlgError:
            raise ValueError("a matrix has no inverse") from None
        for _ in range(STEPS):
            rest = one - self @ about
            about = about + about @ rest
            if max(map(abs, rest.numbers.reshape(-1)), default=0) < 1 << (UNIT // 2 - 20):
                return about
        raise ValueError("a matrix has no inverse")

    def wide(self) -> Wide:
        """Return the nearest float64 numbers."""
        scale = 1 << UNIT
        flat = [int(x) / scale for x in self.numbers.reshape(-1)]  # Python rounds such a quotient once
        return np.array(flat, np.float64).reshape(self.numbers.shape)


def derived_numbers(function: Callable[..., Any], *inputs: Sequence[Wide]) -> Wide:
    """Return the derived numbers of a function of matrices, (n, p, q).

    Args:
        function: of `Matrices`, by their operations; it makes n matrices of n, each from those of its place.
        inputs: for each argument float64 matrices whose sum it is, each (n, ...) or (1, ...).

    Raises:
        ValueError: a matrix that the function inverts has no inverse.
    """
    pairs = function(*(_as_pairs(x) for x in inputs))
    shape = pairs.high.shape
    bound = np.broadcast_to(pairs.bound[:, None, None], shape).reshape(-1)
    total, rest = two_sum(pairs.high.reshape(-1), pairs.low.reshape(-1))
    found: Wide = total.reshape(shape)
    with np.errstate(all="ignore"):
        half = np.spacing(np.abs(total)) * np.where(_is_power(total) & (rest * total < 0), 0.25, 0.5)
        sure = np.abs(rest) + bound < half * (1 - 1e-9)
        sure |= np.abs(total) + bound < LEAST
    doubt = np.flatnonzero(~sure.reshape(len(found), -1).all(1))
    if len(doubt):
        part = ([x if len(x) == 1 else x[doubt] for x in argument] for argument in inputs)
        found[doubt] = function(*(Fixed.of(x) for x in part)).wide()
    found[np.abs(found) < LEAST] = 0.0
    return found


def _as_pairs(x: Sequence[Wide]) -> Pairs:
    total = Pairs.of(x[0])
    for part in x[1:]:
        total = total + Pairs.of(part)
    return total


def _as_integers(x: Wide) -> npt.NDArray[Any]:
    """Return numbers times 2**UNIT, rounded down."""
    m, e = integers(np.ascontiguousarray(x).view(np.int64).reshape(-1), F64)
    shifted = [a << b if b >= 0 else a >> -b for a, b in zip(m.tolist(), (e + UNIT).tolist(), strict=True)]
    whole = np.empty(len(shifted), object)
    whole[:] = shifted
    return whole.reshape(x.shape)


def _largest(x: Wide) -> Wide:
    """Return the largest number of each matrix."""
    most: Wide = x.max((1, 2), initial=0.0)
    return most


def _size(x: Pairs) -> Wide:
    """Return an upper bound of the Frobenius norm of each matrix."""
    size: Wide = np.sqrt(np.square(np.abs(x.high) + np.abs(x.low)).sum((1, 2))) * (1 + 1e-6)
    return size


def power_above(x: Wide) -> Wide:
    """Return powers of two that are larger, 1 for 0."""
    powers: Wide = np.ldexp(1.0, np.frexp(np.where(x > 0, x, 0.5))[1])
    return powers


def _is_power(x: Wide) -> npt.NDArray[np.bool_]:
    powers: npt.NDArray[np.bool_] = (x.view(np.int64) & ((1 << 52) - 1)) == 0
    return powers


def _is_usual(power: Wide) -> npt.NDArray[np.bool_]:
    usual: npt.NDArray[np.bool_] = (power > 2.0**-REACH) & (power < 2.0**REACH)
    return usual


def _sliced(x: Pairs, power: Wide, bits: int, count: int) -> list[Wide | None]:
    """Return slices of so many bits each, whose sum is nearly x; None for zeros. power: above all numbers."""
    rest, low, slices = x.high, x.low, list[Wide | None]()
    for k in range(1, count + 1):
        if not rest.any() and not low.any():
            slices.append(None)
            continue
        rest, low = two_sum(rest, low)
        middle = (power * (1.5 * 2.0 ** (52 - k * bits)))[:, None, None]
        part = (rest + middle) - middle
        rest = rest - part
        slices.append(part)
    return slices
