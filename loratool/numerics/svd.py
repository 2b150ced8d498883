"""Compute the best low-rank approximation of a matrix, as good as a full SVD and tens of times faster.

The method is block Golub-Kahan: an orthonormal basis Q of the Krylov space of D^T D grows by a block a step, W = D Q is
kept, and the top eigenvalues of the small matrix T = W^T W are the energy reached so far (Musco & Musco, NeurIPS 2015;
Chen et al. 2025 for blocks smaller than the rank). It ends when the last gains show that the optimum is within the
tolerance. If the spectrum is too flat for that, or the matrix is small, the eigenvectors of D^T D in float64 are
cheaper, and exact. The energy kept is exact in either case: ||D||^2 - ||D - U S V^T||^2 is the sum of S^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-4  # relative to the optimum's energy

BLOCK = 16  # columns added to the basis in a step

SMALL = 512  # with up to so many columns, the eigenvectors of D^T D are as cheap

WIDE = 3  # if the basis fills more than 1 / WIDE of the smaller side, the eigenvectors are cheaper

UNRESOLVED = 1e-7  # of the largest singular value: smaller ones may be rounding errors of float64's D^T D

SHORT = 3.0  # factor on the extrapolated gains, which are too small by this much if the spectrum's tail is flat

FLOOR = 1e-6  # smaller gaps are within float32's rounding error

TINY = 1e-15  # norms from TINY to 1 / TINY have squares within float32's range

PROBES = 7  # Lanczos steps that look for energy outside the basis

IN_CACHE = 1 << 17  # numbers whose float64 copies stay in a core's cache

MISS = 1e-9  # the probability that PROBES steps miss energy: one in a million for a thousand matrices


@dataclass(frozen=True)
class TruncatedSVD:
    """A truncated SVD D ~ U diag(S) V^T; r is the requested rank, or D's rank if that is smaller.

    V (of a wide D: U) is orthonormal and U diag(S) = D V, so the energy kept is exactly the sum of S^2. U's columns
    have length 1. Columns with little energy are only as orthogonal as they have converged.
    """

    U: Tensor  # (m, r)
    S: Tensor  # (r,), float64, largest first
    V: Tensor  # (n, r)
    total: float  # ||D||^2
    gap: float  # (E - energy) / E for the optimum's energy E: 0 if exact, a bound if certified, else an estimate
    columns: int  # of the basis that was built; 0 for the eigenvectors of D^T D, which are exact

    @property
    def energy(self) -> float:
        return float(self.S.square().sum())


def truncated_svd(
    D: Tensor, rank: int, generator: torch.Generator, tolerance: float = TOLERANCE, certify: bool = False
) -> TruncatedSVD:
    """Return the top `rank` singular triplets (u, s, v) of D.

    The largest entry of each column of V is positive.

    Args:
        D: (m, n), float32, all finite
        generator: on D's device, for the random start
        tolerance: how much of the optimum's energy may be missing
        certify: prove that the tolerance is met, except with the probability MISS
    """
    m, n = D.shape
    if m < n:
        return _transposed(truncated_svd(D.T, rank, generator, tolerance, certify))
    total = energy_of(D)
    rank = min(rank, n)
    if total == 0.0 or rank == 0:
        return TruncatedSVD(D.new_zeros(m, 0), D.new_zeros(0).double(), D.new_zeros(n, 0), total, 0.0, 0)
    triplets = None
    if n > SMALL and WIDE * (rank + 2 * BLOCK) <= n and TINY < math.sqrt(total) < 1 / TINY:
        triplets = _krylov(D, rank, generator, tolerance, certify)
    X, gap, columns = triplets or (_eigenvectors(D, rank), 0.0, 0)
    return _from_right(D, X, total, gap, columns)


def truncated_svds(
    stack: Tensor, rank: int, generators: Sequence[torch.Generator], certify: bool = False
) -> list[TruncatedSVD]:
    """Return `truncated_svd` of each matrix of a stack (E, m, n), with one batched call per group if they are small."""
    E, m, n = stack.shape
    if min(m, n) > SMALL or E == 1:
        return [truncated_svd(D, rank, g, certify=certify) for D, g in zip(stack, generators, strict=True)]
    tall = stack if m >= n else stack.mT
    svds: list[TruncatedSVD] = []
    count = max(1, (1 << 22) // (m * n))
    for start in range(0, E, count):
        group = tall[start : start + count]
        wide = group.double()
        X = torch.linalg.eigh(wide.mT @ wide).eigenvectors[:, :, -min(rank, m, n) :].flip(2)
        svds += [_from_right(D, V, energy_of(D), 0.0, 0) for D, V in zip(group, X, strict=True)]
    return svds if m >= n else [_transposed(svd) for svd in svds]


def singular_values_of(D: Tensor) -> Tensor:
    """Return the singular values of D (m, n) in float64, (min(m, n),), largest first, to 1e-8 of the largest."""
    squares = torch.linalg.eigvalsh(gram(D if len(D) >= D.shape[1] else D.T))
    S: Tensor = squares.clamp(min=0).sqrt().flip(0)
    return S


def least_triplets(D: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `rank` singular triplets of D (m, n) with the least singular values.

    The eigenvectors of the smaller Gram matrix in float64 resolve singular values down to 1e-8 of the largest. Smaller
    ones are as good as 0, and any basis of their space does.

    Returns:
        (U, S, V): U (m, r) and V (n, r) in D's dtype, with orthonormal columns, S (r,) in float64, largest first.
    """
    if len(D) < D.shape[1]:
        V, S, U = least_triplets(D.T, rank)
        return U, S, V
    X = torch.linalg.eigh(gram(D)).eigenvectors[:, :rank].flip(1)
    B = torch.cat([block.double() @ X for block in row_blocks(D)])
    S = torch.linalg.vector_norm(B, dim=0)
    order = S.argsort(descending=True, stable=True)
    U, R = torch.linalg.qr(B[:, order])  # B / S except for signs, and orthonormal even where S is 0
    return torch.where(R.diagonal() < 0, -U, U).to(D.dtype), S[order], X[:, order].to(D.dtype)


