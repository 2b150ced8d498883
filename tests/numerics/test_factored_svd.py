"""Hold every number of the factored SVD against dense float64 matrices, scipy-like formulas and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from loratool.numerics import factored_svd as f
from loratool.numerics.overlaps import overlaps
from loratool.numerics.product_spectrum import effective_rank, spectrum_of_product

Pair = tuple[Tensor, Tensor]


def random(out: int, inp: int, rank: int, seed: int = 0) -> Pair:
    g = torch.Generator().manual_seed(seed)
    B, A = (
        torch.randn(out, rank, generator=g, dtype=torch.float64),
        torch.randn(rank, inp, generator=g, dtype=torch.float64),
    )
    return B, A


def nearly(pair: Pair, step: float) -> Pair:
    B, A = pair
    return B + step * random(*B.shape, 1, 5)[0][:, :1], A


# two changes each: (B1, A1), (B2, A2)
CASES: dict[str, tuple[Pair, Pair]] = {
    "random": (random(40, 30, 5), random(40, 30, 7, 1)),
    "wide": (random(20, 50, 4), random(20, 50, 4, 1)),
    "nearly equal": (random(40, 30, 5), nearly(random(40, 30, 5), 1e-9)),
    "nearly parallel": (random(40, 30, 5), nearly((3 * random(40, 30, 5)[0], random(40, 30, 5)[1]), 1e-8)),
    "rank-deficient": (
        (random(40, 2, 6)[0] @ random(6, 6, 2)[0] @ random(6, 6, 2)[1], random(40, 30, 6)[1]),
        (torch.cat([random(40, 30, 3)[0]] * 2, 1), torch.cat([random(40, 30, 3)[1]] * 2)),
    ),
    "one of them 0": (random(40, 30, 5), (torch.zeros(40, 3, dtype=torch.float64), random(40, 30, 3)[1])),
    "both 0": ((torch.zeros(40, 2), torch.zeros(2, 30)), (torch.zeros(40, 3), torch.zeros(3, 30))),
    "rank above the matrix": (random(6, 5, 9), random(6, 5, 4, 1)),
    "of very different size": (random(40, 30, 5), (1e-8 * random(40, 30, 5, 1)[0], random(40, 30, 5, 1)[1])),
}
CASES = {name: tuple((B.double(), A.double()) for B, A in pair) for name, pair in CASES.items()}  # type: ignore[misc]


def gauge(pair: Pair, seed: int) -> Pair:
    """Return other factors of the same product, by an M of condition 1e3."""
    B, A = pair
    r = B.shape[1]
    U, _ = torch.linalg.qr(random(r, r, r, seed)[0])
    V, _ = torch.linalg.qr(random(r, r, r, seed + 1)[0])
    S = torch.logspace(0, 3, r, dtype=torch.float64)
    return B @ (U * S) @ V.T, (V / S) @ U.T @ A


@pytest.fixture(params=[(case, turned) for case in CASES for turned in (False, True)], ids=str)
def pairs(request: pytest.FixtureRequest) -> tuple[Pair, Pair]:
    case, turned = request.param
    one, two = CASES[case]
    return (gauge(one, 20), gauge(two, 30)) if turned else (one, two)


def test_norms_inner_products_and_distances(pairs: tuple[Pair, Pair]) -> None:
    D1, D2 = (B @ A for B, A in pairs)
    one, two = (f.factored_svd(B, A) for B, A in pairs)
    found = overlaps([one, two])
    largest = max(float(D1.norm()), float(D2.norm()), 1e-300)
    for norms in (found.norms, torch.stack([one.norm, two.norm])):
        assert abs(norms - torch.stack([D1.norm(), D2.norm()])).max() <= 1e-9 * largest
    assert abs(float(found.inner[0, 1]) - float((D1 * D2).sum())) <= 1e-9 * largest**2
    for between in (f.distance(one, two), found.distances[0, 1], found.distances[1, 0]):
        assert abs(float(between) - float((D2 - D1).norm())) <= 1e-9 * largest
    if D1.any() and D2.any():
        expected = float((D1 * D2).sum() / D1.norm() / D2.norm())
        assert abs(float(found.cosines[0, 1]) - expected) <= 1e-9
    else:
        assert float(found.cosines[0, 1]) == 0
    assert float(overlaps([one, one]).distances[0, 1]) == float(f.distance(one, one)) == 0


def test_svd_ranks_and_truncation(pairs: tuple[Pair, Pair]) -> None:
    for B, A in pairs:
        D, found = B @ A, f.factored_svd(B, A)
        U, S, Vh = torch.linalg.svd(D)
        k = len(found.S)
        scale = max(float(S[0]), 1e-300)
        assert torch.allclose(found.S, S[:k], atol=1e-9 * scale) and torch.allclose(
            f.singular_values(B, A), S[:k], atol=1e-9 * scale
        )
        assert np.allclose(spectrum_of_product(B.numpy(), A.numpy()), S[:k].numpy(), atol=1e-9 * scale)
        assert float(((found.U * found.S) @ found.V.T - D).norm()) <= 1e-9 * scale
        for side in (found.U, found.V):
            assert torch.allclose(side.T @ side, torch.eye(k, dtype=torch.float64), atol=1e-12)
        if D.any():
            p = S / S.sum()
            entropy = -float((p[p > 0] * p[p > 0].log()).sum())
            assert math.isclose(float(effective_rank(found.S.numpy())), math.exp(entropy), rel_tol=1e-7)
            assert math.isclose(float(f.stable_rank(found.S)), float((D.norm() / S[0]) ** 2), rel_tol=1e-9)
            assert int(found.rank()) == int(torch.linalg.matrix_rank(D, rtol=1e-12))
        else:
            assert float(effective_rank(found.S.numpy())) == float(f.stable_rank(found.S)) == int(found.rank()) == 0
        for rank in (1, 2, k + 3):
            small_B, small_A = found.truncated(rank)
            assert small_B.shape == (len(D), rank) and small_A.shape == (rank, D.shape[1])
            best = (U[:, :rank] * S[:rank][: U.shape[1]]) @ Vh[: len(S)][:rank] if rank <= len(S) else D
            gap = float(S[rank - 1] - S[rank]) / scale if rank < len(S) else 1.0
            if gap > 1e-3:
                assert float((small_B @ small_A - best).norm()) <= 1e-9 * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 5, 30])
def test_what_rounding_and_the_rank_lose(pairs: tuple[Pair, Pair], rank: int, dtype: torch.dtype) -> None:
    for B, A in pairs:
        svd = f.factored_svd(B, A)
        exact = svd.truncated(rank)
        stored = tuple(side.to(dtype) for side in exact)
        lost = stored[0].double() @ stored[1].double() - B @ A
        assert abs(float(f.rounding_distance(svd, exact, stored)) - float(lost.norm())) <= 1e-12 * float(svd.norm)
        if B.dtype == torch.float64:
            whole = f.rounding_distance(svd, (B, A), (B.to(dtype), A.to(dtype)))
            lost = B.to(dtype).double() @ A.to(dtype).double() - B @ A
            scale = float(B.norm() * A.norm())
            assert abs(float(whole) - float(lost.norm())) <= 1e-12 * scale
            assert float(whole) == 0 or dtype != torch.float64


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_energy_rank(share: float) -> None:
    S = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    k = f.rank_of_energy(S, share)
    assert float(S[:k].square().sum()) >= share * 14.25 * (1 - 1e-9)
    assert float(S[: k - 1].square().sum()) < share * 14.25
    assert f.rank_of_energy(torch.zeros(3), 0.5) == 0


def rotated(Q: Tensor, angles: Tensor) -> Tensor:
    """Return a basis whose principal angles with Q's span are those given. Q: (n, i)."""
    other = torch.linalg.qr(torch.cat([Q, random(len(Q), 1, len(angles), 9)[0]], 1)).Q[:, Q.shape[1] :]
    k = len(angles)
    turned = torch.cat([Q[:, :k] * angles.cos() + other[:, :k] * angles.sin(), Q[:, k:]], 1)
    M, _ = torch.linalg.qr(random(turned.shape[1], 1, turned.shape[1], 11)[0])
    return turned @ M


