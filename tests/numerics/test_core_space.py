"""Hold the common space of changes against dense float64 matrices, the paper's formulas, and optima known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from loratool.numerics.core_space import core_space, signs
from loratool.numerics.factored_svd import FactoredSVD, factored_svd
from loratool.numerics.forms import Wide

Pair = tuple[Wide, Wide]  # B (out, r), A (r, in)


def random(*shape: int, seed: int) -> Wide:
    return np.random.default_rng(seed).standard_normal(shape)


def pair(out: int, inp: int, rank: int, seed: int, scale: float = 1.0) -> Pair:
    return scale * random(out, rank, seed=seed), random(rank, inp, seed=seed + 100)


def orthonormal(n: int, k: int, seed: int) -> Wide:
    return np.linalg.qr(random(n, k, seed=seed))[0]


def small(core_of: Sequence[Wide], out: int = 9, inp: int = 7) -> list[Pair]:
    """Return changes whose cores, in some bases, are those given, (n, n)."""
    n = len(core_of[0])
    U, V = orthonormal(out, n, 40), orthonormal(inp, n, 41)
    return [(U @ core, V.T) for core in core_of]


ONE = pair(24, 20, 3, 1)
CASES: dict[str, list[Pair]] = {
    "mixed ranks": [pair(24, 20, r, s) for s, r in enumerate((3, 4, 2))],
    "mixed scales": [pair(24, 20, 3, s, scale) for s, scale in enumerate((1e-6, 1.0, 1e5))],
    "one": [ONE],
    "equal ones": [ONE, ONE, pair(24, 20, 2, 5)],
    "opposing": [ONE, (-ONE[0], ONE[1])],
    "one is zero": [ONE, (np.zeros((24, 2)), random(2, 20, seed=3))],
    "rank above a side": [pair(5, 20, 4, s) for s in range(3)],
    "rank above both sides": [pair(5, 4, 6, s) for s in range(3)],
    "factors of lower rank": [(np.concatenate([ONE[0]] * 2, 1), np.concatenate([ONE[1]] * 2)), pair(24, 20, 2, 5)],
    "one side in common": [ONE, (ONE[0] @ random(3, 3, seed=8), random(3, 20, seed=9))],
}


@pytest.fixture(params=CASES)
def pairs(request: pytest.FixtureRequest) -> list[Pair]:
    return CASES[request.param]


def svds(pairs: Sequence[Pair]) -> list[FactoredSVD]:
    return [factored_svd(B, A) for B, A in pairs]


def rank_of(matrix: Wide) -> int:
    S = np.linalg.svd(matrix, compute_uv=False)
    return int((1e-10 * S[0] < S).sum())


def norm(matrix: Wide) -> float:
    return float(np.linalg.norm(matrix))


def test_the_cores_are_the_changes(pairs: list[Pair]) -> None:
    space = core_space(svds(pairs))
    dense = [B @ A for B, A in pairs]
    R, other = space.U.shape[1], space.V.shape[1]
    assert space.cores.shape == (len(pairs), R, other)
    unit = [D / max(norm(D), 1e-300) for D in dense]  # so that small changes count in the rank as large ones do
    assert (R, other) == (rank_of(np.concatenate(unit, 1)), rank_of(np.concatenate(unit)))
    for side in (space.U, space.V):
        assert np.allclose(side.T @ side, np.eye(side.shape[1]), atol=1e-13)
    for core, D in zip(space.cores, dense, strict=True):
        assert norm(space.U @ core @ space.V.T - D) <= 1e-12 * norm(D)


def test_changes_of_nothing_have_an_empty_space() -> None:
    nothing = (np.zeros((6, 2)), np.zeros((2, 5)))
    space = core_space(svds([nothing, nothing]))
    assert space.U.shape == (6, 0) and space.V.shape == (5, 0) and space.cores.shape == (2, 0, 0)
    few = space.compressed(3)
    assert few.U.shape == (6, 0) and few.V.shape == (5, 0) and few.cores.shape == (2, 0, 0)


def test_the_bases_are_functions_of_the_changes(pairs: list[Pair]) -> None:
    """They are eigenvectors of sum (D D^T)^(1/2) and sum (D^T D)^(1/2), whatever the factors."""
    changes, rng = svds(pairs), np.random.default_rng(3)
    space = core_space(changes)
    for axis, found in ((0, space.U), (1, space.V)):
        total = np.zeros((len(found), len(found)))
        for B, A in pairs:
            U, S, Vh = np.linalg.svd(B @ A, full_matrices=False)
            X = U if axis == 0 else Vh.T
            total += (X * S) @ X.T
        values = np.linalg.eigvalsh(total)[::-1][: found.shape[1]]
        residue = total @ found - found * values
        assert np.abs(residue).max() <= 1e-12 * values[0]
    turned = []
    for B, A in pairs:
        Q, _ = np.linalg.qr(rng.standard_normal((B.shape[1], B.shape[1])))
        M = Q * np.logspace(0, 1, len(Q))
        turned.append((3 * B @ M, np.linalg.solve(M, A) / 3))
    again = core_space(svds(turned))
    assert np.allclose(again.cores, space.cores, rtol=0, atol=1e-11 * np.abs(space.cores).max())


def test_the_order_of_changes_is_only_that_of_their_cores() -> None:
    changes = svds(CASES["mixed ranks"])
    one, two = core_space(changes), core_space(changes[::-1])
    assert np.allclose(one.cores, two.cores[::-1], atol=1e-12)
    assert np.allclose(one.U, two.U, atol=1e-12) and np.allclose(one.V, two.V, atol=1e-12)


def test_the_largest_entry_of_a_column_is_positive(pairs: list[Pair]) -> None:
    space = core_space(svds(pairs))
    for basis in (space.U, space.V):
        assert all(column[np.abs(column).argmax()] > 0 for column in basis.T)


def test_of_entries_equal_but_for_rounding_the_first_is_positive() -> None:
    for b in (math.nextafter(0.5, 0), 0.5, math.nextafter(0.5, 1)):
        column = np.array([[0.1], [-0.5], [b], [-b]])
        assert signs(column).tolist() == [-1.0]
    assert signs(np.zeros((0, 3))).shape == (3,)


def energy(space: Wide, kept: Wide) -> float:
    """Return the sum of the shares of energy that each change keeps."""
    whole, part = (np.square(cores).sum((1, 2)) for cores in (space, kept))
    return float((part[whole > 0] / whole[whole > 0]).sum())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_one_change_is_compressed_to_its_best_rank(rank: int) -> None:
    B, A = pair(24, 20, 6, 2)
    space = core_space(svds([(B, A)])).compressed(rank)
    U, S, Vh = np.linalg.svd(B @ A)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert np.allclose(space.U @ space.cores[0] @ space.V.T, best, atol=1e-6)
    assert math.isclose(float(np.square(space.cores).sum()), float((S[:rank] ** 2).sum()), rel_tol=1e-12)


def test_changes_with_common_singular_vectors_keep_the_directions_of_most_energy() -> None:
    """There the optimum is known: |P^T S_i Q| <= |P^T S_i|, whose squares sum to the k largest of sum S_i^2."""
    spectra = np.array([[9.0, 1.0, 2.0, 4.0], [0.0, 30.0, 20.0, 10.0]])
    shares = (np.square(spectra) / np.square(spectra).sum(1, keepdims=True)).sum(0)
    space = core_space(svds(small([np.diag(S) for S in spectra])))
    for rank in (1, 2, 3):
        best = float(np.sort(shares)[::-1][:rank].sum())
        assert math.isclose(energy(space.cores, space.compressed(rank).cores), best, rel_tol=1e-12)


def test_compression_to_one_direction_is_the_best_of_all_angles() -> None:
    """Of random changes, whose best direction is hardly better than others, 2 of 60 end in a local optimum."""
    angles, short = np.arange(500) * (math.pi / 500), []
    lines = np.stack([np.cos(angles), np.sin(angles)], 1)
    for seed in range(60):
        cores = [random(2, 2, seed=10 * seed + i) * scale for i, scale in enumerate((1.0, 1e3, 1e-3))]
        brute = np.sum([np.square(lines @ core @ lines.T) / np.square(core).sum() for core in cores], 0)
        space = core_space(svds(small(cores)))
        short.append(1 - energy(space.cores, space.compressed(1).cores) / float(brute.max()))
    assert sorted(short)[-3] <= 1e-6 and max(short) < 0.15


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_no_other_start_finds_better_directions(rank: int) -> None:
    pairs = [pair(24, 20, r, s, scale) for s, (r, scale) in enumerate([(3, 1.0), (4, 100.0), (2, 0.01)])]
    space = core_space(svds(pairs))
    found = energy(space.cores, space.compressed(rank).cores)
    dense = [B @ A for B, A in pairs]
    dense = [D / np.linalg.norm(D) for D in dense]
    best = 0.0
    for start in range(8):
        Q = orthonormal(20, rank, 60 + start)
        for _ in range(60):
            P = np.linalg.svd(np.concatenate([D @ Q for D in dense], 1))[0][:, :rank]
            Q = np.linalg.svd(np.concatenate([D.T @ P for D in dense], 1))[0][:, :rank]
        best = max(best, sum(np.linalg.norm(P.T @ D @ Q) ** 2 for D in dense))
    assert found >= best - 1e-6


def test_compression_to_the_rank_of_all_loses_nothing(pairs: list[Pair]) -> None:
    space = core_space(svds(pairs))
    for rank in (max(space.cores.shape[1:]), 99):
        whole = space.compressed(rank)
        for core, (B, A) in zip(whole.cores, pairs, strict=True):
            assert norm(whole.U @ core @ whole.V.T - B @ A) <= 1e-11 * norm(B @ A)
