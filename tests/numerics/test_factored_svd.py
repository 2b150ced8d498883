"""Hold every number of the factored SVD against dense float64 matrices, formulas and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from loratool.numerics import factored_svd as f
from loratool.numerics.arrays import rounded_to
from loratool.numerics.forms import BF16, F32, F64, Form, Wide
from loratool.numerics.overlaps import overlaps

Pair = tuple[Wide, Wide]


def random(out: int, inp: int, rank: int, seed: int = 0) -> Pair:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, rank)), rng.standard_normal((rank, inp))


def norm(x: Wide) -> float:
    return float(np.linalg.norm(x))


def rounded(x: Wide, form: Form) -> Wide:
    return rounded_to(x, form).wide()


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
        (np.concatenate([random(40, 30, 3)[0]] * 2, 1), np.concatenate([random(40, 30, 3)[1]] * 2)),
    ),
    "one of them 0": (random(40, 30, 5), (np.zeros((40, 3)), random(40, 30, 3)[1])),
    "both 0": ((np.zeros((40, 2)), np.zeros((2, 30))), (np.zeros((40, 3)), np.zeros((3, 30)))),
    "rank above the matrix": (random(6, 5, 9), random(6, 5, 4, 1)),
    "of very different size": (random(40, 30, 5), (1e-8 * random(40, 30, 5, 1)[0], random(40, 30, 5, 1)[1])),
}


def gauge(pair: Pair, seed: int) -> Pair:
    """Return other factors of the same product, by an M of condition 1e3."""
    B, A = pair
    r = B.shape[1]
    U, _ = np.linalg.qr(random(r, r, r, seed)[0])
    V, _ = np.linalg.qr(random(r, r, r, seed + 1)[0])
    S = np.logspace(0, 3, r)
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
    largest = max(norm(D1), norm(D2), 1e-300)
    for norms in (found.norms, np.array([one.norm, two.norm])):
        assert abs(norms - np.array([norm(D1), norm(D2)])).max() <= 1e-9 * largest
    assert abs(found.inner[0, 1] - (D1 * D2).sum()) <= 1e-9 * largest**2
    for between in (f.distance(one, two), found.distances[0, 1], found.distances[1, 0]):
        assert abs(between - norm(D2 - D1)) <= 1e-9 * largest
    if D1.any() and D2.any():
        expected = (D1 * D2).sum() / norm(D1) / norm(D2)
        assert abs(found.cosines[0, 1] - expected) <= 1e-9
    else:
        assert found.cosines[0, 1] == 0
    assert float(overlaps([one, one]).distances[0, 1]) == float(f.distance(one, one)) == 0


def test_in_common_bases(pairs: tuple[Pair, Pair]) -> None:
    given = [*pairs, pairs[0]]
    changes = [f.factored_svd(*each) for each in f.in_common_bases(given)]
    whole = [f.factored_svd(*each) for each in given]
    (height, width), ranks = (pairs[0][0] @ pairs[0][1]).shape, sum(B.shape[1] for B, _ in pairs)
    assert all(len(each.U) == min(height, ranks) and len(each.V) == min(width, ranks) for each in changes)
    found, expected = overlaps(changes, (height, width)), overlaps(whole)
    assert np.allclose(found.norms, expected.norms, rtol=1e-12)
    for name in ("cosines", "relatives", "of_pairs", "of_sides", "of_all"):
        assert np.allclose(getattr(found, name), getattr(expected, name), atol=1e-8), name
    assert found.distances[0, 2] == 0
    for side in ("U", "V"):
        angles, expected_angles = (
            f.principal_angles(*(getattr(each, side)[:, : int(each.rank())] for each in svds[:2]))
            for svds in (changes, whole)
        )
        assert np.allclose(angles, expected_angles, atol=1e-8)


def test_svd_ranks_and_truncation(pairs: tuple[Pair, Pair]) -> None:
    for B, A in pairs:
        D, found = B @ A, f.factored_svd(B, A)
        U, S, Vh = np.linalg.svd(D)
        k = len(found.S)
        scale = max(float(S[0]), 1e-300)
        for values in (found.S, f.singular_values(B, A)):
            assert values.shape == (k,) and np.allclose(values, S[:k], atol=1e-9 * scale)
        assert norm((found.U * found.S) @ found.V.T - D) <= 1e-9 * scale
        for side in (found.U, found.V):
            assert np.allclose(side.T @ side, np.eye(k), atol=1e-12)
        if D.any():
            p = S / S.sum()
            entropy = -float((p[p > 0] * np.log(p[p > 0])).sum())
            assert math.isclose(float(f.effective_rank(found.S)), math.exp(entropy), rel_tol=1e-7)
            assert math.isclose(float(f.stable_rank(found.S)), (norm(D) / S[0]) ** 2, rel_tol=1e-9)
            assert int(found.rank()) == np.linalg.matrix_rank(D, tol=1e-12 * S[0])
        else:
            assert float(f.effective_rank(found.S)) == float(f.stable_rank(found.S)) == int(found.rank()) == 0
        for rank in (1, 2, k + 3):
            small_B, small_A = found.truncated(rank)
            assert small_B.shape == (len(D), rank) and small_A.shape == (rank, D.shape[1])
            best = (U[:, :rank] * S[:rank][: U.shape[1]]) @ Vh[: len(S)][:rank] if rank <= len(S) else D
            gap = float(S[rank - 1] - S[rank]) / scale if rank < len(S) else 1.0
            if gap > 1e-3:
                assert norm(small_B @ small_A - best) <= 1e-9 * scale


@pytest.mark.parametrize("form", [F64, F32, BF16], ids=lambda form: form.name)
@pytest.mark.parametrize("rank", [2, 5, 30])
def test_what_rounding_and_the_rank_lose(pairs: tuple[Pair, Pair], rank: int, form: Form) -> None:
    for B, A in pairs:
        svd = f.factored_svd(B, A)
        exact = svd.truncated(rank)
        stored = rounded(exact[0], form), rounded(exact[1], form)
        lost = norm(stored[0] @ stored[1] - B @ A)
        assert abs(float(f.rounding_distance(svd, exact, stored)) - lost) <= 1e-12 * float(svd.norm)
        stored = rounded(B, form), rounded(A, form)
        whole, lost = float(f.rounding_distance(svd, (B, A), stored)), norm(stored[0] @ stored[1] - B @ A)
        assert abs(whole - lost) <= 1e-12 * norm(B) * norm(A)
        assert whole == 0 or form != F64


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_energy_rank(share: float) -> None:
    S = np.array([3.0, 2.0, 1.0, 0.5, 0.0])
    k = f.rank_of_energy(S, share)
    assert np.square(S[:k]).sum() >= share * 14.25 * (1 - 1e-9)
    assert np.square(S[: k - 1]).sum() < share * 14.25
    assert f.rank_of_energy(np.zeros(3), 0.5) == 0


def rotated(Q: Wide, angles: Wide) -> Wide:
    """Return a basis whose principal angles with Q's span are those given. Q: (n, i)."""
    other = np.linalg.qr(np.concatenate([Q, random(len(Q), 1, len(angles), 9)[0]], 1))[0][:, Q.shape[1] :]
    k = len(angles)
    turned = np.concatenate([Q[:, :k] * np.cos(angles) + other[:, :k] * np.sin(angles), Q[:, k:]], 1)
    M, _ = np.linalg.qr(random(turned.shape[1], 1, turned.shape[1], 11)[0])
    basis: Wide = turned @ M
    return basis


