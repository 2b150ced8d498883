"""Hold whole merges of rows against the oracle, and the dense step where its sums are exact against the bounded one."""

from __future__ import annotations

import itertools
import math
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
    flushing,
    form_of,
    hard_terms,
    hard_weights,
    id_of,
    keeping,
    merge_rows,
    normal,
    wanted,
)
from lib.oracles.fractions_oracle import count_wrong
from torch import Tensor

from loratool.numerics import dense
from loratool.numerics.arrays import ON_CPU
from loratool.numerics.decide import Factor, Reals
from loratool.numerics.dense import DenseRows, float32_is_whole, largest_of, midpoints
from loratool.numerics.norms import magnitude_ratio, row_norms
from loratool.numerics.products import Products, Term
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace

CASES = [
    (weights, terms, base, factor, out)
    for weights, terms in itertools.product(hard_weights(BF16), hard_terms(BF16))
    for base, factor, out in itertools.product(DTYPES, DTYPES, DTYPES)
]


def check_merge(weights: str, terms: str, base: torch.dtype, factor: torch.dtype, out: torch.dtype) -> None:
    """Merge with subnormals kept and flushed, and under another default type; compare all elements and counts."""
    made = hard_terms(factor, torch.finfo(out).eps)[terms]
    W = keeping(hard_weights(base)[weights], made, out)
    expected = wanted(W, made, out)
    assert expected
    for flush, default in ((False, torch.float32), (True, torch.float64)):
        torch.set_default_dtype(default)
        try:
            with flushing(flush):
                found, stats = merge_rows(Products(made).rows(0, len(W)), W, out)
        finally:
            torch.set_default_dtype(torch.float32)
        assert count_wrong(found, expected) == 0, flush
        steps = stats.steps
        assert steps["dense"] + steps["near"] >= W.numel() - stats.not_finite and steps["near"] >= steps["nearer"]
        assert stats.not_finite == int((~W.isfinite()).sum()) and stats.overflowed == 0


@pytest.mark.parametrize(("weights", "terms", "base", "factor", "out"), CASES[::167], ids=id_of)
def test_merges_round_the_exact_real_once(
    weights: str, terms: str, base: torch.dtype, factor: torch.dtype, out: torch.dtype
) -> None:
    check_merge(weights, terms, base, factor, out)


@pytest.mark.slow
@pytest.mark.parametrize("weights", hard_weights(BF16))
@pytest.mark.parametrize("terms", hard_terms(BF16))
def test_merges_of_every_type_round_once(weights: str, terms: str) -> None:
    for case in CASES:
        if case[:2] == (weights, terms):
            check_merge(*case)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_what_overflows_is_counted(dtype: torch.dtype) -> None:
    """From half a step above the largest number on, and with the size that it would have."""
    top = torch.finfo(dtype).max
    W = torch.full((1, 4), top, dtype=dtype)
    W[0, 3] = math.inf
    half = F(top) * F(torch.finfo(dtype).eps) / (4 - 2 * F(torch.finfo(dtype).eps))
    right = torch.tensor([[1.0, 1 - 2.0**-9, 2, 1]])
    _, stats = merge_rows(Products([Term(torch.ones(1, 1), right, half)]).rows(0, 1), W, dtype)
    assert (stats.overflowed, stats.not_finite) == (2, 1) and stats.largest >= top


def big(base: torch.dtype, factor: torch.dtype, scales: list[F]) -> tuple[Tensor, list[Term]]:
    """Return weights and products whose float64 sums are exact but for some rows, columns and small weights."""
    g = np.random.default_rng(7)
    W = normal(g, 80, 256, dtype=base, size=0.02)
    W[torch.from_numpy(g.random(W.shape) < 0.1)] *= 0  # half of them -0.0
    W = torch.where(torch.from_numpy(g.random(W.shape) < 0.01), W * 2.0**-30, W)
    W[3, :2] = torch.tensor([math.inf, math.nan])
    B, A = normal(g, 80, 16, dtype=factor, size=1e-3), normal(g, 16, 256, dtype=factor)
    B[5], A[:, 9] = 0, 0
    A[0, 11] *= 2.0**-14
    return W, [Term(B, A, scale) for scale in scales]


