"""Find the modules that need a line of their own: far from the median of their siblings, or alone with another value.

Norms grow with the shape and drift over depth, so a module is held against those of its own kind in the layers around
it, and only what is both 5 robust deviations and 3 times away from their median counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

from .numbers import measure

DEVIATIONS = 5.0  # robust ones: 1.4826 times the median distance from the median


FACTOR = 3.0


FEWEST = 4  # siblings, of which a median says something


NEAREST = 8  # layers that one is held against


MOST = 1 / 3  # of the siblings: where more are odd for one reason, none is


ALONE = 2  # modules of one value that are no group of their own


def far_from_siblings(values: Sequence[float | None], by_depth: bool = False) -> dict[int, float]:
    """Return the places of values far from their median, each with how many times it; zeros are no values.

    Args:
        by_depth: the values are of consecutive layers. Each is held against the nearest NEAREST, so that a trend over
            depth neither counts nor hides anything.
    """
    logs = {i: math.log(value) for i, value in enumerate(values) if value and 0 < value < math.inf}
    if len(logs) < FEWEST:
        return {}
    places = list(logs)
    if by_depth and len(places) > NEAREST:
        middles = [median(logs[j] for j in _nearest(places, at)) for at in range(len(places))]
    else:
        middles = [median(logs.values())] * len(places)
    off = {i: logs[i] - middle for i, middle in zip(places, middles, strict=True)}
    spread = 1.4826 * median(map(abs, off.values()))
    bound = max(DEVIATIONS * spread, math.log(FACTOR))
    found = {i: math.exp(distance) for i, distance in off.items() if abs(distance) > bound}
    return found if len(found) <= MOST * len(values) else {}


def _nearest(places: Sequence[int], at: int) -> Sequence[int]:
    """Return the NEAREST places around one, without it."""
    start = min(max(at - NEAREST // 2, 0), len(places) - NEAREST - 1)
    return [place for i, place in enumerate(places[start : start + NEAREST + 1], start) if i != at]


def times(factor: float) -> str:
    """Write a factor: 6.40x, 1/12.0 of."""
    return f"{measure(factor)}x" if factor >= 1 else f"1/{measure(1 / factor)} of"


def alone_with(values: Sequence[str]) -> tuple[set[int], str]:
    """Return the places of the one or two values unlike at least 3/4 of all, and what most are; none if there is no
    such most."""
    if len(values) < FEWEST:
        return set(), ""
    (common, count), *others = Counter(values).most_common()
    odd = {i for i, value in enumerate(values) if value != common and dict(others)[value] <= ALONE}
    return (odd, common) if 4 * count >= 3 * len(values) and len(odd) <= ALONE else (set(), "")
