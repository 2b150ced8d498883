"""Base class of deltas that transform a few stored numbers into all numbers of a weight.

Each number of D is a sum of products of a stored number and two factors, one of its row and one of its column. A fast
transform computes all of them in float64, with a bound. For those that it leaves undecided the products are summed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .arrays import Array, Kind, sent
from .decide import LEAST, SLACK, DenseDelta, U, anything
from .error_free import exact_sum, sums_of_rows, two_product
from .forms import Positions, Wide
from .products import LEAST_OF, UNIT_OF, split_scale

TOGETHER = 1 << 17  # numbers of a transform in memory at a time, beside its result
PLACES = 1 << 14  # summands of single places in memory at a time
SCALES = 300  # a transform decides nothing, if the scale is beyond 2**-300 and 2**300

Pairs = tuple[Wide, Wide, Wide]  # high, low and a bound, as `Delta.near` has them


class TransformedRows(ABC):
    """Some rows of D = scale * a transform.

    Args:
        start, stop: of the rows.
        columns: how many there are.
        summands: of a number.
        sizes: (rows,), the sum of the sizes of a number's summands, at most, without the scale.
        errors: (rows,), the error of `_transform`, at most.
    """

    def __init__(
        self, start: int, stop: int, columns: int, scale: Fraction, summands: int, sizes: Wide, errors: Wide
    ) -> None:
        self.shape = stop - start, columns
        self._start, self._scale, self._summands, self._sizes = start, scale, summands, sizes
        self._in_range = not scale or 2.0**-SCALES <= abs(scale) <= 2.0**SCALES
        significand, e, _ = split_scale(scale)
        with np.errstate(all="ignore"):
            self._factor = float(np.ldexp(significand, np.intc(e)))
            errors = (errors + 4 * U * sizes) * (abs(self._factor) * SLACK)  # the scale and its product are rounded
        self._errors = errors + np.where(errors > 0, LEAST, 0.0)

    @abstractmethod
    def _transform(self, start: int, stop: int) -> Wide:
        """Return some of these rows of D without the scale."""

    @abstractmethod
    def _factors(self, i: Positions, j: Positions) -> tuple[list[Wide], Wide]:
        """Return left sides and a right side, (places, r) each. Their products have the sum D at rows i and columns j.

        The sum is exact, and without the scale.
        """

    @abstractmethod
    def _are_empty(self, i: Positions, j: Positions) -> npt.NDArray[np.bool_]:
        """Return where all summands of D are 0."""

    @property
    def largest(self) -> float:
        scale, most = abs(self._factor), float(self._sizes.max(initial=0.0))
        return max(scale, most, scale * most) if self._in_range else np.inf

    @cached_property
    @np.errstate(all="ignore")
    def _numbers(self) -> Wide:
        """D, (rows, n)."""
        numbers, step = np.empty(self.shape), max(1, TOGETHER // max(self.shape[1], self._summands))
        for start in range(0, len(numbers), step):
            stop = min(start + step, len(numbers))
            np.multiply(self._transform(start, stop), self._factor, out=numbers[start:stop])
        return numbers

    @np.errstate(all="ignore")
    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        numbers = self._numbers
        sizes = np.maximum(numbers.max(1, initial=0.0), -numbers.min(1, initial=0.0)) + self._errors
        errors = self._errors + UNIT_OF[kind] * sizes * SLACK + LEAST_OF[kind]

        def fill(rows: slice, shift: float, out: Array) -> None:
            out[...] = sent(numbers[rows].astype(kind, copy=False), like)
            out += shift

        return DenseDelta(sizes, errors if self._in_range else np.full_like(errors, np.inf), fill)

    def near(self, i: Positions, j: Positions) -> Pairs:
        if not self._in_range:
            return anything(len(i))
        return self._numbers[i, j], np.zeros(len(i)), self._errors[i]

    @np.errstate(all="ignore")
    def nearer(self, i: Positions, j: Positions) -> Pairs:
        if not self._in_range:
            return anything(len(i))
        high, low, bound = np.zeros((3, len(i)))
        others, step = np.flatnonzero(~self._are_empty(i, j)), max(1, PLACES // self._summands)
        significand, e, tail = split_scale(self._scale)
        is_power = abs(significand) == 0.5 and not tail
        for start in range(0, len(others), step):
            some = others[start : start + step]
            total, rest, error = sums_of_rows(*self._products(i[some], j[some]))
            first, second = two_product(total, np.full_like(total, significand))
            second += rest * significand + total * tail
            error = error * SLACK + np.where(
                is_power & (rest == 0), 0.0, 4 * U * (np.abs(rest) + 2 * U * np.abs(total))
            )
            high[some], low[some], bound[some] = np.ldexp([first, second, error], np.intc(e))
        return high, low, bound

    def exact(self, i: int, j: int) -> Fraction:
        products, rests = self._products(np.array([i]), np.array([j]))
        return self._scale * exact_sum([*products[0].tolist(), *rests[0].tolist()])

    def _products(self, i: Positions, j: Positions) -> tuple[Wide, Wide]:
        """Return products and their rounding errors, (places, r) each, with the sum D without the scale."""
        lefts, right = self._factors(i, j)
        return two_product(np.concatenate(lefts, axis=1), np.tile(right, len(lefts)))
