"""Weigh a change D of a matrix by its inputs, to find the D' of a rank that is best for outputs, not for entries of D.

If h_j is the mean of x_j^2 over inputs x whose entries are uncorrelated, the mean of |(D - D') x|^2 is the sum of
h_j |d_j - d'_j|^2 over columns. So D' = C_k W^-1, where W = diag(sqrt h) and C_k is the best rank k of C = D W (Eckart
and Young; the model of llama.cpp's imatrix). With equal h it is the best rank k of D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .svd import row_blocks

FLOOR = 1e-3  # least weight, of the mean: an input that texts hardly used still matters, and A is divided by its weight


def input_weights(h: Tensor) -> Tensor | None:
    """Return sqrt(h) for the inputs of each matrix, (E, in) in float32, relative to the matrix's mean of h.

    So equal inputs have the weight 1, and no matrix counts more than another because its inputs are larger. A matrix
    without inputs (nan, or 0) has the weight 1 everywhere.

    Args:
        h: (E, in), float64, at least 0 or nan.

    Returns:
        None if no matrix has any.
    """
    mean = h.mean(-1, keepdim=True)
    seen = mean > 0
    if not seen.any():
        return None
    relative = torch.where(seen, h / torch.where(seen, mean, 1.0), 1.0)
    return relative.clamp(min=FLOOR).sqrt().float()


def residuals(C: Tensor, B: Tensor, A: Tensor, weights: Tensor) -> Tensor:
    """Return ||D - D_k||^2 for k = 0 .. r, (r + 1,) in float64, where D = C W^-1 and D_k = B[:, :k] A[:k].

    Args:
        C: (out, in), float32.
        B: (out, r), A: (r, in).
        weights: (in,), the diagonal of W.
    """
    B, A, w = B.double(), A.double(), weights.double()
    norm, cross = C.new_zeros((), dtype=torch.float64), B.new_zeros(len(A))
    start = 0
    for block in row_blocks(C):
        D = block.double() / w
        norm += D.square().sum()
        cross += (B[start : start + len(block)] * (D @ A.mT)).sum(0)
        start += len(block)
    inner = ((B.mT @ B) * (A @ A.mT)).cumsum(0).cumsum(1).diagonal()
    left = norm - 2 * cross.cumsum(0) + inner
    return torch.cat([norm[None], left.clamp(min=0)])
