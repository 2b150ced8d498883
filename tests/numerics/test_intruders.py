"""Hold the count of intruder dimensions against full decompositions in float64, as the paper's authors count them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from loratool.numerics import intruders
from loratool.numerics.forms import Single, Wide
from loratool.numerics.intruders import find_intruders
from loratool.numerics.seeded_random import Draw
from loratool.numerics.svd import Krylov, random_block

Floats = npt.NDArray[Any]


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> Wide:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def decaying(m: int, n: int, power: float, rng: np.random.Generator) -> tuple[Single, Wide]:
    """Return a matrix with singular values i^-power, and its left singular vectors."""
    k = min(m, n)
    U = orthonormal(m, k, rng)
    W: Wide = U * np.arange(1.0, k + 1) ** -power @ orthonormal(n, k, rng).T
    return W.astype(np.float32), U


def low_rank(m: int, n: int, rank: int, norm: float, rng: np.random.Generator) -> Single:
    D = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    return (D * (norm / np.linalg.norm(D, 2))).astype(np.float32)


def left_vectors(W: Floats) -> Wide:
    return np.linalg.svd(W.astype(np.float64), full_matrices=False)[0]


def by_full_svd(W: Floats, tuned: Floats, top: int = 10) -> Wide:
    """Return the largest |cos| of each leading left singular vector with those of W, as algorithm 1 does."""
    return np.abs(left_vectors(tuned)[:, :top].T @ left_vectors(W)).max(1)


def count(W: Floats, tuned: Floats, top: int = 10, threshold: float = 0.5) -> intruders.Intruders:
    W, tuned = W.astype(np.float32), tuned.astype(np.float32)
    return find_intruders(lambda: tuned, lambda: W, top, threshold, Draw(0, "x"))


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_sizes_near_the_ends_of_float32(size: float) -> None:
    g = np.random.default_rng(0)
    W, _ = decaying(40, 30, 0.5, g)
    tuned = W + low_rank(40, 30, 1, 3.0, g)
    found = count(W * np.float32(size), tuned * np.float32(size))
    assert found.new.tolist() == (by_full_svd(W, tuned) < 0.5).tolist() and found.new[0]


@pytest.mark.parametrize(
    ("m", "n", "power"),
    [
        (540, 620, 0.5),
        *(
            pytest.param(m, n, power, marks=pytest.mark.slow)
            for m, n in ((900, 520), (540, 1200), (1200, 560), (800, 800), (100, 300))
            for power in (0.2, 0.5, 1.0)
        ),
    ],
)
def test_agrees_with_a_full_svd(m: int, n: int, power: float) -> None:
    g, seen = np.random.default_rng(m + n), set()
    W, _ = decaying(m, n, power, g)
    for norm in (0.01, 0.3, 1.0, 3.0):
        tuned = W + low_rank(m, n, 6, norm, g)
        cosines, found = by_full_svd(W, tuned), count(W, tuned)
        assert not found.undecided.any() and found.new.tolist() == (cosines < 0.5).tolist()
        seen.add(int(found.new.sum()))
    assert {0, 6} <= seen


def test_most_needs_no_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last resort takes a minute for a matrix of a 7B model."""
    for name in ("_cosines", "_leading_of_gram"):
        monkeypatch.setattr(intruders, name, lambda *_: pytest.fail("took the last resort"))
    for m, n in ((600, 700), (1000, 520)):
        g = np.random.default_rng(m)
        W, _ = decaying(m, n, 0.3, g)
        assert [int(count(W, W + low_rank(m, n, 4, norm, g)).new.sum()) for norm in (0.05, 2.0)] == [0, 4]


@pytest.mark.parametrize(("m", "n"), [(60, 80), (80, 60)])
def test_the_bound_holds_and_becomes_tight(m: int, n: int) -> None:
    """At each width no |cos| is above it, whatever the spectrum; a vector that is smeared out has a low one soon."""
    for seed in range(20):
        g = np.random.default_rng(seed)
        W, U = decaying(m, n, seed / 10, g)
        some = g.standard_normal((U.shape[1], 2))
        vectors = np.linalg.qr(np.concatenate([U[:, seed : seed + 1] + 0.5 * U[:, 30:31], U @ some], 1))[0]
        true = np.abs(U.T @ vectors).max(0)
        start = random_block(m, 2, Draw(seed, "x"), "base", W)
        space = Krylov(W.T, 40, np.concatenate([vectors.astype(np.float32), start], 1))
        parts, bound = space.V.T @ vectors, np.ones(3)
        while not space.is_full:
            space.grow()
            values, turned, rests = intruders._ritz_pairs(space)
            bound = intruders._largest_possible(values, rests, turned[: space.block].T @ parts)
            assert (bound >= true - 1e-5).all()
        if seed == 3:
            assert bound[1:].max() < 0.7


