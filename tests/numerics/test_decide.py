"""Hold each step of a decision against fractions: what a step says is sure is right, and all steps say the same."""

from __future__ import annotations

import itertools
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
    NAMES,
    SHAPE,
    both_ways,
    every_place,
    flushing,
    form_of,
    hard_terms,
    hard_weights,
    id_of,
    keeping,
    normal,
    wanted,
)
from lib.oracles.fractions_oracle import FORMATS, Replace, codes, merge_codes

from loratool.numerics import decide as steps
from loratool.numerics.decide import Factor, Reals, anything, decide, nearest
from loratool.numerics.forms import FORMS, Bits, Form, Positions, Wide, rounded, signed
from loratool.numerics.products import ProductRows, Products
from loratool.numerics.stored import Stored
from loratool.numerics.tensors import numbers_of


class Blind(ProductRows):
    """Rows of products whose first steps answer nothing."""

    def __init__(self, products: Products, blind: tuple[str, ...]) -> None:
        super().__init__(products, 0, products.shape[0])
        self._blind = blind

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        return anything(len(i)) if "near" in self._blind else super().near(i, j)

    def nearer(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        return anything(len(i)) if "nearer" in self._blind else super().nearer(i, j)


def code_of(x: F, form: Form) -> int:
    return int(signed(min(rounded(x, form), form.inf), x < 0, form))


def hard_sums(form: Form, count: int = 400) -> tuple[Wide, Wide, Wide]:
    """Return totals, rests and bounds on and beside numbers, midpoints and powers of two, of all signs and sizes."""
    g = np.random.default_rng(0)
    e = np.where(g.random(count) < 0.5, g.integers(max(form.least, -300) - 2, 100, count), 0)
    steps = np.where(g.random(count) < 0.3, 0, g.integers(0, 1 << (form.precision - 1), count))
    halves = g.choice([0.0, 0.5, 0.25, -0.25, -0.5, 2.0**-12, -(2.0**-12), 2.0**-26], count)
    unit = np.ldexp(1.0, e - form.precision + 1)
    total = g.choice([-1.0, 1.0], count) * ((1 << (form.precision - 1)) + steps + halves) * unit
    ulp = np.abs(total) * 2.0**-53
    rest = ulp * g.choice([0.0, 0.0, 1.0, -1.0, 2.0**-30, -(2.0**-30)], count) * 0.5
    bound = g.choice([0.0, 0.0, 2.0**-40, 0.2, 0.24, 0.26, 0.3, 0.45, 0.49, 0.6], count) * unit
    return total, rest, np.where(g.random(count) < 0.3, np.abs(rest) * g.choice([0.5, 1.0, 2.0], count), bound)


def ends_of(total: float, rest: float, bound: float) -> tuple[F, F]:
    middle = F(total) + F(rest)
    return middle - F(bound), middle + F(bound)


class TestWhatIsSure:
    """All of an interval rounds to the number that a step is sure of."""

    @both_ways
    @pytest.mark.parametrize("dtype", NAMES, ids=id_of)
    def test_on_the_grid(self, dtype: torch.dtype, flush: bool) -> None:
        form = form_of(dtype)
        total, rest, bound = hard_sums(form)
        with flushing(flush):
            found, sure = nearest(total, rest, bound, form)
        for k in np.flatnonzero(sure):
            ends = ends_of(total[k], rest[k], bound[k])
            assert {code_of(end, form) for end in ends} == {int(found[k])}, (total[k], rest[k], bound[k])
        assert sure[(bound == 0) & (np.abs(total) > 2.0**-200)].all() and not sure.all()

    @both_ways
    @pytest.mark.parametrize("dtype", [BF16, FP16, torch.float8_e4m3fn, torch.float8_e5m2], ids=id_of)
    def test_by_casts(self, dtype: torch.dtype, flush: bool) -> None:
        form = form_of(dtype)
        total, rest, bound = hard_sums(form)
        with flushing(flush):
            found, sure = steps._by_casts(total, bound + np.abs(rest), form)
        for k in np.flatnonzero(sure):
            assert {code_of(end, form) for end in ends_of(total[k], rest[k], bound[k])} == {int(found[k])}
        assert 20 < sure.sum() < len(sure)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_no_bound_is_sure_of_nothing(self) -> None:
        total, inf = np.array([1.0, 0.0, np.inf, np.nan]), np.full(4, np.inf)
        for form in FORMS.values():
            assert (
                not nearest(total, np.zeros(4), inf, form)[1].any() and not steps._by_casts(total, inf, form)[1].any()
            )


BLIND = {"near": (), "nearer": ("near",), "exact": ("near", "nearer")}


def decided(W: torch.Tensor, out: torch.dtype, delta: ProductRows) -> tuple[Bits, dict[str, int]]:
    """Return W' of the finite weights as `decide` has it, and how often each step was asked."""
    form, i, j = form_of(W.dtype), *every_place()
    code = numbers_of(W).bits.ravel()
    fine = (code & form.size) < form.inf
    x = Reals(delta)
    found = np.zeros(len(code), form_of(out).bits_type)
    found[fine] = decide(x, code[fine], form, i[fine], j[fine], form_of(out))
    return found, x.steps


def is_right(W: torch.Tensor, out: torch.dtype, found: Bits, expected: list[int] | None) -> bool:
    mask = (1 << FORMATS[out].bits) - 1
    fine = W.isfinite().ravel().tolist()
    assert expected is not None
    return all(int(x) & mask == y for x, y, ok in zip(found, expected, fine, strict=True) if ok)


CASES = [
    (weights, terms, base, factor, out)
    for weights, terms in itertools.product(hard_weights(BF16), hard_terms(BF16))
    for base, factor, out in itertools.product(DTYPES, DTYPES, DTYPES)
]


def check_steps(weights: str, terms: str, base: torch.dtype, factor: torch.dtype, out: torch.dtype) -> None:
    """Decide all elements with each step first, kept and flushed subnormals, and compare with the definition."""
    made = hard_terms(factor, torch.finfo(out).eps)[terms]
    W = keeping(hard_weights(base)[weights], made, out)
    expected = wanted(W, made, out)
    for name, blind in BLIND.items():
        for flush in (False, True):
            with flushing(flush):
                found, asked = decided(W, out, Blind(Products(made), blind))
            assert is_right(W, out, found, expected), (name, flush)
            assert asked["near"] == int(W.isfinite().sum()) and asked["near"] >= asked["nearer"] >= asked["exact"]
            assert name != "exact" or asked["exact"] >= asked["near"] // 2


@pytest.mark.parametrize(("weights", "terms", "base", "factor", "out"), CASES[::199], ids=id_of)
def test_all_steps_say_the_same(
    weights: str, terms: str, base: torch.dtype, factor: torch.dtype, out: torch.dtype
) -> None:
    check_steps(weights, terms, base, factor, out)


@pytest.mark.slow
@pytest.mark.parametrize("weights", hard_weights(BF16))
@pytest.mark.parametrize("terms", hard_terms(BF16))
def test_all_steps_say_the_same_for_all_types(weights: str, terms: str) -> None:
    for case in CASES[::3]:
        if case[:2] == (weights, terms):
            check_steps(*case)


@both_ways
@pytest.mark.parametrize("weight", [1.0, 0.5, 1 / 3, -0.7])
@pytest.mark.parametrize(("base", "value"), [(BF16, FP32), (FP32, BF16), (FP64, FP64)], ids=id_of)
def test_a_multiple_of_the_weight(base: torch.dtype, value: torch.dtype, weight: float, flush: bool) -> None:
    """X = (1 - w) W + w V, with zeros of both signs, V = W and V = -W among them."""
    g = np.random.default_rng(3)
    W = hard_weights(base)["zeros"]
    V = torch.where(torch.from_numpy(g.random(SHAPE) < 0.5), W, normal(g, *SHAPE, dtype=base, size=0.02))
    V = torch.where(V.isfinite(), V * torch.from_numpy(g.choice([-1, 1], SHAPE)), 1.0).to(value)
    expected = merge_codes(W, base, [Replace(V, weight)])
    form, i, j = form_of(base), *every_place()
    code = numbers_of(W).bits.ravel()
    fine = np.ones(len(code), np.bool_) if weight == 1 else (code & form.size) < form.inf
    with flushing(flush):
        x = Reals(Stored(V, weight), Factor.of_rows([1 - F(weight)] * SHAPE[0]))
        found = decide(x, code[fine], form, i[fine], j[fine], form)
    mask = (1 << FORMATS[base].bits) - 1
    assert expected and [int(x) & mask for x in found] == [x for x, ok in zip(expected, fine, strict=True) if ok]


def test_a_factor_knows_its_error() -> None:
    numbers = [F(1, 3), F(1), F(0), 1 - F(0.7), F(2) ** -500 / 3]
    factor = Factor.of_rows(numbers)
    for k, number in enumerate(numbers):
        value, error = (x[0] for x in factor.at(np.array([k]), np.array([0])))
        assert abs(number - F(float(value))) <= F(float(error)) and (error > 0) == (F(float(value)) != number)
        assert factor.exact(k) == number


def test_nothing_to_decide() -> None:
    x = Reals(Blind(Products(hard_terms(BF16)["third"]), ()))
    none = np.zeros(0, np.intp)
    assert len(decide(x, np.zeros(0, np.int16), form_of(BF16), none, none, form_of(FP32))) == 0 and not x.steps


def test_codes_of_the_oracle_are_ours() -> None:
    """The tests compare the two: signed here, unsigned there."""
    W = hard_weights(FP32)["bits"]
    assert [int(x) & 0xFFFFFFFF for x in numbers_of(W).bits.ravel()] == codes(W)
