"""Hold stored values as deltas, and sums of deltas, against fractions."""

from __future__ import annotations

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
    reals,
)
from lib.oracles.fractions_oracle import Add, codes, merge_codes
from torch import Tensor

from loratool.numerics.arrays import ON_CPU
from loratool.numerics.decide import Delta, Factor
from loratool.numerics.products import Products
from loratool.numerics.stored import Stored, Sum, Zero


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.ones_like(x))


def check(delta: Delta, expected: list[F], dense: bool = True) -> int:
    """Check all answers; return how many are exact."""
    i, j = every_place(delta.shape)
    exact = 0
    for high, low, bound in (delta.near(i, j), delta.nearer(i, j)):
        for k, number in enumerate(expected):
            assert np.isinf(bound[k]) or abs(F(float(high[k])) + F(float(low[k])) - number) <= F(float(bound[k]))
        exact = int((bound == 0).sum())
    assert [delta.exact(int(a), int(b)) for a, b in zip(i[::5], j[::5], strict=True)] == expected[::5]
    for kind in (np.float32, np.float64) if dense else ():
        if kind == np.float64 or delta.largest < 2.0**60:
            out, of = np.empty(delta.shape, kind), delta.dense(kind, ON_CPU)
            of.fill(slice(0, delta.shape[0]), 0.0, out)
            for k, (number, x) in enumerate(zip(expected, reals(torch.from_numpy(out)), strict=True)):
                assert abs(x - number) <= F(float(of.errors[k // delta.shape[1]]))
                assert abs(number) <= F(float(of.sizes[k // delta.shape[1]])) * (1 + F(1, 10**6)) + F(2) ** -900
    return exact


@pytest.mark.parametrize("weight", [1.0, 1 / 3, -0.7, 2.0**-1000])
@pytest.mark.parametrize("name", ["normal", "subnormal", "largest", "bits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_a_multiple_of_stored_values(dtype: torch.dtype, name: str, weight: float) -> None:
    V = finite(hard_weights(dtype)[name])
    if dtype == FP64 and name in ("largest", "subnormal"):
        V = V * 2.0 ** (-30 if name == "largest" else 60)
    expected = [F(weight) * v for v in reals(V)]
    exact = check(Stored(V, weight), expected)
    assert exact == len(expected) or weight != 1
    with flushing():
        check(Stored(V, weight), expected, dense=dtype in (BF16, FP16) or weight != 1)


def test_rows_by_an_index() -> None:
    V, index = hard_weights(FP32)["normal"], np.array([3, -1, 0, -1])
    values = reals(V)
    expected = [F(0.5) * values[row * N + column] if row >= 0 else F(0) for row in index for column in range(N)]
    assert check(Stored(V, 0.5, index), expected) == len(expected)
    none = Stored(V[:0], 0.5, np.array([-1, -1]))
    assert check(none, [F(0)] * (2 * N)) == 2 * N


@pytest.mark.parametrize("factor", DTYPES, ids=id_of)
def test_a_sum_and_its_negative(factor: torch.dtype) -> None:
    """Of stored values and products, where they cancel to 2**-60 of themselves too."""
    V = hard_weights(BF16)["normal"]
    for name in ("third", "near ties", "no rank"):
        terms = hard_terms(factor)[name]
        products = Products(terms).rows(0, M)
        whole = Sum([Stored(V, 1.0), products, Stored(V, -1.0), Stored(V, 0.5)])
        expected = [d + v / 2 for d, v in zip(changes(terms), reals(V), strict=True)]
        exact = check(whole, expected)
        assert whole.shape == SHAPE and whole.largest >= products.largest
        assert exact == len(expected) or name == "third" or factor == FP64


def test_float64_values_that_may_be_flushed() -> None:
    """A sum of two zeros to a machine that flushes them, and W's own bits to one that believes it."""
    V, W = torch.full((1, 4), 2.0**-1060, dtype=FP64), torch.tensor([[0.0, -0.0, 1.0, 2.0**-1060]], dtype=FP64)
    expected = merge_codes(W, FP64, [Add(reals(V))])
    for flush in (False, True):
        with flushing(flush):
            assert codes(merge_rows(Stored(V, 1.0), W, FP64)[0]) == expected


@pytest.mark.parametrize("flush", [False, True])
def test_multiples_of_w_that_float64_cannot_hold(flush: bool) -> None:
    """Such a number is no 0: the sign of W stays."""
    numbers = [F(2) ** -1080, -(F(2) ** -1080), F(2) ** -1060 / 3]
    W = torch.tensor([[1.0, -1.0, 2.0**127]] * 3)
    with flushing(flush):
        made, _ = merge_rows(Zero((3, 3)), W, FP32, Factor.of_rows(numbers))
    assert made.eq(0).all() and made.signbit().tolist() == [[x * w < 0 for w in (1, -1, 1)] for x in numbers]
