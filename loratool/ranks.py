"""How many singular values of each matrix are kept: RANK_RULES.

A rule sees what was computed of a matrix's spectrum, and says how many to keep, or None where it must see more. The
budget is the one rule that looks at all matrices at once: each next triplet of a matrix brings sigma^2 for m + n
parameters, less and less, so taking the best offers first is the best choice (a knapsack whose items of one matrix
fall in value).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spectrum:
    """Of a matrix, or of a stack of them whose ranks are one: squares falls, sum over a stack; cost: parameters a rank.

    total: ||D||^2; whole: whether nothing is left beyond `squares`.
    """

    squares: tuple[float, ...]
    total: float
    cost: int
    whole: bool


def fixed_rank(spectrum: Spectrum, value: float) -> int | None:
    """The same for all, or the matrix's own rank where that is lower."""
    found = len(spectrum.squares)
    return min(int(value), found) if spectrum.whole or found >= value else None


def energy_rank(spectrum: Spectrum, value: float) -> int | None:
    """The least k whose squares sum to `value` of ||D||^2 (peft/tuners/lora/conversion.py: a float rank)."""
    kept, wanted = 0.0, value * spectrum.total * (1 - 1e-12)
    for k, square in enumerate(spectrum.squares, 1):
        kept += square
        if kept >= wanted:
            return k
    return len(spectrum.squares) if spectrum.whole else None


def ratio_rank(spectrum: Spectrum, value: float) -> int | None:
    """Those above sigma_1 / value (kohya's networks/resize_lora.py, index_sv_ratio; theirs are one more)."""
    kept = sum(math.sqrt(square) * value > math.sqrt(spectrum.squares[0]) for square in spectrum.squares)
    return kept if spectrum.whole or kept < len(spectrum.squares) else None


def cumulative_rank(spectrum: Spectrum, value: float) -> int | None:
    """The least k whose sigmas sum to `value` of all of them (index_sv_cumulative; theirs was one more)."""
    if not spectrum.whole:
        return None
    sigmas = [math.sqrt(square) for square in spectrum.squares]
    kept, wanted = 0.0, value * math.fsum(sigmas) * (1 - 1e-12)
    for k, sigma in enumerate(sigmas, 1):
        kept += sigma
        if kept >= wanted:
            return k
    return len(sigmas)


def norm_rank(spectrum: Spectrum, value: float) -> int | None:
    """The least k that keeps `value` of ||D||, not of its square (index_sv_fro; theirs was one more)."""
    return energy_rank(spectrum, value * value)


# name -> how many of one matrix
RANK_RULES: dict[str, Callable[[Spectrum, float], int | None]] = {
    "rank": fixed_rank,
    "energy": energy_rank,
    "sv_ratio": ratio_rank,
    "sv_cumulative": cumulative_rank,
    "sv_fro": norm_rank,
}


def budget_ranks(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int]:
    """The ranks that keep the most energy for `budget` parameters in all; a matrix may get 0."""
    ranks = dict.fromkeys(spectra, 0)
    left = budget
    offers = [(-s.squares[0] / s.cost, name) for name, s in spectra.items() if s.squares and s.cost]
    heapq.heapify(offers)
    while offers:
        _, name = heapq.heappop(offers)
        spectrum = spectra[name]
        if spectrum.cost > left:
            continue
        left -= spectrum.cost
        ranks[name] += 1
        if ranks[name] < len(spectrum.squares):
            heapq.heappush(offers, (-spectrum.squares[ranks[name]] / spectrum.cost, name))
    return ranks


def rank_for(spectrum: Spectrum, share: float, full: int) -> int:
    """About how many would keep `share` of ||D||^2: read off what was computed, beyond it from a power law.

    The law k^-p starts at the last square known and holds as much as is missing, spread to the rank `full`.
    """
    k = energy_rank(spectrum, share)
    if k is not None:
        return k
    known, last = len(spectrum.squares), spectrum.squares[-1]
    missing = spectrum.total - math.fsum(spectrum.squares)
    beyond = np.arange(known + 1, full + 1) / known
    low, high = 0.0, 8.0
    for _ in range(40):
        p = (low + high) / 2
        low, high = (p, high) if last * float((beyond**-p).sum()) > missing else (low, p)
    wanted = share * spectrum.total - math.fsum(spectrum.squares)
    return min(full, known + 1 + int(np.searchsorted(last * (beyond**-low).cumsum(), wanted)))
