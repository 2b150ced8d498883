"""Choose how many singular values of each matrix to keep, by one of RANK_RULES or a budget for all matrices.

A rule takes the computed part of a matrix's spectrum, and returns the number of values to keep, or None if it needs
more of them. A budget compares all matrices: the next triplet of a matrix adds sigma^2 for m + n parameters, and less
each time. The best ratio that still fits is taken first (the greedy algorithm for a knapsack). If all matrices have one
size, no other choice keeps more. Otherwise another choice may keep more, by less than the largest sigma^2 not taken:
with a fraction of the first triplet that did not fit, the greedy choice would be optimal (Dantzig, Operations Research
5, 1957).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..errors import UsageError


@dataclass(frozen=True)
class SingularValues:
    """The computed singular values of a matrix, or of a stack of matrices that get one common rank."""

    squares: tuple[float, ...]  # sigma^2, falling; summed over the stack
    total: float  # ||D||^2, including values that are not in `squares`
    cost: int  # parameters per rank
    complete: bool  # no singular value is missing from `squares`
    noise: float | None = None  # the edge of the noise; of a stack, the root of the sum of its matrices' squares


def fixed_rank(spectrum: SingularValues, value: float) -> int | None:
    """Return `value`, or the matrix's rank if that is lower."""
    known = len(spectrum.squares)
    return min(int(value), known) if spectrum.complete or known >= value else None


def energy_rank(spectrum: SingularValues, value: float) -> int | None:
    """Return the least k whose squares sum to `value` of ||D||^2 (peft/tuners/lora/conversion.py: a float rank)."""
    energy, wanted = 0.0, value * spectrum.total * (1 - 1e-12)
    for k, square in enumerate(spectrum.squares, 1):
        energy += square
        if energy >= wanted:
            return k
    return len(spectrum.squares) if spectrum.complete else None


def ratio_rank(spectrum: SingularValues, value: float) -> int | None:
    """Count the sigmas above sigma_1 / value (kohya's networks/resize_lora.py, index_sv_ratio, returns one more)."""
    count = sum(math.sqrt(square) * value > math.sqrt(spectrum.squares[0]) for square in spectrum.squares)
    return count if spectrum.complete or count < len(spectrum.squares) else None


def cumulative_rank(spectrum: SingularValues, value: float) -> int | None:
    """Return the least k whose sigmas sum to `value` of their total (kohya's index_sv_cumulative returned one more)."""
    if not spectrum.complete:
        return None
    sigmas = [math.sqrt(square) for square in spectrum.squares]
    total, wanted = 0.0, value * math.fsum(sigmas) * (1 - 1e-12)
    for k, sigma in enumerate(sigmas, 1):
        total += sigma
        if total >= wanted:
            return k
    return len(sigmas)


def norm_rank(spectrum: SingularValues, value: float) -> int | None:
    """Return the least k that keeps `value` of ||D||, not of its square (kohya's index_sv_fro returned one more)."""
    return energy_rank(spectrum, value * value)


def noise_rank(spectrum: SingularValues, value: float) -> int | None:
    """Count the sigmas above `value` times the edge of the noise (`numerics/rounding_noise.py`); the count may be 0."""
    assert spectrum.noise is not None, "only who knows the noise offers the rule"
    count = sum(square > (value * spectrum.noise) ** 2 for square in spectrum.squares)
    return count if spectrum.complete or count < len(spectrum.squares) else None


# name -> a function from (singular values, value of the option) to a rank, or to None if it needs more values
RANK_RULES: dict[str, Callable[[SingularValues, float], int | None]] = {
    "rank": fixed_rank,
    "energy": energy_rank,
    "sv_ratio": ratio_rank,
    "sv_cumulative": cumulative_rank,
    "sv_fro": norm_rank,
    "noise": noise_rank,
}

# rules of one file alone, which `combine` has not -> why
OF_ONE_FILE = {
    "noise": "it measures the rounding of one file, but a combination has several; resize the adapters by it first"
}

RULES_OF_SEVERAL = [rule for rule in RANK_RULES if rule not in OF_ONE_FILE]

ALONE = ("noise",)  # rules that need no value: it is 1

