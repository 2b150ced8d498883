"""Decompose tall matrices by blocks of rows."""

from __future__ import annotations

import numpy as np
import pytest

from loratool.numerics.linalg import ROWS, adjoint, qr, triangle_of

SHAPES = [(2 * ROWS, 7), (2 * ROWS - 1, 7), (5 * ROWS + 3, 16), (2, 3, 4 * ROWS + 40, 32), (2 * ROWS, 0), (3 * ROWS, 1)]


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("shape", [*SHAPES, (3000, 300), (5, 9)], ids=str)
def test_qr_of_tall_matrices(shape: tuple[int, ...], order: str) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    x = adjoint(np.ascontiguousarray(adjoint(x))) if order == "columns" else x
    Q, R = qr(x)
    k = min(shape[-2:])
    assert Q.shape == (*shape[:-1], k) and R.shape == (*shape[:-2], k, shape[-1])
    assert np.allclose(Q @ R, x, atol=1e-13) and np.allclose(adjoint(Q) @ Q, np.eye(k), atol=1e-13)
    assert np.array_equal(np.triu(R), R)
    triangle = triangle_of(x)  # its rows may have other signs
    assert np.array_equal(np.triu(triangle), triangle) and np.allclose(np.abs(triangle), np.abs(R), atol=1e-12)


@pytest.mark.parametrize("columns", [1, 3])
def test_dependent_columns_and_columns_of_very_different_sizes(columns: int) -> None:
    x = np.repeat(np.random.default_rng(1).standard_normal((3 * ROWS, 2)), columns, 1) * np.logspace(
        0, -150, 2 * columns
    )
    Q, R = qr(x)
    assert np.allclose(adjoint(Q) @ Q, np.eye(2 * columns), atol=1e-13)
    assert (np.abs(Q @ R - x).max(0) <= 1e-13 * np.abs(x).max(0)).all()
    assert not qr(np.zeros_like(x))[1].any()
