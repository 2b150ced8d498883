"""Hold products of stored factors, and Tucker's terms, against fractions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction as F

import numpy as np
import pytest
import torch
from lib.hostile.hostile_reals import BF16, DTYPES, FP32, FP64, changes, flushing, id_of, normal, reals

from loratool.numerics.arrays import Numbers
from loratool.numerics.exact_factors import multiply_exactly, tucker_terms
from loratool.numerics.products import Products, Term
from loratool.numerics.tensors import numbers_of, tensor_of


def numbers(parts: list[Numbers]) -> list[F]:
    return [sum(each, F(0)) for each in zip(*(reals(tensor_of(part)) for part in parts), strict=True)]


@pytest.mark.parametrize("one", DTYPES, ids=id_of)
@pytest.mark.parametrize("two", DTYPES, ids=id_of)
def test_products_have_all_bits(one: torch.dtype, two: torch.dtype) -> None:
    """Of a column and a matrix, with the least and largest numbers of the types."""
    g = np.random.default_rng(0)
    x, y = normal(g, 4, 1, dtype=one), normal(g, 4, 5, dtype=two)
    if one != FP64:
        x[0], x[1] = torch.finfo(one).max, torch.finfo(one).smallest_normal * torch.finfo(one).eps
    if two != FP64:
        y[:, 0], y[:, 1] = torch.finfo(two).max, torch.finfo(two).smallest_normal * torch.finfo(two).eps
    y[2, 2] = 0
    wanted = [a * b for k, a in enumerate(reals(x)) for b in reals(y)[5 * k : 5 * k + 5]]
    for flush in (False, True):
        with flushing(flush):
            parts = multiply_exactly(numbers_of(x), numbers_of(y))
        assert numbers(parts) == wanted and {part.shape for part in parts} == {tuple(y.shape)}
        assert Products([Term(torch.ones(2, 4), part, F(1)) for part in parts]).in_range


@pytest.mark.parametrize("value", [2.0**-99, 2.0**99, float("inf"), float("nan"), 2.0**-1060])
def test_a_float64_factor_that_could_be_lost_is_refused(value: float) -> None:
    x = torch.tensor([1.0, value], dtype=FP64)
    for sides in ((x, torch.ones(2)), (torch.ones(2, dtype=BF16), x)):
        with pytest.raises(ValueError, match="float64"):
            multiply_exactly(*map(numbers_of, sides))


@pytest.mark.filterwarnings("error")
def test_what_is_no_number_is_left_to_products() -> None:
    parts = multiply_exactly(Numbers.of(np.float32([[np.inf, 1.0]])), Numbers.of(np.float32([[0.0, 1.0]])))
    with pytest.raises(ValueError, match="inf or nan"):
        Products([Term(torch.ones(2, 1), part, F(1)) for part in parts])


@pytest.mark.parametrize("kernel", [(), (2, 3)])
@pytest.mark.parametrize(("core", "factor"), [(FP32, BF16), (BF16, FP64), (FP64, FP64)], ids=id_of)
def test_a_tucker_core(core: torch.dtype, factor: torch.dtype, kernel: tuple[int, ...]) -> None:
    """Unequal ranks; the columns count inputs first, as a flattened kernel of (out, in, ...) does."""
    g = np.random.default_rng(1)
    up, mid, down = normal(g, 4, 2, dtype=factor), normal(g, 2, 3, *kernel, dtype=core), normal(g, 3, 5, dtype=factor)
    terms = tucker_terms(*map(numbers_of, (up, mid, down)), F(1 / 3))
    whole = torch.einsum("pi,ij...,js->ps...", up.double(), mid.double(), down.double()).flatten(1)
    size = whole.shape[1] // 5
    u, t, d = reals(up), reals(mid), reals(down)
    wanted = [
        F(1 / 3)
        * sum((u[p * 2 + i] * t[(i * 3 + j) * size + k] * d[j * 5 + s] for i in range(2) for j in range(3)), F(0))
        for p in range(4)
        for s in range(5)
        for k in range(size)
    ]
    tensors = [replace(term, left=tensor_of(term.left), right=tensor_of(term.right)) for term in terms]
    assert changes(tensors) == wanted
    assert [float(3 * x) for x in wanted] == pytest.approx(whole.flatten().tolist(), rel=1e-12)
    assert len(terms) == (4 if core == factor == FP64 else 2 if FP64 in (core, factor) else 1)
