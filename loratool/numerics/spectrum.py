"""Thin a spectrum to the few points that its curve needs, so that a report of many matrices stays small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .factored_svd import RANK_TOLERANCE

FIRST = 8  # places of which all are points


@dataclass(frozen=True)
class SpectrumPoints:
    """Some of a matrix's singular values, or of a stack of matrices their root mean squares, to 6 digits.

    Attributes:
        places: 1 for the largest; all up to FIRST, from there steps of about sqrt 2, and the last that is known.
        values: the singular values there, and 0 for what rounding may have made.
        energies: the share of the sum of all squares up to there, 1 of nothing.
    """

    places: tuple[int, ...]
    values: tuple[float, ...]
    energies: tuple[float, ...]


def spectrum_points(
    squares: Tensor, matrices: int = 1, total: float | None = None, noise: float = RANK_TOLERANCE
) -> SpectrumPoints:
    """Return the points of a spectrum.

    Args:
        squares: of singular values, falling, float64, (k,); of a stack summed over its matrices.
        matrices: how many are in the stack.
        total: ||D||^2, where `squares` are not all of it.
        noise: the part of the largest singular value below which others may be rounding's.
    """
    squares = squares.cpu()
    squares = torch.where(squares >= noise**2 * squares[:1], squares, 0.0)
    places = _places(len(squares))
    at = torch.tensor(places, dtype=torch.int64) - 1
    values, sums = (squares[at] / matrices).sqrt(), squares.cumsum(0)[at]
    whole = float(squares.sum()) if total is None else total
    energies = (sums / whole).clamp(max=1.0) if whole else torch.ones_like(sums)
    return SpectrumPoints(places, _short(values), _short(energies))


def _places(known: int) -> tuple[int, ...]:
    steps = (round(2 ** (half / 2)) for half in range(2 * known.bit_length()))
    return tuple(sorted(place for place in {*range(1, FIRST + 1), *steps, known} if 0 < place <= known))


def _short(numbers: Tensor) -> tuple[float, ...]:
    found: Sequence[float] = numbers.tolist()
    return tuple(float(f"{each:.6g}") for each in found)
