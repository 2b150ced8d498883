"""Truncate a change D to a rank, round its factors to their type, and measure the loss.

With weights W of the inputs, D W is truncated instead, and A is divided by W afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..numerics.arrays import Array, Numbers, fetched, sent
from ..numerics.factored_svd import FactoredSVD, factored_svd, relative_distance, rounding_distance
from ..numerics.forms import Form
from ..numerics.linalg import norm, square
from ..numerics.spectrum import SpectrumPoints, spectrum_points
from .stacked import round_factors


@dataclass(frozen=True)
class Figures:
    """The figures measured for a module."""

    norm: float  # ||D||
    energy: float  # ||D||^2, or with the weights W of the inputs ||D W||^2
    kept: float  # the share of the energy within the rank
    error: float  # ||D' - D|| / ||D||, with D' as written
    weighted_error: float | None  # the same for D' W and D W; None without W
    spectrum: SpectrumPoints | None = None  # of D, or of D W; None for several modules


class Weighted(NamedTuple):
    """A change weighted by its effect on the outputs."""

    svd: FactoredSVD  # of D W
    inputs: Array  # the diagonal of W, (E, 1, in), float64


def truncated_factors(
    module: str,
    D: FactoredSVD,
    rank: int,
    form: Form,
    weighted: Weighted | None = None,
    unchanged: tuple[Array, Array] | None = None,
) -> tuple[tuple[Numbers, Numbers], Figures]:
    """Return the best factors of a given rank and type for a stack D: B (E, out, rank) and A (E, rank, in).

    Args:
        module: the module's name, for messages.
        weighted: D weighted, to keep what is best for the outputs.
        unchanged: factors of D, returned unchanged if they have the rank and nothing is weighted.

    Raises:
        NeedsFlag, InputError: as `round_factors`.
    """
    C, inputs = weighted or (D, None)
    factors = unchanged if unchanged and not weighted and unchanged[0].shape[-1] == rank else C.truncated(rank)
    exact_B, exact_A = factors
    rounded = round_factors(module, (exact_B, exact_A if inputs is None else exact_A / inputs), form)
    B, A = (sent(side.wide(), D.S) for side in rounded)
    energy, kept_energy = (float(square(S).sum()) for S in (C.S, C.S[..., :rank]))
    distance = rounding_distance(C, factors, (B, A if inputs is None else A * inputs))
    error = float(norm(distance)) / math.sqrt(energy) if energy else 0.0
    figures = Figures(
        norm=float(norm(D.S)),
        energy=energy,
        kept=share_of(kept_energy, energy),
        error=error if inputs is None else relative_distance(D, factored_svd(B, A)),
        weighted_error=None if inputs is None else error,
        spectrum=spectrum_points(fetched(square(C.S)).sum(0), len(C.S)),
    )
    return rounded, figures


def in_all(figures: Sequence[Figures]) -> Figures:
    """Return the figures over all modules; the weighted error is over the modules that have one."""
    energy = math.fsum(each.energy for each in figures)
    weighted = [(each.weighted_error, math.sqrt(each.energy)) for each in figures if each.weighted_error is not None]
    return Figures(
        norm=math.hypot(*(each.norm for each in figures)),
        energy=energy,
        kept=math.fsum(each.kept * each.energy for each in figures) / energy if energy else 1.0,
        error=_error_in_all([(each.error, each.norm) for each in figures]),
        weighted_error=_error_in_all(weighted) if weighted else None,
    )


def _error_in_all(errors: Sequence[tuple[float, float]]) -> float:
    """Return the error over several modules, from pairs of (relative error, norm)."""
    norm = math.hypot(*(norm for _, norm in errors))
    return math.hypot(*(error * norm for error, norm in errors)) / norm if norm else 0.0


def share_of(part: float, total: float) -> float:
    """Return part / whole, at most 1; 1 if the whole is 0."""
    return min(1.0, part / total) if total else 1.0
