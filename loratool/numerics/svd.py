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

import numpy as np

from .arrays import Array, doubled, empty, fetched, sent, where
from .linalg import (
    cast,
    concatenate,
    eigenvalues,
    eigh,
    eye,
    norm,
    order_of,
    qr,
    sqrt,
    square,
    taken,
    zeros,
)
from .seeded_random import Draw

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

    U: Array  # (m, r)
    S: Array  # (r,), float64, largest first
    V: Array  # (n, r)
    total: float  # ||D||^2
    gap: float  # (E - energy) / E for the optimum's energy E: 0 if exact, a bound if certified, else an estimate
    columns: int  # of the basis that was built; 0 for the eigenvectors of D^T D, which are exact

    @property
    def energy(self) -> float:
        return float(square(self.S).sum())


def truncated_svd(D: Array, rank: int, draw: Draw, tolerance: float = TOLERANCE, certify: bool = False) -> TruncatedSVD:
    """Return the top `rank` singular triplets (u, s, v) of D.

    The largest entry of each column of V is positive.

    Args:
        D: (m, n), float32, all finite
        draw: of the random start
        tolerance: how much of the optimum's energy may be missing
        certify: prove that the tolerance is met, except with the probability MISS
    """
    m, n = D.shape
    if m < n:
        return _transposed(truncated_svd(D.T, rank, draw, tolerance, certify))
    total = energy_of(D)
    rank = min(rank, n)
    if total == 0.0 or rank == 0:
        U, V = (zeros((size, 0), D, np.float32) for size in (m, n))
        return TruncatedSVD(U, zeros((0,), D), V, total, 0.0, 0)
    triplets = None
    if n > SMALL and WIDE * (rank + 2 * BLOCK) <= n and TINY < math.sqrt(total) < 1 / TINY:
        triplets = _krylov(D, rank, draw, tolerance, certify)
    X, gap, columns = triplets or (_eigenvectors(D, rank), 0.0, 0)
    return _from_right(D, X, total, gap, columns)


def truncated_svds(stack: Array, rank: int, draws: Sequence[Draw], certify: bool = False) -> list[TruncatedSVD]:
    """Return `truncated_svd` of each matrix of a stack (E, m, n), with one batched call per group if they are small."""
    E, m, n = stack.shape
    if min(m, n) > SMALL or E == 1:
        return [truncated_svd(D, rank, draw, certify=certify) for D, draw in zip(stack, draws, strict=True)]
    tall = stack if m >= n else stack.swapaxes(1, 2)
    svds: list[TruncatedSVD] = []
    count = (1 << 22) // max(1, m * n) or 1
    for start in range(0, E, count):
        group = tall[start : start + count]
        wide = doubled(group)
        X = eigh(wide.swapaxes(1, 2) @ wide)[1][:, :, : min(rank, m, n)]
        svds += [_from_right(D, V, energy_of(D), 0.0, 0) for D, V in zip(group, X, strict=True)]
    return svds if m >= n else [_transposed(svd) for svd in svds]


def singular_values_of(D: Array) -> Array:
    """Return the singular values of D (m, n) in float64, (min(m, n),), largest first, to 1e-8 of the largest."""
    return sqrt(eigenvalues(gram(D if len(D) >= D.shape[1] else D.T)).clip(0.0))


def least_triplets(D: Array, rank: int) -> tuple[Array, Array, Array]:
    """Return the `rank` singular triplets of D (m, n) with the least singular values.

    The eigenvectors of the smaller Gram matrix in float64 resolve singular values down to 1e-8 of the largest. Smaller
    ones are as good as 0, and any basis of their space does.

    Returns:
        (U, S, V): U (m, r) and V (n, r) in D's dtype, with orthonormal columns, S (r,) in float64, largest first.
    """
    if len(D) < D.shape[1]:
        V, S, U = least_triplets(D.T, rank)
        return U, S, V
    X = eigh(gram(D))[1][:, D.shape[1] - rank :]
    B = concatenate([doubled(block) @ X for block in row_blocks(D)])
    S = norm(B, 0)
    order = order_of(S)
    U, R = qr(B[:, order])  # B / S except for signs, and orthonormal even where S is 0
    return cast(where(R.diagonal() < 0, -U, U), D), S[order], cast(X[:, order], D)


