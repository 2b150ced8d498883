"""Hold the weighted truncation against the dense SVD of the scaled matrix in float64, and against random searches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratool.numerics.input_weights import FLOOR, input_weights, residuals
from loratool.numerics.svd import truncated_svd


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_lost(D: Tensor, other: Tensor, h: Tensor) -> float:
    """Return the mean of |(D - D') x|^2 over inputs of these second moments."""
    return float(((D - other).square() * h).sum())


def test_weights() -> None:
    h = torch.tensor([[4.0, 0.0, 8.0], [torch.nan] * 3, [0.0] * 3, [5.0] * 3], dtype=torch.float64)
    weights = input_weights(h)
    assert weights is not None
    assert torch.equal(weights[0], torch.tensor([1.0, FLOOR, 2.0], dtype=torch.float64).sqrt().float())
    assert torch.equal(weights[1:], torch.ones(3, 3))
    assert input_weights(h[1:3]) is None


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (700, 520)])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_best_for_the_outputs(shape: tuple[int, int], rank: int) -> None:
    """What truncated_svd keeps of D W is, over W, the best of its rank, and the residuals are those of D itself."""
    D, h = random(*shape), random(1, shape[1], seed=1).exp()
    weights = input_weights(h)
    assert weights is not None
    w = weights[0].double()
    C = (D * w).float()
    svd = truncated_svd(C, rank, torch.Generator().manual_seed(0))
    found = (svd.U.double() * svd.S) @ (svd.V.double() / w[:, None]).mT
    U, S, Vh = torch.linalg.svd(D * w, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ (Vh[:rank] / w)
    lost = outputs_lost(D, best, h[0])
    assert outputs_lost(D, found, h[0]) <= lost * (1 + 2e-4)
    assert float(svd.energy) == pytest.approx(float(S[:rank].square().sum()), rel=2e-4)
    plain = residuals(C, svd.U.double() * svd.S, svd.V.double().mT / w, weights[0])
    assert plain.shape == (rank + 1,) and float(plain[0]) == pytest.approx(float(D.square().sum()), rel=1e-6)
    for k in range(1, rank + 1):
        first = (svd.U[:, :k].double() * svd.S[:k]) @ (svd.V[:, :k].double() / w[:, None]).mT
        assert float(plain[k]) == pytest.approx(float((D - first).square().sum()), rel=1e-5)


def test_no_search_beats_it() -> None:
    """Neither random factors of the rank, nor changes of the best ones, nor the best of D itself lose less."""
    D, h, rank = random(12, 9), random(9, seed=1).exp(), 3
    weights = input_weights(h[None])
    assert weights is not None
    w = weights[0].double()
    svd = truncated_svd((D * w).float(), rank, torch.Generator().manual_seed(0))
    B, A = svd.U.double() * svd.S, (svd.V.double() / w[:, None]).mT
    lost = outputs_lost(D, B @ A, h)
    for seed in range(200):
        step = 10.0 ** -(seed % 6)
        tried = (B + step * random(12, rank, seed=seed)) @ (A + step * random(rank, 9, seed=1000 + seed))
        assert outputs_lost(D, tried, h) >= lost * (1 - 1e-9)
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    assert outputs_lost(D, (U[:, :rank] * S[:rank]) @ Vh[:rank], h) > lost