@pytest.mark.parametrize(
    "angles", [[1e-12, 1e-7, 1e-3, 0.7], [0.0, 0.0, 0.5, math.pi / 2], [math.pi / 4] * 4, [1.5, 1.57, 1.0, 1e-9]]
)
def test_principal_angles_are_those_that_were_made(angles: list[float]) -> None:
    wanted = torch.tensor(angles, dtype=torch.float64)
    Q = torch.linalg.qr(random(60, 1, 4)[0]).Q
    found = f.principal_angles(Q, rotated(Q, wanted))
    assert torch.allclose(found, wanted.sort().values, atol=1e-9)
    other = torch.linalg.qr(random(60, 1, 7, 3)[0]).Q
    cosines = torch.linalg.svdvals(Q.T @ other)
    assert torch.allclose(f.principal_angles(Q, other).cos(), cosines, atol=1e-12)
    assert torch.equal(f.principal_angles(Q, other), f.principal_angles(other, Q))


def test_phi_is_the_papers_by_brute_force() -> None:
    one, two = f.factored_svd(*random(40, 30, 5)), f.factored_svd(*random(40, 30, 8, 1))
    phi = f.subspace_similarity(one.V, two.V)
    full = [torch.linalg.svd(B @ A).Vh.T for B, A in (random(40, 30, 5), random(40, 30, 8, 1))]
    for i in range(1, 6):
        for j in range(1, 9):
            expected = torch.linalg.matrix_norm(full[0][:, :i].T @ full[1][:, :j]) ** 2 / min(i, j)
            assert math.isclose(float(phi[i - 1, j - 1]), float(expected), rel_tol=1e-9)
    assert torch.allclose(f.subspace_similarity(one.V, one.V).diagonal(), torch.ones(5, dtype=torch.float64))


