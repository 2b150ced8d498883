"""Hold what several changes share against dense matrices, the paper's formula on their own SVDs, and random draws."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import permutations

import numpy as np
import pytest
from lib.oracles.task_interference import task_interference

from loratool.numerics.factored_svd import FactoredSVD, factored_svd
from loratool.numerics.forms import Wide
from loratool.numerics.overlaps import Overlaps, overlaps, stacked

OUT, IN = 24, 18


def draw(*shape: int, seed: int) -> Wide:
    return np.random.default_rng(seed).standard_normal(shape)


def change(rank: int, seed: int, scale: float = 1.0) -> Wide:
    D: Wide = scale * draw(OUT, rank, seed=seed) @ draw(rank, IN, seed=seed + 100)
    return D


def svd(D: Wide, rank: int) -> FactoredSVD:
    """The SVD of a dense matrix with some directions that are noise, as factors of a low rank have them."""
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    return FactoredSVD(U[..., : rank + 2], S[..., : rank + 2], Vh.swapaxes(-1, -2)[..., : rank + 2])


CHANGES = {
    "of three ranks": [change(4, 0), change(6, 1), change(2, 2)],
    "one twice": [change(4, 0), change(4, 0), change(3, 5)],
    "opposed": [change(4, 0), -2 * change(4, 0)],
    "a zero among them": [change(4, 0), 0 * change(4, 0), change(3, 1)],
    "nothing but zeros": [0 * change(4, 0)] * 3,
    "of very different size": [change(4, 0), change(4, 1, 1e-9), change(5, 2, 1e6)],
    "twelve": [change(1 + i % 4, i) for i in range(12)],
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_every_number_is_that_of_the_dense_matrices(changes: list[Wide]) -> None:
    found = overlaps([svd(D, 4) for D in changes])
    flat = np.stack([D.reshape(-1) for D in changes])
    size = np.linalg.norm(flat, axis=1)
    largest, both = np.maximum.outer(size, size) + 1e-300, np.outer(size, size)
    assert np.allclose(found.norms, size, rtol=1e-12)
    assert (abs(found.inner - flat @ flat.T) <= 1e-13 * (both + 1e-300) * OUT).all()
    apart = np.linalg.norm(flat[None] - flat[:, None], axis=-1)
    assert (abs(found.distances - apart) <= 1e-12 * largest).all()
    assert (found.distances.diagonal() == 0).all() and np.allclose(found.relatives, apart / largest, atol=1e-12)
    cosines = np.where(both == 0, 0.0, flat @ flat.T / np.where(both == 0, 1.0, both))
    assert np.allclose(found.cosines, cosines, atol=1e-12) and np.abs(found.cosines).max() <= 1
    wanted, whole = task_interference(changes)
    assert math.isclose(float(found.together), wanted, rel_tol=1e-9, abs_tol=1e-300)
    assert math.isclose(float(found.of_all[0]), wanted / whole if whole else 0.0, rel_tol=1e-9)
    for i, j in permutations(range(len(changes)), 2):
        wanted, whole = task_interference([changes[i], changes[j]])
        assert math.isclose(float(found.pairs[i, j]), wanted, rel_tol=1e-9, abs_tol=1e-12 * float(found.sizes.max()))
        U, S, Vh = np.linalg.svd(changes[j], full_matrices=False)
        there = 1e-12 * S[0] < S
        for within, energies in (U[:, there].T @ changes[i], found.outputs), (changes[i] @ Vh[there].T, found.inputs):
            assert math.isclose(float(energies[i, j]), float(np.square(within).sum()), rel_tol=1e-9)
        assert math.isclose(
            float(found.of_pairs[0][i, j]), wanted / whole if whole else 0.0, rel_tol=1e-5, abs_tol=1e-9
        )


def test_what_the_numbers_mean() -> None:
    D, left, right = change(4, 0), np.eye(OUT), np.eye(IN)
    halves = [left[:, :4] @ right[:4], left[:, 4:8] @ right[:4]]
    for both, wanted in ([D, D], 1.0), ([D, -3 * D], 1.0), ([D] * 3, 4.0), (halves, 0.0):
        found = overlaps([svd(each, 4) for each in both])
        assert math.isclose(float(found.of_all[0]), wanted, rel_tol=1e-12, abs_tol=1e-12)
        outputs, inputs = (float(side[0, 1]) for side in found.of_sides)
        assert math.isclose(inputs, 1, rel_tol=1e-12) and math.isclose(outputs, float(wanted > 0), abs_tol=1e-12)
        other = overlaps([svd(each, 4) for each in reversed(both)])
        assert np.allclose(other.cosines, np.flip(found.cosines), atol=1e-14)


@pytest.mark.parametrize("ranks", [(4, 4), (8, 3), (2, 5, 8), (6,) * 5])
def test_random_directions_have_about_the_mean_that_is_told(ranks: tuple[int, ...]) -> None:
    """With the same singular values; the mean of products of two normal numbers is a little less than normal ones'."""
    out, inp, count = 96, 64, 60
    changes = [
        FactoredSVD(
            np.linalg.qr(draw(count, out, r, seed=i))[0],
            np.tile(np.linspace(3, 1, r), (count, 1)) * (1 + i),
            np.linalg.qr(draw(count, inp, r, seed=50 + i))[0],
        )
        for i, r in enumerate(ranks)
    ]
    found = overlaps(changes)
    told, together = found.random_pairs[0], found.random_together[0]
    assert abs(found.together.mean() / together - 1) < 0.1
    other = ~np.eye(len(ranks), dtype=bool)
    assert np.abs(found.pairs.mean(0)[other] / told[other] - 1).max() < 0.15
    assert (told.diagonal() == 0).all() and np.allclose(told, told.T)


def block_diagonal(blocks: Wide) -> Wide:
    """Return the matrix (E * m, E * n) that has blocks (E, m, n) on its diagonal."""
    E, m, n = blocks.shape
    whole = np.zeros((E, m, E, n))
    whole[range(E), :, range(E)] = blocks
    return whole.reshape(E * m, E * n)


def test_matrices_together_are_blocks_of_one() -> None:
    """Of a batch, one after the other, and as one block diagonal matrix."""
    sides = [(draw(3, OUT, r, seed=r), draw(3, r, IN, seed=9 + r)) for r in (4, 2, 3)]
    batch = overlaps([factored_svd(B, A) for B, A in sides])
    alone = [overlaps([factored_svd(B[e], A[e]) for B, A in sides]) for e in range(3)]
    for i, one in enumerate(alone):
        for each in fields(Overlaps):
            assert np.allclose(getattr(batch.member(i), each.name), getattr(one, each.name), rtol=1e-11, atol=1e-12)
    whole = overlaps([factored_svd(block_diagonal(B), block_diagonal(A)) for B, A in sides])
    for name in ("norms", "inner", "distances", "sizes", "pairs", "together", "outputs", "inputs", "cosines"):
        for total in (batch.total(), stacked(alone).total()):
            assert np.allclose(getattr(total, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_a_change_without_directions_is_zero() -> None:
    one, two = svd(change(4, 0), 4), svd(change(3, 1), 4)
    padded = overlaps([one, two.nothing(), two, one.nothing()])
    zeros = overlaps([one, svd(0 * change(4, 0), 4), two, svd(0 * change(4, 0), 4)])
    for each in fields(Overlaps):
        assert np.allclose(getattr(padded, each.name), getattr(zeros, each.name), atol=1e-12)
