"""Give the numbers that codes mean before any scale, and the codes that are nearest to numbers.

Sources: OCP Microscaling Formats (MX) 1.0, tables 3 to 7, for e2m1, e4m3 and E8M0; OCP OFP8 1.0 for e5m2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Codes = npt.NDArray[Any]
Wide = npt.NDArray[np.float64]


class Levels(Protocol):
    """The numbers of codes."""

    def values(self, codes: Codes) -> Wide:
        """Return the numbers of codes, in their shape."""

    def nearest(self, numbers: Wide) -> Codes:
        """Return the codes nearest to numbers, ties to even codes, clamped to the range; of nan the code of 0."""

    def ordinals(self, codes: Codes) -> Codes:
        """Return integers that order codes as their numbers, -0 just below +0."""

    def from_ordinals(self, ordinals: Codes) -> Codes:
        """Return the codes of ordinals."""


@dataclass(frozen=True)
class Integers:
    """Codes that are numbers: `code - offset` for codes low..high."""

    low: int
    high: int
    kind: str = "uint8"  # numpy's name of the type of a code
    offset: int = 0

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
        return ordinals.astype(self.kind)


@dataclass(frozen=True)
class Table:
    """Codes that count the numbers of a table, of which any order and repeats are allowed; nan for codes not in use.

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
    def _steps(self) -> tuple[Codes, Wide, npt.NDArray[np.bool_]]:
        """The codes of rising numbers without repeats, +0 alone of both zeros, the midpoints, and who has each."""
        order = self._order[~np.isnan(self._wide[self._order])]
        values = self._wide[order] + 0.0
        last = np.append(values[1:] != values[:-1], True)  # of -0 and +0 the latter, of equal entries the least code
        codes, values = order[last], values[last]
        middles = (values[1:] + values[:-1]) / 2
        upper = codes[1:] % 2 == 0 if self.even else np.zeros(len(middles), np.bool_)
        return codes.astype(np.uint8), middles, upper

    def values(self, codes: Codes) -> Wide:
        return self._wide.take(codes)

    def nearest(self, numbers: Wide) -> Codes:
        codes, middles, upper = self._steps
        at = np.searchsorted(middles, numbers, side="left")
        tie = np.flatnonzero(middles.take(at, mode="clip") == numbers)
        flat = at.reshape(-1)
        flat[tie] += upper.take(flat[tie], mode="clip") & (flat[tie] < len(middles))
        zero = self.nearest_to_zero
        return np.where(np.isnan(numbers), zero, codes.take(at)).astype(np.uint8)

    @cached_property
    def nearest_to_zero(self) -> int:
        codes, middles, _ = self._steps
        return int(codes[np.searchsorted(middles, 0.0)])

    def ordinals(self, codes: Codes) -> Codes:
        return self._ranks.take(codes)

    def from_ordinals(self, ordinals: Codes) -> Codes:
        return self._order.take(ordinals).astype(np.uint8)


def _floats(kind: torch.dtype) -> tuple[float, ...]:
    return tuple(torch.arange(256, dtype=torch.uint8).view(kind).double().tolist())


def _finite(numbers: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(x if abs(x) < float("inf") else float("nan") for x in numbers)


_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

E2M1 = Table((*_HALF, *(-x for x in _HALF)))

E4M3 = Table(_floats(torch.float8_e4m3fn))

E5M2 = Table(_floats(torch.float8_e5m2))

INT8 = Integers(-128, 127, "int8")


def e8m0(codes: Codes) -> Wide:
    """Return 2**(code - 127), nan for 255."""
    found: Wide = np.ldexp(1.0, codes.astype(np.intc) - 127)
    return np.where(codes == 255, np.nan, found)
