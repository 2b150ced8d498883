"""Combine changes entry by entry, with elected signs and pruned entries: TIES, DARE and similar methods.

The same functions run on the changes and on their cores, whose entries are coordinates in a common space. The D_i elect
signs and choose the entries to prune; the sum is over w_i D_i. The published code of core space keeps one entry more,
and uses the full matrix if a sum of signs is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ....numerics.arrays import Array, fetched, sent, where
from ....numerics.forms import Wide
from ....numerics.seeded_random import uniform
from .delta import WeightedDelta

DRAWN = 1 << 20  # random numbers drawn at a time, each time with another key

SPREAD = 0.15  # of DELLA's probabilities around the density: mergekit's epsilon, half the authors' window

# Yields the pruned deltas one by one, so that only one is in memory; can be called again.
Deltas = Callable[[], Iterator[Array]]


def _keep_largest(deltas: Sequence[WeightedDelta], density: float) -> Deltas:
    """Keep the largest entries of each D, a fraction `density`, with all entries equal to the smallest kept one."""
    thresholds: dict[int, float] = {}

    def pruned() -> Iterator[Array]:
        for i, delta in enumerate(deltas):
            D = delta.dense()
            if i not in thresholds:
                thresholds[i] = _threshold(D, density)
            D *= abs(D) >= thresholds[i]
            yield D

    return pruned


def _threshold(D: Array, density: float) -> float:
    """Return the smallest magnitude to keep, so that the fraction `density` of the entries is kept."""
    size = math.prod(D.shape)
    dropped = size - max(1, int(density * size))
    if dropped <= 0:
        return 0.0
    magnitudes = fetched(abs(D)).reshape(-1)
    magnitudes.partition(dropped)
    return float(magnitudes[dropped])


def _keep_random(deltas: Sequence[WeightedDelta], density: float) -> Deltas:
    """Keep each entry with the probability `density`, divided by it (DARE)."""

    def pruned() -> Iterator[Array]:
        for delta in deltas:
            D = delta.dense()
            flat = D.reshape(-1)
            for start in range(0, len(flat) if density < 1 else 0, DRAWN):
                block = flat[start : start + DRAWN]
                is_kept = uniform(f"{delta.key} {start}", len(block)) < density
                block *= sent(is_kept.astype(delta.kind) / density, D)
            yield D

    return pruned


def _keep_by_rank(deltas: Sequence[WeightedDelta], density: float) -> Deltas:
    """Keep each entry with a probability that rises with its rank in its row, divided by it (DELLA)."""

    def pruned() -> Iterator[Array]:
        for delta in deltas:
            D = delta.dense()
            rows = max(1, DRAWN // max(1, D.shape[1]))
            for start in range(0, len(D) if density < 1 else 0, rows):
                block = D[start : start + rows]
                drawn = uniform(f"{delta.key} rows {start}", math.prod(block.shape)).reshape(block.shape)
                probabilities = _probabilities(block, density)
                block *= sent((drawn < probabilities) / probabilities, D)
            yield D

    return pruned


def _probabilities(rows: Array, density: float) -> Wide:
    """Return `density` - SPREAD (least entry of a row) to + SPREAD (largest), in equal steps, in float64."""
    n = rows.shape[1]
    steps = np.linspace(density - SPREAD, density + SPREAD, n) if n > 1 else np.full(n, density)
    order = fetched(abs(rows)).argsort(1, kind="stable")
    probabilities = np.empty(order.shape)
    np.put_along_axis(probabilities, order, np.broadcast_to(steps, order.shape), 1)
    return probabilities


def _weights(deltas: Sequence[WeightedDelta]) -> list[float]:
    return [delta.weight for delta in deltas]


def _relative_weights(deltas: Sequence[WeightedDelta]) -> list[float]:
    """Return the weights times a power of two, the largest below 1, so that float32 can hold their sums."""
    exponent = math.frexp(max(_weights(deltas)))[1]
    return [math.ldexp(weight, -exponent) for weight in _weights(deltas)]


def _sum(pruned: Deltas, weights: Sequence[float]) -> Array:
    total = None
    for weight, D in zip(weights, pruned(), strict=True):
        D *= weight
        if total is None:
            total = D
        else:
            total += D
    return total


def _elect_signs(pruned: Deltas, weights: Sequence[float], votes: Sequence[float]) -> Array:
    """Elect signs and merge (TIES after trimming), with weights w_i and votes v_i.

    The sign of an entry is that of sum v_i D_i; its value is sum w_i D_i / sum v_i over those with this sign.
    """
    total = _sum(pruned, votes)
    positive = total >= 0
    total[...] = 0.0
    count = total + 0.0
    for weight, vote, D in zip(weights, votes, pruned(), strict=True):
        agrees = where(positive, D > 0, D < 0)
        D *= agrees
        D *= weight
        total += D
        D[...] = agrees
        D *= vote
        count += D
    count[count == 0] = 1.0
    total /= count
    return total


def ties(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return TIES of the changes, each adapter with one vote (as peft has it)."""
    return _elect_signs(_keep_largest(deltas, density), _weights(deltas), [1.0] * len(deltas))


def ties_mergekit(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return TIES with votes by weight and a weighted mean (as mergekit has it)."""
    weights = _relative_weights(deltas)
    return _elect_signs(_keep_largest(deltas, density), weights, weights)


def dare_linear(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return the weighted sum of DARE's entries."""
    return _sum(_keep_random(deltas, density), _weights(deltas))


def dare_ties(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return DARE's entries, merged by TIES' election."""
    return _elect_signs(_keep_random(deltas, density), _weights(deltas), [1.0] * len(deltas))


def magnitude(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return the weighted sum of each change's largest entries."""
    return _sum(_keep_largest(deltas, density), _weights(deltas))


def della(deltas: Sequence[WeightedDelta], density: float) -> Array:
    """Return DELLA (Deep et al., 2024): entries drawn by their rank in the row, then votes and mean by weight.

    Kept entries are divided by their probabilities, as in the authors' code. mergekit rescales the matrix's L1 norm.
    """
    weights = _relative_weights(deltas)
    return _elect_signs(_keep_by_rank(deltas, density), weights, weights)
