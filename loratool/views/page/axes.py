"""Say in a sentence what each column of a page is, in which unit, and by which kind of colours it is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ColumnAxis:
    """The meaning of a column's numbers.

    Attributes:
        meaning: a sentence without its full stop.
        unit: `%`, `°` or `B`; empty for plain numbers.
        factor: by which a report's number is multiplied to be in that unit.
        ends: of the scale, None for the least and the largest number; of two colours if 0 is in the middle.
        colours: a word of the column -> its colour, where it should be the same on every page.
    """

    meaning: str
    unit: str = ""
    factor: float = 1.0
    ends: tuple[float, float] | None = None
    colours: Mapping[str, str] = field(default_factory=dict)


def _share(meaning: str) -> ColumnAxis:
    return ColumnAxis(meaning, "%", 100.0)


# title of a column -> what it is
AXES: dict[str, ColumnAxis] = {
    "shape": ColumnAxis("rows and columns of the weight"),
    "kind": ColumnAxis("the kind of update, or of weight"),
    "update": ColumnAxis("the kinds of its updates"),
    "dtype": ColumnAxis("the type in which its tensors are stored"),
    "stored as": ColumnAxis("the type, or the format of its codes; where a merge changes that, the base's first"),
    "rank": ColumnAxis("the rank of the delta B A"),
    "alpha": ColumnAxis("alpha, as the adapter says it"),
    "scale": ColumnAxis("s in W + s B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA, times the weight"),
    "ranks": ColumnAxis("the rank in each adapter, 0 where it lacks the module"),
    "parameters": ColumnAxis("how many numbers it has"),
    "LoRA target": ColumnAxis("the kind of target that it is for LoRA"),
    "count": ColumnAxis("how many tensors"),
    "bits": ColumnAxis("bits in which a number of a matrix is stored, those of its scales included"),
    "delta": ColumnAxis("the Frobenius norm of the delta, s B A for LoRA"),
    "delta/W": _share("the norm of the delta beside that of the base's weight"),
    "kept": _share("the share of the delta that rounding to the output's type, or to codes, has left"),
    "missed": ColumnAxis("the distance of the result from W + delta, beside the norm of the delta"),
    "size": ColumnAxis("bytes in the files", "B"),
    "size each": ColumnAxis("bytes of one of the tensors", "B"),
    "eff. rank": ColumnAxis(
        "over how many directions it spreads: exp of the entropy of the singular values' shares (Roy and Vetterli 2007)"
    ),
    "norm": ColumnAxis("the Frobenius norm; of a stack that of all its matrices"),
    "largest": ColumnAxis("the largest singular value"),
    "stable": ColumnAxis("the stable rank: the square of the norm over that of the largest singular value"),
    "50%": ColumnAxis("the least rank that holds half of the energy"),
    "90%": ColumnAxis("the least rank that holds nine tenths of the energy"),
    "99%": ColumnAxis("the least rank that holds 99 hundredths of the energy"),
    "of": ColumnAxis("out of how many: singular values that there can be, or singular vectors that were looked at"),
    "new": ColumnAxis("leading singular vectors that have no match in the base: intruder dimensions"),
    "first new": ColumnAxis("the place of the first new singular vector, from 1 for the largest singular value"),
    "change": _share("the norm of the difference beside that of the base's weight"),
    "new rank": ColumnAxis("the rank of what is written"),
    "energy": _share("the share of the sum of the squared singular values that the rank holds"),
    "out. error": _share("what is lost of the delta's effect on the outputs, by the inputs of the imatrix"),
    "error": _share("the distance of what is written from the delta, beside the delta's norm"),
    "over noise": ColumnAxis("how many singular values are larger than what rounding the models can have made"),
    "residual": ColumnAxis("the norm of what the factors do not hold of the delta"),
    "gap (at most)": ColumnAxis("what share of the best energy of this rank is missed, proven but for 1 in 10^9"),
    "gap (about)": ColumnAxis("what share of the best energy of this rank is missed, as estimated"),
    "stored": ColumnAxis("what rounding the factors to their type adds, beside the norm of their product"),
    "apart": _share("the distance of the two beside the larger norm; of several adapters the largest of any two"),
    "interference": ColumnAxis("how much they use the same directions: 0 for not at all, (T - 1)^2 for T equal deltas"),
    "random": ColumnAxis("about what the interference would be if directions were random"),
    "size B/A": ColumnAxis("the norm of B's delta over that of A's"),
    "A delta/W": _share("the norm of A's delta beside that of the base's weight"),
    "B delta/W": _share("the norm of B's delta beside that of the base's weight"),
    "A amplified": ColumnAxis("the norm of A's delta over that of what the base has in the same directions"),
    "B amplified": ColumnAxis("the norm of B's delta over that of what the base has in the same directions"),
    "phi": ColumnAxis("how much of A's directions lies in B's: 1 is all", ends=(0, 1)),
    "angle": ColumnAxis("the largest principal angle between the spans, on the input side", "°", 180 / math.pi),
    "cosine": ColumnAxis(
        "of the two deltas as vectors: 1 is the same direction, -1 the opposite, 0 none in common", ends=(-1, 1)
    ),
    "least cosine": ColumnAxis("the cosine of the two adapters that have the least", ends=(-1, 1)),
    "pair": ColumnAxis("the two adapters that have the least cosine"),
    "A": ColumnAxis("the norm in A"),
    "B": ColumnAxis("the norm in B"),
    "norms": ColumnAxis("the norm in each adapter"),
    "max |B-A|": ColumnAxis("the largest difference of two numbers"),
    "ulps": ColumnAxis("the largest difference in steps from a number to the next of its type"),
    "changed": _share("the share of numbers that differ"),
    "verdict": ColumnAxis(
        "exact, right with another rounding, wrong, or codes that another program chose",
        colours={"exact": "#009E73", "rounding": "#0072B2", "requantized": "#E69F00", "wrong": "#D55E00"},
    ),
    "what": ColumnAxis("which rounding, or what is wrong"),
    "shared": _share("the share of the changes' energy in the directions that they share"),
}
