"""How the changes of several adapters to one matrix become one: METHODS.

The formulas are those of the papers, taken of the changes D_i = s_i B_i A_i. Taken of B and A apart, as some tools do,
they depend on which factors happen to make up a change, and a weighted sum of factors has cross terms B_i A_j. Where
what is published differs, or says nothing of weights, the row names the variant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...numerics.factored_svd import RANK_TOLERANCE
from ...numerics.seeded_random import uniform

DRAWN = 1 << 20  # random numbers at a time, each lot under a key of its own


ROWS = 1024  # of a dense change made at a time in float64


@dataclass(frozen=True)
class WeightedDelta:
    """One adapter's share: weight * B @ A. B: (out, r), A: (r, in), float64, the scale in B.

    key: what its random numbers follow from.
    """

    B: Tensor
    A: Tensor
    weight: float
    key: str

    def dense(self) -> Tensor:
        """D, (out, in), float32, without the weight."""
        D = self.B.new_empty(len(self.B), self.A.shape[1], dtype=torch.float32)
        for start in range(0, len(D), ROWS):
            D[start : start + ROWS] = self.B[start : start + ROWS] @ self.A
        return D


# Makes the parts' changes with some entries 0, each time it is called and one at a time: only one need be there.
Deltas = Callable[[], Iterator[Tensor]]


def _keep_largest(parts: Sequence[WeightedDelta], density: float) -> Deltas:
    """Of each D the share `density` of its entries, the largest; equal ones stay together."""
    cuts: dict[int, float] = {}

    def changes() -> Iterator[Tensor]:
        for i, part in enumerate(parts):
            D = part.dense()
            if i not in cuts:
                cuts[i] = _threshold(D, density)
            yield D.mul_(D.abs() >= cuts[i])

    return changes


def _threshold(D: Tensor, density: float) -> float:
    """The least of the largest magnitudes. numpy's selection, since torch's brings as many indices along."""
    dropped = D.numel() - max(1, int(density * D.numel()))
    if dropped <= 0:
        return 0.0
    sizes = D.abs().flatten().cpu().numpy()
    sizes.partition(dropped)
    return float(sizes[dropped])


def _keep_random(parts: Sequence[WeightedDelta], density: float) -> Deltas:
    """DARE: each entry stays with the probability `density`, and is divided by it."""

    def changes() -> Iterator[Tensor]:
        for part in parts:
            D = part.dense()
            flat = D.view(-1)
            for start in range(0, len(flat) if density < 1 else 0, DRAWN):
                block = flat[start : start + DRAWN]
                drawn = torch.from_numpy(uniform(f"{part.key} {start}", len(block))).to(flat.device)
                block.mul_((drawn < density) / density)
            yield D

    return changes


def _weights(parts: Sequence[WeightedDelta]) -> list[float]:
    return [part.weight for part in parts]


def _sum(changes: Deltas, weights: Sequence[float]) -> Tensor:
    pairs = zip(weights, changes(), strict=True)
    weight, D = next(pairs)
    total = D.mul_(weight)
    for weight, D in pairs:
        total.add_(D, alpha=weight)
    return total


def _elect_signs(changes: Deltas, weights: Sequence[float], votes: Sequence[float]) -> Tensor:
    """TIES after trimming: an entry's sign is that of sum v_i D_i, its value sum w_i D_i / sum v_i of those that agree.

    v: the votes.
    """
    positive = _sum(changes, votes) >= 0
    total, count = (torch.zeros_like(positive, dtype=torch.float32) for _ in range(2))
    for weight, vote, D in zip(weights, votes, changes(), strict=True):
        agrees = torch.where(positive, D > 0, D < 0)
        total.add_(D.mul_(agrees), alpha=weight)
        count.add_(agrees, alpha=vote)
    return total.div_(count.masked_fill_(count == 0, 1.0))


def cat(parts: Sequence[WeightedDelta], density: float) -> tuple[Tensor, Tensor]:
    """sum w_i D_i, exactly: (B (out, sum r_i), A (sum r_i, in)); scales and weights are in B."""
    return torch.cat([part.B * part.weight for part in parts], 1), torch.cat([part.A for part in parts])


def ties(parts: Sequence[WeightedDelta], density: float) -> Tensor:
    return _elect_signs(_keep_largest(parts, density), _weights(parts), [1.0] * len(parts))


def ties_mergekit(parts: Sequence[WeightedDelta], density: float) -> Tensor:
    return _elect_signs(_keep_largest(parts, density), _weights(parts), _weights(parts))


def dare_linear(parts: Sequence[WeightedDelta], density: float) -> Tensor:
    return _sum(_keep_random(parts, density), _weights(parts))


def dare_ties(parts: Sequence[WeightedDelta], density: float) -> Tensor:
    return _elect_signs(_keep_random(parts, density), _weights(parts), [1.0] * len(parts))


def magnitude(parts: Sequence[WeightedDelta], density: float) -> Tensor:
    return _sum(_keep_largest(parts, density), _weights(parts))


def knots(parts: Sequence[WeightedDelta], density: float) -> tuple[Tensor, Tensor]:
    """TIES of the S V_i^T in [D_1 ... D_N] = U S [V_1^T ... V_N^T]: (U (out, k), the result (k, in)).

    With [B_1 ... B_N] = Q R and A_i^T = Q_i L_i^T the SVD is that of the small R blockdiag(L_i), so U S V^T is never
    N * in wide; S V_i^T is U^T D_i.
    """
    Q, R = torch.linalg.qr(torch.cat([part.B for part in parts], 1))
    pieces = R.split([part.B.shape[1] for part in parts], 1)
    L = [torch.linalg.qr(part.A.mT, mode="r").R.mT for part in parts]
    small = torch.cat([piece @ each for piece, each in zip(pieces, L, strict=True)], 1)
    U, S, _ = torch.linalg.svd(small, full_matrices=False)
    k = int((RANK_TOLERANCE * S[:1] < S).sum())  # beyond it are directions of none of the changes
    U = U[:, :k]
    turned = [
        WeightedDelta(U.mT @ piece, part.A, part.weight, part.key) for piece, part in zip(pieces, parts, strict=True)
    ]
    result = parts[0].A.new_zeros(len(R), parts[0].A.shape[1])
    if k:
        result[:k] = ties(turned, density)
    return torch.nn.functional.pad(Q @ U, (0, len(R) - k)), result


@dataclass(frozen=True)
class CombineMethod:
    """run: of the parts of one matrix and the density, to factors, or to a dense result that has no low rank."""

    run: Callable[[Sequence[WeightedDelta], float], tuple[Tensor, Tensor] | Tensor]
    dense: bool = True
    prunes: bool = True
    random: bool = False
    negative: bool = True  # whether weights may be below 0


METHODS: dict[str, CombineMethod] = {
    "cat": CombineMethod(cat, dense=False, prunes=False),
    "ties": CombineMethod(ties),
    "ties-mergekit": CombineMethod(ties_mergekit, negative=False),
    "dare-linear": CombineMethod(dare_linear, random=True),
    "dare-ties": CombineMethod(dare_ties, random=True),
    "magnitude": CombineMethod(magnitude),
    "knots": CombineMethod(knots, dense=False),
}


# What others call it, or offer -> what to use instead, and why.
REFUSED = {
    "linear": "a sum of factors has the cross terms B_i A_j, which no adapter has; cat is the sum of the changes",
    "svd": "that is cat with --rank",
    "ties_svd": "that is ties with --rank",
    "dare_linear": "it is spelled dare-linear",
    "dare_ties": "it is spelled dare-ties",
    "magnitude_prune": "it is spelled magnitude",
}
