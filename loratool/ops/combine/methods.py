"""Implement the methods that combine several adapters' deltas of one matrix into one (METHODS).

The papers' formulas are applied to the deltas D_i = s_i B_i A_i. Applied to B and A separately, as in some tools, they
would depend on the choice of factors, and a weighted sum of factors would have cross terms B_i A_j. `choices` gives the
paper of each method, and the variant if publications differ or do not define weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...numerics.factored_svd import RANK_TOLERANCE
from ...numerics.seeded_random import uniform

DRAWN = 1 << 20  # random numbers drawn at a time, each time with another key


ROWS = 1024  # of a dense delta, computed at a time in float64


@dataclass(frozen=True)
class WeightedDelta:
    """An adapter's weighted delta of one matrix, weight * B @ A."""

    B: Tensor  # (out, r), float64, with the scale folded in
    A: Tensor  # (r, in), float64
    weight: float
    key: str  # seeds its random numbers

    def dense(self) -> Tensor:
        """Return D = B @ A, (out, in), float32, without the weight."""
        D = self.B.new_empty(len(self.B), self.A.shape[1], dtype=torch.float32)
        for start in range(0, len(D), ROWS):
            D[start : start + ROWS] = self.B[start : start + ROWS] @ self.A
        return D


# Yields the pruned deltas one by one, so that only one is in memory; can be called again.
Deltas = Callable[[], Iterator[Tensor]]


def _keep_largest(deltas: Sequence[WeightedDelta], density: float) -> Deltas:
    """Keep the fraction `density` of the entries of each D, the largest, and all others equal to the smallest kept."""
    thresholds: dict[int, float] = {}

    def pruned() -> Iterator[Tensor]:
        for i, delta in enumerate(deltas):
            D = delta.dense()
            if i not in thresholds:
                thresholds[i] = _threshold(D, density)
            yield D.mul_(D.abs() >= thresholds[i])

    return pruned


def _threshold(D: Tensor, density: float) -> float:
    """Return the smallest magnitude to keep, so that the fraction `density` of the entries is kept."""
    dropped = D.numel() - max(1, int(density * D.numel()))
    if dropped <= 0:
        return 0.0
    magnitudes = D.abs().flatten().cpu().numpy()
    magnitudes.partition(dropped)  # torch's selection would also make as many indices
    return float(magnitudes[dropped])


def _keep_random(deltas: Sequence[WeightedDelta], density: float) -> Deltas:
    """Keep each entry with the probability `density`, divided by it (DARE)."""

    def pruned() -> Iterator[Tensor]:
        for delta in deltas:
            D = delta.dense()
            flat = D.view(-1)
            for start in range(0, len(flat) if density < 1 else 0, DRAWN):
                block = flat[start : start + DRAWN]
                drawn = torch.from_numpy(uniform(f"{delta.key} {start}", len(block))).to(flat.device)
                block.mul_((drawn < density) / density)
            yield D

    return pruned


def _weights(deltas: Sequence[WeightedDelta]) -> list[float]:
    return [delta.weight for delta in deltas]


def _sum(pruned: Deltas, weights: Sequence[float]) -> Tensor:
    pairs = zip(weights, pruned(), strict=True)
    weight, D = next(pairs)
    total = D.mul_(weight)
    for weight, D in pairs:
        total.add_(D, alpha=weight)
    return total


def _elect_signs(pruned: Deltas, weights: Sequence[float], votes: Sequence[float]) -> Tensor:
    """Elect signs and merge (TIES after trimming), with weights w_i and votes v_i.

    The sign of an entry is that of sum v_i D_i; its value is sum w_i D_i / sum v_i over those with this sign.
    """
    positive = _sum(pruned, votes) >= 0
    total, count = (torch.zeros_like(positive, dtype=torch.float32) for _ in range(2))
    for weight, vote, D in zip(weights, votes, pruned(), strict=True):
        agrees = torch.where(positive, D > 0, D < 0)
        total.add_(D.mul_(agrees), alpha=weight)
        count.add_(agrees, alpha=vote)
    return total.div_(count.masked_fill_(count == 0, 1.0))


def cat(deltas: Sequence[WeightedDelta], density: float) -> tuple[Tensor, Tensor]:
    """Return factors of sum w_i D_i, exactly: B (out, sum r_i), with scales and weights, and A (sum r_i, in)."""
    return torch.cat([delta.B * delta.weight for delta in deltas], 1), torch.cat([delta.A for delta in deltas])


def ties(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    return _elect_signs(_keep_largest(deltas, density), _weights(deltas), [1.0] * len(deltas))


def ties_mergekit(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    return _elect_signs(_keep_largest(deltas, density), _weights(deltas), _weights(deltas))


def dare_linear(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    return _sum(_keep_random(deltas, density), _weights(deltas))


def dare_ties(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    return _elect_signs(_keep_random(deltas, density), _weights(deltas), [1.0] * len(deltas))


def magnitude(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    return _sum(_keep_largest(deltas, density), _weights(deltas))


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
    rotated = [
        WeightedDelta(U.mT @ piece, delta.A, delta.weight, delta.key)
        for piece, delta in zip(pieces, deltas, strict=True)
    ]
    result = deltas[0].A.new_zeros(len(R), deltas[0].A.shape[1])
    if k:
        result[:k] = ties(rotated, density)
    return torch.nn.functional.pad(Q @ U, (0, len(R) - k)), result


@dataclass(frozen=True)
class CombineMethod:
    """A method of `combine`."""

    run: Callable[[Sequence[WeightedDelta], float], tuple[Tensor, Tensor] | Tensor]  # (deltas, density) -> (B, A) or D
    dense: bool = True  # returns D, which has no low rank
    prunes: bool = True  # has a density
    random: bool = False  # draws random numbers
    negative: bool = True  # takes negative weights


METHODS: dict[str, CombineMethod] = {
    "cat": CombineMethod(cat, dense=False, prunes=False),
    "ties": CombineMethod(ties),
    "ties-mergekit": CombineMethod(ties_mergekit, negative=False),
    "dare-linear": CombineMethod(dare_linear, random=True),
    "dare-ties": CombineMethod(dare_ties, random=True),
    "magnitude": CombineMethod(magnitude),
    "knots": CombineMethod(knots, dense=False),
}


# a method of other tools -> what to use instead, and why
REFUSED = {
    "linear": "a sum of factors has the cross terms B_i A_j, which no adapter has; cat is the sum of the changes",
    "svd": "that is cat with --rank",
    "ties_svd": "that is ties with --rank",
    "dare_linear": "it is spelled dare-linear",
    "dare_ties": "it is spelled dare-ties",
    "magnitude_prune": "it is spelled magnitude",
}
