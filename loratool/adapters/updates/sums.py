"""Sum arrays without rounding error, for factors that are sums of exact products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...numerics.forms import Wide


def sum_exactly(summands: Iterable[Wide]) -> list[Wide]:
    """Return float64 arrays with the same sum, element by element and exactly: mostly two, the sum and its error."""
    from ...numerics.error_free import two_sum

    parts: list[Wide] = []
    rest = list(summands)
    while rest:
        total, *others = rest
        rest = []
        for each in others:
            total, error = two_sum(total, each)
            if error.any():
                rest.append(error)
        parts.append(total)
    return parts
