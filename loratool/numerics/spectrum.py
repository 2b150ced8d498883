"""Reduce a spectrum to the few points that its curve needs, so that a report of many matrices stays small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .forms import Wide

RANK_TOLERANCE = 1e-12  # relative to the largest singular value; smaller ones are rounding noise of float64
FIRST = 8  # places that are all points


@dataclass(frozen=True)
class SpectrumPoints:
    """Some of a matrix's singular values, or of a stack of matrices their root mean squares, to 6 digits.

    Attributes:
        places: 1 for the largest; all up to FIRST, then steps of about sqrt 2, and the last known one.
        values: the singular values at these places; 0 if rounding errors may explain them.
        energies: the share of the sum of all squares up to each place; 1 if the sum is 0.
    """

    places: tuple[int, ...]
    values: tuple[float, ...]
    energies: tuple[float, ...]


def spectrum_points(
    squares: Wide, matrices: int = 1, total: float | None = None, noise: float = RANK_TOLERANCE
) -> SpectrumPoints:
    """Return the points of a spectrum.

    Args:
        squares: of singular values, falling, float64, (k,); of a stack, summed over its matrices.
        matrices: the number of matrices in the stack.
        total: ||D||^2, if `squares` are not all of it.
        noise: smaller singular values, relative to the largest one, may be rounding errors.
    """
    numbers: list[float] = squares.tolist()
    numbers = [square if square >= noise**2 * numbers[0] else 0.0 for square in numbers]
    sums, places = [*accumulate(numbers)], curve_places(len(numbers))
    denominator = total or (sums[-1] if sums else 0.0)
    return SpectrumPoints(
        places,
        tuple(six_digits(math.sqrt(numbers[place - 1] / matrices)) for place in places),
        tuple(six_digits(min(1.0, sums[place - 1] / denominator)) if denominator else 1.0 for place in places),
    )


@lru_cache
def curve_places(known: int) -> tuple[int, ...]:
    """Return the places, from 1, that are points of the curve of `known` sorted numbers."""
    steps = (round(2 ** (half / 2)) for half in range(2 * known.bit_length()))
    return tuple(sorted(place for place in {*range(1, FIRST + 1), *steps, known} if 0 < place <= known))


def six_digits(number: float) -> float:
    """Round a number to six digits: a report has very many, and a curve or a shade shows three digits."""
    return float(f"{number:.6g}")
