"""Find the modules that need a line of their own: far from the median of their siblings, or alone with another value.

Norms grow with the shape and drift over depth, so a module is held against those of its own kind alone, and only what
is both 5 robust deviations and 3 times away from their median counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TypeVar

from .numbers import measure

Key = TypeVar("Key")


DEVIATIONS = 5.0  # robust ones: 1.4826 times the median distance from the median


FACTOR = 3.0


FEWEST = 4  # siblings, of which a median says something


MOST = 1 / 3  # of the siblings: where more are odd for one reason, none is


ALONE = 2  # modules of one value that are no group of their own


def far_from_median(values: Mapping[Key, float | None]) -> dict[Key, float]:
    """Return how many times the median of all each value is, of those that are far from it; zeros are no values."""
    logs = {key: math.log(value) for key, value in values.items() if value and 0 < value < math.inf}
    if len(logs) < FEWEST:
        return {}
    middle = median(logs.values())
    spread = 1.4826 * median(abs(x - middle) for x in logs.values())
    bound = max(DEVIATIONS * spread, math.log(FACTOR))
    found = {key: math.exp(x - middle) for key, x in logs.items() if abs(x - middle) > bound}
    return found if len(found) <= MOST * len(values) else {}


def times_the_median(factor: float) -> str:
    """Write a factor: 6.4x the median, 1/12 of the median."""
    return f"{measure(factor)}x the median" if factor >= 1 else f"1/{measure(1 / factor)} of the median"


def alone_with(values: Sequence[str]) -> tuple[set[int], str]:
    """Return the places of the one or two values unlike at least 3/4 of all, and what most are; none if there is no
    such most."""
    if len(values) < FEWEST:
        return set(), ""
    (common, count), *others = Counter(values).most_common()
    odd = {i for i, value in enumerate(values) if value != common and dict(others)[value] <= ALONE}
    return (odd, common) if 4 * count >= 3 * len(values) and len(odd) <= ALONE else (set(), "")
