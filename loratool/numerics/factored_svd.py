"""Compute the SVD, norm, distance and angles of D = B @ A from its factors, without forming the product.

With B = Q_B R_B and A^T = Q_A R_A, D is Q_B (R_B R_A^T) Q_A^T, so its singular values are those of a core of at most
r x r, which takes milliseconds where the product takes seconds. Everything is float64, batched over leading dimensions,
and depends on the product only, not on how it is split into factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Array, doubled, fetched, where
from .forms import Wide
from .linalg import (
    adjoint,
    concatenate,
    isfinite,
    norm,
    padded,
    qr,
    solve,
    split,
    sqrt,
    svd,
    svd_values,
    triangle_of,
    zeros,
)
from .spectrum import RANK_TOLERANCE

MILD = 1e3  # ratio of the largest and the least singular value up to which a triangle may be inverted


def core(B: Array, A: Array) -> Array:
    """Return R_B @ R_A^T, which has the singular values of B @ A.

    Args:
        B: (..., out, r), any float dtype
        A: (..., r, in), any float dtype

    Returns:
        (..., min(out, r), min(in, r)) in float64.
    """
    return triangle_of(doubled(B)) @ adjoint(triangle_of(doubled(adjoint(A))))


@np.errstate(all="ignore")
def singular_values(B: Array, A: Array) -> Array:
    """Return the singular values of B @ A that can differ from 0, (..., min(out, in, r)), largest first.

    All are inf if an intermediate number overflows float64.
    """
    small = core(B, A)
    if not isfinite(small).all():
        return zeros((*small.shape[:-2], min(small.shape[-2:])), small) + math.inf
    return svd_values(small)


@dataclass(frozen=True)
class FactoredSVD:
    """The SVD B @ A = U diag(S) V^T with k = min(out, in, r).

    Columns of U and V with S nearly 0 are arbitrary: they are not directions of B @ A.
    """

    U: Array  # (..., out, k), orthonormal columns
    S: Array  # (..., k), largest first
    V: Array  # (..., in, k), orthonormal columns

    @property
    def norm(self) -> Array:
        """The Frobenius norm ||B A||, (...)."""
        return norm(self.S, -1)

    def rank(self) -> Array:
        """Return the number of singular values above rounding noise, (...)."""
        return (RANK_TOLERANCE * self.S[..., :1] < self.S).sum(-1)

    def nothing(self) -> FactoredSVD:
        """Return the SVD of a zero matrix of the same shape, with k = 0."""
        return FactoredSVD(self.U[..., :0], self.S[..., :0], self.V[..., :0])

    def truncated(self, rank: int) -> tuple[Array, Array]:
        """Return the best factors of this rank, (B (..., out, rank), A (..., rank, in)); each side gets sqrt(S).

        If `rank` is larger than k, the extra columns and rows are zeros.
        """
        k = min(rank, self.S.shape[-1])
        root = sqrt(self.S[..., None, :k])
        B, A = self.U[..., :k] * root, adjoint(self.V[..., :k] * root)
        return padded(B, -1, rank), padded(A, -2, rank)


@np.errstate(all="ignore")
def factored_svd(B: Array, A: Array) -> FactoredSVD:
    """Return the SVD of B @ A for B (..., out, r) and A (..., r, in)."""
    B, A = doubled(B), doubled(adjoint(A))
    R_B, R_A = triangle_of(B), triangle_of(A)
    U, S, Vh = svd(R_B @ adjoint(R_A))
    return FactoredSVD(_in_basis(B, R_B, U), S, _in_basis(A, R_A, adjoint(Vh)))


def _in_basis(x: Array, R: Array, vectors: Array) -> Array:
    """Return Q @ vectors for x = Q R; without Q where that is as accurate to within MILD, in half the time."""
    if 0 < R.shape[-2] == R.shape[-1]:
        S = svd_values(R)
        if (S[..., 0] < MILD * S[..., -1]).all():
            return x @ solve(R, vectors)
    return qr(x)[0] @ vectors


def in_common_bases(factors: Sequence[tuple[Array, Array]]) -> list[tuple[Wide, Wide]]:
    """Return smaller factors of several matrices, in common orthonormal bases of all their columns and all their rows.

    With the QRs Q [R_1 R_2 ..] of all B_i side by side and P [L_1 L_2 ..] of all A_i^T, D_i is Q (R_i L_i^T) P^T. So
    norms, distances and angles of the D_i are those of the R_i L_i^T. Equal factors stay equal.

    Args:
        factors: B_i (..., out, r_i) and A_i (..., r_i, in).

    Returns:
        R_i (..., p, r_i) and L_i^T (..., r_i, q), where p and q are at most the sum of the ranks.
    """
    distinct: list[tuple[Array, Array]] = []
    places = []
    for pair in factors:
        place = next((i for i, other in enumerate(distinct) if _same(pair, other)), len(distinct))
        distinct[place:] = distinct[place:] or [pair]
        places.append(place)
    widths = [B.shape[-1] for B, _ in distinct]
    left, right = (
        split(fetched(triangle_of(concatenate(sides, -1))), widths, -1)
        for sides in ([B for B, _ in distinct], [adjoint(A) for _, A in distinct])
    )
    return [(left[place], adjoint(right[place])) for place in places]


def _same(pair: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
    return all(x.shape == y.shape and bool((x == y).all()) for x, y in zip(pair, other, strict=True))


def distance(first: FactoredSVD, second: FactoredSVD) -> Array:
    """Return ||D2 - D1||, (...), and exactly 0 if both SVDs are equal.

    It is the norm of the core of [B2, -B1] and [A2; A1], since ||D1||^2 - 2 <D1, D2> + ||D2||^2 would cancel.
    """
    B = concatenate([second.U * second.S[..., None, :], -first.U * first.S[..., None, :]], -1)
    A = adjoint(concatenate([second.V, first.V], -1))
    return where(are_equal(first, second), 0.0, norm(core(B, A), (-2, -1)))


def are_equal(first: FactoredSVD, second: FactoredSVD) -> Array:
    """Return whether two SVDs have the same numbers, (...)."""
    if first.S.shape != second.S.shape:
        return zeros(first.S.shape[:-1], first.S, np.bool_)
    U, V = ((getattr(first, side) == getattr(second, side)).all(-1).all(-1) for side in ("U", "V"))
    return U & V & (first.S == second.S).all(-1)


@np.errstate(all="ignore")
def rounding_distance(D: FactoredSVD, exact: tuple[Array, Array], stored: tuple[Array, Array]) -> Array:
    """Return ||B' A' - D||, (...), where B' and A' are stored as roundings of the factors of D, or of its best rank.

    B' A' - D is (B' - B) A' + B (A' - A) minus the truncated part of D. These terms hardly cancel, so Gram matrices are
    accurate enough; they take a tenth of the time of QRs.

    Args:
        D: its SVD.
        exact: B (..., out, r) and A (..., r, in) of D, or of its best rank r, in float64.
        stored: the same in any float type.
    """
    (B, A), (rounded_B, rounded_A) = exact, map(doubled, stored)
    r, squares = B.shape[-1], zeros(B.shape[:-2], B)
    truncated = -D.U[..., r:] * D.S[..., None, r:], adjoint(D.V[..., r:])
    terms = [(rounded_B - B, rounded_A), (B, rounded_A - A), truncated]
    for i, (left, right) in enumerate(terms):
        for times, (other_left, other_right) in ((2.0, terms[j]) if j < i else (1.0, terms[i]) for j in range(i + 1)):
            products = (adjoint(left) @ other_left) * (right @ adjoint(other_right))
            squares = squares + times * products.sum((-2, -1))
    return sqrt(squares.clip(0.0))


def relative_distance(first: FactoredSVD, second: FactoredSVD) -> float:
    """Return ||D2 - D1|| / ||D1|| of two stacks of matrices, each as one vector; 0 if D1 is 0."""
    size = float(norm(first.S))
    return float(norm(distance(first, second))) / size if size else 0.0


def stable_rank(S: Wide) -> Wide:
    """Return ||D||_F^2 / ||D||_2^2, (...), and 0 if D is 0. S: (..., k), largest first."""
    largest = S[..., 0]
    squares: Wide = np.square(S / np.where(largest == 0, 1.0, largest)[..., None])
    return np.asarray(squares.sum(-1))


def effective_rank(S: Wide) -> Wide:
    """Return exp of the entropy of S / sum S (Roy & Vetterli, EUSIPCO 2007), (...), and 0 if D is 0. S: (..., k)."""
    total = S.sum(-1, keepdims=True)
    p = S / np.where(total == 0, 1.0, total)
    entropy = -(p * np.log(np.where(p == 0, 1.0, p))).sum(-1)
    return np.where(total[..., 0] == 0, 0.0, np.exp(entropy))


def rank_of_energy(S: Wide, share: float) -> int:
    """Return the least rank whose singular values have `share` (0 to 1) of the sum of S^2. S: (k,), largest first."""
    squares = np.square(S)
    total = float(squares.sum())
    return int((squares.cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1 if total else 0


def principal_angles(U: Array, W: Array) -> Wide:
    """Return the angles between the spans of U (n, i) and W (n, j), in radians, smallest first: (min(i, j),).

    Both have orthonormal columns. Angles near 0 are computed from sines and the others from cosines, because each of
    these is inaccurate at the other end (Bjorck & Golub, Math. Comp. 27, 1973; Knyazev & Argentati, SIAM J. Sci.
    Comput. 23, 2002).
    """
    if U.shape[1] < W.shape[1]:
        U, W = W, U
    M = U.T @ W
    cosines = fetched(svd_values(M)).clip(None, 1.0)
    sines = np.flip(fetched(svd_values(W - U @ M)).clip(None, 1.0))
    angles: Wide = np.where(cosines * cosines > 0.5, np.arcsin(sines), np.arccos(cosines))
    return angles


def subspace_similarity(U: Array, W: Array) -> Wide:
    """Return phi(i, j) = ||U_i^T W_j||_F^2 / min(i, j), from 0 to 1, for the first i and j columns: (i, j).

    U (n, i) and W (n, j) have orthonormal columns. This is equation 4 of Hu et al., ICLR 2022. `random_similarity` is
    its mean for random subspaces.
    """
    sums = np.square(fetched(U.T @ W)).cumsum(0).cumsum(1)
    i, j = (np.arange(1, side.shape[1] + 1) for side in (U, W))
    shares: Wide = sums / np.minimum(i[:, None], j)
    return shares


def random_similarity(i: int, j: int, n: int) -> float:
    """Return the mean of phi(i, j) for random subspaces of R^n, from E ||U^T W||^2 = i j / n."""
    return max(i, j) / n


def amplification(change: FactoredSVD, W: Iterable[Array], rank: int) -> float:
    """Return ||D|| / ||U^T W V|| for the top `rank` singular vectors of D (Hu et al., ICLR 2022, section 7.3).

    This is how much D amplifies the directions that it shares with W.

    Args:
        change: the SVD of one matrix D (out, in)
        W: (out, in), as blocks of its rows in order

    Returns:
        inf if W has nothing in these directions, 0 if D has nothing either.
    """
    k, row = min(rank, int(change.rank())), 0
    shared = zeros((k, k), change.S)
    for block in W:
        shared += change.U[row : row + len(block), :k].T @ (doubled(block) @ change.V[:, :k])
        row += len(block)
    size, within = float(change.norm), float(norm(shared))
    return size / within if within else math.inf if size else 0.0
