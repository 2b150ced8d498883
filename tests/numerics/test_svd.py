"""Hold the truncated SVD against full ones in float64: the energy kept, on every kind of spectrum."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import covering, slow

from loratool.numerics import svd
from loratool.numerics.forms import Single, Wide
from loratool.numerics.seeded_random import Draw
from loratool.numerics.svd import truncated_svd

Floats = npt.NDArray[Any]


def draw(seed: int = 0) -> Draw:
    return Draw(seed, "x")


def with_spectrum(m: int, n: int, values: Wide, seed: int = 0) -> Single:
    rng, k = np.random.default_rng(seed), len(values)
    U, V = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    D: Wide = (U * values) @ V.T
    return D.astype(np.float32)


def power(k: int, exponent: float) -> Wide:
    values: Wide = np.arange(1.0, k + 1) ** -exponent
    return values


def gaps(k: int) -> Wide:
    return np.append([10.0] * 4, [0.01] * (k - 4))


def energies(D: Floats) -> Wide:
    """Return the squares of all singular values, the largest first."""
    return np.square(np.linalg.svd(D.astype(np.float64), compute_uv=False))


SPECTRA = {
    **{f"k^-{p}": (lambda k, p=p: power(k, p)) for p in (0.25, 0.5, 1, 2)},
    "flat": np.ones,
    "gap": gaps,
    "low rank": lambda k: np.append(power(5, 0.5), np.zeros(k - 5)),
    "repeated": lambda k: np.repeat(power((k + 3) // 4, 0.7), 4)[:k],
    "exponential": lambda k: 0.9 ** np.arange(k),
}
SHAPES = [(40, 30), (30, 40), (600, 1300), (1, 50), (50, 1), (700, 600)]


@pytest.mark.parametrize(("spectrum", "rank", "shape"), covering(SPECTRA, [1, 32], SHAPES))
def test_the_energy_is_the_optimums(spectrum: str, rank: int, shape: tuple[int, int]) -> None:
    """It is within 1e-4 of the best, where a few iterations of a randomized SVD lose percents."""
    k = min(shape)
    values = SPECTRA[spectrum](max(k, 6))[:k]
    D = with_spectrum(*shape, values)
    found = truncated_svd(D, rank, draw(1))
    exact = energies(D)
    best, (U, V) = exact[:rank].sum(), (side.astype(np.float64) for side in (found.U, found.V))
    left = D - (U * found.S) @ V.T
    kept = np.square(D.astype(np.float64)).sum() - np.square(left).sum()
    assert kept >= 0.9999 * best and found.energy == pytest.approx(kept, rel=1e-5)
    assert found.total == pytest.approx(exact.sum(), rel=1e-6)
    assert found.U.dtype == found.V.dtype == np.float32 and found.S.dtype == np.float64
    assert len(found.S) <= min(rank, k) and (np.diff(found.S) <= 0).all()
    basis = V if shape[0] >= shape[1] else U
    assert np.allclose(basis.T @ basis, np.eye(len(found.S)), atol=1e-5)
    for factor in (U, V):
        assert np.allclose(np.linalg.norm(factor, axis=0), 1, atol=1e-5)


def test_an_exactly_low_rank_matrix_gives_its_rank() -> None:
    D = with_spectrum(900, 800, power(5, 0.5))
    found = truncated_svd(D, 32, draw())
    assert len(found.S) == 5 and found.energy == pytest.approx(found.total, rel=1e-5)


def test_zeros_and_rank_zero() -> None:
    for shape in ((30, 20), (20, 30)):
        zeros, ones = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        stacked = svd.truncated_svds(np.stack([ones, zeros]), 0, [draw()] * 2)
        for found in (truncated_svd(zeros, 4, draw()), truncated_svd(ones, 0, draw()), *stacked):
            assert (found.U.shape, found.S.shape, found.V.shape) == ((shape[0], 0), (0,), (shape[1], 0))
            assert found.U.dtype == found.V.dtype == np.float32 and found.energy == found.gap == 0
        assert [len(found.S) for found in svd.truncated_svds(np.stack([ones, zeros]), 4, [draw()] * 2)] == [1, 0]
    for shape in ((2, 0, 3), (2, 3, 0), (0, 4, 3)):
        for found in svd.truncated_svds(np.zeros(shape, np.float32), 4, [draw()] * shape[0]):
            assert (found.U.shape, found.V.shape) == ((shape[1], 0), (shape[2], 0))


def test_the_seed_decides_and_signs_are_fixed() -> None:
    D = with_spectrum(900, 800, power(800, 0.5))
    one, two, other = (truncated_svd(D, 16, draw(seed)) for seed in (3, 3, 4))
    assert one.U.tobytes() == two.U.tobytes() and one.V.tobytes() == two.V.tobytes()
    assert one.columns and np.allclose(one.S, other.S, rtol=1e-4, atol=0) and (one.S != other.S).any()
    largest = np.abs(one.V).argmax(0)
    assert (one.V[largest, np.arange(16)] > 0).all()


@pytest.mark.slow
def test_the_gap_is_an_estimate_of_the_right_size() -> None:
    """On decaying spectra the true deficit is below a few times the estimate."""
    for exponent in (0.3, 0.5, 1.0):
        D = with_spectrum(1100, 1000, power(1000, exponent), seed=int(10 * exponent))
        found = truncated_svd(D, 16, draw(2))
        best = energies(D)[:16].sum()
        assert found.columns and (best - found.energy) / best <= 4 * found.gap + 1e-6


def random_spectrum(seed: int, k: int) -> Wide:
    """Return powers, exponentials, plateaus, clusters and noise, many without a gap at the rank."""
    rng = np.random.default_rng(seed)
    x = rng.random(4).tolist()
    i = np.arange(1.0, k + 1)
    shapes = [
        i ** -(2 * x[0]),
        np.exp(-x[0] * i / 4),
        1 + x[0] * (i < k * x[1]) * 10,
        rng.random(k) + x[0],
        (np.floor(i / 5) + 1) ** -x[0],
        np.ones(k),
    ]
    chosen: Wide = shapes[seed % len(shapes)] + x[2] * 1e-3
    return np.sort(chosen)[::-1]


@pytest.mark.parametrize("spectra", [24, slow(100)])
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_the_bound_holds_at_every_step_on_many_spectra(rank: int, spectra: int) -> None:
    """`bound` is never below the optimum of the exact SVD, however little of the space is known."""
    for seed in range(spectra):
        D = with_spectrum(150, 110, random_spectrum(seed, 110), seed)
        best = energies(D)[:rank].sum()
        space = svd.Krylov(D, 96, svd.random_block(D.shape[1], svd.BLOCK, draw(seed), "start", D))
        while not space.is_full:
            space.grow()
            if space.width >= rank + svd.BLOCK:
                assert space.bound(rank, draw(seed + 1)) >= best * (1 - 1e-6)
                assert space.energy(rank) <= best * (1 + 1e-6)


@pytest.mark.parametrize("spectra", [24, slow(120)])
def test_a_certified_gap_is_one(monkeypatch: pytest.MonkeyPatch, spectra: int) -> None:
    """The basis proves it, or only the eigenvectors can: on every spectrum, flat ones too."""
    monkeypatch.setattr(svd, "SMALL", 0)
    ways = set()
    for seed in range(spectra):
        D = with_spectrum(340, 300, random_spectrum(seed, 300), seed)
        found = truncated_svd(D, 8, draw(seed), certify=True)
        best = energies(D)[:8].sum()
        assert found.gap <= svd.TOLERANCE
        assert best <= found.energy / (1 - found.gap) * (1 + 1e-6)
        ways.add(bool(found.columns))
    assert ways == {True, False}


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (600, 1300), (3, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("tail", [1e-2, 1e-4, 1e-7, 1e-30])
def test_the_residual_does_not_cancel(shape: tuple[int, int], tail: float) -> None:
    """It is that of a dense difference, whatever part of D it is and however D is laid out."""
    m, n = shape
    rng = np.random.default_rng(m)
    B, A = rng.standard_normal((m, 3)).astype(np.float32), rng.standard_normal((3, n)).astype(np.float32)
    left = rng.standard_normal((m, n)) * tail if tail > 1e-20 else np.zeros((m, n))
    D = B.astype(np.float64) @ A.astype(np.float64) + left
    for found in (svd.residual_energy(D, B, A), svd.residual_energy(np.asfortranarray(D), B, A)):
        assert found == pytest.approx(np.square(left).sum(), rel=1e-6, abs=1e-24)


@pytest.mark.parametrize("shape", [(5, 40, 30), (5, 30, 40), (2, 700, 600)])
def test_a_stack_is_each_of_its_matrices(shape: tuple[int, int, int]) -> None:
    stack = np.stack([with_spectrum(*shape[1:], power(min(shape[1:]), 0.5 + e), e) for e in range(shape[0])])
    stack[0] = 0
    for e, found in enumerate(svd.truncated_svds(stack, 4, [draw(e) for e in range(shape[0])])):
        best = energies(stack[e])[:4].sum()
        assert found.U.shape == (shape[1], len(found.S)) and found.V.shape == (shape[2], len(found.S))
        assert found.energy >= 0.9999 * best and (e > 0) == bool(len(found.S))
