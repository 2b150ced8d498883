"""Hold the bounds of sums of products against fractions: no error is larger, and a bound of 0 means exact."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction as F

import numpy as np
import pytest
import torch
from lib.hostile.hostile_reals import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    SHAPE,
    M,
    N,
    changes,
    every_place,
    flushing,
    hard_terms,
    hard_weights,
    id_of,
    merge_rows,
    normal,
    several,
    together,
)

from loratool.numerics import merge
from loratool.numerics.arrays import ON_CPU, Numbers
from loratool.numerics.decide import Factor
from loratool.numerics.dense import Bounds, DenseRows
from loratool.numerics.products import ProductRows, Products, Term, lowest_bits, norms


def exact_in_float64(x: np.ndarray, bound: np.ndarray, expected: list[F], *more: np.ndarray) -> list[int]:
    """Return the elements whose sum of parts is off by more than its bound."""
    parts = [x, *more]
    found = []
    for k, number in enumerate(expected):
        error = abs(sum((F(float(part[k])) for part in parts), F(0)) - number)
        if not np.isinf(bound[k]) and error > F(float(bound[k])):
            found.append(k)
    return found


def check_bounds(rows: ProductRows, expected: list[F]) -> dict[str, int]:
    """Check every answer about all elements; return how many each gave with a bound of 0."""
    i, j = every_place(rows.shape)
    exact = {}
    for name in ("near", "nearer"):
        high, low, bound = getattr(rows, name)(i, j)
        assert exact_in_float64(high, bound, expected, low) == [], name
        assert (bound >= 0).all()
        exact[name] = int((bound == 0).sum())
    for k in range(0, len(expected), 7):
        assert rows.exact(int(i[k]), int(j[k])) == expected[k]
    for kind in (np.float32, np.float64):
        if kind == np.float32 and not rows.largest < 2.0**60:
            continue
        dense = rows.dense(kind, ON_CPU)
        largest = np.abs(np.array([float(x) for x in expected])).reshape(rows.shape).max(1, initial=0.0)
        assert (largest <= dense.sizes * (1 + 1e-15) + 1e-300).all()
        for shift in (0.0, 0.125):
            out = np.empty(rows.shape, kind)
            dense.fill(slice(0, rows.shape[0]), shift, out)
            slack = (dense.errors * 1.01 + shift * 1e-6 * (kind == np.float32) + shift * 1e-14).repeat(rows.shape[1])
            assert exact_in_float64(out.astype(np.float64).ravel() - shift, slack, expected) == [], (kind, shift)
        least = (dense.errors**2).max(initial=0.0) * rows.shape[1]  # what is only rounding counts as 0
        n = rows.shape[1]
        squares = np.array([float(sum(x * x for x in expected[k * n : (k + 1) * n])) for k in range(rows.shape[0])])
        assert dense.squares is not None and dense.squares == pytest.approx(squares, rel=1e-6, abs=least)
    return exact


@pytest.mark.parametrize("factor", DTYPES, ids=id_of)
@pytest.mark.parametrize("name", hard_terms(BF16))
def test_no_error_is_beyond_its_bound(name: str, factor: torch.dtype) -> None:
    """Where subnormal numbers are flushed too."""
    terms = hard_terms(factor)[name]
    expected = changes(terms)
    exact = check_bounds(Products(terms).rows(0, M), expected)
    with flushing():
        assert check_bounds(Products(terms).rows(0, M), expected) == exact or name == "subnormal"
    if factor in (BF16, FP16) and name in ("ties", "no rank", "no scale"):
        assert exact["near"] == len(expected)
    if factor != FP64 and name in ("ties", "near ties"):
        assert exact["nearer"] == len(expected)


@pytest.mark.parametrize("factor", DTYPES, ids=id_of)
@pytest.mark.parametrize("name", hard_terms(BF16))
def test_no_error_of_several_matrices_is_beyond_its_bound(name: str, factor: torch.dtype) -> None:
    each = several(hard_terms(factor)[name])
    check_bounds(together(each).rows(0, 3 * M), [x for terms in each for x in changes(terms)])


@pytest.mark.parametrize("rank", [1, 33, *(pytest.param(r, marks=pytest.mark.slow) for r in (64, 300, 1024, 2048))])
@pytest.mark.parametrize("factor", DTYPES, ids=id_of)
def test_high_ranks_that_cancel(rank: int, factor: torch.dtype) -> None:
    """Every second product takes the one before back, nearly."""
    g = np.random.default_rng(rank)
    B, A = normal(g, 3, rank, dtype=factor), normal(g, rank, 5, dtype=factor)
    for k in range(1, rank, 2):
        B[:, k], A[k] = -B[:, k - 1], A[k - 1] * (1 + 2.0**-7 * (k % 4 == 1))
    for scale in (F(1 / 3), F(1 / 7)):
        terms = [Term(B, A, scale)]
        check_bounds(Products(terms).rows(0, 3), changes(terms))


NEXT_TO_A_HALF = F(0.3) * F(-5 / 3)  # of a weight and a scale: float64 has -1/2 for it


@pytest.mark.parametrize("factor", DTYPES, ids=id_of)
def test_a_scale_next_to_a_power_of_two(factor: torch.dtype) -> None:
    g = np.random.default_rng(0)
    B, A = normal(g, 3, 2, dtype=factor), normal(g, 2, 5, dtype=factor)
    for terms in ([Term(B, A, NEXT_TO_A_HALF)], [Term(B, A, F(1)), Term(B, A, NEXT_TO_A_HALF)]):
        check_bounds(Products(terms).rows(0, 3), changes(terms))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("factor", [BF16, FP64], ids=id_of)
def test_ratios_of_rows_and_columns(factor: torch.dtype, axis: int) -> None:
    """One of two terms is multiplied by numbers that float64 does not hold."""
    one, two = hard_terms(factor)["two"]
    numbers = [F(k + 1, 3) for k in range(SHAPE[axis])]
    ratio = replace(Factor.of_rows(numbers), axis=axis)
    marked = Term(one.left, one.right, one.scale, columns=ratio if axis else None, by_rows=not axis)
    plain, more = changes([one]), changes([two])
    expected = [numbers[(k // N, k % N)[axis]] * plain[k] + more[k] for k in range(M * N)]
    check_bounds(Products([marked, two]).rows(0, M, None if axis else ratio), expected)


def test_rows_are_those_of_the_whole() -> None:
    terms = hard_terms(FP32)["two"]
    whole, part = Products(terms).rows(0, M), Products(terms).rows(2, 5)
    i, j = every_place(part.shape)
    for one, two in zip(whole.near(i + 2, j), part.near(i, j), strict=True):
        assert np.array_equal(one, two)
    assert part.exact(1, 3) == whole.exact(3, 3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("side", [0, 1])
def test_a_factor_that_is_no_number_is_refused(side: int, value: float) -> None:
    sides = [torch.ones(2, 3), torch.ones(3, 2)]
    sides[side][1, 1] = value
    with pytest.raises(ValueError, match="inf or nan"):
        Products([Term(sides[0], sides[1], F(1))])


def test_norms_are_no_less() -> None:
    x = normal(np.random.default_rng(0), 5, 40).numpy() * 10.0 ** np.array([[0], [-200], [200], [-299], [3]])
    x[4] = 0
    found = norms(x)
    for row, norm in zip(x, found, strict=True):
        square = sum(F(float(v)) ** 2 for v in row)
        assert square <= F(float(norm)) ** 2 <= square * (1 + F(1, 10**6))


def test_the_lowest_bits() -> None:
    parts = [np.array([[1.5, 0, 8], [0, 0, 0], [2.0**-100, 3, -0.75]]), np.array([[0.25], [0], [1]])]
    assert lowest_bits(parts, 3).tolist() == [-2, 480, -100]


SHRUNK = 0.01  # of a bound


def test_bounds_of_a_hundredth_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the data of these tests would not tell a bound that is too small."""
    g = np.random.default_rng(0)
    W = normal(g, 128, 2048, dtype=FP16, size=0.02)
    terms = [Term(normal(g, 128, 16, dtype=FP32, size=1e-2), normal(g, 16, 2048, dtype=FP32), F(1 / 3))]
    few = [Term(terms[0].left[:4], terms[0].right[:, :64], terms[0].scale)]
    monkeypatch.setattr(merge, "merge_block", lambda *block, **options: None)  # the compiled passes have other bounds
    expected = changes(few)
    right, _ = merge_rows(Products(terms).rows(0, 128), W, FP16)
    bound, bounds = ProductRows.bound, DenseRows.bounds

    def slight(self: DenseRows, base: Numbers, first: int, backward: bool = False) -> Bounds:
        found = bounds(self, base, first, backward)
        return replace(found, shift=found.shift * SHRUNK, span=found.span * SHRUNK)

    monkeypatch.setattr(ProductRows, "bound", lambda self, size, kind=np.float64: bound(self, size, kind) * SHRUNK)
    with pytest.raises(AssertionError):
        check_bounds(Products(few).rows(0, 4), expected)
    monkeypatch.setattr(DenseRows, "bounds", slight)
    wrong, _ = merge_rows(Products(terms).rows(0, 128), W, FP16)
    assert 0 < int((right.view(torch.int16) != wrong.view(torch.int16)).sum()) < 1000


def test_the_default_type_is_never_asked() -> None:
    """The same answers under float64."""
    terms, W = hard_terms(FP16)["two"], hard_weights(FP16)["normal"]
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            rows = Products(terms).rows(0, M)
            near = rows.near(*every_place())
            found.append((merge_rows(rows, W, FP16)[0].view(torch.int16).tolist(), [x.tolist() for x in near]))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1]