def _transposed(svd: TruncatedSVD) -> TruncatedSVD:
    return _signed(TruncatedSVD(svd.V, svd.S, svd.U, svd.total, svd.gap, svd.columns))


def _from_right(D: Array, X: Array, total: float, gap: float, columns: int) -> TruncatedSVD:
    """Return the singular triplets of D given its right singular vectors X (n, r), computed in X's precision."""
    m, n = D.shape
    B = concatenate([cast(block, X) @ X for block in row_blocks(D)])
    S = norm(doubled(B), 0)
    order = order_of(S)
    S, B, X = S[order], B[:, order], X[:, order]
    nonzero = S[:1] * rounding_floor(m, n) < S
    S, B, X = S[nonzero], B[:, nonzero], cast(X[:, nonzero], D)
    return _signed(TruncatedSVD(cast(doubled(B) / S, D), S, X, total, gap, columns))


def rounding_floor(m: int, n: int) -> float:
    """Return an upper bound of the singular values of D (m, n) that are float32's rounding errors, over the largest."""
    return 1e-7 * math.sqrt(max(m, n))


def energy_of(D: Array) -> float:
    """Return ||D||^2, summed in float64."""
    return math.fsum(float(square(doubled(block)).sum()) for block in row_blocks(D, IN_CACHE))


def residual_energy(D: Array, B: Array, A: Array) -> float:
    """Return ||D - B A||^2, summed in float64 from its entries, as ||D||^2 - ||B A||^2 would cancel.

    Args:
        D: (m, n).
        B: (m, r), A: (r, n).
    """
    A, energy, first = doubled(A), 0.0, 0
    for block in row_blocks(D, IN_CACHE):
        left = doubled(block) - doubled(B[first : first + len(block)]) @ A
        energy += float(square(left).sum())
        first += len(block)
    return energy


