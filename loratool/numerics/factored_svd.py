"""What B @ A is, read off its factors: the product is never formed.

With B = Q_B R_B and A^T = Q_A R_A the change is Q_B (R_B R_A^T) Q_A^T, so all of its singular values are those of
a core of at most r x r: milliseconds where the product takes seconds. Everything is float64, batched over leading
dimensions, and invariant under a change of the factors that leaves their product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-12  # of the largest singular value: what is below is float64's noise about a lower rank


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


@dataclass(frozen=True)
class FactoredSVD:
    """B @ A = U diag(S) V^T. U: (..., out, k), S: (..., k) falling, V: (..., in, k), with k = min(out, in, r).

    U and V are orthonormal; columns whose S is nearly 0 belong to no direction of B @ A.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def norm(self) -> Tensor:
        """||B A||, Frobenius, (...)."""
        norm: Tensor = torch.linalg.vector_norm(self.S, dim=-1)
        return norm

    def rank(self) -> Tensor:
        """How many singular values are more than noise, (...)."""
        return (RANK_TOLERANCE * self.S[..., :1] < self.S).sum(-1)

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors of this rank, each side with the square root of S: (B (..., out, r), A (..., r, in)).

        More than there are come as zeros.
        """
        k = min(rank, self.S.shape[-1])
        root = self.S[..., :k].sqrt()
        B, A = self.U[..., :k] * root.unsqueeze(-2), (self.V[..., :k] * root.unsqueeze(-2)).mT
        missing = rank - k
        return torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))


def factored_svd(B: Tensor, A: Tensor) -> FactoredSVD:
    """B: (..., out, r), A: (..., r, in)."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return FactoredSVD(Q_B @ U, S, Q_A @ Vh.mT)


def inner(one: FactoredSVD, two: FactoredSVD) -> Tensor:
    """<D1, D2>, (...), to float64's rounding of ||D1|| ||D2||: as exact as if both were formed."""
    left, right = one.U.mT @ two.U, one.V.mT @ two.V
    return (left * right * one.S.unsqueeze(-1) * two.S.unsqueeze(-2)).sum((-2, -1))


def distance(one: FactoredSVD, two: FactoredSVD) -> Tensor:
    """||D2 - D1||, (...), from the core of [B2, -B1] and [A2; A1]: no squares that cancel; 0 of equals."""
    B = torch.cat([two.U * two.S.unsqueeze(-2), -one.U * one.S.unsqueeze(-2)], -1)
    A = torch.cat([two.V, one.V], -1).mT
    norm: Tensor = torch.linalg.vector_norm(core(B, A), dim=(-2, -1))
    if one.S.shape != two.S.shape:
        return norm
    equal = [(getattr(one, part) == getattr(two, part)).flatten(one.S.dim() - 1).all(-1) for part in ("U", "S", "V")]
    return norm.masked_fill(equal[0] & equal[1] & equal[2], 0.0)


def cosine(one: FactoredSVD, two: FactoredSVD) -> Tensor:
    """<D1, D2> / (||D1|| ||D2||), (...); 0 where one of them is 0."""
    norms = one.norm * two.norm
    return torch.where(norms == 0, 0.0, inner(one, two) / torch.where(norms == 0, 1.0, norms)).clamp(-1.0, 1.0)


def effective_rank(S: Tensor) -> Tensor:
    """exp of the entropy of sigma / sum sigma (Roy & Vetterli, EUSIPCO 2007), 0 for a change of 0. S: (..., k)."""
    total = S.sum(-1, keepdim=True)
    p = S / torch.where(total == 0, 1.0, total)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return torch.where(total.squeeze(-1) == 0, 0.0, entropy.exp())


def stable_rank(S: Tensor) -> Tensor:
    """||D||_F^2 / ||D||_2^2, 0 for a change of 0. S: (..., k), falling."""
    largest = S[..., 0]
    scaled = S / torch.where(largest == 0, 1.0, largest).unsqueeze(-1)
    return scaled.square().sum(-1)


def rank_of_energy(S: Tensor, share: float) -> int:
    """The least k whose squares sum to `share` of all. S: (k,), falling."""
    total = S.square().sum()
    if total == 0:
        return 0
    return int((S.square().cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1


def principal_angles(U: Tensor, W: Tensor) -> Tensor:
    """The angles between the spans of two orthonormal bases, in radians, rising: (min(i, j),).

    U: (n, i), W: (n, j). Angles near 0 come from sines, the others from cosines, since neither tells all of them
    (Bjorck & Golub, Math. Comp. 27, 1973; Knyazev & Argentati, SIAM J. Sci. Comput. 23, 2002).
    """
    if U.shape[1] < W.shape[1]:
        U, W = W, U
    M = U.T @ W
    cosines = torch.linalg.svdvals(M).clamp(max=1.0)
    sines = torch.linalg.svdvals(W - U @ M).clamp(max=1.0).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def subspace_similarity(U: Tensor, W: Tensor) -> Tensor:
    """phi(i, j) = ||U_i^T W_j||_F^2 / min(i, j) of the first i and j columns, all at once: (i, j), from 0 to 1.

    U: (n, i), W: (n, j), orthonormal. Hu et al., ICLR 2022, equation 4. Of random subspaces its mean is
    `random_similarity`.
    """
    sums = (U.T @ W).square().cumsum(0).cumsum(1)
    i = torch.arange(1, U.shape[1] + 1, dtype=torch.int64, device=U.device).unsqueeze(1)
    j = torch.arange(1, W.shape[1] + 1, dtype=torch.int64, device=U.device).unsqueeze(0)
    return sums / torch.minimum(i, j)


def random_similarity(i: int, j: int, n: int) -> float:
    """The mean of phi(i, j) of random subspaces of R^n: E ||U^T W||^2 = i j / n."""
    return max(i, j) / n


def amplification(change: FactoredSVD, W: Iterable[Tensor], rank: int) -> float:
    """||D|| / ||U^T W V||, how much D strengthens what W has in D's top `rank` directions (Hu et al., section 7.3).

    change: of one matrix; W: (out, in), by blocks of its rows in order. inf where W has nothing there.
    """
    k, row = min(rank, int(change.rank())), 0
    there = change.S.new_zeros(k, k)
    for block in W:
        there += change.U[row : row + len(block), :k].T @ (block.double() @ change.V[:, :k])
        row += len(block)
    norm, within = float(change.norm), float(torch.linalg.vector_norm(there))
    return norm / within if within else math.inf if norm else 0.0