SCALES = {"one": [F(1)], "two": [F(-1, 2), F(4)], "third": [F(1 / 3)]}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("base", "factor"), [(FP32, BF16), (BF16, FP16), (FP16, FP16)], ids=id_of)
def test_exact_sums_round_as_the_bounded_ones(
    base: torch.dtype, factor: torch.dtype, scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, terms = big(base, factor, SCALES[scales])
    rows, found = Products(terms).rows(0, 80), []
    for way in (dense._apart, lambda *_: None):
        monkeypatch.setattr(dense, "_apart", way)
        bounds = DenseRows(Reals(rows), form_of(base), form_of(FP32), ON_CPU).bounds(numbers_of(W), 0)
        assert (bounds.apart is not None) == (way.__name__ == "_apart" and scales != "third")
        found.append(merge_rows(rows, W, FP32))
    assert torch.equal(found[0][0].view(torch.int32), found[1][0].view(torch.int32))
    assert found[0][1].changed == found[1][1].changed
    if scales != "third":
        assert found[0][1].steps["near"] < W.numel() / 5


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=id_of)
def test_dora_of_sizes_that_float32_does_not_hold(dtype: torch.dtype) -> None:
    """a = m / n is subnormal in float32, W nearly infinite."""
    g = np.random.default_rng(0)
    large = torch.finfo(dtype).max / 8
    W = (normal(g, 4, 32) * large / 4).clamp(-large, large).to(dtype)
    B, A = torch.zeros(4, 1), torch.ones(1, 32)
    n = row_norms(Products([Term(B, A, F(1))]).rows(0, 4), numbers_of(W), Workspace())
    m = normal(g, 4, dtype=FP32, size=2.0**-20)
    ratio, factor = magnitude_ratio(m, n, 1.0, 0)
    rows = Products([Term(B, A, F(1), by_rows=True)]).rows(0, 4, ratio)
    found, _ = merge_rows(rows, W, dtype, factor)
    for i, j in itertools.product(range(4), range(32)):
        exact = factor.exact(i) * F(float(W[i, j]))
        expected = wanted(torch.zeros(1, 1, dtype=FP64), [Term(torch.ones(1, 1), torch.ones(1, 1), exact)], dtype)
        assert expected is not None and count_wrong(found[i, j].reshape(1), expected) == 0


@pytest.mark.parametrize("a", [F(0), F(1), F(1, 3), F(-2)])
def test_a_factor_of_columns(a: F) -> None:
    """Beside columns that stay, with inf and nan among the weights."""
    W, made = hard_weights(BF16)["zeros"], hard_terms(FP32)["third"]
    numbers = [a if k % 2 else F(1) for k in range(W.shape[1])]
    rows = Factor.of_rows(numbers)
    found, stats = merge_rows(Products(made).rows(0, len(W)), W, BF16, replace(rows, axis=1))
    plain = wanted(W, made, BF16)
    changes = Products(made).rows(0, len(W))
    assert plain
    for k, (i, j) in enumerate(itertools.product(*map(range, W.shape))):
        exact = numbers[j] * F(float(W[i, j])) + changes.exact(i, j) if W[i, j].isfinite() else changes.exact(i, j)
        stays = not W[i, j].isfinite() and numbers[j] != 0
        one = torch.ones(1, 1)
        expected = wanted(torch.zeros(1, 1, dtype=FP64), [Term(one, one, exact)], BF16) if not stays else [plain[k]]
        assert expected is not None and count_wrong(found[i, j].reshape(1), expected) == 0
    assert stats.not_finite == (2 if a == 0 else 3)


def test_what_is_read_from_bits() -> None:
    work = Workspace()
    x = torch.tensor([[1 + 2.0**-24, 1 + 3 * 2.0**-24, 1.0, 1 + 2.0**-23, -3 - 2.0**-23, 0.0, 1 + 2.0**-24 + 2.0**-52]])
    assert midpoints(x.double().numpy(), work).tolist() == [[False] * 7]  # rounded when it was made
    x = torch.tensor(x.double().tolist(), dtype=FP64)
    x[0, :2] = torch.tensor([1 + 2.0**-24, 1 + 3 * 2.0**-24], dtype=FP64)
    x[0, 4] = torch.tensor(-3 - 2.0**-23, dtype=FP64)
    assert midpoints(x.numpy(), work).tolist() == [[True, True, False, False, True, False, False]]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        some = torch.tensor([[-3.0, 2.0, math.inf, math.nan, -math.inf]], dtype=dtype)
        found = [largest_of(numbers_of(x)) for x in (some, -some[:, :2], some[:0], some[:, :1] * 0)]
        assert found == [3, 3, 0, 0]  # at last of -0.0


def test_short_products_are_not_trusted() -> None:
    """torch's, on a GPU; numpy's are never short."""
    tensor = torch.empty(0)  # as one on a GPU
    assert float32_is_whole(tensor)
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            assert not float32_is_whole(tensor) and float32_is_whole(ON_CPU)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert float32_is_whole(tensor) and float32_is_whole(ON_CPU)
