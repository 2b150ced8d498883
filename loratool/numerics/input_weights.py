"""Weigh a change D of a matrix by its inputs, to find the D' of a rank that is best for outputs, not for entries of D.

If h_j is the mean of x_j^2 over inputs x whose entries are uncorrelated, the mean of |(D - D') x|^2 is the sum of
h_j |d_j - d'_j|^2 over columns. So D' = C_k W^-1, where W = diag(sqrt h) and C_k is the best rank k of C = D W (Eckart
and Young; the model of llama.cpp's imatrix). With equal h it is the best rank k of D.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import Array, doubled
from .forms import Wide
from .linalg import concatenate, square, zeros
from .svd import row_blocks

FLOOR = 1e-3  # least weight, of the mean: an input that texts hardly used still matters, and A is divided by its weight


@np.errstate(over="ignore", invalid="ignore")
def input_weights(h: Wide) -> npt.NDArray[np.float32] | None:
    """Return sqrt(h) for the inputs of each matrix, (E, in) in float32, relative to the matrix's mean of h.

    So equal inputs have the weight 1, and no matrix counts more than another because its inputs are larger. A matrix
    without inputs (nan, or 0) has the weight 1 everywhere.

    Args:
        h: (E, in), float64, at least 0 or nan.

    Returns:
        None if no matrix has any.
    """
    mean = h.mean(-1, keepdims=True)
    seen = mean > 0
    if not seen.any():
        return None
    relative = np.where(seen, h / np.where(seen, mean, 1.0), 1.0)
    return np.sqrt(np.maximum(relative, FLOOR)).astype(np.float32)


def residuals(C: Array, B: Array, A: Array, weights: Array) -> Array:
    """Return ||D - D_k||^2 for k = 0 .. r, (r + 1,) in float64, where D = C W^-1 and D_k = B[:, :k] A[:k].

    Args:
        C: (out, in), float32.
        B: (out, r), A: (r, in).
        weights: (in,), the diagonal of W.
    """
    B, A, w = doubled(B), doubled(A), doubled(weights)
    norm, cross = zeros((1,), B), zeros((len(A),), B)
    start = 0
    for block in row_blocks(C):
        D = doubled(block) / w
        norm += square(D).sum()
        cross += (B[start : start + len(block)] * (D @ A.T)).sum(0)
        start += len(block)
    inner = ((B.T @ B) * (A @ A.T)).cumsum(0).cumsum(1).diagonal()
    left = norm - 2 * cross.cumsum(0) + inner
    return concatenate([norm, left.clip(0.0)])
