"""Give the numbers that codes mean before any scale, and the codes that are nearest to numbers.

Sources: OCP Microscaling Formats (MX) 1.0, tables 3 to 7, for e2m1, e4m3 and E8M0; OCP OFP8 1.0 for e5m2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from .forms import Codes, Wide


class Levels(Protocol):
    """The numbers of codes."""

    def values(self, codes: Codes) -> Wide:
        """Return the numbers of codes, in their shape."""

    def nearest(self, numbers: Wide) -> Codes:
        """Return the codes nearest to numbers, clamped to the range; of nan the code of 0.

        Ties go to even codes, or to the lower number in a table that is not `even`.
        """

    def ordinals(self, codes: Codes) -> Codes:
        """Return integers that order codes as their numbers: -0 just below +0, equal ones by falling code, nan last."""

    def from_ordinals(self, ordinals: Codes) -> Codes:
        """Return the codes of ordinals; IndexError if one is no code's."""


@dataclass(frozen=True)
class Integers:
    """Codes that are numbers: `code - offset`."""

    low: int  # the first and the last code that writers use
    high: int
    kind: str = "uint8"  # numpy's name of the type of a code
    offset: int = 0
    readable: tuple[int, int] | None = None  # the first and the last code that a file may have; None for low and high

    def values(self, codes: Codes) -> Wide:
        found = codes.astype(np.float64)
        return found - self.offset if self.offset else found

    @np.errstate(invalid="ignore")
    def nearest(self, numbers: Wide) -> Codes:
        found = np.rint(numbers + self.offset)
        np.clip(found, self.low, self.high, out=found)
        return np.where(np.isnan(found), self.offset, found).astype(self.kind)

    def ordinals(self, codes: Codes) -> Codes:
        return codes.astype(np.int16)

    def from_ordinals(self, ordinals: Codes) -> Codes:
        _require_within(ordinals, *(self.readable or (self.low, self.high)))
        return ordinals.astype(self.kind)


@dataclass(frozen=True)
class Table:
    """Codes that count the numbers of a table, of which any order and repeats are allowed; nan for codes not in use.

    The numbers are of float32, so that the middles between them are exact.

    Attributes:
        even: whether a tie goes to the even code; otherwise to the lower number.
    """

    numbers: tuple[float, ...]
    even: bool = True

    @cached_property
    def _wide(self) -> Wide:
        return np.array(self.numbers)

    @cached_property
    def _order(self) -> Codes:
        """The codes as their numbers rise, -0 before +0, equal entries from the last code to the first, nan last."""
        size = self._wide + 0.0
        return np.lexsort((-np.arange(len(size)), ~np.signbit(self._wide), size)).astype(np.int16)

    @cached_property
    def _ranks(self) -> Codes:
        found = np.empty(len(self._order), np.int16)
        found[self._order] = np.arange(len(self._order), dtype=np.int16)
        return found

    @cached_property
    def _steps(self) -> tuple[Codes, Wide]:
        """The codes of rising finite numbers without repeats, +0 alone of both zeros, and the least double of each.

        The first has none; a nan follows the last, which no number reaches.
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
        """The place in `_steps` of the least of all doubles that begin with 16 bits, and the most steps among them.

        The middles between small floats end with these bits, so that one comparison is enough.
        """
        first = np.arange(1 << 16, dtype=np.uint64) << 48
        last = first | ((1 << 48) - 1)
        least, most = np.where(first < 1 << 63, (first, last), (last, first)).view(np.float64)
        least, most = np.nan_to_num((least, most), nan=-np.inf)  # beside an infinity, whose cell the nans share
        steps = self._steps[1][:-1]
        found = np.searchsorted(steps, least, side="right")
        spread = np.searchsorted(steps, most, side="right") - found
        return found.astype(np.uint8), int(spread.max(initial=0))

    def values(self, codes: Codes) -> Wide:
        return self._wide.take(codes)

    def nearest(self, numbers: Wide) -> Codes:
        codes, steps = self._steps
        cells, most = self._cells
        begin = np.ascontiguousarray(numbers).view(np.uint64) >> 48
        at = cells.take(begin.view(np.int64))  # numpy before 2 takes no unsigned 64 bits
        for _ in range(most):
            at += numbers >= steps.take(at)
        found = codes.take(at)
        found[np.isnan(numbers)] = self.nearest_to_zero
        return found

    @cached_property
    def nearest_to_zero(self) -> int:
        codes, steps = self._steps
        return int(codes[np.searchsorted(steps[:-1], 0.0, side="right")])

    def ordinals(self, codes: Codes) -> Codes:
        return self._ranks.take(codes)

    def from_ordinals(self, ordinals: Codes) -> Codes:
        _require_within(ordinals, 0, len(self.numbers) - 1)
        return self._order.take(ordinals).astype(np.uint8)


def _require_within(ordinals: Codes, low: int, high: int) -> None:
    if len(ordinals) and (int(ordinals.min()) < low or int(ordinals.max()) > high):
        raise IndexError(f"has a code beyond {low} to {high}")


def _floats(kind: torch.dtype) -> tuple[float, ...]:
    """Return the numbers of 8-bit floats; the sign of a nan is its code's, whatever a processor makes of it."""
    found = torch.arange(256, dtype=torch.uint8).view(kind).double().numpy()
    return tuple(np.copysign(found, np.where(np.arange(256) < 128, 1.0, -1.0)).tolist())


_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

E2M1 = Table((*_HALF, *(-x for x in _HALF)))

E4M3 = Table(_floats(torch.float8_e4m3fn))

E5M2 = Table(_floats(torch.float8_e5m2))

INT8 = Integers(-128, 127, "int8")


def e8m0(codes: Codes) -> Wide:
    """Return 2**(code - 127), nan for 255."""
    found: Wide = np.ldexp(1.0, codes.astype(np.intc) - 127)
    return np.where(codes == 255, np.nan, found)