def test_the_random_baseline_is_that_of_random_subspaces() -> None:
    found = []
    for seed in range(400):
        U, W = (torch.linalg.qr(random(50, 1, k, seed + 1000 * k)[0]).Q for k in (4, 9))
        found.append(f.subspace_similarity(U, W))
    mean = torch.stack(found).mean(0)
    for i, j in [(1, 1), (2, 5), (4, 9), (4, 1)]:
        assert math.isclose(float(mean[i - 1, j - 1]), f.random_similarity(i, j, 50), rel_tol=0.15)


def test_amplification_by_brute_force() -> None:
    B, A = random(40, 30, 5)
    W = random(40, 30, 30, 7)[0] @ random(40, 30, 30, 7)[1]
    U, _, Vh = torch.linalg.svd(B @ A)
    for rank in (2, 5):
        expected = (B @ A).norm() / (U[:, :rank].T @ W @ Vh[:rank].T).norm()
        assert math.isclose(f.amplification(f.factored_svd(B, A), W.split(7), rank), float(expected), rel_tol=1e-9)
    assert f.amplification(f.factored_svd(B, A), [torch.zeros(40, 30)], 5) == math.inf


Reduce = Callable[[f.FactoredSVD], Tensor]


def effective_rank_of(svd: f.FactoredSVD) -> Tensor:
    return torch.from_numpy(np.array(effective_rank(svd.S.numpy())))


@pytest.mark.parametrize("reduce", [lambda x: x.norm, effective_rank_of, lambda x: f.stable_rank(x.S)])
def test_a_batch_is_its_members(reduce: Reduce) -> None:
    each = [random(40, 30, 5, seed) for seed in range(6)]
    B, A = torch.stack([b for b, _ in each]).view(2, 3, 40, 5), torch.stack([a for _, a in each]).view(2, 3, 5, 30)
    alone = torch.stack([reduce(f.factored_svd(*pair)) for pair in each])
    assert torch.allclose(reduce(f.factored_svd(B, A)).flatten(), alone, rtol=1e-12)
    both = f.factored_svd(B, A), f.factored_svd(B.flip(1), A.flip(1))
    found = f.distance(*both)
    assert found.shape == (2, 3)
    assert torch.allclose(found[1, 0], f.distance(f.factored_svd(*each[3]), f.factored_svd(*each[5])), rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_numbers_are_the_same() -> None:
    one, two = (f.factored_svd(*random(40, 30, 5, seed)) for seed in (0, 1))
    there = [f.factored_svd(*(t.cuda() for t in random(40, 30, 5, seed))) for seed in (0, 1)]
    assert math.isclose(float(f.distance(*there)), float(f.distance(one, two)), rel_tol=1e-9)
