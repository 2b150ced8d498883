"""The quantities that columns show: title, meaning and unit, each defined once.

Tables in a terminal, pages, heat maps and curves use them. Two meanings of one title are two quantities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# unit -> by which a report's number is multiplied to be in it
UNITS = {"": 1.0, "%": 100.0, "°": 180 / math.pi, "B": 1.0}


@dataclass(frozen=True)
class Quantity:
    """A quantity, or a property in words, that a column shows.

    Attributes:
        title: as it stands above the column.
        meaning: a sentence without its full stop, for pages.
        unit: a key of UNITS; empty for words and plain numbers.
        ends: of the colour scale, None for the least and the largest number; of two colours if 0 is in the middle.
        colours: a word of the column -> its colour, where it should be the same on every page.
    """

    title: str
    meaning: str
    unit: str = ""
    ends: tuple[float, float] | None = None
    colours: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def scale(self) -> float:
        """Return by which a report's number is multiplied to be in the unit."""
        return UNITS[self.unit]


# modules, tensors and how they are stored
SHAPE = Quantity("shape", "rows and columns of the weight")
KIND = Quantity("kind", "the kind of update, or of weight")
UPDATE = Quantity("update", "the kinds of its updates")
DTYPE = Quantity("dtype", "the type in which its tensors are stored")
STORED_AS = Quantity("stored as", "the type, or the format of its codes; where a merge changes that, the base's first")
PARAMETERS = Quantity("parameters", "how many numbers it has")
LORA_TARGET = Quantity("LoRA target", "the kind of target that it is for LoRA")
COUNT = Quantity("count", "how many tensors")
BITS = Quantity("bits", "bits in which a number of a matrix is stored, those of its scales included")
SIZE = Quantity("size", "bytes in the files", "B")
SIZE_EACH = Quantity("size each", "bytes of one of the tensors", "B")

# LoRA's rank and scale
RANK = Quantity("rank", "the rank of the delta B A")
NEW_RANK = Quantity("new rank", "the rank of what is written")
RANKS = Quantity("ranks", "the rank in each adapter, 0 where it lacks the module")
ALPHA = Quantity("alpha", "alpha, as the adapter says it")
SCALE = Quantity("scale", "s in W + s B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA, times the weight")

# a delta, and what is left of it
DELTA = Quantity("delta", "the Frobenius norm of the delta, s B A for LoRA")
DELTA_OVER_W = Quantity("delta/W", "the norm of the delta beside that of the base's weight", "%")
KEPT = Quantity("kept", "the share of the delta that rounding to the output's type, or to codes, has left", "%")
MISSED = Quantity("missed", "the distance of the result from W + delta, beside the norm of the delta")
ENERGY = Quantity("energy", "the share of the sum of the squared singular values that the rank holds", "%")
SHARED = Quantity("shared", "the share of the changes' energy in the directions that they share", "%")
ERROR = Quantity("error", "the distance of what is written from the delta, beside the delta's norm", "%")
OUTPUT_ERROR = Quantity(
    "out. error", "what is lost of the delta's effect on the outputs, by the inputs of the imatrix", "%"
)
RESIDUAL = Quantity("residual", "the norm of what the factors do not hold of the delta")
OVER_NOISE = Quantity("over noise", "how many singular values are larger than what rounding the models can have made")
GAP_AT_MOST = Quantity(
    "gap (at most)", "what share of the best energy of this rank is missed, proven but for 1 in 10^9"
)
GAP_ABOUT = Quantity("gap (about)", "what share of the best energy of this rank is missed, as estimated")
STORED = Quantity("stored", "what rounding the factors to their type adds, beside the norm of their product")

# the start of a training
GAP = Quantity("gap", "what share of the best energy of this rank the start misses at most")
START_ERROR = Quantity("error", "the distance of residual + s B A from the base's weight, beside the norm of that", "%")