def _transposed(svd: TruncatedSVD) -> TruncatedSVD:
    return _signed(TruncatedSVD(svd.V, svd.S, svd.U, svd.total, svd.gap, svd.columns))


def _from_right(D: Tensor, X: Tensor, total: float, gap: float, columns: int) -> TruncatedSVD:
    """Return the singular triplets of D given its right singular vectors X (n, r), computed in X's precision."""
    m, n = D.shape
    B = torch.cat([block.to(X.dtype) @ X for block in row_blocks(D)])
    S = torch.linalg.vector_norm(B.double(), dim=0)
    order = S.argsort(descending=True, stable=True)
    S, B, X = S[order], B[:, order], X[:, order]
    nonzero = S[0] * rounding_floor(m, n) < S
    S, B, X = S[nonzero], B[:, nonzero], X[:, nonzero].to(D.dtype)
    return _signed(TruncatedSVD((B.double() / S).to(D.dtype), S, X, total, gap, columns))


def rounding_floor(m: int, n: int) -> float:
    """Return an upper bound of the singular values of D (m, n) that are float32's rounding errors, over the largest."""
    return 1e-7 * math.sqrt(max(m, n))


def energy_of(D: Tensor) -> float:
    """Return ||D||^2 with a relative error of about 1e-8.

    The norms of rows are taken in float32, whose errors average out, and their squares are summed in float64.
    """
    lines = torch.linalg.vector_norm(D, dim=1 if D.stride(1) == 1 else 0)
    if len(lines) and not TINY < float(lines.max()) < math.inf:  # squares beyond float32's range
        lines = torch.linalg.vector_norm(D, dim=1, dtype=torch.float64)
    return float(lines.double().square().sum())


def residual_energy(D: Tensor, B: Tensor, A: Tensor) -> float:
    """Return ||D - B A||^2, summed in float64 from its entries, as ||D||^2 - ||B A||^2 would cancel.

    Args:
        D: (m, n).
        B: (m, r), A: (r, n).
    """
    A, energy, first = A.double(), 0.0, 0
    for block in row_blocks(D, IN_CACHE):
        left = torch.addmm(block.double(), B[first : first + len(block)].double(), A, alpha=-1)
        energy += float(torch.linalg.vector_norm(left).square())
        first += len(block)
    return energy


