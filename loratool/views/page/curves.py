"""Curves of a chosen row: its singular values, and the share of the energy that each rank holds.

Both have a logarithmic axis, as the points of a spectrum have equal ratios.
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
    """Return the curves of a row's named spectra.

    Args:
        ranks: name -> the index of a singular value; a line marks it.
        levels: name -> a size of singular values; a line marks it.
        beyond: name -> estimated points (rank, energy in %).
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
        energies_by_name = (
            (name, each.places, [100 * e for e in each.energies]) for name, each in spectra(row).items() if each
        )
        lines = _lines(energies_by_name)
        return {**lines, **beyond(row), **_uprights(ranks(row), 0, 100)} if lines else {}

    return (
        Curve("singular values", Axis(PLACE, log=True), Axis(SINGULAR_VALUE, log=True), values),
        Curve("energy by rank", Axis(RANK, log=True), Axis(ENERGY, ends=(0, 100)), energies),
    )


def _lines(named_points: Iterable[tuple[str, Sequence[int], Sequence[float]]]) -> dict[str, Points]:
    """Return lines by their names, without points at 0, as a logarithmic axis has no 0. Empty lines are left out."""
    lines = {
        name: [(x, y) for x, y in zip(places, heights, strict=True) if y] for name, places, heights in named_points
    }
    return {name: line for name, line in lines.items() if line}


def _uprights(ranks: Mapping[str, int | None], low: float, high: float) -> dict[str, Points]:
    return {f"{name} {at}": [(at, low), (at, high)] for name, at in ranks.items() if at}
