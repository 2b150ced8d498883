"""Combine changes entry by entry, with elected signs and pruned entries: TIES, DARE and similar methods.

The same functions run on the changes and on their cores, whose entries are coordinates in a common space. The D_i elect
signs and choose the entries to prune; the sum is over w_i D_i. The published code of core space keeps one entry more,
and uses the full matrix if a sum of signs is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ....numerics.seeded_random import uniform
from .delta import WeightedDelta

DRAWN = 1 << 20  # random numbers drawn at a time, each time with another key

SPREAD = 0.15  # of DELLA's probabilities around the density: mergekit's epsilon, half the authors' window

# Yields the pruned deltas one by one, so that only one is in memory; can be called again.
Deltas = Callable[[], Iterator[Tensor]]


def _keep_largest(deltas: Sequence[WeightedDelta], density: float) -> Deltas:
    """Keep the largest entries of each D, a fraction `density`, with all entries equal to the smallest kept one."""
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
                block.mul_((drawn < density).to(block.dtype) / density)
            yield D

    return pruned


def _keep_by_rank(deltas: Sequence[WeightedDelta], density: float) -> Deltas:
    """Keep each entry with a probability that rises with its rank in its row, divided by it (DELLA)."""

    def pruned() -> Iterator[Tensor]:
        for delta in deltas:
            D = delta.dense()
            rows = max(1, DRAWN // max(1, D.shape[1]))
            for start in range(0, len(D) if density < 1 else 0, rows):
                block = D[start : start + rows]
                drawn = uniform(f"{delta.key} rows {start}", block.numel())
                probabilities = _probabilities(block, density)
                block.mul_(
                    (torch.from_numpy(drawn).to(block.device).view(probabilities.shape) < probabilities) / probabilities
                )
            yield D

    return pruned


def _probabilities(rows: Tensor, density: float) -> Tensor:
    """Return `density` - SPREAD (least entry of a row) to + SPREAD (largest), in equal steps, in float64."""
    n = rows.shape[1]
    steps = torch.linspace(density - SPREAD, density + SPREAD, n, dtype=torch.float64, device=rows.device)
    order = rows.abs().argsort(dim=1, stable=True)
    probabilities = torch.empty_like(rows, dtype=torch.float64)
    return probabilities.scatter_(
        1, order, (steps if n > 1 else torch.full_like(steps, density)).expand_as(probabilities)
    )


def _weights(deltas: Sequence[WeightedDelta]) -> list[float]:
    return [delta.weight for delta in deltas]


def _relative_weights(deltas: Sequence[WeightedDelta]) -> list[float]:
    """Return the weights times a power of two, the largest below 1, so that float32 can hold their sums."""
    exponent = math.frexp(max(_weights(deltas)))[1]
    return [math.ldexp(weight, -exponent) for weight in _weights(deltas)]


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
    total = _sum(pruned, votes)
    positive = total >= 0
    total.zero_()
    count = torch.zeros_like(total)
    for weight, vote, D in zip(weights, votes, pruned(), strict=True):
        agrees = torch.where(positive, D > 0, D < 0)
        total.add_(D.mul_(agrees), alpha=weight)
        count.add_(agrees, alpha=vote)
    return total.div_(count.masked_fill_(count == 0, 1.0))


def ties(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    """Return TIES of the changes, each adapter with one vote (as peft has it)."""
    return _elect_signs(_keep_largest(deltas, density), _weights(deltas), [1.0] * len(deltas))


def ties_mergekit(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    """Return TIES with votes by weight and a weighted mean (as mergekit has it)."""
    weights = _relative_weights(deltas)
    return _elect_signs(_keep_largest(deltas, density), weights, weights)


def dare_linear(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    """Return the weighted sum of DARE's entries."""
    return _sum(_keep_random(deltas, density), _weights(deltas))


def dare_ties(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    """Return DARE's entries, merged by TIES' election."""
    return _elect_signs(_keep_random(deltas, density), _weights(deltas), [1.0] * len(deltas))


def magnitude(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    """Return the weighted sum of each change's largest entries."""
    return _sum(_keep_largest(deltas, density), _weights(deltas))


def della(deltas: Sequence[WeightedDelta], density: float) -> Tensor:
    """Return DELLA (Deep et al., 2024): entries drawn by their rank in the row, then votes and mean by weight.

    Kept entries are divided by their probabilities, as in the authors' code. mergekit rescales the matrix's L1 norm.
    """
    weights = _relative_weights(deltas)
    return _elect_signs(_keep_by_rank(deltas, density), weights, weights)
