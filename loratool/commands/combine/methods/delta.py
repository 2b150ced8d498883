"""The input of methods: an adapter's weighted change of one matrix, or the core that stands for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....numerics.arrays import Array, empty

ROWS = 1024  # of a dense delta, computed at a time in float64


@dataclass(frozen=True)
class WeightedDelta:
    """An adapter's weighted delta of one matrix, weight * B @ A. A core M is B = M, A = I."""

    B: Array  # (out, r), float64, with the scale folded in
    A: Array  # (r, in), float64
    weight: float
    key: str  # seeds its random numbers
    side: int  # the smaller side of the matrix that it changes, or of the space that the matrix was compressed to
    kind: npt.DTypeLike = np.float32  # of its entries: a core's are float64

    def dense(self) -> Array:
        """Return D = B @ A, (out, in), without the weight."""
        D = empty(self.kind, len(self.B), self.A.shape[1], like=self.B)
        for start in range(0, len(D), ROWS):
            D[start : start + ROWS] = self.B[start : start + ROWS] @ self.A
        return D
