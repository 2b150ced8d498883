"""Hold the weighted truncation against the dense SVD of the scaled matrix in float64, and against random searches."""

from __future__ import annotations

import numpy as np
import pytest

from loratool.numerics.forms import Wide
from loratool.numerics.input_weights import FLOOR, input_weights, residuals
from loratool.numerics.seeded_random import Draw
from loratool.numerics.svd import truncated_svd


def random(*shape: int, seed: int = 0) -> Wide:
    return np.random.default_rng(seed).standard_normal(shape)


def outputs_lost(D: Wide, other: Wide, h: Wide) -> float:
    """Return the mean of |(D - D') x|^2 over inputs of these second moments."""
    return float((np.square(D - other) * h).sum())


def test_weights() -> None:
    h = np.array([[4.0, 0.0, 8.0], [np.nan] * 3, [0.0] * 3, [5.0] * 3])
    weights = input_weights(h)
    assert weights is not None and weights.dtype == np.float32
    assert np.array_equal(weights[0], np.sqrt([1.0, FLOOR, 2.0]).astype(np.float32))
    assert np.array_equal(weights[1:], np.ones((3, 3)))
    assert input_weights(h[1:3]) is None


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (700, 520)])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_best_for_the_outputs(shape: tuple[int, int], rank: int) -> None:
    """What truncated_svd keeps of D W is, over W, the best of its rank, and the residuals are those of D itself."""
    D, h = random(*shape), np.exp(random(1, shape[1], seed=1))
    weights = input_weights(h)
    assert weights is not None
    w = weights[0].astype(np.float64)
    C = (D * w).astype(np.float32)
    svd = truncated_svd(C, rank, Draw(0, "x"))
    left, right = svd.U * svd.S, svd.V.T / w
    found = left @ right
    U, S, Vh = np.linalg.svd(D * w, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ (Vh[:rank] / w)
    lost = outputs_lost(D, best, h[0])
    assert outputs_lost(D, found, h[0]) <= lost * (1 + 2e-4)
    assert svd.energy == pytest.approx(np.square(S[:rank]).sum(), rel=2e-4)
    plain = residuals(C, left, right, weights[0])
    assert plain.shape == (rank + 1,) and float(plain[0]) == pytest.approx(np.square(D).sum(), rel=1e-6)
    for k in range(1, rank + 1):
        assert float(plain[k]) == pytest.approx(np.square(D - left[:, :k] @ right[:k]).sum(), rel=1e-5)


def test_no_search_beats_it() -> None:
    """Neither random factors of the rank, nor changes of the best ones, nor the best of D itself lose less."""
    D, h, rank = random(12, 9), np.exp(random(9, seed=1)), 3
    weights = input_weights(h[None])
    assert weights is not None
    w = weights[0].astype(np.float64)
    svd = truncated_svd((D * w).astype(np.float32), rank, Draw(0, "x"))
    B, A = svd.U * svd.S, svd.V.T / w
    lost = outputs_lost(D, B @ A, h)
    for seed in range(200):
        step = 10.0 ** -(seed % 6)
        tried = (B + step * random(12, rank, seed=seed)) @ (A + step * random(rank, 9, seed=1000 + seed))
        assert outputs_lost(D, tried, h) >= lost * (1 - 1e-9)
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    assert outputs_lost(D, (U[:, :rank] * S[:rank]) @ Vh[:rank], h) > lost
