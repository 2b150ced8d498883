"""Draw the singular values of a chosen row, and the share of the energy that each rank holds.

Both are over a logarithmic axis, since a spectrum's points stand in equal factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..parts.content import Axis, Curve, Points
from ..parts.quantities import ENERGY, PLACE, RANK, SINGULAR_VALUE
from ..parts.rows import R

if TYPE_CHECKING:
    from ...numerics.spectrum import SpectrumPoints


def spectrum_curves(
    spectra: Callable[[R], Mapping[str, SpectrumPoints | None]],
    ranks: Callable[[R], Mapping[str, int | None]] = lambda _: {},
    levels: Callable[[R], Mapping[str, float | None]] = lambda _: {},
    beyond: Callable[[R], Mapping[str, Points]] = lambda _: {},
) -> tuple[Curve[R], Curve[R]]:
    """Return the curves of a row's spectra, each of which has a name.

    Args:
        ranks: name -> a place among the singular values, which a line marks.
        levels: name -> a size of singular values, which a line marks.
        beyond: name -> points (rank, energy in %) that are no singular values' but estimates.
    """

    def values(row: R) -> dict[str, Points]:
        lines = _lines((name, each.places, each.values) for name, each in spectra(row).items() if each)
        if not lines:
            return {}
        last = max(line[-1][0] for line in lines.values())
        lines |= {name: [(1, level), (last, level)] for name, level in levels(row).items() if level}
        heights = [y for line in lines.values() for _, y in line]
        return lines | _uprights(ranks(row), min(heights), max(heights))

    def energies(row: R) -> dict[str, Points]:
        found = ((name, each.places, [100 * e for e in each.energies]) for name, each in spectra(row).items() if each)
        lines = _lines(found)
        return {**lines, **beyond(row), **_uprights(ranks(row), 0, 100)} if lines else {}

    return (
        Curve("singular values", Axis(PLACE, log=True), Axis(SINGULAR_VALUE, log=True), values),
        Curve("energy by rank", Axis(RANK, log=True), Axis(ENERGY, ends=(0, 100)), energies),
    )


def _lines(found: Iterable[tuple[str, Sequence[int], Sequence[float]]]) -> dict[str, Points]:
    """Return lines by their names, without points at 0 and without lines of no points: an axis of factors has no 0."""
    lines = {name: [(x, y) for x, y in zip(places, heights, strict=True) if y] for name, places, heights in found}
    return {name: line for name, line in lines.items() if line}


def _uprights(ranks: Mapping[str, int | None], low: float, high: float) -> dict[str, Points]:
    return {f"{name} {at}": [(at, low), (at, high)] for name, at in ranks.items() if at}
