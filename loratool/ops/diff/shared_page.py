"""Show what three or more adapters share: the cosines and the interference of each two."""

from __future__ import annotations

from collections.abc import Sequence

from ...reports.numbers import Formatter, correlation, measure
from ...reports.page.content import Figure, Heatmap
from .shared import FIGHTING, Shared
from .shared_document import letters


def shared_heatmaps(shared: Shared) -> tuple[Heatmap, ...]:
    """Return the cosines and the interference of each two, which the lists tell of two adapters."""
    names = letters(len(shared.cosines))
    if len(names) < 3:
        return ()
    pairs = {(pair.first, pair.second): pair.interference for pair in shared.pairs}
    both = [[pairs.get((min(i, j), max(i, j))) for j in range(len(names))] for i in range(len(names))]
    return (
        of_each_two("cosine of each two", "cosine", shared.cosines, correlation),
        of_each_two("interference of each two", "interference", both, measure),
    )


def of_each_two(title: str, cell: str, values: Sequence[Sequence[float | None]], write: Formatter) -> Heatmap:
    """Return the heat map of numbers of each two adapters."""
    names = letters(len(values))
    return Heatmap(title, "adapter", "adapter", cell, names, names, values, write)


def shared_figures(shared: Shared) -> tuple[Figure, ...]:
    """Return how many pairs fight, and the interference of all."""
    random = measure(shared.random_interference)
    return (
        Figure("fighting", f"{len(shared.fighting):,}", f"of {len(shared.pairs):,} pairs are {' or '.join(FIGHTING)}"),
        Figure("interference", measure(shared.interference), f"in all, {random} if directions were random"),
    )
