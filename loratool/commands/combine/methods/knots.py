"""Combine changes by KnOTS: TIES on their rows in a common basis of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ....numerics.arrays import Array
from ....numerics.linalg import concatenate, padded, qr, split, svd, triangle_of, zeros
from ....numerics.spectrum import RANK_TOLERANCE
from .delta import WeightedDelta
from .entries import ties


def knots(deltas: Sequence[WeightedDelta], density: float) -> tuple[Array, Array]:
    """Apply TIES to S V_i^T, where [D_1 ... D_N] = U S [V_1^T ... V_N^T] (KnOTS, Stoica et al., ICLR 2025).

    With [B_1 ... B_N] = Q R and A_i^T = Q_i L_i^T the SVD is that of the small R blockdiag(L_i), so nothing N * in wide
    is computed; S V_i^T is U^T D_i.

    Returns:
        U (out, sum r_i or less) and the result of TIES in its basis, padded by zeros to the same rank.
    """
    Q, R = qr(concatenate([delta.B for delta in deltas], 1))
    pieces = split(R, [delta.B.shape[1] for delta in deltas], 1)
    L = [triangle_of(delta.A.T).T for delta in deltas]
    small = concatenate([piece @ each for piece, each in zip(pieces, L, strict=True)], 1)
    U, S, _ = svd(small)
    k = int((RANK_TOLERANCE * S[:1] < S).sum())  # the other directions are in no delta
    U = U[:, :k]
    rotated = [replace(delta, B=U.T @ piece) for piece, delta in zip(pieces, deltas, strict=True)]
    result = zeros((len(R), deltas[0].A.shape[1]), R)
    if k:
        result[:k] = ties(rotated, density)
    return padded(Q @ U, 1, len(R)), result
