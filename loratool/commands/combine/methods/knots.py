"""Combine changes by KnOTS: TIES on their rows in a common basis of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ....numerics.spectrum import RANK_TOLERANCE
from .delta import WeightedDelta
from .entries import ties


def knots(deltas: Sequence[WeightedDelta], density: float) -> tuple[Tensor, Tensor]:
    """Apply TIES to S V_i^T, where [D_1 ... D_N] = U S [V_1^T ... V_N^T] (KnOTS, Stoica et al., ICLR 2025).

    With [B_1 ... B_N] = Q R and A_i^T = Q_i L_i^T the SVD is that of the small R blockdiag(L_i), so nothing N * in wide
    is computed; S V_i^T is U^T D_i.

    Returns:
        U (out, sum r_i or less) and the result of TIES in its basis, padded by zeros to the same rank.
    """
    Q, R = torch.linalg.qr(torch.cat([delta.B for delta in deltas], 1))
    pieces = R.split([delta.B.shape[1] for delta in deltas], 1)
    L = [torch.linalg.qr(delta.A.mT, mode="r").R.mT for delta in deltas]
    small = torch.cat([piece @ each for piece, each in zip(pieces, L, strict=True)], 1)
    U, S, _ = torch.linalg.svd(small, full_matrices=False)
    k = int((RANK_TOLERANCE * S[:1] < S).sum())  # the other directions are in no delta
    U = U[:, :k]
    rotated = [replace(delta, B=U.mT @ piece) for piece, delta in zip(pieces, deltas, strict=True)]
    result = deltas[0].A.new_zeros(len(R), deltas[0].A.shape[1])
    if k:
        result[:k] = ties(rotated, density)
    return torch.nn.functional.pad(Q @ U, (0, len(R) - k)), result
