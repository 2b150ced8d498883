"""Hold DoRA's norms, by each of the three ways, against exact roots."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
import torch
from lib.hostile.hostile_reals import BF16, FP16, FP32, FP64, both_ways, changes, flushing, id_of, normal, reals
from lib.oracles.fractions_oracle import root
from torch import Tensor

from loratool.numerics import norms
from loratool.numerics.composed import Hadamard
from loratool.numerics.decide import Delta
from loratool.numerics.forms import Wide
from loratool.numerics.norms import TINY_BY, column_norms, magnitude_ratio, norm_of, row_norms, short_root
from loratool.numerics.products import Products, Term
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace

WORK = Workspace()


def exact_norms(W: Tensor, terms: list[Term]) -> list[float]:
    """Return the norm of each row of W + D."""
    squares = [(w + d) ** 2 for w, d in zip(reals(W), changes(terms), strict=True)]
    return [float(root(sum(squares[k : k + W.shape[1]], F(0)))) for k in range(0, len(squares), W.shape[1])]


def hard(dtype: torch.dtype, columns: int) -> tuple[Tensor, list[Term]]:
    """Return W and the terms of D with rows of all sizes: zero, subnormal, one that D takes away, ends of 36 bits."""
    g = np.random.default_rng(columns)
    W, B, A = normal(g, 8, columns, dtype=dtype, size=0.02), normal(g, 8, 3, dtype=FP32), normal(g, 3, columns)
    B[3:7] = 0
    W[3], W[4] = 0, W[4] * 2.0**-4 * torch.finfo(dtype).tiny
    W[5] = 0
    W[5, 0] = 1.5
    W[6], W[7] = 0, -1
    A[0], B[7] = 1, torch.tensor([3.0, 0, 0])
    return W, [Term(B, A.float(), F(1 / 3))]


def changed_columns(terms: list[Term]) -> Tensor:
    """Return D in float64, three columns one after the other in each of four rows, where that is exact."""
    D = torch.tensor([float(x) for x in changes(terms)], dtype=FP64).reshape(8, 12)
    return D.T.reshape(4, 24).contiguous()


def by_rows(W: Tensor, terms: list[Term]) -> Wide:
    return row_norms(Products(terms).rows(0, len(W)), numbers_of(W), WORK)


def by_columns(W: Tensor, terms: list[Term], height: int) -> Wide:
    turned = [Term(t.right.T.contiguous(), t.left.T.contiguous(), t.scale) for t in terms]
    whole = numbers_of(W.T.contiguous())
    blocks = [(start, whole[start : start + height]) for start in range(0, len(whole), height)]
    return column_norms(Products(turned).rows, lambda: blocks, WORK)


@pytest.mark.parametrize("columns", [1, 2, 33, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=id_of)
def test_norms_are_exact_roots(dtype: torch.dtype, columns: int) -> None:
    W, terms = hard(dtype, columns)
    expected = exact_norms(W, terms)
    for flush in (False, dtype != FP64):
        with flushing(flush):
            assert by_rows(W, terms).tolist() == expected
            for height in (1, 40, columns):
                assert by_columns(W, terms, height).tolist() == expected


@pytest.mark.parametrize("size", [-1073, -1060, -1045, -1039, -1036, -1022, -600, 600, 1020])
def test_a_norm_has_36_bits_near_the_ends_of_float64(size: int) -> None:
    """As a negative number where float64 cannot hold them, and not finite if it is too large."""
    g = np.random.default_rng(7)
    W = torch.from_numpy(np.ldexp(normal(g, 8, 9).clamp(-2, 2).numpy(), size))
    W[2] = 0
    W[3, 1:] = 0
    terms = [Term(torch.zeros(8, 1), torch.zeros(1, 9), F(1))]
    squares = [sum((w * w for w in reals(row)), F(0)) for row in W]
    for found in (by_rows(W, terms), by_columns(W, terms, 4)):
        assert [norm_of(n) for n in found.tolist()] == [root(square) for square in squares]
        assert (found >= 0).all() or size < -1036


@pytest.mark.parametrize(
    ("scale", "fits"), [(F(1 / 3) * F(2) ** -1900, True), (F(1 / 3) * F(2) ** -2060, False), (F(2) ** 1024, False)]
)
def test_a_norm_that_no_float64_stands_for_is_not_finite(scale: F, fits: bool) -> None:
    terms = [Term(torch.ones(2, 1), torch.ones(1, 5), scale)]
    found = by_rows(torch.zeros(2, 5), terms)
    assert np.isfinite(found).all() == fits
    assert not fits or norm_of(float(found[0])) == root(5 * scale**2)


STEPS = ("sums", "pairs", "exact numbers")


def blind(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the steps before one tell nothing."""
    if step != "sums":
        monkeypatch.setattr(norms, "FLUSHED", 2.0**200)
    if step == "exact numbers":
        monkeypatch.setattr(norms, "_pair_squares", lambda *_: None)


