"""Compute the SVD, norm, distance and angles of D = B @ A from its factors, without forming the product.

With B = Q_B R_B and A^T = Q_A R_A, D is Q_B (R_B R_A^T) Q_A^T, so its singular values are those of a core of at most
r x r, which takes milliseconds where the product takes seconds. Everything is float64, batched over leading dimensions,
and depends on the product only, not on how it is split into factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .spectrum import RANK_TOLERANCE


def core(B: Tensor, A: Tensor) -> Tensor:
    """Return R_B @ R_A^T, which has the singular values of B @ A.

    Args:
        B: (..., out, r), any float dtype
        A: (..., r, in), any float dtype

    Returns:
        (..., min(out, r), min(in, r)) in float64.
    """
    R_B: Tensor = torch.linalg.qr(B.double(), mode="r").R
    R_A: Tensor = torch.linalg.qr(A.double().mT, mode="r").R
    return R_B @ R_A.mT


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Return the singular values of B @ A that can differ from 0, (..., min(out, in, r)), largest first.

    All are inf if an intermediate number overflows float64.
    """
    small = core(B, A)
    if not small.isfinite().all():
        return small.new_full((*small.shape[:-2], min(small.shape[-2:])), torch.inf)
    S: Tensor = torch.linalg.svdvals(small)
    return S


@dataclass(frozen=True)
class FactoredSVD:
    """The SVD B @ A = U diag(S) V^T with k = min(out, in, r).

    Columns of U and V with S nearly 0 are arbitrary: they are not directions of B @ A.
    """

    U: Tensor  # (..., out, k), orthonormal columns
    S: Tensor  # (..., k), largest first
    V: Tensor  # (..., in, k), orthonormal columns

    @property
    def norm(self) -> Tensor:
        """The Frobenius norm ||B A||, (...)."""
        norm: Tensor = torch.linalg.vector_norm(self.S, dim=-1)
        return norm

    def rank(self) -> Tensor:
        """Return the number of singular values above rounding noise, (...)."""
        return (RANK_TOLERANCE * self.S[..., :1] < self.S).sum(-1)

    def nothing(self) -> FactoredSVD:
        """Return the SVD of a zero matrix of the same shape, with k = 0."""
        return FactoredSVD(self.U[..., :0], self.S[..., :0], self.V[..., :0])

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best factors of this rank, (B (..., out, rank), A (..., rank, in)); each side gets sqrt(S).

        If `rank` is larger than k, the extra columns and rows are zeros.
        """
        k = min(rank, self.S.shape[-1])
        root = self.S[..., :k].sqrt()
        B, A = self.U[..., :k] * root.unsqueeze(-2), (self.V[..., :k] * root.unsqueeze(-2)).mT
        missing = rank - k
        return torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))


def factored_svd(B: Tensor, A: Tensor) -> FactoredSVD:
    """Return the SVD of B @ A for B (..., out, r) and A (..., r, in)."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return FactoredSVD(Q_B @ U, S, Q_A @ Vh.mT)


def distance(first: FactoredSVD, second: FactoredSVD) -> Tensor:
    """Return ||D2 - D1||, (...), and exactly 0 if both SVDs are equal.

    It is the norm of the core of [B2, -B1] and [A2; A1], since ||D1||^2 - 2 <D1, D2> + ||D2||^2 would cancel.
    """
    B = torch.cat([second.U * second.S.unsqueeze(-2), -first.U * first.S.unsqueeze(-2)], -1)
    A = torch.cat([second.V, first.V], -1).mT
    norm: Tensor = torch.linalg.vector_norm(core(B, A), dim=(-2, -1))
    return norm.masked_fill(are_equal(first, second), 0.0)


def are_equal(first: FactoredSVD, second: FactoredSVD) -> Tensor:
    """Return whether two SVDs have the same numbers, (...)."""
    if first.S.shape != second.S.shape:
        return first.S.new_zeros(first.S.shape[:-1], dtype=torch.bool)
    U, V = ((getattr(first, side) == getattr(second, side)).flatten(-2).all(-1) for side in ("U", "V"))
    equal: Tensor = U & V & (first.S == second.S).all(-1)
    return equal