def row_blocks(D: Array, size: int = 1 << 22) -> Iterator[Array]:
    """Yield blocks of rows of about `size` numbers, whose float64 copies take little memory."""
    step = max(1, size // max(1, D.shape[1]))
    for start in range(0, D.shape[0], step):
        yield D[start : start + step]


def _signed(svd: TruncatedSVD) -> TruncatedSVD:
    if not len(svd.S):
        return svd
    sign = 1 - 2 * cast(taken(svd.V, abs(svd.V).argmax(0)) < 0, svd.V)
    return TruncatedSVD(svd.U * sign, svd.S, svd.V * sign, svd.total, svd.gap, svd.columns)


def _eigenvectors(D: Array, rank: int) -> Array:
    """Return the top right singular vectors (n, rank) of D from D^T D, exact to 1e-8 of the largest singular value."""
    return eigh(gram(D))[1][:, :rank]


def gram(D: Array) -> Array:
    """Return D^T D in float64, (n, n)."""
    total = zeros((D.shape[1], D.shape[1]), D)
    for block in row_blocks(D):
        wide = doubled(block)
        total += wide.T @ wide
    return total


class Krylov:
    """A basis of the Krylov space of D^T D that grows by a block a step.

    Q (n, width) has orthonormal columns, W = D Q is (m, width), and T = W^T W is in float64. V (n, b) is the next
    block of Q, and D^T D times the last block of Q is Q T[:, -b:] + V R. The first block is `start` (n, b).
    """

    def __init__(self, D: Array, max_width: int, start: Array) -> None:
        m, n = D.shape
        self.D, self.max_width, self.width = D, max_width, 0
        self.block: int = start.shape[1]
        self._Q, self._W = (empty(np.float32, size, max_width, like=D) for size in (n, m))
        self._T = zeros((max_width, max_width), D)
        self.V = qr(start)[0]
        self.R = zeros((self.block, self.block), D)

    @property
    def Q(self) -> Array:
        return self._Q[:, : self.width]

    @property
    def T(self) -> Array:
        return self._T[: self.width, : self.width]

    @property
    def is_full(self) -> bool:
        return self.width + self.block > self.max_width

    def grow(self) -> None:
        """Append V to the basis, and compute the next V and R."""
        new = slice(self.width, self.width + self.block)
        self._Q[:, new], self._W[:, new] = self.V, self.D @ self.V
        cross = doubled(self._W[:, : new.stop].T @ self._W[:, new])
        self._T[: new.stop, new], self._T[new, : new.stop] = cross, cross.T
        self.width = new.stop
        Z = self.D.T @ self._W[:, new]
        self.R = eye(self.block, Z)
        for _ in range(3):  # a QR scales up columns that are nearly noise, and with them their components in Q
            Z -= self.Q @ (self.Q.T @ Z)
            Z, R = qr(Z)
            self.R = doubled(R) @ self.R
        self.V = Z

    def top(self, rank: int) -> Array:
        """Return the best `rank` right singular vectors within the basis, (n, rank)."""
        return qr(self.Q @ cast(eigh(self.T)[1][:, :rank], self.D))[0]

    def energy(self, rank: int) -> float:
        """Return the energy of the best approximation of this rank within the basis."""
        return float(eigenvalues(self.T)[:rank].sum())

    def bound(self, rank: int, draw: Draw) -> float:
        """Return an upper bound on the energy of any approximation of this rank, wrong with the probability MISS.

        With P = I - Q Q^T, D^T D is [[T, E R^T], [R E^T, P D^T D P]] in the basis (Q, V, the rest). If mu bounds
        P D^T D P, this is at most [[T, E R^T], [R E^T, mu]], whose top eigenvalues are the bound (Weyl).
        """
        k, n, b = self.width, len(self._Q), self.block
        mu = self._rest(draw)
        M = zeros((k + b, k + b), self.D)
        M[:k, :k], M[k:, k - b : k], M[k - b : k, k:] = self.T, self.R, self.R.T
        M[k:, k:] = mu * eye(b, M)
        values = np.append(fetched(eigenvalues(M)), [mu] * min(rank, n - k - b))
        return float(np.sort(values)[-rank:].sum())

    def _rest(self, draw: Draw) -> float:
        """Return an upper bound on the norm of P D^T D P, from Lanczos with random starts.

        From one start, PROBES steps find less than (1 - e) of the norm with a probability of at most
        1.648 sqrt(n) exp(-sqrt(e) (2 PROBES - 1)) (Kuczynski & Wozniakowski, 1992, theorem 4.2). From BLOCK independent
        starts at once, whose space contains that of each, it is at most the BLOCK-th power of this.
        """
        n = len(self._Q)

        def outside(X: Array) -> Array:
            for _ in range(2):
                X = X - self.Q @ (self.Q.T @ X)
            return X

        basis = qr(outside(random_block(n, BLOCK, draw, f"outside {self.width}", self.D)))[0]
        W = self.D @ basis
        for _ in range(PROBES - 1):
            Z = outside(self.D.T @ W[:, -BLOCK:])
            for _ in range(2):
                Z = Z - basis @ (basis.T @ Z)
            Z = qr(Z)[0]
            basis, W = concatenate([basis, Z], 1), concatenate([W, self.D @ Z], 1)
        largest = float(eigenvalues(doubled(W.T @ W))[0])
        missed = (math.log(1.648 * math.sqrt(n)) - math.log(MISS) / BLOCK) / (2 * PROBES - 1)
        return largest / (1 - missed**2)


def random_block(n: int, columns: int, draw: Draw, label: str, like: Array) -> Array:
    """Return normal numbers (n, columns), in the type of `like` and where it is."""
    return sent(draw.normal(label, n, columns).astype(np.float32), like)


def _krylov(D: Array, rank: int, draw: Draw, tolerance: float, certify: bool) -> tuple[Array, float, int] | None:
    """Return (top right singular vectors, gap, columns), or None if the basis would grow too wide."""
    space = Krylov(D, D.shape[1] // WIDE, random_block(D.shape[1], BLOCK, draw, "start", D))
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
            bound = space.bound(rank, draw)
            gap = (bound - energy) / bound
            if gap > tolerance:
                wanted = space.width + max(2 * BLOCK, space.width // 4)
                continue
        return space.top(rank), max(gap, FLOOR), space.width
    return None
