"""Hold derived numbers, products of 36 bits, and deltas of blocks that mix against fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
from lib.oracles.mixed_oracle import inverse, nearest, short, unit

from loratool.adapters.updates.rotations import cayley, defect, root, series, squares
from loratool.numerics.arrays import ON_CPU, Numbers, rounded_to
from loratool.numerics.derived import Fixed, Pairs, derived_numbers
from loratool.numerics.forms import BF16, F32, F64, FORMS, Form
from loratool.numerics.mixed import Mixed
from loratool.numerics.short_products import column_products, row_products
from loratool.numerics.trigonometry import cos_sin


def fractions(x: Any) -> Any:
    return np.array([Fraction(float(each)) for each in np.asarray(x, np.float64).flat], object).reshape(np.shape(x))


def skew(n: int, b: int, size: float, seed: int = 0) -> Any:
    upper = np.triu(np.random.default_rng(seed).standard_normal((n, b, b)) * size, 1).astype(np.float32).astype(float)
    return upper - upper.swapaxes(1, 2)


@pytest.mark.parametrize("size", [0.02, 0.5, 30.0, 1e-30, 1e8])
def test_rotations_are_the_nearest_numbers(size: float) -> None:
    """Also of a block of zeros, and of one whose halves do not mix."""
    Q = skew(3, 6, size)
    Q[1, 3:, :3] = Q[1, :3, 3:] = 0
    Q[2] = 0
    by_cayley = derived_numbers(cayley, [Q])
    by_series = derived_numbers(lambda x: series(x, (2, 2, 2, 1)), [Q])
    for k, matrix in enumerate(map(fractions, Q)):
        one, q2 = unit(6), matrix.dot(matrix)
        assert (by_cayley[k] == nearest((one + matrix).dot(inverse(one - matrix)) - one).astype(float)).all()
        powers = 2 * (matrix + q2 + q2.dot(matrix)) + q2.dot(q2)
        assert (by_series[k] == nearest(powers).astype(float)).all()


def test_a_tie_goes_to_even() -> None:
    """A product that is the middle between two numbers, which no bound decides."""
    x, y = np.array([[[1.0 + 2.0**-52, 2.0**-53]]]), np.array([[[1.0], [1.0]]])
    assert derived_numbers(lambda x, y: x @ y, [x], [y])[0, 0, 0] == 1.0 + 2.0**-51
    assert derived_numbers(lambda x, y: x @ y, [x], [y * 2.0**-100])[0, 0, 0] == (1.0 + 2.0**-51) * 2.0**-100


@pytest.mark.parametrize("count", [1, 7, 64, 300])
def test_products_of_pairs_keep_their_bound(count: int) -> None:
    g = np.random.default_rng(1)
    x, y = g.standard_normal((2, 3, count)) * 10.0 ** g.integers(-6, 6, (2, 3, 1)), g.standard_normal((2, count, 4))
    product = Pairs.of(x) @ Pairs.of(y)
    for k in range(2):
        exact = fractions(x[k]).dot(fractions(y[k]))
        found = fractions(product.high[k]) + fractions(product.low[k])
        assert max(abs(found - exact).flat) <= Fraction(float(product.bound[k]))
        assert product.bound[k] <= 2.0**-85 * count * np.abs(x[k]).max() * np.abs(y[k]).max() * 16


def test_a_matrix_without_inverse_is_an_error() -> None:
    with pytest.raises(ValueError, match="no inverse"):
        derived_numbers(lambda x: x.inverse(), [np.ones((1, 2, 2))])


def test_integers_and_pairs_agree() -> None:
    Q = skew(2, 5, 0.3)
    assert np.array_equal(cayley(Fixed.of([Q])).wide(), derived_numbers(cayley, [Q]))


def test_defects_norms_and_roots() -> None:
    Q = skew(2, 4, 0.2)
    assert defect(derived_numbers(cayley, [Q])) < 1e-14 < defect(derived_numbers(lambda x: series(x, (2,)), [Q]))
    assert squares([Q]) == [sum(x * x for x in fractions(each).flat) for each in Q]
    assert root(Fraction(9, 4)) == Fraction(3, 2) and abs(root(Fraction(2)) ** 2 - 2) < Fraction(1, 1 << 390)


@pytest.mark.parametrize("angle", [0.0, 1e-30, 0.5, -3.0, 1e3, 3.4e38, float(np.pi), float(np.pi / 2)])
def test_cosines_and_sines(angle: float) -> None:
    found = cos_sin(Fraction(angle))
    with mpmath.workprec(1200):
        wanted = mpmath.cos(mpmath.mpf(angle)), mpmath.sin(mpmath.mpf(angle))
        for x, y in zip(found, wanted, strict=True):
            assert abs(mpmath.mpf(x.numerator) / x.denominator - y) < mpmath.mpf(2) ** -300
    if not angle:
        assert found == (1, 0)


@pytest.mark.parametrize("form", [BF16, F32, F64])
def test_products_of_36_bits(form: Form) -> None:
    g = np.random.default_rng(2)
    W = rounded_to(g.standard_normal((50, 70)), form)
    W.bits[3] = 0
    U, L = (rounded_to(g.standard_normal(shape), F32) for shape in ((70, 3), (2, 50)))
    U.bits[:, 2] = U.bits[:, 1]
    wide, blocks = W.wide(), lambda: [(0, W[:20]), (20, W[20:])]
    for found, x, y in (
        (row_products(W, U), wide, U.wide()),
        (column_products(L, blocks, 70), L.wide(), wide),
    ):
        exact = fractions(x).dot(fractions(y))
        assert found.tolist() == [[float(short(each)) for each in row] for row in exact]
    cancelled = rounded_to(np.concatenate([U.wide(), -U.wide()])[:, :2], F32)
    doubled = Numbers(np.concatenate([W.bits, W.bits], 1), form)
    assert not row_products(doubled, cancelled).any()


@pytest.mark.parametrize("reach", [0, 3, 60, 120])
@pytest.mark.parametrize("form", [F32, F64])
def test_products_of_few_bits_and_of_all_sizes(form: Form, reach: int) -> None:
    """So that ties are many, and sums cancel or lose numbers."""
    g = np.random.default_rng(reach)
    drawn = lambda *shape: g.integers(-9, 10, shape) * 2.0 ** g.integers(-reach, reach + 1, shape)  # noqa: E731
    W, U = rounded_to(drawn(40, 9), F32), rounded_to(drawn(9, 3) + 2.0**-37 * drawn(9, 3) * (form is F64), form)
    wanted = [[float(short(each)) for each in row] for row in fractions(W.wide()).dot(fractions(U.wide()))]
    assert row_products(W, U).tolist() == wanted
    assert column_products(U.T, lambda: [(0, W.T[:5]), (5, W.T[5:])], 40).T.tolist() == wanted


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("form", ["BF16", "F64"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 1), (4, 1), (1, 3, "cut")])
def test_bounds_of_blocks_that_mix(axis: int, form: str, shape: Any) -> None:
    g, b = np.random.default_rng(3), 4
    rows, columns = 4 * b - (len(shape) > 2), 3 * b - (len(shape) > 2)
    if axis == 0 and shape[:2] == (1, 3):
        shape = (4, 1)
    W, M = rounded_to(g.standard_normal((rows, columns)), FORMS[form]), g.standard_normal((*shape[:2], b, b))
    M[0, 0, :, 1] = M[0, 0, 2] = 0
    delta, exact = Mixed(W, M, axis), np.zeros((rows, columns), object)
    for i in range(rows):
        for j in range(columns):
            exact[i, j] = delta.exact(i, j)
    padded = np.zeros((4 * b, 3 * b), object)
    padded[:rows, :columns] = fractions(W.wide())
    P, Q = M.shape[:2]
    for p in range(4):
        for q in range(3):
            block, matrix = np.s_[p * b : p * b + b, q * b : q * b + b], fractions(M[p % P, q % Q])
            part = padded[block].dot(matrix) if axis else matrix.dot(padded[block])
            here = exact[block]
            assert (part[: here.shape[0], : here.shape[1]] == here).all()
    i, j = (each.reshape(-1) for each in np.indices((rows, columns)))
    for high, low, bound in (delta.near(i, j), delta.nearer(i, j)):
        off = np.abs(fractions(high) + fractions(low) - exact.reshape(-1))
        assert all(x <= Fraction(y) for x, y in zip(off, bound.tolist(), strict=True))
    for kind in (np.float32, np.float64):
        dense, out = delta.dense(kind, ON_CPU), np.empty((rows, columns), kind)
        dense.fill(slice(0, 5), 0.0, out[:5])
        dense.fill(slice(5, rows), 0.0, out[5:])
        for row in range(rows):
            assert max(abs(fractions(out[row]) - exact[row])) <= Fraction(float(dense.errors[row]))
            assert max(abs(exact[row])) <= Fraction(float(dense.sizes[row]))
