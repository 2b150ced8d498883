"""Hold formats, bit patterns and roundings against the oracle's, which has no array and no float."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest
import torch
from lib.hostile.hostile_reals import NAMES, both_ways, flushing, form_of, id_of, some_bits
from lib.oracles.fractions_oracle import FORMATS, Format, Refused, log2_floor, real_of, round_to_code

from loratool.numerics import forms
from loratool.numerics.forms import Form


def oracle_bits(bits: int, form: Format) -> int:
    return int(bits) % (1 << form.bits)


@pytest.mark.parametrize("dtype", NAMES, ids=id_of)
def test_bits_mean_what_ieee_says(dtype: torch.dtype) -> None:
    form, its, bits = form_of(dtype), FORMATS[dtype], some_bits(form_of(dtype))
    bits = bits[:: 97 if len(bits) > 4000 else 1]
    bits = bits[(bits & form.size) < form.inf]
    m, e = forms.integers(bits, form)
    for k, each in enumerate(bits):
        number = real_of(oracle_bits(each, its), its)
        assert int(m[k]) * F(2) ** int(e[k]) == number == forms.fraction(each, form)


@both_ways
@pytest.mark.parametrize("dtype", NAMES, ids=id_of)
def test_wide_keeps_every_number(dtype: torch.dtype, flush: bool) -> None:
    """numpy widens what it knows, torch bfloat16; subnormal numbers are not flushed either."""
    form, bits = form_of(dtype), some_bits(form_of(dtype))
    bits = bits[(bits & form.size) < form.inf]
    expected = torch.from_numpy(bits).view(dtype).double().numpy().copy()
    with flushing(flush):
        found = forms.wide(bits, form)
    assert np.array_equal(found.view(np.int64), expected.view(np.int64))


@pytest.mark.parametrize("dtype", NAMES, ids=id_of)
def test_places_are_in_the_order_of_the_numbers(dtype: torch.dtype) -> None:
    form, bits = form_of(dtype), some_bits(form_of(dtype))
    bits = np.unique(np.append(bits[:: 41 if len(bits) > 4000 else 1], bits[bits & form.size < 3]))
    place = forms.place(bits, form)
    assert np.array_equal(forms.number(place, form), bits)
    finite = np.unique(place[(bits & form.size) < form.inf])
    numbers = [forms.fraction(each, form) for each in forms.number(finite, form)]
    assert numbers == sorted(numbers) and set(np.flatnonzero([x == 0 for x in numbers])) == set(
        np.flatnonzero((finite == 0) | (finite == -1))
    )
    assert len(set(numbers)) == len(numbers) - 1  # of -0.0 and +0.0


def around(dtype: torch.dtype) -> list[F]:
    """Return numbers, midpoints and what is beside them, in and beyond the range."""
    form, g = form_of(dtype), np.random.default_rng(1)
    sizes = [*range(6), *(int(x) for x in g.integers(0, form.inf - 1, 20)), *range(form.inf - 4, form.inf - 1)]
    sizes += [each << (form.precision - 1) for each in range(1, 5)]
    found = []
    for size in sizes:
        low, high = (forms.fraction(form.bits_type(each), form) for each in (size, size + 1))
        middle, hair = (low + high) / 2, (high - low) * F(2) ** -200
        found += [low, low + hair, middle - hair, middle, middle + hair, high - hair]
    top = forms.fraction(form.bits_type(form.inf - 1), form)
    return [*found, top + (top - found[-6]) / 2, top * 2, F(1, 3), F(2) ** -4000]


@pytest.mark.parametrize("dtype", NAMES, ids=id_of)
def test_rounded_is_the_nearest_ties_to_even(dtype: torch.dtype) -> None:
    form, its = form_of(dtype), FORMATS[dtype]
    for x in around(dtype):
        assert x == 0 or forms.exponent(x) == log2_floor(x)
        found = forms.rounded(-x, form)
        try:
            assert found == round_to_code(x, its)
        except Refused:
            assert found >= form.inf
        for negative in (False, True):
            bits = forms.signed(min(found, form.inf), negative, form)
            assert (int(bits) & form.size, int(bits) < 0) == (min(found, form.inf), negative)


def test_a_form_is_the_machines() -> None:
    """Significands, exponents and codes of `torch.finfo`."""
    for dtype in NAMES:
        form, info = form_of(dtype), torch.finfo(dtype)
        assert (info.eps, info.tiny) == (2.0 ** (1 - form.precision), 2.0**form.least) and isinstance(form, Form)
        largest = torch.from_numpy(np.array([form.inf - 1], form.bits_type)).view(dtype)
        assert largest.double().item() == info.max
