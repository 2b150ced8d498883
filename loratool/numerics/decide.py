"""Decide W' = RN(X) of single weights, X = a * W + D a real number that is defined by the stored numbers alone.

D is computed in float64 with a bound on its error (`Delta.near`). If [X - bound, X + bound] does not round to one
number, D is computed as an unevaluated sum of two float64 (`Delta.nearer`), and if that does not decide, as a fraction
(`Delta.exact`). So the result does not depend on the order of summation, the library or the machine (a floating-point
filter: Shewchuk, Discrete & Computational Geometry 18, 1997).

Every bound has an absolute part, or is 0 where nothing was rounded, so that flushed subnormal numbers are within it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .arrays import ON_CPU, Array, Kind, Numbers, narrow
from .error_free import two_product, two_sum
from .forms import Bits, Form, Positions, Wide, fraction, rounded, signed, wide

U = 2.0**-53  # unit roundoff of float64
PAIR = 2.0**-98  # no pair of numbers is off by more of their size, roundings of pairs included
LEAST = 2.0**-900  # smaller sums are left to the fractions, so that no relevant number is near float64's least one
TINY = 2.0**-700  # of a smaller factor the tail, or itself, may have been flushed
SLACK = 1 + 1e-9  # times a bound, for the roundings of the bound itself
CHUNK = 1 << 13  # numbers processed at a time, so that all arrays stay in a core's cache

PerMatrix = Any  # a float; of several matrices, one below the other, an array with a number for each row, (rows, 1)


@dataclass(frozen=True)
class DenseDelta:
    """D of some rows as a GEMM computes it, in float32 or float64.

    Attributes:
        sizes: (rows,), no |D| of a row is larger.
        errors: (rows,), no error of a row is larger.
        fill: writes D + shift of some rows into an array, (rows, n) of this type, by (rows, shift, array).
        squares: (rows,), about ||D||^2 of each row; None if only the numbers themselves tell.
    """

    sizes: Wide
    errors: Wide
    fill: Callable[[slice, PerMatrix, Array], None]
    squares: Wide | None = None


class Delta(Protocol):
    """The change D of some rows of a weight, (rows, n), a real number for each weight.

    Each kind of update implements `dense`, `near`, `nearer` and `exact`. `near` and `nearer` may return `anything` (an
    infinite bound), at a cost in speed.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, n)."""

    @property
    def largest(self) -> float:
        """Upper bound of the factors of all products. Up to 2**60, float32 cannot overflow."""

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        """Return D in float32 or float64 where `like` is, with bounds on its errors."""

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        """Return D at rows i and columns j as high + low, and a bound that is 0 only where that is exact."""

    def nearer(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        """Return the same as `near` with a smaller bound, more slowly. It is 0 only where the pair is exact."""

    def exact(self, i: int, j: int) -> Fraction:
        """Return D of one weight."""


def anything(count: int) -> tuple[Wide, Wide, Wide]:
    """Return pairs with an infinite bound, for `near` or `nearer` of an unknown D."""
    return np.zeros(count), np.zeros(count), np.full(count, np.inf)


@dataclass(frozen=True)
class Factor:
    """An exact number for each row (axis 0) or column (axis 1).

    Attributes:
        value: in float64.
        error: no |exact number - value| is larger.
        tail: exact number - value, to `PAIR` times `size`; exact where `size` is 0.
        size: of the summands.
        exact: a row or column -> its number as a fraction.
    """

    axis: int
    value: Wide
    error: Wide
    tail: Wide
    size: Wide
    exact: Callable[[int], Fraction]

    def at(self, i: Positions, j: Positions) -> tuple[Wide, Wide]:
        """Return value and error at rows i and columns j."""
        index = (i, j)[self.axis]
        return self.value.take(index), self.error.take(index)

    def exact_at(self, i: int, j: int) -> Fraction:
        """Return the number of row i and column j."""
        return self.exact((i, j)[self.axis])

    def of_rows_in(self, rows: slice) -> tuple[Wide, Wide]:
        """Return values and errors of some rows, (rows, 1) or (1, n)."""
        if self.axis == 0:
            return self.value[rows, None], self.error[rows, None]
        return self.value[None], self.error[None]

    def times(self, high: Wide, low: Wide, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        """Return the product with pairs at rows i and columns j as a pair, and a bound, 0 where that is exact."""
        index = (i, j)[self.axis]
        value, tail, size = self.value.take(index), self.tail.take(index), self.size.take(index)
        high, low = two_sum(high, low)  # where terms cancelled, the low part may be the larger
        product, rest = two_product(high, value)
        plain = (tail == 0) & (size == 0) & ((value == 0) | (np.abs(value) == 1))
        bound = np.abs(high) * (np.abs(value) + size) * PAIR + LEAST
        rest = np.where(plain, low * value, rest + (low * value + high * tail))
        return np.where(plain, high * value, product), rest, np.where(plain, 0.0, bound)

    def repeated(self, times: int) -> Factor:
        """Return the factor with each number repeated, as for channels whose kernels are flattened."""
        value, error, tail, size = (np.repeat(x, times) for x in (self.value, self.error, self.tail, self.size))
        return Factor(self.axis, value, error, tail, size, lambda k: self.exact(k // times))

    @classmethod
    def of_rows(cls, numbers: Sequence[Fraction]) -> Factor:
        """Return the factor of rows with these numbers."""
        return cls._of(0, numbers)

    @classmethod
    def of_columns(cls, numbers: Sequence[Fraction]) -> Factor:
        """Return the factor of columns with these numbers."""
        return cls._of(1, numbers)

    @classmethod
    def _of(cls, axis: int, numbers: Sequence[Fraction]) -> Factor:
        tails = {x: float(x - Fraction(float(x))) for x in dict.fromkeys(numbers)}
        value, tail = (np.array([of(x) for x in numbers]) for of in (float, tails.__getitem__))
        flushed = (np.abs(value) < TINY) & np.array([bool(x) for x in numbers], np.bool_)
        error, size = np.where(flushed, TINY, np.abs(tail) * SLACK), np.where(flushed, np.inf, np.abs(tail))
        return cls(axis, value, error, tail, size, lambda k: numbers[k])


class Entries:
    """A `Factor` with a number for each weight, 1 + C for a delta C of the same rows."""

    def __init__(self, delta: Delta) -> None:
        self.axis, self._delta = 2, delta
        dense = delta.dense(np.float64, ON_CPU)
        self.value = np.empty(delta.shape)
        dense.fill(slice(0, delta.shape[0]), 1.0, self.value)
        self.error = ((dense.errors + (1 + dense.sizes) * (2 * U)) * SLACK)[:, None]  # of each row

    def at(self, i: Positions, j: Positions) -> tuple[Wide, Wide]:
        return self.value.reshape(-1).take(i * self.value.shape[1] + j), self.error[:, 0].take(i)

    def exact_at(self, i: int, j: int) -> Fraction:
        return 1 + self._delta.exact(i, j)

    def of_rows_in(self, rows: slice) -> tuple[Wide, Wide]:
        return self.value[rows], self.error[rows]

    def times(self, high: Wide, low: Wide, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        more, less, bound = self._delta.nearer(i, j)
        value, e = two_sum(np.ones(len(i)), more)
        tail, rounding = two_sum(e, less)
        high, low = two_sum(high, low)
        product, rest = two_product(high, value)
        size = np.abs(high) + np.abs(low)
        rest = rest + (low * value + high * tail)
        off = size * (bound + np.abs(rounding) + np.abs(value) * PAIR + np.abs(tail) * (8 * U)) * SLACK + LEAST
        return product, rest, off


@dataclass(frozen=True)
class Reals:
    """X = a * W + sign * D for some rows of a weight.

    Attributes:
        factor: None for a = 1.
        sign: 1, or -1 on the way back.
        steps: how many weights each step computed.
    """

    delta: Delta
    factor: Factor | Entries | None = None
    sign: int = 1
    steps: Counter[str] = field(default_factory=Counter)

    def exact(self, weight: Fraction, i: int, j: int) -> Fraction:
        """Return X of one weight."""
        a = Fraction(1) if self.factor is None else self.factor.exact_at(i, j)
        return a * weight + self.sign * self.delta.exact(i, j)

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        """Return sign * D as `Delta.near` does."""
        high, low, bound = self.delta.near(i, j)
        return self.sign * high, self.sign * low, bound

    def keeps(self, i: int, j: int) -> bool:
        """Return whether D = 0 and a = 1, so that W's own bits stay."""
        a = 1 if self.factor is None else self.factor.exact_at(i, j)
        return a == 1 and self.delta.exact(i, j) == 0