def rounding_distance(svd: FactoredSVD, exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor]) -> Tensor:
    """Return ||B' A' - D||, (...), where B' and A' are stored as roundings of the factors of D, or of its best rank.

    B' A' - D is (B' - B) A' + B (A' - A) minus the truncated part of D. These terms hardly cancel, so Gram matrices are
    accurate enough; they take a tenth of the time of QRs.

    Args:
        svd: of D.
        exact: B (..., out, r) and A (..., r, in) of D, or of its best rank r, in float64.
        stored: the same in any float type.
    """
    (B, A), (rounded_B, rounded_A) = exact, (side.double() for side in stored)
    r = B.shape[-1]
    left = torch.cat([rounded_B - B, B, -svd.U[..., r:] * svd.S[..., None, r:]], -1)
    right = torch.cat([rounded_A, rounded_A - A, svd.V[..., r:].mT], -2)
    squares: Tensor = ((left.mT @ left) * (right @ right.mT)).sum((-2, -1))
    return squares.clamp(min=0.0).sqrt()


def relative_distance(first: FactoredSVD, second: FactoredSVD) -> float:
    """Return ||D2 - D1|| / ||D1|| of two stacks of matrices, each as one vector; 0 if D1 is 0."""
    norm = float(torch.linalg.vector_norm(first.S))
    return float(torch.linalg.vector_norm(distance(first, second))) / norm if norm else 0.0


def stable_rank(S: Tensor) -> Tensor:
    """Return ||D||_F^2 / ||D||_2^2, (...), and 0 if D is 0. S: (..., k), largest first."""
    largest = S[..., 0]
    scaled = S / torch.where(largest == 0, 1.0, largest).unsqueeze(-1)
    return scaled.square().sum(-1)


def rank_of_energy(S: Tensor, share: float) -> int:
    """Return the least rank whose singular values have `share` (0 to 1) of the sum of S^2. S: (k,), largest first."""
    total = S.square().sum()
    if total == 0:
        return 0
    return int((S.square().cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1


def principal_angles(U: Tensor, W: Tensor) -> Tensor:
    """Return the angles between the spans of U (n, i) and W (n, j), in radians, smallest first: (min(i, j),).

    Both have orthonormal columns. Angles near 0 are computed from sines and the others from cosines, because each of
    these is inaccurate at the other end (Bjorck & Golub, Math. Comp. 27, 1973; Knyazev & Argentati, SIAM J. Sci.
    Comput. 23, 2002).
    """
    if U.shape[1] < W.shape[1]:
        U, W = W, U
    M = U.T @ W
    cosines = torch.linalg.svdvals(M).clamp(max=1.0)
    sines = torch.linalg.svdvals(W - U @ M).clamp(max=1.0).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def subspace_similarity(U: Tensor, W: Tensor) -> Tensor:
    """Return phi(i, j) = ||U_i^T W_j||_F^2 / min(i, j), from 0 to 1, for the first i and j columns: (i, j).

    U (n, i) and W (n, j) have orthonormal columns. This is equation 4 of Hu et al., ICLR 2022. `random_similarity` is
    its mean for random subspaces.
    """
    sums = (U.T @ W).square().cumsum(0).cumsum(1)
    i = torch.arange(1, U.shape[1] + 1, dtype=torch.int64, device=U.device).unsqueeze(1)
    j = torch.arange(1, W.shape[1] + 1, dtype=torch.int64, device=U.device).unsqueeze(0)
    return sums / torch.minimum(i, j)


def random_similarity(i: int, j: int, n: int) -> float:
    """Return the mean of phi(i, j) for random subspaces of R^n, from E ||U^T W||^2 = i j / n."""
    return max(i, j) / n


def amplification(change: FactoredSVD, W: Iterable[Tensor], rank: int) -> float:
    """Return ||D|| / ||U^T W V|| for the top `rank` singular vectors of D (Hu et al., ICLR 2022, section 7.3).

    This is how much D amplifies the directions that it shares with W.

    Args:
        change: the SVD of one matrix D (out, in)
        W: (out, in), as blocks of its rows in order

    Returns:
        inf if W has nothing in these directions, 0 if D has nothing either.
    """
    k, row = min(rank, int(change.rank())), 0
    shared = change.S.new_zeros(k, k)
    for block in W:
        shared += change.U[row : row + len(block), :k].T @ (block.double() @ change.V[:, :k])
        row += len(block)
    norm, within = float(change.norm), float(torch.linalg.vector_norm(shared))
    return norm / within if within else math.inf if norm else 0.0
