"""Hold several matrices that are merged at once, one below the other, against fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction as F

import pytest
import torch
from lib.hostile.hostile_reals import (
    BF16,
    DTYPES,
    form_of,
    hard_terms,
    hard_weights,
    id_of,
    keeping,
    several,
    together,
    wanted,
)
from lib.oracles.fractions_oracle import codes, count_wrong

from loratool.numerics import forms
from loratool.numerics.arrays import Numbers
from loratool.numerics.decide import Reals
from loratool.numerics.merge import RowMerge
from loratool.numerics.products import Term
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace

CASES = [
    (weights, terms, base, factor, out)
    for weights, terms in itertools.product(hard_weights(BF16), hard_terms(BF16))
    for base, factor, out in itertools.product(DTYPES, DTYPES, DTYPES)
]


@pytest.mark.parametrize(
    ("weights", "terms", "base", "factor", "out"),
    [pytest.param(*case, marks=pytest.mark.slow if k % 127 else ()) for k, case in enumerate(CASES[::7])],
    ids=id_of,
)
def test_each_rounds_the_exact_real_once(
    weights: str, terms: str, base: torch.dtype, factor: torch.dtype, out: torch.dtype
) -> None:
    """The statistics are those of each too."""
    each, hard = several(hard_terms(factor, torch.finfo(out).eps)[terms]), hard_weights(base)
    Ws = [keeping(W, own, out) for W, own in zip((hard[weights], hard["normal"], hard["zeros"]), each, strict=True)]
    W, found = torch.cat(Ws), torch.empty(3 * len(Ws[0]), Ws[0].shape[1], dtype=out)
    merge = RowMerge(Reals(together(each).rows(0, len(W))), form_of(base), form_of(out))
    stats = merge.apply_each(numbers_of(W), 0, numbers_of(found), Workspace())
    for one, own, made, its in zip(Ws, each, found.chunk(3), stats, strict=True):
        expected = wanted(one, own, out)
        assert expected and count_wrong(made, expected) == 0
        assert its.not_finite == int((~one.isfinite()).sum()) and its.overflowed == 0
        if base == out:
            assert its.changed == sum(x != y for x, y in zip(codes(one), codes(made), strict=True))
    if together(each).in_range:  # otherwise they are not merged at once
        size = float(Ws[1].double().square().sum())
        assert stats[1].base_squared == pytest.approx(size, rel=1e-4)  # whatever its neighbours hold


def test_what_overflows_is_told_of_each() -> None:
    """The step of the largest numbers is 2**120, and more than half of it is added to all."""
    W = torch.zeros(3, 4, 5, dtype=BF16)
    W[1, 2, 3] = W[1, 0, 4] = torch.finfo(BF16).max
    each = [[Term(torch.ones(4, 1), torch.full((1, 5), 2.0**122), F(1))]] * 3
    merge = RowMerge(Reals(together(each).rows(0, 12)), forms.BF16, forms.BF16)
    out = Numbers.empty(forms.BF16, 12, 5)
    stats = merge.apply_each(numbers_of(W.view(12, 5)), 0, out, Workspace())
    assert [its.overflowed for its in stats] == [0, 2, 0]
    assert [its.largest for its in stats] == [0, float(torch.finfo(BF16).max) + 2.0**122, 0]