@both_ways
@pytest.mark.parametrize("step", STEPS[1:])
@pytest.mark.parametrize("dtype", [BF16, FP64], ids=id_of)
def test_each_step_gives_the_same(dtype: torch.dtype, step: str, flush: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bound of the one before tells nothing."""
    W, terms = hard(dtype, 12)
    expected = exact_norms(W, terms)
    blind(step, monkeypatch)
    with flushing(flush and dtype != FP64):
        assert by_rows(W, terms).tolist() == expected and by_columns(W, terms, 5).tolist() == expected


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=id_of)
def test_norms_of_other_deltas(dtype: torch.dtype, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a product of two, by rows, by columns, and by groups of three columns, read in blocks of any height."""
    W, terms = hard(dtype, 12)
    ones = [Term(torch.ones(8, 1), torch.ones(1, 12), F(1))]
    turned = [Term(t.right.T.contiguous(), t.left.T.contiguous(), t.scale) for t in terms]
    blind(step, monkeypatch)
    delta = Hadamard(Products(terms).rows(0, 8), Products(ones).rows(0, 8), F(1))
    assert row_norms(delta, numbers_of(W), WORK).tolist() == exact_norms(W, terms)
    grouped = exact_norms(W.T.reshape(4, 24), [Term(torch.eye(4), changed_columns(terms), F(1))])
    for height in (1, 3, 8):
        blocks = [(start, numbers_of(W)[start : start + height]) for start in range(0, 8, height)]

        def rows(start: int, stop: int) -> Hadamard:
            return Hadamard(Products(terms).rows(start, stop), Products(ones).rows(start, stop), F(1))

        for of in (rows, Products(terms).rows):
            assert column_norms(of, lambda blocks=blocks: blocks, WORK).tolist() == exact_norms(W.T, turned)
        for of in (rows, Products(terms).rows):
            assert column_norms(of, lambda blocks=blocks: blocks, WORK, 3).tolist() == grouped


def test_few_rows_are_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the norms of LoHa cost more than its merge."""
    g, asked = np.random.default_rng(0), []
    one, two = ([Term(normal(g, 300, 8, dtype=FP32), normal(g, 8, 200, dtype=FP32), F(1))] for _ in "12")
    delta = Hadamard(Products(one).rows(0, 300), Products(two).rows(0, 300), F(1, 2**13))
    pairs = norms._pair_squares

    def counted(*args: object) -> object:
        asked.append(args)
        return pairs(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(norms, "_pair_squares", counted)
    monkeypatch.setattr(norms, "_exact_squares", None)
    row_norms(delta, numbers_of(normal(g, 300, 200, dtype=BF16, size=0.02)), WORK)
    assert len(asked) < 15


def test_a_root_is_rounded_half_up() -> None:
    for x in (F(2), F(9, 16), F(1, 3) ** 90, F(7) ** 200, (2**35 + F(1, 2)) ** 2, (2**36 - F(1, 2)) ** 2, F(0)):
        assert short_root(x) == root(x)
    assert short_root((2**35 + F(1, 2)) ** 2) == 2**35 + 1


@both_ways
@pytest.mark.parametrize("weight", [1.0, 0.5, -0.7])
def test_ratios_are_within_their_errors(weight: float, flush: bool) -> None:
    """Of w m / n and 1 - w + w m / n, too small ones and a norm of 0 among them."""
    m = torch.tensor([1.0, 0.0, 3e-40, 7.0, 2.0**-1000, -2.0], dtype=FP64)
    n = np.array([3.0, 3.0, 3.0, 0.0, 2.0**100, 1e-30])
    m, n = torch.cat([m, m, m * 2.0**-1040, m * 2.0**-650]), np.concatenate([n, *([-np.where(n, 1e-19, -0.0)] * 3)])
    with flushing(flush):
        ratio, whole = magnitude_ratio(m, n, weight, 0)
    for k in range(len(m)):
        norm = F(float(n[k])) if n[k] >= 0 else F(-float(n[k])) / 2**TINY_BY
        exact = F(weight) * F(float(m[k])) / norm if norm else F(0)
        assert ratio.exact(k) == exact and whole.exact(k) == 1 - F(weight) + exact
        for factor in (ratio, whole):
            assert k > 5 or np.isfinite(factor.error[k])
            if np.isinf(factor.error[k]):
                assert np.isinf(factor.size[k])  # so that all of it is left to the fractions
                continue
            assert abs(F(float(factor.value[k])) - factor.exact(k)) <= F(float(factor.error[k]))
    assert (ratio.error[[1, 3]] == 0).all() and np.isfinite(ratio.error[18])


@pytest.mark.parametrize("composed", [False, True])
def test_a_hair_below_the_middle_of_two_roots(composed: bool) -> None:
    """W + D is the middle to a float64, which would be rounded up."""
    W, ones = torch.tensor([[2.0**36 + 1], [-(2.0**36) - 1]], dtype=FP64), torch.ones(1, 1)
    delta: Delta = Products([Term(W.sign(), ones, -(F(2) ** -20))]).rows(0, 2)
    if composed:
        delta = Hadamard(delta, Products([Term(torch.ones(2, 1), ones, F(1))]).rows(0, 2), F(1))
    assert row_norms(delta, numbers_of(W), WORK).tolist() == [2.0**36] * 2