# a conversion
HOW = Quantity("how", "what was done to the factors: nothing, other rows, their scale or kind, or a rounding")
FROM_MODULES = Quantity("from", "the modules of the adapter that it is made of, where they have other names")
FROM_TYPE = Quantity("from", "the type, or the format of its codes, before")
TO_TYPE = Quantity("to", "the type after")
BECAME_0 = Quantity("became 0", "numbers that are too small for the new type")

# singular values
NORM = Quantity("norm", "the Frobenius norm; of a stack that of all its matrices")
LARGEST = Quantity("largest", "the largest singular value")
STABLE_RANK = Quantity("stable", "the stable rank: the square of the norm over that of the largest singular value")
EFFECTIVE_RANK = Quantity(
    "eff. rank",
    "over how many directions it spreads: exp of the entropy of the singular values' shares (Roy and Vetterli 2007)",
)
RANK_50 = Quantity("50%", "the least rank that holds half of the energy")
RANK_90 = Quantity("90%", "the least rank that holds nine tenths of the energy")
RANK_99 = Quantity("99%", "the least rank that holds 99 hundredths of the energy")
OUT_OF = Quantity("of", "out of how many: singular values that there can be, or singular vectors that were looked at")
NEW = Quantity("new", "leading singular vectors that have no match in the base: intruder dimensions")
FIRST_NEW = Quantity("first new", "the place of the first new singular vector, from 1 for the largest singular value")
CHANGE = Quantity("change", "the norm of the difference beside that of the base's weight", "%")
PLACE = Quantity(
    "number", "the place of a singular value, from 1 for the largest, or of an angle, from 1 for the least"
)
SINGULAR_VALUE = Quantity("singular value", "how much the weight, or its delta, stretches one of its directions")

# two sides or more
APART = Quantity(
    "apart", "the distance of the two beside the larger norm; of several adapters the largest of any two", "%"
)
INTERFERENCE = Quantity(
    "interference", "how much they use the same directions: 0 for not at all, (T - 1)^2 for T equal deltas"
)
RANDOM = Quantity("random", "about what the interference would be if directions were random")
B_OVER_A = Quantity("size B/A", "the norm of B's delta over that of A's")
A_DELTA_OVER_W = Quantity("A delta/W", "the norm of A's delta beside that of the base's weight", "%")
B_DELTA_OVER_W = Quantity("B delta/W", "the norm of B's delta beside that of the base's weight", "%")
A_AMPLIFIED = Quantity("A amplified", "the norm of A's delta over that of what the base has in the same directions")
B_AMPLIFIED = Quantity("B amplified", "the norm of B's delta over that of what the base has in the same directions")
PHI = Quantity("phi", "how much of A's directions lies in B's: 1 is all", ends=(0, 1))
PRINCIPAL_ANGLE = Quantity("angle", "an angle between the spans of the two deltas, each by the one before", "°")
ANGLE = Quantity("angle", "the largest principal angle between the spans, on the input side", "°")
COSINE = Quantity(
    "cosine", "of the two deltas as vectors: 1 is the same direction, -1 the opposite, 0 none in common", ends=(-1, 1)
)
LEAST_COSINE = Quantity("least cosine", "the cosine of the two adapters that have the least", ends=(-1, 1))
PAIR = Quantity("pair", "the two adapters that have the least cosine")
NORMS = Quantity("norms", "the norm in each adapter")
MAX_DIFFERENCE = Quantity("max |B-A|", "the largest difference of two numbers")
ULPS = Quantity("ulps", "the largest difference in steps from a number to the next of its type")
CHANGED = Quantity("changed", "the share of numbers that differ", "%")


def norm_in(adapter: str) -> Quantity:
    """Return the quantity of an adapter's norms, by the adapter's letter."""
    return Quantity(adapter, f"the norm in {adapter}")


# a verification
VERDICT = Quantity(
    "verdict",
    "exact, right with another rounding, wrong, or codes that another program chose",
    colours={"exact": "#009E73", "rounding": "#0072B2", "requantized": "#E69F00", "wrong": "#D55E00"},
)
WHAT = Quantity("what", "which rounding, or what is wrong")