@pytest.mark.parametrize(
    "angles", [[1e-12, 1e-7, 1e-3, 0.7], [0.0, 0.0, 0.5, math.pi / 2], [math.pi / 4] * 4, [1.5, 1.57, 1.0, 1e-9]]
)
def test_principal_angles_are_those_that_were_made(angles: list[float]) -> None:
    Q = np.linalg.qr(random(60, 1, 4)[0])[0]
    found = f.principal_angles(Q, rotated(Q, np.array(angles)))
    assert np.allclose(found, sorted(angles), atol=1e-9)
    other = np.linalg.qr(random(60, 1, 7, 3)[0])[0]
    cosines = np.linalg.svd(Q.T @ other, compute_uv=False)
    assert np.allclose(np.cos(f.principal_angles(Q, other)), cosines, atol=1e-12)
    assert np.array_equal(f.principal_angles(Q, other), f.principal_angles(other, Q))


def test_phi_is_the_papers_by_brute_force() -> None:
    one, two = f.factored_svd(*random(40, 30, 5)), f.factored_svd(*random(40, 30, 8, 1))
    phi = f.subspace_similarity(one.V, two.V)
    full = [np.linalg.svd(B @ A)[2].T for B, A in (random(40, 30, 5), random(40, 30, 8, 1))]
    for i in range(1, 6):
        for j in range(1, 9):
            expected = norm(full[0][:, :i].T @ full[1][:, :j]) ** 2 / min(i, j)
            assert math.isclose(float(phi[i - 1, j - 1]), expected, rel_tol=1e-9)
    assert np.allclose(f.subspace_similarity(one.V, one.V).diagonal(), 1)


