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
KIND = Quantity("kind", "kind of update, or of weight")
UPDATE = Quantity("update", "kinds of its updates")
DTYPE = Quantity("dtype", "dtype of its tensors")
STORED_AS = Quantity("stored as", "dtype, or format of its codes; if a merge changes it, the base's comes first")
PARAMETERS = Quantity("parameters", "count of its numbers")
LORA_TARGET = Quantity("LoRA target", "kind of LoRA target")
COUNT = Quantity("count", "count of tensors")
BITS = Quantity("bits", "stored bits per number of a matrix, with those of its scales")
SIZE = Quantity("size", "bytes in the files", "B")
PATCH_SIZE = Quantity("in patch", "bytes in the patch", "B")
OF_SIZE = Quantity("of size", "bytes in the patch, relative to those of the tensor", "%")
SIZE_EACH = Quantity("size each", "bytes of one tensor", "B")

# LoRA's rank and scale
RANK = Quantity("rank", "rank of the delta B A")
NEW_RANK = Quantity("new rank", "rank of the written delta")
RANKS = Quantity("ranks", "rank in each adapter, 0 if it does not have the module")
ALPHA = Quantity("alpha", "alpha, as stored in the adapter")
SCALE = Quantity("scale", "s in W + s B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA, times the weight")

# a delta, and what is left of it
DELTA = Quantity("delta", "the Frobenius norm of the delta, s B A for LoRA")
DELTA_OVER_W = Quantity("delta/W", "norm of the delta, relative to that of the base's weight", "%")
KEPT = Quantity("kept", "share of the delta that survives rounding to the output's dtype, or to codes", "%")
MISSED = Quantity("missed", "distance of the result from W + delta, relative to the norm of the delta")
ENERGY = Quantity("energy", "share of the sum of squared singular values that the rank keeps", "%")
SHARED = Quantity("shared", "share of the deltas' energy in the directions that they share", "%")
ERROR = Quantity("error", "distance of the written delta from the original, relative to the norm of the original", "%")
OUTPUT_ERROR = Quantity(
    "out. error", "lost share of the delta's effect on the outputs, for the inputs of the imatrix", "%"
)
RESIDUAL = Quantity("residual", "norm of the part of the delta that the factors do not keep")
OVER_NOISE = Quantity("over noise", "count of singular values that are larger than rounding of the models can cause")
GAP_AT_MOST = Quantity("gap (at most)", "missed share of the best energy of this rank, a bound that fails once in 10^9")
GAP_ABOUT = Quantity("gap (about)", "missed share of the best energy of this rank, estimated")
STORED = Quantity("stored", "error from rounding the factors to their dtype, relative to the norm of their product")

# the initialization of an adapter
GAP = Quantity("gap", "missed share of the best energy of this rank, at most")
START_ERROR = Quantity("error", "distance of residual + s B A from the base's weight, relative to its norm", "%")

# a conversion
HOW = Quantity("how", "how the factors were converted: copied, rows moved, rescaled, another kind, or rounded")
FROM_MODULES = Quantity("from", "source modules of the adapter, if their names differ")
FROM_TYPE = Quantity("from", "dtype, or format of its codes, before")
TO_TYPE = Quantity("to", "dtype after")
BECAME_0 = Quantity("became 0", "numbers that are too small for the new dtype")

# singular values
NORM = Quantity("norm", "Frobenius norm; for a stack, over all its matrices")
LARGEST = Quantity("largest", "the largest singular value")
STABLE_RANK = Quantity("stable", "stable rank: squared norm over squared largest singular value")
EFFECTIVE_RANK = Quantity(
    "eff. rank",
    "how many directions it uses: exp of the entropy of the singular values' shares (Roy and Vetterli 2007)",
)
RANK_50 = Quantity("50%", "lowest rank with 50% of the energy")
RANK_90 = Quantity("90%", "lowest rank with 90% of the energy")
RANK_99 = Quantity("99%", "lowest rank with 99% of the energy")
OUT_OF = Quantity("of", "total count: of possible singular values, or of checked singular vectors")
NEW = Quantity("new", "intruder dimensions: leading singular vectors that match none of the base")
FIRST_NEW = Quantity("first new", "position of the first new singular vector, 1 for the largest singular value")
CHANGE = Quantity("change", "norm of the difference, relative to that of the base's weight", "%")
PLACE = Quantity("number", "position of a singular value, 1 for the largest, or of an angle, 1 for the smallest")
SINGULAR_VALUE = Quantity("singular value", "how much the weight, or its delta, stretches one direction")

# two sides or more
APART = Quantity("apart", "distance relative to the larger norm; for several adapters, the largest of any pair", "%")
INTERFERENCE = Quantity(
    "interference", "how much they use the same directions: 0 for not at all, (T - 1)^2 for T equal deltas"
)
RANDOM = Quantity("random", "approximate interference of random directions")
B_OVER_A = Quantity("size B/A", "the norm of B's delta over that of A's")
A_DELTA_OVER_W = Quantity("A delta/W", "norm of A's delta, relative to that of the base's weight", "%")
B_DELTA_OVER_W = Quantity("B delta/W", "norm of B's delta, relative to that of the base's weight", "%")
A_AMPLIFIED = Quantity("A amplified", "norm of A's delta, relative to that of the base in the same directions")
B_AMPLIFIED = Quantity("B amplified", "norm of B's delta, relative to that of the base in the same directions")
PHI = Quantity("phi", "share of A's directions that is in B's: 1 is all", ends=(0, 1))
PRINCIPAL_ANGLE = Quantity("angle", "principal angle between the spans of the two deltas", "°")
ANGLE = Quantity("angle", "the largest principal angle between the spans, on the input side", "°")
COSINE = Quantity(
    "cosine",
    "cosine of the two deltas as vectors: 1 is the same direction, -1 the opposite, 0 orthogonal",
    ends=(-1, 1),
)
LEAST_COSINE = Quantity("least cosine", "lowest cosine of any pair of adapters", ends=(-1, 1))
PAIR = Quantity("pair", "pair of adapters with the lowest cosine")
NORMS = Quantity("norms", "the norm in each adapter")
MAX_DIFFERENCE = Quantity("max |B-A|", "the largest difference of two numbers")
ULPS = Quantity("ulps", "largest difference, in steps between numbers of the dtype")
CHANGED = Quantity("changed", "share of numbers that differ", "%")


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
