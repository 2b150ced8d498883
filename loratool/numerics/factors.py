"""What B @ A is, read off its factors: the product is never formed.

With B = Q_B R_B and A^T = Q_A R_A the change is Q_B (R_B R_A^T) Q_A^T, so all of its singular values are those of
a core of at most r x r: milliseconds where the product takes seconds. Everything is float64 and batched over
leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def core(B: Tensor, A: Tensor) -> Tensor:
    """R_B @ R_A^T, (..., min(out, r), min(in, r)), with the singular values of B @ A.

    B: (..., out, r), A: (..., r, in), any float dtype.
    """
    R_B: Tensor = torch.linalg.qr(B.double(), mode="r").R
    R_A: Tensor = torch.linalg.qr(A.double().mT, mode="r").R
    return R_B @ R_A.mT


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """All that can differ from 0, in falling order: (..., min(out, in, r))."""
    S: Tensor = torch.linalg.svdvals(core(B, A))
    return S


def effective_rank(S: Tensor) -> Tensor:
    """exp of the entropy of sigma / sum sigma (Roy & Vetterli, EUSIPCO 2007), 0 for a change of 0. S: (..., k)."""
    total = S.sum(-1, keepdim=True)
    p = S / torch.where(total == 0, 1.0, total)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return torch.where(total.squeeze(-1) == 0, 0.0, entropy.exp())
