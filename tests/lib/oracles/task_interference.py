"""Say by the formula what the interference of dense changes is: Gargiulo et al., CVPR 2025, equation 4."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def task_interference(changes: Sequence[npt.ArrayLike]) -> tuple[float, float]:
    """Return |(U^T U - I) S (V^T V - I)|_1 with the singular vectors of all side by side, and the sum of all S."""
    found = []
    for D in changes:
        U, S, Vh = np.linalg.svd(np.asarray(D, float), full_matrices=False)
        there = 1e-10 * S[0] < S
        found.append((U[:, there], S[there], Vh[there].T))
    U, V = (np.concatenate([each[i] for each in found], 1) for i in (0, 2))
    S, one = np.concatenate([each[1] for each in found]), np.eye(U.shape[1])
    return float(np.abs((U.T @ U - one) @ np.diag(S) @ (V.T @ V - one)).sum()), float(S.sum())
