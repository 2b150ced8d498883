"""Hold steps to sorted lists of numbers, with the passes and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import needs_passes
from lib.oracles import naive_patch_bodies as naive

from loratool.numerics.forms import FORMS
from loratool.numerics.passes.native import NATIVE
from loratool.numerics.steps import classes, step_back, step_on, steps

EITHER = pytest.mark.parametrize("native", ["0", pytest.param("1", marks=needs_passes)])


def patterns(dtype: str, count: int, seed: int) -> Any:
    form = FORMS[dtype]
    g = np.random.default_rng(seed)
    x = np.frombuffer(g.bytes(count * form.itemsize), f"<u{form.itemsize}").copy()
    ends = np.array([0, form.size, form.inf, form.size + 1, 2 * form.size + 1, form.size + 1 + form.inf], x.dtype)
    return np.concatenate([x, ends, ends[::-1], ends])


@EITHER
@pytest.mark.parametrize("dtype", FORMS)
def test_a_step_leads_there_and_back(dtype: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, native)
    form, (bits, _) = FORMS[dtype], naive.FLOATS[dtype]
    base, target = patterns(dtype, 2000, 1), patterns(dtype, 2000, 2)[::-1].copy()
    z, found = steps(base, target, form), np.empty_like(base)
    for b, t, step in zip(base.tolist(), target.tolist(), z.tolist(), strict=True):
        up = -naive.unfolded(step) if b >> bits - 1 else naive.unfolded(step)
        assert (naive.place(b, bits) + up - naive.place(t, bits)) % (1 << bits) == 0
    step_on(base, z, form, found)
    assert (found == target).all()
    step_back(target, z, form, found)
    alike = base >> (bits - 1) == target >> (bits - 1)
    assert (found == base)[alike].all() and alike.sum() > 500
    into = z.copy()
    step_on(base, into, form, into)
    assert (into == target).all()


@EITHER
def test_steps_are_counted_in_the_order_of_the_numbers(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each number of fp16 to the next one: 1 upwards, which away from zero is 2 where it is positive, else 1."""
    monkeypatch.setenv(NATIVE, native)
    every = np.arange(1 << 16, dtype=np.uint16)
    values = every.view(np.float16)
    numbers = every[np.isfinite(values)]
    order = np.lexsort((~np.signbit(numbers.view(np.float16)), numbers.view(np.float16)))  # -0.0 before 0.0
    numbers = numbers[order]
    z = steps(numbers[:-1].copy(), numbers[1:].copy(), FORMS["F16"])
    assert (z == np.where(np.signbit(numbers[:-1].view(np.float16)), 1, 2)).all()


@EITHER
@pytest.mark.parametrize("dtype", FORMS)
def test_classes_are_counted_by_exponents(dtype: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, native)
    x = patterns(dtype, 1000, 3)
    g, (bits, fraction) = np.random.default_rng(4), naive.FLOATS[dtype]
    for count in (0, 1, 3, min(15, 2 ** (bits - 1 - fraction) - 1)):
        bounds = np.sort(g.choice(2 ** (bits - 1 - fraction), count, replace=False))[::-1].astype(np.uint16)
        found = classes(x, bounds, FORMS[dtype]).tolist()
        assert found == [naive.class_of(each, bounds.tolist(), dtype) for each in x.tolist()]
