"""The numbers that codes stand for before any scale, and the codes nearest to numbers.

Sources: OCP Microscaling Formats (MX) 1.0, tables 3 to 7, for e2m1, e4m3 and E8M0; OCP OFP8 1.0 for e5m2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .arrays import Numbers
from .forms import FORMS, IntArray, Wide

Codes = npt.NDArray[Any]  # codes of quantized weights, one for each number, of an integer type


class Levels(Protocol):
    """The numbers of codes."""

    def values(self, codes: Codes) -> Wide:
        """Return the numbers of codes, in their shape."""

    def nearest(self, numbers: Wide) -> Codes:
        """Return the codes nearest to numbers, clamped to the range; nan gets the code of 0.

        Ties go to even codes, or to the lower number in a table that is not `even`.
        """

    def ordinals(self, codes: Codes) -> IntArray:
        """Return integers in the order of the codes' numbers: -0 before +0, equal ones by falling code, nan last."""

    def from_ordinals(self, ordinals: IntArray) -> Codes:
        """Return the codes of ordinals; raise IndexError if an ordinal has no code."""


@dataclass(frozen=True)
class Integers:
    """Codes whose numbers are `code - offset`."""

    low: int  # the first and the last code that writers use
    high: int
    kind: str = "uint8"  # numpy's name of the type of a code
    offset: int = 0
    readable: tuple[int, int] | None = None  # the first and the last code that a file may have; None for low and high

    def values(self, codes: Codes) -> Wide:
        numbers = codes.astype(np.float64)
        return numbers - self.offset if self.offset else numbers

    @np.errstate(invalid="ignore")
    def nearest(self, numbers: Wide) -> Codes:
        rounded = np.rint(numbers + self.offset)
        np.clip(rounded, self.low, self.high, out=rounded)
        return np.where(np.isnan(rounded), self.offset, rounded).astype(self.kind)

    def ordinals(self, codes: Codes) -> IntArray:
        return codes.astype(np.int16)

    def from_ordinals(self, ordinals: IntArray) -> Codes:
        _require_within(ordinals, *(self.readable or (self.low, self.high)))
        return ordinals.astype(self.kind)


@dataclass(frozen=True)
class Table:
    """Codes that are indices of a table, with numbers in any order, repeats allowed, and nan for unused codes.

    The numbers fit in float32, so that the midpoints between them are exact in float64.

    Attributes:
        even: a tie goes to the even code; otherwise to the lower number.
    """

    numbers: tuple[float, ...]
    even: bool = True

    @cached_property
    def _wide(self) -> Wide:
        return np.array(self.numbers)

    @cached_property
    def _order(self) -> Codes:
        """The codes in the order of their numbers: -0 before +0, equal entries by falling code, nan last."""
        size = self._wide + 0.0
        return np.lexsort((-np.arange(len(size)), ~np.signbit(self._wide), size)).astype(np.int16)

    @cached_property
    def _ranks(self) -> IntArray:
        ranks = np.empty(len(self._order), np.int16)
        ranks[self._order] = np.arange(len(self._order), dtype=np.int16)
        return ranks

    @cached_property
    def _steps(self) -> tuple[Codes, Wide]:
        """The codes of rising finite numbers without repeats and -0, and the least double of each but the first.

        A nan, which no number reaches, follows the last double.
        """
        order = self._order[np.isfinite(self._wide[self._order])]
        values = self._wide[order] + 0.0
        last = np.append(values[1:] != values[:-1], True)  # of -0 and +0 the latter, of equal entries the least code
        codes, values = order[last], values[last]
        middles = (values[1:] + values[:-1]) / 2
        upper = codes[1:] % 2 == 0 if self.even else np.zeros(len(middles), np.bool_)
        return codes.astype(np.uint8), np.append(np.where(upper, middles, np.nextafter(middles, np.inf)), np.nan)

    @cached_property
    def _cells(self) -> tuple[Codes, int]:
        """For each value of the first 16 bits, the place in `_steps` of the least double; the most steps in a value.

        The midpoints between small floats have no bits beyond these, so that one comparison is enough.
        """
        first = np.arange(1 << 16, dtype=np.uint64) << 48
        last = first | ((1 << 48) - 1)
        least, most = np.where(first < 1 << 63, (first, last), (last, first)).view(np.float64)
        least, most = np.nan_to_num((least, most), nan=-np.inf)  # beside an infinity, whose cell the nans share
        steps = self._steps[1][:-1]
        cells = np.searchsorted(steps, least, side="right")
        spread = np.searchsorted(steps, most, side="right") - cells
        return cells.astype(np.uint8), int(spread.max(initial=0))

    def values(self, codes: Codes) -> Wide:
        return self._wide.take(codes)

    def nearest(self, numbers: Wide) -> Codes:
        codes, steps = self._steps
        cells, most = self._cells
        begin = np.ascontiguousarray(numbers).view(np.uint64) >> 48
        place = cells.take(begin.view(np.int64))  # numpy before 2 takes no unsigned 64 bits
        for _ in range(most):
            place += numbers >= steps.take(place)
        nearest = codes.take(place)
        nearest[np.isnan(numbers)] = self.nearest_to_zero
        return nearest

    @cached_property
    def nearest_to_zero(self) -> int:
        codes, steps = self._steps
        return int(codes[np.searchsorted(steps[:-1], 0.0, side="right")])

    def ordinals(self, codes: Codes) -> IntArray:
        return self._ranks.take(codes)

    def from_ordinals(self, ordinals: IntArray) -> Codes:
        _require_within(ordinals, 0, len(self.numbers) - 1)
        return self._order.take(ordinals).astype(np.uint8)


def _require_within(ordinals: IntArray, low: int, high: int) -> None:
    if len(ordinals) and (int(ordinals.min()) < low or int(ordinals.max()) > high):
        raise IndexError(f"has a code beyond {low} to {high}")


def _floats(name: str) -> tuple[float, ...]:
    """Return the numbers of 8-bit floats; a nan has the sign of its code on every processor."""
    return tuple(Numbers(np.arange(256, dtype=np.uint8).view(np.int8), FORMS[name]).wide().tolist())


_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

E2M1 = Table((*_HALF, *(-x for x in _HALF)))

E4M3 = Table(_floats("F8_E4M3"))

E5M2 = Table(_floats("F8_E5M2"))

INT8 = Integers(-128, 127, "int8")


def e8m0(codes: Codes) -> Wide:
    """Return 2**(code - 127), nan for 255."""
    powers: Wide = np.ldexp(1.0, codes.astype(np.intc) - 127)
    return np.where(codes == 255, np.nan, powers)
