"""Overlaps of adapters, for each pair and for all: cosines, interference, and a word for their relation.

A cosine alone is not enough. Two changes can use the same directions for different things: their cosine is near 0, and
yet each disturbs the other in a sum. Interference measures that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ...numerics.arrays import Array
from ...numerics.factored_svd import factored_svd, in_common_bases
from ...numerics.overlaps import Overlaps, overlaps, stacked
from ...views.diff_shared import AdapterPair, Matrix, Shared, relation


def shared_of(modules: Sequence[Overlaps]) -> Shared:
    """Return the overlaps of adapters, from those of each module."""
    total = stacked(modules).total()
    cosines, (interference, random) = total.cosines.tolist(), (side.tolist() for side in total.of_pairs)
    outputs, inputs = (side.tolist() for side in total.of_sides)
    pairs = [
        AdapterPair(i, j, *numbers, relation(*numbers), inputs[i][j], outputs[i][j])
        for i, j in combinations(range(len(cosines)), 2)
        for numbers in [(cosines[i][j], interference[i][j], random[i][j])]
    ]
    of_all, random_of_all = map(float, total.of_all)
    return Shared(as_rows(total.cosines), of_all, random_of_all, tuple(pairs))


def as_rows(matrix: Array) -> Matrix:
    return tuple(map(tuple, matrix.tolist()))


def overlaps_of_factors(factors: Sequence[tuple[Array, Array] | None]) -> Overlaps:
    """Return the overlaps of changes of one module: one for each adapter, None for an adapter without the module.

    Args:
        factors: B (E, out, r) and A (E, r, in), with the weight of the adapter in one of them.
    """
    B, A = next(each for each in factors if each)
    small = iter(in_common_bases([each for each in factors if each]))
    svds = [factored_svd(*next(small)) if each else None for each in factors]
    first = next(each for each in svds if each)
    return overlaps([each or first.nothing() for each in svds], (B.shape[-2], A.shape[-1])).total()