@np.errstate(all="ignore")
def decide(x: Reals, bits: Bits, form: Form, i: Positions, j: Positions, to: Form) -> Bits:
    """Return RN(X) of the weights at rows i and columns j, as bit patterns; an overflow is the pattern of inf.

    Args:
        bits: the bit patterns of W there, in `form`; finite, except where a is 0.
        to: the form of the result.
    """
    if not len(i):
        return np.empty(0, to.bits_type)
    weight, (high, low, bound) = wide(bits, form), x.near(i, j)
    minus_zero = np.zeros(len(i), np.bool_)
    unchanged = (high == -low) & (bound == 0)  # D = 0: W's own bits stay
    if x.factor:
        a, error = x.factor.at(i, j)
        known = (error == 0) & ((a == 0) | (a == 1))
        minus_zero = unchanged & known & (a == 0) & (high == 0) & np.signbit(high)  # a stored value that replaces W
        unchanged &= known & (a == 1)
        size, plain = np.abs(weight), weight
        weight = np.where(a == 0, 0.0, weight * a)
        bound = bound + np.where(known, 0.0, size * error + np.abs(weight) * (2 * U) + LEAST)
    out, sure = _by_casts(weight + high, bound + np.abs(low), to)
    doubt = np.flatnonzero(~sure)
    for start in range(0, len(doubt), CHUNK):
        part = doubt[start : start + CHUNK]
        total, rest = two_sum(weight.take(part), high.take(part))
        rest, rounding = two_sum(rest, low.take(part))
        total, rest = two_sum(total, rest)
        out[part], sure[part] = nearest(total, rest, (bound.take(part) + np.abs(rounding)) * SLACK, to)
    size = bits & form.size
    if form.precision == 53:
        sure &= (size >= 1 << 52) | (size == 0)  # a subnormal W may have been flushed
    out = np.where(minus_zero, -to.size - 1, _with_unchanged(out, bits, unchanged, form, to)).astype(to.bits_type)
    if form == to:
        sure |= unchanged
    x.steps["near"] += len(i)
    undecided = np.flatnonzero(~sure)
    if len(undecided):
        x.steps["nearer"] += len(undecided)
        rows, columns = i[undecided], j[undecided]
        high, low, bound = x.delta.nearer(rows, columns)
        unchanged = (high == -low) & (bound == 0)
        weight, (more, rounding) = weight[undecided], np.zeros((2, len(undecided)))
        if x.factor:
            weight, more, rounding = x.factor.times(plain[undecided], np.zeros(len(undecided)), rows, columns)
            unchanged &= x.factor.at(rows, columns)[0] == 1
        total, rest = two_sum(weight, x.sign * high)
        more, e1 = two_sum(more, x.sign * low)
        rest, e2 = two_sum(rest, more)
        total, rest = two_sum(total, rest)
        decided, sure = nearest(total, rest, (bound + rounding + np.abs(e1) + np.abs(e2)) * SLACK, to)
        out[undecided] = _with_unchanged(decided, bits[undecided], unchanged & (rounding == 0), form, to)
        undecided = undecided[~sure | ((form.precision == 53) & (size[undecided] > 0) & (size[undecided] < 1 << 52))]
    x.steps["exact"] += len(undecided)
    for k in undecided:
        out[k] = _as_fraction(x, bits[k], form, int(i[k]), int(j[k]), to)
    return out


