"""The best low-rank approximation of a matrix, as good as a full SVD and tens of times faster.

Block Golub-Kahan: an orthonormal basis of the Krylov space of D^T D grows by a block a step, both products are kept,
and the top of a small matrix T = W^T W gives the energy reached so far (Musco & Musco, NeurIPS 2015; Chen et al. 2025
for blocks smaller than the rank). It ends when the gains say that the optimum is no further than the tolerance. Where
the spectrum is too flat for that, or the matrix small, the eigenvectors of D^T D in float64 are cheaper, and exact.
The energy kept is exact in either case: ||D||^2 - ||D - U S V^T||^2 is the sum of S^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16  # columns a step
SMALL = 512  # columns up to which the eigenvectors are as cheap
WIDE = 3  # of the smaller side, the part that the basis may fill before the eigenvectors are cheaper
FLOOR = 1e-6  # below which float32 tells no gap


@dataclass(frozen=True)
class TruncatedSVD:
    """U: (m, r), S: (r,) falling, in float64, V: (n, r); D ~ U diag(S) V^T. r is the rank asked for, or D's own.

    V (of a wide D: U) is orthonormal and U diag(S) = D V, so the energy kept is exactly the sum of S^2; U's columns
    have length 1, and are orthogonal as far as those that carry little energy have converged.
    total: ||D||^2. gap: (E - S's energy) / E for the optimum's energy E: 0 where exact, else an estimate.
    columns: of the basis that was built, 0 for the eigenvectors of D^T D.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    total: float
    gap: float
    columns: int

    @property
    def energy(self) -> float:
        return float(self.S.square().sum())


def truncated_svd(D: Tensor, rank: int, generator: torch.Generator, tolerance: float = 1e-4) -> TruncatedSVD:
    """The top `rank` triplets of D (m, n), float32, of finite numbers.

    tolerance: of the energy, relative to the optimum. generator: on D's device; it decides the start alone. Signs are
    such that the largest entry of each column of V is positive.
    """
    m, n = D.shape
    if m < n:
        turned = truncated_svd(D.T, rank, generator, tolerance)
        return _signed(TruncatedSVD(turned.V, turned.S, turned.U, turned.total, turned.gap, turned.columns))
    total = _energy(D)
    rank = min(rank, n)
    if total == 0.0 or rank == 0:
        return TruncatedSVD(D.new_zeros(m, 0), D.new_zeros(0).double(), D.new_zeros(n, 0), total, 0.0, 0)
    found = None if n <= SMALL or WIDE * (rank + 2 * BLOCK) > n else _krylov(D, rank, generator, tolerance)
    if found is None:
        X, gap, columns = _eigenvectors(D, rank), 0.0, 0
    else:
        X, gap, columns = found
    B = D @ X
    S = torch.linalg.vector_norm(B.double(), dim=0)
    order = S.argsort(descending=True, stable=True)
    S, B, X = S[order], B[:, order], X[:, order]
    kept = S[0] * 1e-7 * max(m, n) ** 0.5 < S  # what is below is float32's noise about an exact rank
    S, B, X = S[kept], B[:, kept], X[:, kept]
    return _signed(TruncatedSVD((B.double() / S).to(D.dtype), S, X, total, gap, columns))


def _energy(D: Tensor) -> float:
    """||D||^2 in float64, by blocks of rows."""
    return math.fsum(float(block.double().square().sum()) for block in _row_blocks(D))


def _row_blocks(D: Tensor) -> Iterator[Tensor]:
    step = max(1, (1 << 22) // max(1, D.shape[1]))
    for start in range(0, D.shape[0], step):
        yield D[start : start + step]


def _signed(svd: TruncatedSVD) -> TruncatedSVD:
    if not len(svd.S):
        return svd
    largest = svd.V.abs().argmax(0)
    sign = torch.where(svd.V[largest, torch.arange(len(svd.S), device=svd.V.device)] < 0, -1.0, 1.0).to(svd.V.dtype)
    return TruncatedSVD(svd.U * sign, svd.S, svd.V * sign, svd.total, svd.gap, svd.columns)


def _eigenvectors(D: Tensor, rank: int) -> Tensor:
    """The top right singular vectors from D^T D, whose float64 keeps singular values down to 1e-8 of the largest."""
    gram = torch.zeros(D.shape[1], D.shape[1], dtype=torch.float64, device=D.device)
    for block in _row_blocks(D):
        wide = block.double()
        gram.addmm_(wide.T, wide)
    top: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).to(D.dtype)
    return top


def _krylov(D: Tensor, rank: int, generator: torch.Generator, tolerance: float) -> tuple[Tensor, float, int] | None:
    """(the top right singular vectors, the estimated gap, columns), or None where the basis would grow too wide."""
    n = D.shape[1]
    most = n // WIDE
    Q = D.new_empty(n, most)
    W = D.new_empty(D.shape[0], most)
    T = torch.zeros(most, most, dtype=torch.float64, device=D.device)
    V = torch.linalg.qr(torch.randn(n, BLOCK, generator=generator, device=D.device, dtype=D.dtype)).Q
    width, energy, gain = 0, 0.0, 0.0
    while width + BLOCK <= most:
        new = slice(width, width + BLOCK)
        Q[:, new], W[:, new] = V, D @ V
        cross = (W[:, : new.stop].T @ W[:, new]).double()
        T[: new.stop, new], T[new, : new.stop] = cross, cross.T
        width = new.stop
        Z = D.T @ W[:, new]
        for _ in range(2):  # the first QR brings out columns that are nearly noise, and with them what lies in Q
            Z -= Q[:, :width] @ (Q[:, :width].T @ Z)
            Z = torch.linalg.qr(Z).Q
        if width >= rank + BLOCK:
            values, vectors = torch.linalg.eigh(T[:width, :width])
            former, energy = energy, float(values[-rank:].sum())
            last, gain = gain, (energy - former) / energy if energy else 0.0
            ratio = min(max(gain / last if last > 0 else 0.95, 0.0), 0.95)
            gap = gain * max(ratio / (1 - ratio), 0.25)
            if former and gap < tolerance and (last or gain < FLOOR):
                X = Q[:, :width] @ vectors[:, -rank:].flip(1).to(D.dtype)
                return torch.linalg.qr(X).Q, max(gap, FLOOR), width
        V = Z
    return None
