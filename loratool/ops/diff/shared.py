"""Tell what adapters share, pair by pair and in all, in numbers and in a word: whether they pull the same way or fight.

A cosine alone does not tell. Two changes may use the same directions for other things: their cosine is near 0, and yet
neither is left alone in a sum. That is their interference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from ...numerics.factored_svd import factored_svd
from ...numerics.overlaps import Overlaps, overlaps, stacked

Matrix = tuple[tuple[float, ...], ...]


# The least cosine -> what two changes are. From 0.9 on, four fifths of either (0.81 of its energy) is along the other,
# from 0.3 a tenth (0.09); random directions of usual sizes have less than 0.01.
COSINES = {0.9: "alike", 0.3: "related", -0.3: "unrelated", -math.inf: "opposed"}


# Of "unrelated" changes, those that cross: a tenth of the interference of two equal ones (as 0.3 is a tenth of the
# energy), and twice that of random directions, which small matrices and high ranks have without any reason.
CROSSING, LEAST, TIMES_RANDOM = "crossing", 0.1, 2.0


# word -> what it means for a sum
MEANINGS = {
    "alike": "one change but for its size, which a sum has twice",
    "related": "they pull the same way, and a sum has what they share twice",
    "opposed": "they pull against each other, and a sum has less of both",
    CROSSING: "they read or write the same directions, mostly for different things, and a sum mixes them",
    "unrelated": "each has directions of its own, and a sum has both changes as they are",
}


FIGHTING = ("opposed", CROSSING)


def relation(cosine: float, interference: float, random: float) -> str:
    """Return the word, a key of MEANINGS, for two changes; `random` is the interference of random directions."""
    word = next(word for least, word in COSINES.items() if cosine >= least)
    crosses = word == "unrelated" and interference >= max(LEAST, TIMES_RANDOM * random)
    return CROSSING if crosses else word


@dataclass(frozen=True)
class AdapterPair:
    """Two of several adapters, over all modules; one that an adapter lacks is 0 there.

    Attributes:
        first, second: the adapters, counted from 0 in their order.
        interference: of both (`numerics.overlaps`) over the sum of their singular values: 0 if they share no direction,
            1 if they are equal.
        random_interference: about what it would be if their directions were random.
        relation: a key of MEANINGS.
        inputs, outputs: the share of their energy that reads what the other reads, and that writes what it writes.
    """

    first: int
    second: int
    cosine: float
    interference: float
    random_interference: float
    relation: str
    inputs: float
    outputs: float


@dataclass(frozen=True)
class Shared:
    """The cosines and the interference of T adapters over all modules.

    Attributes:
        cosines: T rows of T; 0 with an adapter without a change.
        interference: of all together; 0 if no two share a direction, 1 for two equal ones, (T - 1)^2 for T.
        random_interference: about what it would be if their directions were random.
    """

    cosines: Matrix
    interference: float
    random_interference: float
    pairs: tuple[AdapterPair, ...]

    @property
    def fighting(self) -> tuple[AdapterPair, ...]:
        return tuple(pair for pair in self.pairs if pair.relation in FIGHTING)


def shared_of(modules: Sequence[Overlaps]) -> Shared:
    """Return what adapters share, from the overlaps of each module."""
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


def as_rows(matrix: Tensor) -> Matrix:
    return tuple(map(tuple, matrix.tolist()))


def overlaps_of_factors(factors: Sequence[tuple[Tensor, Tensor] | None]) -> Overlaps:
    """Return what changes of one module have in common, one for each adapter, None without it.

    Args:
        factors: B (E, out, r) and A (E, r, in), with the weight of the adapter in one of them.
    """
    found = [None if each is None else factored_svd(*each) for each in factors]
    there = next(each for each in found if each)
    return overlaps([each or there.nothing() for each in found]).total()
