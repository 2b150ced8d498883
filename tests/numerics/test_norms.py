"""Hold DoRA's norms, by each of the three ways, against exact roots."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
import torch
from fractions_oracle import root
from hostile_reals import BF16, CPU, FP16, FP32, FP64, both_ways, changes, flushing, id_of, normal, reals
from torch import Tensor

from loratool.numerics import norms
from loratool.numerics.forms import Wide
from loratool.numerics.norms import column_norms, magnitude_ratio, row_norms, short_root
from loratool.numerics.products import Products, Term
from loratool.numerics.workspace import Workspace

WORK = Workspace(CPU)


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


def by_rows(W: Tensor, terms: list[Term]) -> Wide:
    return row_norms(Products(terms).rows(0, len(W)), W, WORK)


def by_columns(W: Tensor, terms: list[Term], height: int) -> Wide:
    turned = [Term(t.right.T.contiguous(), t.left.T.contiguous(), t.scale) for t in terms]
    whole = W.T.contiguous()
    blocks = [(start, whole[start : start + height]) for start in range(0, len(whole), height)]
    return column_norms(Products(turned), lambda: blocks, WORK)


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


@both_ways
@pytest.mark.parametrize("way", ["pairs", "fractions"])
def test_every_way_gives_the_same(way: str, flush: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is the only one: a bound that tells nothing, then pairs that tell nothing."""
    W, terms = hard(FP32, 12)
    expected = exact_norms(W, terms)
    monkeypatch.setattr(norms, "FLUSHED", 2.0**200)
    asked = []
    if way == "fractions":
        monkeypatch.setattr(norms._Squares, "root", lambda self: asked.append(1))
    with flushing(flush):
        assert by_rows(W, terms).tolist() == expected and by_columns(W, terms, 5).tolist() == expected
    assert len(asked) == (2 * len(expected) if way == "fractions" else 0)


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
    with flushing(flush):
        ratio, whole = magnitude_ratio(m, n, weight, 0)
    for k in range(len(m)):
        exact = F(weight) * F(float(m[k])) / F(float(n[k])) if n[k] else F(0)
        assert ratio.exact(k) == exact and whole.exact(k) == 1 - F(weight) + exact
        for factor in (ratio, whole):
            assert abs(F(float(factor.value[k])) - factor.exact(k)) <= F(float(factor.error[k]))
    assert (ratio.error[[1, 3]] == 0).all()