def _with_unchanged(out: Bits, bits: Bits, unchanged: npt.NDArray[np.bool_], form: Form, to: Form) -> Bits:
    """Return results with W's own bits where W is unchanged; in another form, with its sign of zero."""
    if form == to:
        return np.where(unchanged, bits, out)
    return np.where(unchanged & (bits == -form.size - 1), -to.size - 1, out)


def _as_fraction(x: Reals, bits: Bits, form: Form, i: int, j: int, to: Form) -> Bits:
    weight = fraction(bits, form) if (bits & form.size) < form.inf else Fraction(0)  # not finite only where a is 0
    exact = x.exact(weight, i, j)
    minus = exact < 0 or (exact == 0 and bits < 0 and x.keeps(i, j))
    return signed(min(rounded(exact, to), to.inf), minus, to)


def _by_casts(total: Wide, bound: Wide, form: Form) -> tuple[Bits, Bits]:
    """Decide results of 16 bits by two casts, which may go by way of float32, so the bound includes its rounding."""
    if form.precision > 11:
        return np.empty(len(total), form.bits_type), np.zeros(len(total), np.bool_)
    reach = bound * SLACK + np.abs(total) * 2.0**-23.8 + 2.0**-120
    low, high = (Numbers.empty(form, len(total)) for _ in range(2))
    narrow(total - reach, low)
    narrow(total + reach, high)
    return high.bits, (high.bits == low.bits) & np.isfinite(total)


def nearest(total: Wide, rest: Wide, bound: Wide, form: Form) -> tuple[Bits, Bits]:
    """Return RN(total + rest +- bound) as bit patterns, and where that is certain.

    |rest| is at most half a step of `total`. All steps are on the grid of the binade of `total`, where ldexp, floor and
    the distance to the midpoint are exact. Just below a power of two the grid is that of the lower binade.
    """
    at_power = (total.view(np.int64) & ((1 << 52) - 1)) == 0
    rest = np.where(total < 0, -rest, rest)
    e = np.maximum(((total.view(np.int64) >> 52) & 2047) - 1023, form.least)
    e -= (at_power & (rest < 0)) & (e > form.least)
    up = (form.precision - 1 - e).astype(np.intc)
    unit = np.ldexp(1.0, up)
    steps, reach = np.ldexp(np.abs(total), up), bound * unit
    floor = np.floor(steps)
    if form.precision == 53:
        over = np.zeros(len(total), np.bool_)
        sure = (np.abs(rest) * unit + reach < 0.49) | (bound == 0)
    else:
        past = steps - floor - 0.5
        tie = past == 0
        over = np.where(tie, (rest > 0) | ((rest == 0) & (floor % 2 == 1)), past > 0)
        sure = np.where(tie, (np.abs(rest) > bound) | (bound == 0), np.abs(past + rest * unit) > reach * SLACK)
    sure &= (floor > 1 << (form.precision - 1)) | (reach < 0.2)  # the lower binade's midpoints may be near
    sure &= (np.abs(total) > LEAST) & (np.abs(total) > 2 * bound) & np.isfinite(steps)
    sure |= (total == 0) & (rest == 0) & (bound == 0)
    start = (e - form.least) << (form.precision - 1)
    ordinal = np.minimum(start + np.where(sure, floor, 0).astype(np.int64) + over, form.inf)
    return signed(ordinal, total < 0, form), sure
