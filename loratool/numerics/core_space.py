"""Express several changes of one matrix as small cores in a common space: D_i = U M_i V^T (Panariello et al., 2025).

All columns of the changes are in the span of U (out, R), and all rows in that of V (in, R'). So a method that combines
changes can run on the cores M_i (R, R'). Its result M stands for U M V^T, and no (out, in) matrix is formed. Methods
that commute with rotations give the same result as on the D_i; the others (TIES, DARE, pruning) depend on the bases.

So the bases are part of the definition (NeurIPS 2025, arXiv 2509.17786, section 4): the left singular vectors of the
stack of all B_i, and the right singular vectors of the stack of all A_i. Here the SVD splits D_i = B_i A_i evenly. So
the bases are the eigenvectors of sum (D_i D_i^T)^(1/2) and sum (D_i^T D_i)^(1/2): they depend on the changes, not on
the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .arrays import Array, where
from .factored_svd import FactoredSVD
from .linalg import adjoint, cast, concatenate, eigh, norm, qr, split, sqrt, square, stack, svd, taken, zeros
from .spectrum import RANK_TOLERANCE

ROUNDS = 50  # of the alternating eigenproblems; a few are enough where the changes have low rank

SETTLED = 1e-8  # relative gain in the energy kept that ends them: the authors' 1e-6 shows in the sixth digit

EQUAL = 1e-9  # entries that differ by less, relatively, count as equal, so that rounding errors decide nothing


@dataclass(frozen=True)
class CoreSpace:
    """The common space of the changes D_i of one matrix, i = 1 .. T."""

    U: Array  # (out, R), float64, orthonormal columns
    V: Array  # (in, R'), float64, orthonormal columns
    cores: Array  # (T, R, R'), float64: D_i = U @ cores[i] @ V^T

    def compressed(self, rank: int) -> CoreSpace:
        """Return the space of at most `rank` directions a side that holds the most of all changes.

        Each core counts by its own norm: P (R, k) and Q (R', k) maximize sum |P^T M_i Q|^2 / |M_i|^2, by alternating
        eigenproblems (Ye, Machine Learning 61, 2005; for adapters arXiv 2606.03723, "compress then merge"). They may
        end in a local maximum.
        """
        P, Q = _shared_bases(self.cores, rank)
        return CoreSpace(self.U @ P, self.V @ Q, P.T @ self.cores @ Q)


def core_space(changes: Sequence[FactoredSVD]) -> CoreSpace:
    """Return the common space of changes of one matrix, each given by its SVD with U (out, k_i)."""
    cut = [_of_its_rank(change) for change in changes]
    U, left = _basis([change.U * sqrt(change.S) for change in cut])
    V, right = _basis([change.V * sqrt(change.S) for change in cut])
    return CoreSpace(U, V, stack([of_left @ of_right.T for of_left, of_right in zip(left, right, strict=True)]))


def _of_its_rank(change: FactoredSVD) -> FactoredSVD:
    """Return a change without directions that are rounding noise, whose square roots would not look like noise."""
    k = int(change.rank())
    return FactoredSVD(change.U[:, :k], change.S[:k], change.V[:, :k])


def _basis(sides: Sequence[Array]) -> tuple[Array, Sequence[Array]]:
    """Return the left singular vectors (n, R) of [sides] with nonzero values, and each side (n, k) in them, (R, k).

    The largest entry of a vector is positive.
    """
    Q, T = qr(concatenate(sides, 1))
    W, S, _ = svd(T)
    W = W[:, : int((RANK_TOLERANCE * S[:1] < S).sum())]
    basis = Q @ W
    sign = signs(basis)
    return basis * sign, split((W * sign).T @ T, [side.shape[1] for side in sides], 1)


def signs(basis: Array) -> Array:
    """Return the sign of each column's entry of largest magnitude, the first of equal ones. basis: (n, k)."""
    if 0 in basis.shape:
        return 1 + zeros(basis.shape[1:], basis)
    sizes = abs(basis)
    near = taken(sizes, sizes.argmax(0)) * (1 - EQUAL)
    first = cast(sizes >= near, basis).argmax(0)
    return 1 - 2 * cast(taken(basis, first) < 0, basis)


def _shared_bases(cores: Array, rank: int) -> tuple[Array, Array]:
    """Return (P (R, k), Q (R', k)) with orthonormal columns as in `CoreSpace.compressed`."""
    norms = norm(cores, (1, 2))[:, None, None]
    scaled = cores / where(norms == 0, 1.0, norms)
    Q, energy = _leading(adjoint(scaled) @ scaled, rank), 0.0
    for _ in range(ROUNDS):
        right = scaled @ Q
        P = _leading(right @ adjoint(right), rank)
        left = P.T @ scaled
        Q = _leading(adjoint(left) @ left, rank)
        former, energy = energy, float(square(left @ Q).sum())
        if energy - former <= SETTLED * energy:
            break
    return P, Q


def _leading(grams: Array, rank: int) -> Array:
    """Return the leading eigenvectors (n, rank or n) of a sum of symmetric matrices (T, n, n)."""
    leading = eigh(grams.sum(0))[1][:, :rank]
    return leading * signs(leading)