def test_what_is_amplified_from_within_is_not_new() -> None:
    """A direction that W has in its bulk may become the largest; half of two still matches, a third of nine not."""
    m = n = 560
    g = np.random.default_rng(1)
    W, U = decaying(m, n, 0.3, g)
    v = orthonormal(n, 3, g)
    ways = np.stack([U[:, 200], (U[:, 100] + U[:, 300]) / 2**0.5, U[:, 400:409].sum(1) / 3], 1)
    tuned = W + 3.0 * ways * np.array([3.0, 2.0, 1.0]) @ v.T
    found = count(W, tuned, 3)
    assert found.new.tolist() == (by_full_svd(W, tuned, 3) < 0.5).tolist() == [False, False, True]


def test_few_dimensions_and_none() -> None:
    g = np.random.default_rng(2)
    D = low_rank(30, 20, 3, 1.0, g)
    zero = np.zeros((30, 20), np.float32)
    assert count(zero, D).new.tolist() == [True] * 3, "W has no direction at all, W' three"
    assert len(count(D, zero).new) == 0
    W = g.standard_normal((30, 20))
    same = count(W, W.copy(), top=50)
    assert len(same.new) == 20 and not same.new.any() and not same.undecided.any()
    wide, none = np.zeros((600, 600), np.float32), low_rank(600, 600, 3, 1.0, g)
    assert count(wide, none).new.tolist() == [True] * 3


def test_a_threshold_and_the_authors_strictness() -> None:
    """A |cosine| of the threshold is a match: the authors count what is below."""
    W = np.diag([4.0, 3.0, 2.0, 1.0])
    turned = np.eye(4)
    turned[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    tuned = turned @ W
    assert count(W, tuned, 2, 0.79).new.tolist() == [False, False]
    assert count(W, tuned, 2, 0.81).new.tolist() == [True, True]
    edge = count(W, tuned, 2, 0.8)
    assert edge.undecided.all() and not edge.new.any(), "float32 cannot tell"


def test_equal_singular_values() -> None:
    """Of W: each direction of their space is a singular vector. Of W': which vector is meant cannot be told."""
    g = np.random.default_rng(3)
    b = orthonormal(20, 1, g)
    W = np.eye(20)
    assert not count(W, W + b @ b.T, 1).new.any()
    tied = np.diag([3.0, 3.0, 1.0, 1.0])
    Q = orthonormal(4, 4, g)
    other = Q @ np.diag([4.0, 3.0, 2.0, 1.0]) @ orthonormal(4, 4, g).T
    cosines = by_full_svd(other, tied, 2)
    found = count(other, tied, 2, float(cosines.max()) - 1e-3)
    assert found.undecided.all() and not found.new.any()


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_sizes_whose_squares_float32_cannot_hold(size: float) -> None:
    g = np.random.default_rng(4)
    W, _ = decaying(560, 540, 0.5, g)
    tuned = W + low_rank(560, 540, 4, 2.0, g)
    assert count(W * np.float32(size), tuned * np.float32(size)).new.tolist() == count(W, tuned).new.tolist()


def test_rows_without_any_output() -> None:
    """A vocabulary is padded with rows of zeros: what a change puts there is new, and no tiny singular value of W."""
    g = np.random.default_rng(5)
    W, _ = decaying(700, 520, 0.3, g)
    W[600:] = 0
    D = np.zeros((700, 520), np.float32)
    D[650] = 5.0 * g.standard_normal(520) / math.sqrt(520)
    cosines, found = by_full_svd(W, W + D), count(W, W + D)
    assert found.new.tolist() == (cosines < 0.5).tolist() and found.new[0]


def test_beside_a_direction_that_is_far_larger() -> None:
    """A change that swamps the rest leaves the others told apart."""
    g = np.random.default_rng(6)
    W, _ = decaying(540, 620, 0.3, g)
    tuned = W + low_rank(540, 620, 1, 3000.0, g) + low_rank(540, 620, 2, 4.0, g)
    cosines, found = by_full_svd(W, tuned), count(W, tuned)
    assert found.new.tolist() == (cosines < 0.5).tolist() and not found.undecided.any() and found.new.sum() >= 3
