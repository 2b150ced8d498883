"""Combine changes by their singular vectors and inner products, which rotations keep: TSV, Iso-C, Iso-CTS, WUDI.

From the cores M_i such a method computes the core of its result for the changes U M_i V^T. Weights come first: the
inputs are w_i D_i, and changes that are 0 or have weight 0 are left out. Directions are those above float64's rounding.
Published code also uses a change's further singular vectors, which are arbitrary at low rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ....numerics.arrays import Array
from ....numerics.linalg import adjoint, concatenate, eigh, norm, stack, svd, zeros
from ....numerics.spectrum import RANK_TOLERANCE
from .delta import WeightedDelta

COMMON = 0.8  # of the directions are those of the sum (the share of Iso-CTS' authors)

SAME = 2.0**-24  # singular vectors that are so nearly dependent are one: factors in float32 cannot tell them apart

SEEN = 1e-6  # of the mean of the inputs' eigenvalues; below it WUDI would divide by what rounding made


class Triplets(NamedTuple):
    """Singular values and vectors above rounding."""

    U: Array  # (R, k)
    S: Array  # (k,), largest first
    V: Array  # (R', k)


def tsv(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return TSV-Merge: the changes' singular vectors made orthogonal to each other (Gargiulo et al., CVPR 2025).

    With [U_1 ... U_T] and [V_1 ... V_T] replaced by their polar factors it is polar(U) S polar(V)^T. Each of T changes
    has the 1/T of the matrix's smaller side that is largest, at most, and the share `density` of its own.
    """
    M = _weighted(deltas)
    if not len(M):
        return M.sum(0)
    most = max(1, deltas[0].side // len(M))
    triplets = [_triplets(each, norm(each)) for each in M]
    U, S, V = _side_by_side([_first(each, min(most, max(1, int(density * len(each.S))))) for each in triplets])
    return _polar(U) * S @ _polar(V).T


def iso_c(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return Iso-C: the sum, with all singular values replaced by their mean (Marczak et al., ICML 2025).

    The mean is over the rank of the sum; of full matrices that is the authors', over all singular values.
    """
    M = _weighted(deltas)
    U, S, V = _triplets(M.sum(0), _largest_norm(M))
    return U @ V.T * _mean(S)


def iso_cts(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return Iso-CTS: the sum's leading directions and some of each change beside them (Marczak et al., ICML 2025).

    Of the n directions that the changes have together COMMON are the sum's; the others are divided between the changes,
    each without what lies in the common U. Both stacks become their polar factors, and all values their mean.
    """
    M = _weighted(deltas)
    if not len(M):
        return M.sum(0)
    n = min(M.shape[1:])
    specific = round((n - int(COMMON * n)) / len(M))
    common = _first(_triplets(M.sum(0), _largest_norm(M)), n - specific * len(M))
    parts = [common]
    for change in M:
        rest = change - common.U @ (common.U.T @ change)
        parts.append(_first(_triplets(rest, norm(change)), specific))
    U, S, V = _side_by_side(parts)
    return _polar(U) @ _polar(V).T * _mean(S)


def wudi(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return WUDI-Merging's minimum: X with the least sum |(X - D_i) D_i^T|^2 / |D_i|^2 (Cheng et al., ICML 2025).

    Each change's rows stand for its inputs, on which X shall do what the change does. Where the paper descends from the
    sum by Adam and stops early, this is the solution of X G = sum D_i D_i^T D_i / |D_i|^2, G = sum D_i^T D_i / |D_i|^2.
    Inputs that the changes hardly see, by SEEN, are left as they are in the sum.
    """
    M = _weighted(deltas)
    unit = M / norm(M, (1, 2))[:, None, None]
    values, Q = eigh((adjoint(unit) @ unit).sum(0))
    seen = values > SEEN * _mean(values)
    known, rest = Q[:, seen], Q[:, ~seen]
    wanted = (M @ adjoint(unit) @ (unit @ known)).sum(0)
    return wanted / values[seen] @ known.T + M.sum(0) @ rest @ rest.T


def _weighted(deltas: Sequence[WeightedDelta]) -> Array:
    """Return the nonzero changes times their weights, (T, R, R')."""
    M = stack([delta.dense() * delta.weight for delta in deltas])
    return M[norm(M, (1, 2)) > 0]


def _triplets(M: Array, size: Array) -> Triplets:
    """Return the singular triplets of M that are above the rounding of something of norm `size`, ()."""
    U, S, Vh = svd(M)
    return _first(Triplets(U, S, Vh.T), int((RANK_TOLERANCE * size < S).sum()))


def _first(triplets: Triplets, count: int) -> Triplets:
    return Triplets(triplets.U[:, :count], triplets.S[:count], triplets.V[:, :count])


def _side_by_side(parts: Sequence[Triplets]) -> Triplets:
    U, S, V = (concatenate(side, -1) for side in zip(*parts, strict=True))
    return Triplets(U, S, V)


def _polar(X: Array) -> Array:
    """Return the factor of X = P H with orthonormal columns (R, k), or of dependent columns the partial isometry."""
    U, S, Vh = svd(X)
    independent = int((SAME * S[:1] < S).sum())
    return U[:, :independent] @ Vh[:independent]


def _largest_norm(M: Array) -> Array:
    return norm(M, (1, 2)).max() if len(M) else zeros((), M)


def _mean(S: Array) -> float:
    return float(S.mean()) if len(S) else 0.0