def test_the_random_baseline_is_that_of_random_subspaces() -> None:
    found = []
    for seed in range(400):
        U, W = (np.linalg.qr(random(50, 1, k, seed + 1000 * k)[0])[0] for k in (4, 9))
        found.append(f.subspace_similarity(U, W))
    mean = np.mean(found, 0)
    for i, j in [(1, 1), (2, 5), (4, 9), (4, 1)]:
        assert math.isclose(float(mean[i - 1, j - 1]), f.random_similarity(i, j, 50), rel_tol=0.15)


def test_amplification_by_brute_force() -> None:
    B, A = random(40, 30, 5)
    W = random(40, 30, 30, 7)[0] @ random(40, 30, 30, 7)[1]
    U, _, Vh = np.linalg.svd(B @ A)
    blocks = [W[row : row + 7] for row in range(0, 40, 7)]
    for rank in (2, 5):
        expected = norm(B @ A) / norm(U[:, :rank].T @ W @ Vh[:rank].T)
        assert math.isclose(f.amplification(f.factored_svd(B, A), blocks, rank), expected, rel_tol=1e-9)
    assert f.amplification(f.factored_svd(B, A), [np.zeros((40, 30))], 5) == math.inf
    assert f.amplification(f.factored_svd(0 * B, A), blocks, 5) == 0


Reduce = Callable[[f.FactoredSVD], npt.NDArray[np.float64]]


@pytest.mark.parametrize("reduce", [lambda x: x.norm, lambda x: f.effective_rank(x.S), lambda x: f.stable_rank(x.S)])
def test_a_batch_is_its_members(reduce: Reduce) -> None:
    each = [random(40, 30, 5, seed) for seed in range(6)]
    B, A = (np.stack(sides).reshape(2, 3, *sides[0].shape) for sides in zip(*each, strict=True))
    alone = [reduce(f.factored_svd(*pair)) for pair in each]
    assert np.allclose(reduce(f.factored_svd(B, A)).reshape(-1), alone, rtol=1e-12)
    both = f.factored_svd(B, A), f.factored_svd(B[:, ::-1], A[:, ::-1])
    found = f.distance(*both)
    assert found.shape == (2, 3)
    assert np.allclose(found[1, 0], f.distance(f.factored_svd(*each[3]), f.factored_svd(*each[5])), rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_numbers_are_the_same() -> None:
    one, two = (f.factored_svd(*random(40, 30, 5, seed)) for seed in (0, 1))
    there = [f.factored_svd(*(torch.from_numpy(side).cuda() for side in random(40, 30, 5, seed))) for seed in (0, 1)]
    assert math.isclose(float(f.distance(*there)), float(f.distance(one, two)), rel_tol=1e-9)
