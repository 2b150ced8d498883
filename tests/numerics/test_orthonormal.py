"""Q of a QR decomposition: its signs as LAPACK's, its numbers the nearest to those of mpmath."""

from __future__ import annotations

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch

from loratool.numerics.orthonormal import householder_q

Wide = npt.NDArray[np.float64]
RNG = np.random.default_rng(0)


def lapack(P: Wide) -> Wide:
    found: Wide = torch.linalg.qr(torch.from_numpy(P))[0].numpy()
    return found


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 5), (7, 3), (40, 1), (64, 8)])
def test_signs_and_numbers(shape: tuple[int, int]) -> None:
    for _ in range(4):
        P = RNG.standard_normal(shape) * 2.0 ** RNG.integers(-60, 60, shape[1])
        Q = householder_q(P)
        assert np.abs(Q - lapack(P)).max() < 1e-12
        with mpmath.workprec(600):
            exact = mpmath.qr(mpmath.matrix(P.tolist()), mode="skinny")[0]
            wanted = np.array([[float(x) for x in row] for row in exact.tolist()])
        signs = np.sign((Q * wanted).sum(0))
        assert np.array_equal(Q, wanted * signs)


@pytest.mark.parametrize(
    "P",
    [
        np.eye(4)[:, :3],
        -np.eye(4)[:, :3],
        np.triu(RNG.standard_normal((5, 3))),
        np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),
        np.array([[0.0, 1.0], [2.0, 3.0]]),
        np.concatenate([np.eye(4)[:, :1], RNG.standard_normal((4, 2))], 1),
    ],
)
def test_columns_without_a_reflection(P: Wide) -> None:
    assert np.abs(householder_q(P) - lapack(P)).max() < 1e-15


@pytest.mark.parametrize(
    ("P", "match"),
    [
        (np.ones((4, 2)), "depends on those before it"),
        (np.zeros((4, 2)), "depends on those before it"),
        (np.ones((2, 3)), "3 columns of 2 numbers"),
    ],
)
def test_open_decompositions(P: Wide, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        householder_q(P)
