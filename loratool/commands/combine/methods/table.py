"""The methods of `combine`, each with what it acts on, and the unsupported methods of other tools.

The formulas of papers are applied to the changes D_i = s_i B_i A_i. If applied to B and A separately, as in some tools,
they would depend on the choice of factors, and a weighted sum of factors would have cross terms B_i A_j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ....numerics.arrays import Array
from ....numerics.linalg import concatenate
from .cores import iso_c, iso_cts, tsv, wudi
from .delta import WeightedDelta
from .entries import SPREAD, dare_linear, dare_ties, della, magnitude, ties, ties_mergekit
from .knots import knots


def cat(deltas: Sequence[WeightedDelta], density: float) -> tuple[Array, Array]:
    """Return factors of sum w_i D_i, exactly: B (out, sum r_i), with scales and weights, and A (sum r_i, in)."""
    return concatenate([delta.B * delta.weight for delta in deltas], 1), concatenate([delta.A for delta in deltas])


# what a method is given of each change, and so what it returns:
#   factors: B and A; it returns factors of the result
#   entries: the (out, in) entries, and so are those of the result, which has no low rank
#   core: the core in the common space; the result's core, which has factors
#   core entries: the same, for functions that tell entries apart by size and sign
ActsOn = Literal["factors", "entries", "core", "core entries"]


@dataclass(frozen=True)
class CombineMethod:
    """A method of `combine`."""

    run: Callable[[Sequence[WeightedDelta], float], tuple[Array, Array] | Array]  # (deltas, density) -> the result
    acts_on: ActsOn
    source: str  # whose definition this is
    linear: bool = False  # the result is the sum of the weighted changes
    density: float | None = None  # by default; None if it leaves nothing out
    draws: bool = False  # draws random numbers
    negative: bool = True  # takes negative weights
    spread: float = 0.0  # of its probabilities around the density
    flat: bool = False  # all singular values of the result are equal, so that none is to be cut before another

    @property
    def dense(self) -> bool:
        """Whether the result has no low rank, so that (out, in) matrices are formed."""
        return self.acts_on == "entries"


DENSITY = 0.5  # peft's and the papers' range is 0.2 to 0.9

METHODS: dict[str, CombineMethod] = {
    "cat": CombineMethod(cat, "factors", "peft's cat, and with --rank its svd", linear=True),
    "ties": CombineMethod(
        ties, "entries", "Yadav et al., NeurIPS 2023 (2306.01708), weights as in peft's ties_svd", density=DENSITY
    ),
    "ties-mergekit": CombineMethod(ties_mergekit, "entries", "mergekit's ties", density=DENSITY, negative=False),
    "dare-linear": CombineMethod(
        dare_linear,
        "entries",
        "Yu et al., ICML 2024 (2311.03099), as peft's dare_linear_svd",
        density=DENSITY,
        draws=True,
    ),
    "dare-ties": CombineMethod(dare_ties, "entries", "peft's dare_ties_svd", density=DENSITY, draws=True),
    "magnitude": CombineMethod(magnitude, "entries", "peft's magnitude_prune_svd", density=DENSITY),
    "della": CombineMethod(
        della,
        "entries",
        "Deep et al., 2024 (2406.11617), as in their code",
        density=DENSITY,
        draws=True,
        negative=False,
        spread=SPREAD,
    ),
    "knots": CombineMethod(knots, "factors", "Stoica et al., ICLR 2025 (2410.19735)", density=DENSITY),
    "tsv": CombineMethod(tsv, "core", "Gargiulo et al., CVPR 2025 (2412.00081), their TSV-M", density=1.0),
    "iso-c": CombineMethod(iso_c, "core", "Marczak et al., ICML 2025 (2502.04959)", flat=True),
    "iso-cts": CombineMethod(iso_cts, "core", "Marczak et al., ICML 2025 (2502.04959)", flat=True),
    "wudi": CombineMethod(wudi, "core", "Cheng et al., ICML 2025 (2503.08099), equation 9"),
    "core-ties": CombineMethod(ties, "core entries", "Panariello et al., NeurIPS 2025 (2509.17786)", density=DENSITY),
    "core-dare": CombineMethod(
        dare_linear, "core entries", "Panariello et al., NeurIPS 2025 (2509.17786)", density=DENSITY, draws=True
    ),
    "core-magnitude": CombineMethod(
        magnitude, "core entries", "magnitude, in the space of Panariello et al.", density=DENSITY
    ),
}

NOT_COMPRESSED = {
    "cat": "truncating the exact sum to --rank is better",
    "della": "it draws entries by their order in a row of the full matrix",
}
