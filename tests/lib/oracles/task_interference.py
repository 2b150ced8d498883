"""Say by the formula what the interference of dense changes is: Gargiulo et al., CVPR 2025, equation 4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_interference(changes: Sequence[Tensor]) -> tuple[float, float]:
    """Return |(U^T U - I) S (V^T V - I)|_1 with the singular vectors of all side by side, and the sum of all S."""
    found = []
    for D in changes:
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        there = 1e-10 * S[0] < S
        found.append((U[:, there], S[there], Vh[there].T))
    U, V = (torch.cat([each[i] for each in found], 1) for i in (0, 2))
    S, one = torch.cat([each[1] for each in found]), torch.eye(U.shape[1]).double()
    return float(((U.T @ U - one) @ S.diag() @ (V.T @ V - one)).abs().sum()), float(S.sum())