WHOLE = ("sv_cumulative",)  # rules that need all singular values

SHARES = ("energy", "sv_cumulative", "sv_fro")  # rules whose value is a share of something

MOST = 1 << 62  # beyond every disk

MOST_RANK = 1 << 16  # beyond every matrix

NOISE_IS_PLAIN = (
    "the rule noise measures a change, but with --imatrix the singular values are those of its effect on the outputs"
)

BUDGETS = ("params", "size")  # for all matrices together


def read_rule(
    requested: Mapping[str, float | None], rank_rule: tuple[str, float] | None = None
) -> tuple[str, float] | None:
    """Return the one rule that was requested, and its value; None for none.

    Args:
        requested: rule or budget -> its value, None if it was not requested.
        rank_rule: a rule with its value, in place of one in `requested`.

    Raises:
        UsageError: there are two rules, or a value is out of range.
    """
    chosen = [(name, float(min(value, MOST))) for name, value in requested.items() if value is not None]
    chosen += [rank_rule] if rank_rule else []
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(name for name, _ in chosen)} exclude each other")
    for name, value in chosen:
        if name not in (*RANK_RULES, *BUDGETS):
            raise UsageError(f"the rule {name!r} is none of {', '.join(RANK_RULES)}")
        if name == "rank" and not (value <= MOST_RANK and value.is_integer()):
            raise UsageError(f"rank {value:g} is not a whole number up to {MOST_RANK}")
        if not value > 0 or (name in SHARES and value > 1) or (name == "sv_ratio" and value < 1) or math.isinf(value):
            raise UsageError(f"{name} {value:g} is out of range")
    return chosen[0] if chosen else None


def choose_ranks(
    rule: str, value: float, spectra: Mapping[str, SingularValues], most: int | None = None
) -> dict[str, int]:
    """Return the rank of each matrix, at least 1: a module without factors would no longer be a target.

    Args:
        value: of the rule; for one of BUDGETS, the total number of parameters.
        most: the largest rank of any matrix.

    Raises:
        UsageError: rank 1 everywhere exceeds the budget.
    """
    if rule == "rank":
        ranks = dict.fromkeys(spectra, int(value))
    elif rule in RANK_RULES:
        ranks = {name: RANK_RULES[rule](spectrum, value) or 1 for name, spectrum in spectra.items()}
    else:
        budget, least = int(value), sum(spectrum.cost for spectrum in spectra.values())
        if budget < least:
            raise UsageError(
                f"--{rule} is too little: rank 1 everywhere takes {least} parameters, and {max(0, budget)} fit in"
            )
        rest = {name: replace(spectrum, squares=spectrum.squares[1:most]) for name, spectrum in spectra.items()}
        ranks = {name: 1 + more for name, more in budget_ranks(rest, budget - least).items()}
    return {name: min(max(1, rank), most or rank) for name, rank in ranks.items()}


def budget_ranks(spectra: Mapping[str, SingularValues], budget: int) -> dict[str, int]:
    """Return ranks with `budget` parameters in total, by energy per parameter; a matrix may get 0.

    Other ranks keep more energy by less than the largest sigma^2 not taken; if all costs are equal, none keep more.
    """
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


def rank_for(spectrum: SingularValues, share: float, full: int) -> int:
    """Estimate the rank that keeps `share` of ||D||^2, by a power law if the computed values are too few.

    The law k^-p starts at the last known square, and its sum up to the rank `full` is the missing energy.
    """
    k = energy_rank(spectrum, share)
    if k is not None:
        return k
    known, last = len(spectrum.squares), spectrum.squares[-1]
    missing = spectrum.total - math.fsum(spectrum.squares)
    import numpy as np

    beyond = np.arange(known + 1, full + 1) / known
    low, high = 0.0, 8.0
    for _ in range(40):
        p = (low + high) / 2
        low, high = (p, high) if last * float((beyond**-p).sum()) > missing else (low, p)
    wanted = share * spectrum.total - math.fsum(spectrum.squares)
    return min(full, known + 1 + int(np.searchsorted(last * (beyond**-low).cumsum(), wanted)))
