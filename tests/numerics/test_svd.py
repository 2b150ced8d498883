"""Hold the truncated SVD against torch.linalg.svd in float64: the energy kept, on every kind of spectrum."""

from __future__ import annotations

import pytest
import torch
from conftest import covering, slow
from torch import Tensor

from loratool.numerics import svd
from loratool.numerics.svd import truncated_svd


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    g, k = generator(seed), len(values)
    U = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    return ((U * values) @ V.T).float()


def power(k: int, exponent: float) -> Tensor:
    return torch.arange(1, k + 1, dtype=torch.float64) ** -exponent


def gaps(k: int) -> Tensor:
    return torch.cat([torch.full((4,), 10.0), torch.full((k - 4,), 0.01)]).double()


SPECTRA = {
    **{f"k^-{p}": (lambda k, p=p: power(k, p)) for p in (0.25, 0.5, 1, 2)},
    "flat": lambda k: torch.ones(k, dtype=torch.float64),
    "gap": gaps,
    "low rank": lambda k: torch.cat([power(5, 0.5), torch.zeros(k - 5, dtype=torch.float64)]),
    "repeated": lambda k: torch.repeat_interleave(power((k + 3) // 4, 0.7), 4)[:k],
    "exponential": lambda k: 0.9 ** torch.arange(k, dtype=torch.float64),
}
SHAPES = [(40, 30), (30, 40), (600, 1300), (1, 50), (50, 1), (700, 600)]


@pytest.mark.parametrize(("spectrum", "rank", "shape"), covering(SPECTRA, [1, 32], SHAPES))
def test_the_energy_is_the_optimums(spectrum: str, rank: int, shape: tuple[int, int]) -> None:
    """It is within 1e-4 of the best, where a few iterations of a randomized SVD lose percents."""
    k = min(shape)
    values = SPECTRA[spectrum](max(k, 6))[:k]
    D = with_spectrum(*shape, values)
    found = truncated_svd(D, rank, generator(1))
    exact = torch.linalg.svdvals(D.double())
    best = float(exact[:rank].square().sum())
    left = D.double() - (found.U.double() * found.S) @ found.V.double().T
    kept = float(D.double().square().sum() - left.square().sum())
    assert kept >= 0.9999 * best and found.energy == pytest.approx(kept, rel=1e-5)
    assert found.total == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert len(found.S) <= min(rank, k) and bool((found.S.diff() <= 0).all())
    basis = (found.V if shape[0] >= shape[1] else found.U).double()
    assert torch.allclose(basis.T @ basis, torch.eye(len(found.S), dtype=torch.float64), atol=1e-5)
    for factor in (found.U, found.V):
        assert torch.allclose(factor.double().norm(dim=0), torch.ones(len(found.S), dtype=torch.float64), atol=1e-5)


def test_an_exactly_low_rank_matrix_gives_its_rank() -> None:
    D = with_spectrum(900, 800, power(5, 0.5))
    found = truncated_svd(D, 32, generator())
    assert len(found.S) == 5 and found.energy == pytest.approx(found.total, rel=1e-5)


def test_zeros_and_rank_zero() -> None:
    assert truncated_svd(torch.zeros(30, 20), 4, generator()).S.shape == (0,)
    assert truncated_svd(torch.ones(30, 20), 0, generator()).U.shape == (30, 0)


def test_the_seed_decides_and_signs_are_fixed() -> None:
    D = with_spectrum(900, 800, power(800, 0.5))
    one, two, other = (truncated_svd(D, 16, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.U, two.U) and torch.equal(one.V, two.V)
    assert one.columns and torch.allclose(one.S, other.S, rtol=1e-4)
    largest = one.V.abs().argmax(0)
    assert bool((one.V[largest, torch.arange(16)] > 0).all())


def test_the_gap_is_an_estimate_of_the_right_size() -> None:
    """On decaying spectra the true deficit is below a few times the estimate."""
    for exponent in (0.3, 0.5, 1.0):
        D = with_spectrum(1100, 1000, power(1000, exponent), seed=int(10 * exponent))
        found = truncated_svd(D, 16, generator(2))
        best = float(torch.linalg.svdvals(D.double())[:16].square().sum())
        assert found.columns and (best - found.energy) / best <= 4 * found.gap + 1e-6


def random_spectrum(seed: int, k: int) -> Tensor:
    """Return powers, exponentials, plateaus, clusters and noise, many without a gap at the rank."""
    g = generator(seed)
    x = torch.rand(4, generator=g, dtype=torch.float64).tolist()
    i = torch.arange(1, k + 1, dtype=torch.float64)
    shapes = [
        i ** -(2 * x[0]),
        (-x[0] * i / 4).exp(),
        1 + x[0] * (i < k * x[1]).double() * 10,
        torch.rand(k, generator=g, dtype=torch.float64) + x[0],
        (i / 5).floor().add(1) ** -x[0],
        torch.ones(k, dtype=torch.float64),
    ]
    chosen = shapes[seed % len(shapes)] + x[2] * 1e-3
    return chosen.sort(descending=True).values


@pytest.mark.parametrize("spectra", [24, slow(100)])
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_the_bound_holds_at_every_step_on_many_spectra(rank: int, spectra: int) -> None:
    """`bound` is never below the optimum of the exact SVD, however little of the space is known."""
    for seed in range(spectra):
        D = with_spectrum(150, 110, random_spectrum(seed, 110), seed)
        best = float(torch.linalg.svdvals(D.double())[:rank].square().sum())
        space = svd.Krylov(D, 96, svd.random_block(D.shape[1], svd.BLOCK, generator(seed), D))
        while not space.is_full:
            space.grow()
            if space.width >= rank + svd.BLOCK:
                assert space.bound(rank, generator(seed + 1)) >= best * (1 - 1e-6)
                assert space.energy(rank) <= best * (1 + 1e-6)


@pytest.mark.parametrize("spectra", [24, slow(120)])
def test_a_certified_gap_is_one(monkeypatch: pytest.MonkeyPatch, spectra: int) -> None:
    """The basis proves it, or only the eigenvectors can: on every spectrum, flat ones too."""
    monkeypatch.setattr(svd, "SMALL", 0)
    ways = set()
    for seed in range(spectra):
        D = with_spectrum(340, 300, random_spectrum(seed, 300), seed)
        found = truncated_svd(D, 8, generator(seed), certify=True)
        best = float(torch.linalg.svdvals(D.double())[:8].square().sum())
        assert found.gap <= svd.TOLERANCE
        assert best <= found.energy / (1 - found.gap) * (1 + 1e-6)
        ways.add(bool(found.columns))
    assert ways == {True, False}


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (600, 1300), (3, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("tail", [1e-2, 1e-4, 1e-7, 1e-30])
def test_the_residual_does_not_cancel(shape: tuple[int, int], tail: float) -> None:
    """It is that of a dense difference, whatever part of D it is and however D is laid out."""
    m, n = shape
    g = generator(m)
    B, A = torch.randn(m, 3, generator=g).double(), torch.randn(3, n, generator=g).double()
    left = torch.randn(m, n, generator=g).double() * tail if tail > 1e-20 else torch.zeros(m, n).double()
    D = B @ A + left
    for found in (svd.residual_energy(D, B, A), svd.residual_energy(D.T.contiguous().T, B, A)):
        assert found == pytest.approx(float(left.square().sum()), rel=1e-6, abs=1e-24)


@pytest.mark.parametrize("shape", [(5, 40, 30), (5, 30, 40), (2, 700, 600)])
def test_a_stack_is_each_of_its_matrices(shape: tuple[int, int, int]) -> None:
    stack = torch.stack([with_spectrum(*shape[1:], power(min(shape[1:]), 0.5 + e), e) for e in range(shape[0])])
    stack[0] = 0
    for e, found in enumerate(svd.truncated_svds(stack, 4, [generator(e) for e in range(shape[0])])):
        best = float(torch.linalg.svdvals(stack[e].double())[:4].square().sum())
        assert found.U.shape == (shape[1], len(found.S)) and found.V.shape == (shape[2], len(found.S))
        assert found.energy >= 0.9999 * best and (e > 0) == bool(len(found.S))