def row_blocks(D: Tensor, size: int = 1 << 22) -> Iterator[Tensor]:
    """Yield blocks of rows of about `size` numbers, whose float64 copies take little memory."""
    step = max(1, size // max(1, D.shape[1]))
    for start in range(0, D.shape[0], step):
        yield D[start : start + step]


def _signed(svd: TruncatedSVD) -> TruncatedSVD:
    if not len(svd.S):
        return svd
    largest = svd.V.abs().argmax(0)
    negative = svd.V.gather(0, largest[None])[0] < 0
    sign = torch.ones_like(svd.S, dtype=svd.V.dtype).masked_fill_(negative, -1.0)
    return TruncatedSVD(svd.U * sign, svd.S, svd.V * sign, svd.total, svd.gap, svd.columns)


def _eigenvectors(D: Tensor, rank: int) -> Tensor:
    """Return the top right singular vectors (n, rank) of D from D^T D, exact to 1e-8 of the largest singular value."""
    top: Tensor = torch.linalg.eigh(gram(D)).eigenvectors[:, -rank:].flip(1)
    return top


def gram(D: Tensor) -> Tensor:
    """Return D^T D in float64, (n, n)."""
    gram = torch.zeros(D.shape[1], D.shape[1], dtype=torch.float64, device=D.device)
    for block in row_blocks(D):
        wide = block.double()
        gram.addmm_(wide.T, wide)
    return gram


class Krylov:
    """A basis of the Krylov space of D^T D that grows by a block a step.

    Q (n, width) has orthonormal columns, W = D Q is (m, width), and T = W^T W is in float64. V (n, b) is the next
    block of Q, and D^T D times the last block of Q is Q T[:, -b:] + V R. The first block is `start` (n, b).
    """

    def __init__(self, D: Tensor, max_width: int, start: Tensor) -> None:
        m, n = D.shape
        self.D, self.max_width, self.width, self.block = D, max_width, 0, start.shape[1]
        self._Q, self._W = D.new_empty(n, max_width), D.new_empty(m, max_width)
        self._T = torch.zeros(max_width, max_width, dtype=torch.float64, device=D.device)
        self.V = torch.linalg.qr(start).Q
        self.R = D.new_zeros(self.block, self.block).double()

    @property
    def Q(self) -> Tensor:
        return self._Q[:, : self.width]

    @property
    def T(self) -> Tensor:
        return self._T[: self.width, : self.width]

    @property
    def is_full(self) -> bool:
        return self.width + self.block > self.max_width

    def grow(self) -> None:
        """Append V to the basis, and compute the next V and R."""
        new = slice(self.width, self.width + self.block)
        self._Q[:, new], self._W[:, new] = self.V, _product(self.D, self.V)
        cross = (self._W[:, : new.stop].T @ self._W[:, new]).double()
        self._T[: new.stop, new], self._T[new, : new.stop] = cross, cross.T
        self.width = new.stop
        Z = _product(self.D.T, self._W[:, new])
        self.R = torch.eye(self.block, dtype=torch.float64, device=Z.device)
        for _ in range(3):  # a QR scales up columns that are nearly noise, and with them their components in Q
            Z -= self.Q @ (self.Q.T @ Z)
            Z, R = torch.linalg.qr(Z)
            self.R = R.double() @ self.R
        self.V = Z

    def top(self, rank: int) -> Tensor:
        """Return the best `rank` right singular vectors within the basis, (n, rank)."""
        vectors = torch.linalg.eigh(self.T).eigenvectors[:, -rank:].flip(1).to(self.D.dtype)
        best: Tensor = torch.linalg.qr(self.Q @ vectors).Q
        return best

    def energy(self, rank: int) -> float:
        """Return the energy of the best approximation of this rank within the basis."""
        return float(torch.linalg.eigvalsh(self.T)[-rank:].sum())

    def bound(self, rank: int, generator: torch.Generator) -> float:
        """Return an upper bound on the energy of any approximation of this rank, wrong with the probability MISS.

        With P = I - Q Q^T, D^T D is [[T, E R^T], [R E^T, P D^T D P]] in the basis (Q, V, the rest). If mu bounds
        P D^T D P, this is at most [[T, E R^T], [R E^T, mu]], whose top eigenvalues are the bound (Weyl).
        """
        k, n, b = self.width, len(self._Q), self.block
        mu = self._rest(generator)
        M = torch.zeros(k + b, k + b, dtype=torch.float64, device=self.D.device)
        M[:k, :k], M[k:, k - b : k], M[k - b : k, k:] = self.T, self.R, self.R.T
        M[k:, k:].fill_diagonal_(mu)
        values = torch.linalg.eigvalsh(M)
        more = values.new_full((max(0, min(rank, n - k - b)),), mu)
        return float(torch.cat([values, more]).sort(descending=True).values[:rank].sum())

    def _rest(self, generator: torch.Generator) -> float:
        """Return an upper bound on the norm of P D^T D P, from Lanczos with random starts.

        From one start, PROBES steps find less than (1 - e) of the norm with a probability of at most
        1.648 sqrt(n) exp(-sqrt(e) (2 PROBES - 1)) (Kuczynski & Wozniakowski, 1992, theorem 4.2). From BLOCK independent
        starts at once, whose space contains that of each, it is at most the BLOCK-th power of this.
        """
        n = len(self._Q)

        def outside(X: Tensor) -> Tensor:
            for _ in range(2):
                X = X - self.Q @ (self.Q.T @ X)
            return X

        basis = torch.linalg.qr(outside(random_block(n, BLOCK, generator, self.D))).Q
        W = _product(self.D, basis)
        for _ in range(PROBES - 1):
            Z = outside(_product(self.D.T, W[:, -BLOCK:]))
            for _ in range(2):
                Z = Z - basis @ (basis.T @ Z)
            Z = torch.linalg.qr(Z).Q
            basis, W = torch.cat([basis, Z], 1), torch.cat([W, _product(self.D, Z)], 1)
        largest = float(torch.linalg.eigvalsh((W.T @ W).double())[-1])
        missed = (math.log(1.648 * math.sqrt(n)) - math.log(MISS) / BLOCK) / (2 * PROBES - 1)
        return largest / (1 - missed**2)


def _product(D: Tensor, X: Tensor) -> Tensor:
    """Return D @ X for a few columns X, in the order of operands that suits D's layout and takes half the time."""
    return D @ X if D.stride(1) == 1 else (X.T.contiguous() @ D.T).T


def random_block(n: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Return normal numbers (n, columns) of the type and on the device of `like`."""
    return torch.randn(n, columns, generator=generator, device=like.device, dtype=like.dtype)


def _krylov(
    D: Tensor, rank: int, generator: torch.Generator, tolerance: float, certify: bool
) -> tuple[Tensor, float, int] | None:
    """Return (top right singular vectors, gap, columns), or None if the basis would grow too wide."""
    space = Krylov(D, D.shape[1] // WIDE, random_block(D.shape[1], BLOCK, generator, D))
    energy, gain, wanted = 0.0, 0.0, 0
    while not space.is_full:
        space.grow()
        if space.width < rank + BLOCK:
            continue
        former, energy = energy, space.energy(rank)
        last, gain = gain, (energy - former) / energy if energy else 0.0
        ratio = min(max(gain / last if last > 0 else 0.95, 0.0), 0.95)
        gap = SHORT * gain * max(ratio / (1 - ratio), 0.25)
        if not former or gap >= tolerance or not (last or gain < FLOOR) or space.width < wanted:
            continue
        if certify:
            bound = space.bound(rank, generator)
            gap = (bound - energy) / bound
            if gap > tolerance:
                wanted = space.width + max(2 * BLOCK, space.width // 4)
                continue
        return space.top(rank), max(gap, FLOOR), space.width
    return None
