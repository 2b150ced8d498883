"""Hold stored numbers as arrays: each cast against torch's and against fractions, and what moves patterns about."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction as F
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from lib.hostile.hostile_reals import some_bits

from loratool.numerics import forms
from loratool.numerics.arrays import (
    Array,
    Kind,
    Numbers,
    fetched,
    floats_of,
    largest_ordinal,
    narrow,
    not_equal,
    positions,
    put,
    recast,
    rounded_in,
    take,
    widen,
)
from loratool.numerics.forms import BF16, E4M3, F16, F32, F64, FORMS, Bits, Form, IntArray, holding, rounded, signed
from loratool.numerics.rounding_stats import cast_rounded
from loratool.numerics.tensors import numbers_of, tensor_of
from loratool.numerics.workspace import Workspace

# A numpy warning is an error here: users would see it, of each block with a nan
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
PAIRS = [*product(FORMS.values(), repeat=2)]
kinds = pytest.mark.parametrize("kind", [np.float32, np.float64])
on_both = pytest.mark.parametrize("on_gpu", [False, True], ids=["numpy", "torch"])  # a tensor, as on a GPU


def is_nan(bits: Bits, form: Form) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = (bits & form.size) >= form.inf + form.has_inf
    return mask


def fraction_of(x: Any) -> F:
    """Return a float as a fraction; inf is larger than all others."""
    return F(float(x)) if np.isfinite(x) else F(2) ** 2000 * int(np.sign(x))


def right(x: npt.NDArray[Any], form: Form) -> Bits:
    """Return RN(x) by fractions; a nan has no payload but the quiet bit, and keeps its sign."""
    nan = form.inf | 1 << (form.precision - 2)
    ordinals = [nan if np.isnan(each) else min(rounded(fraction_of(each), form), form.inf) for each in x.ravel()]
    return signed(np.array(ordinals, np.int64), np.signbit(x.ravel()), form).reshape(x.shape)


def by_torch(x: npt.NDArray[Any], form: Form) -> Bits:
    """Return the patterns of torch's cast, with nan where e4m3 overflows; there some versions stop at the largest."""
    tensor = torch.from_numpy(x)
    cast: Bits = numbers_of(tensor.to(tensor_of(Numbers.empty(form, 0)).dtype)).bits
    return np.where(np.abs(x) > 464, signed(form.inf, np.signbit(x), form), cast) if form == E4M3 else cast


def same(found: Bits, expected: Bits, form: Form) -> bool:
    """Return whether numbers have the same bits; any nan is as good as another."""
    both = is_nan(found, form) & is_nan(expected, form)
    return bool(((found == expected) | both).all())


def holds(kind: Kind, form: Form) -> bool:
    return kind == np.float64 or form != F64


def ordinals_of(form: Form) -> IntArray:
    """Return ordinals below that of inf: all of a short form, those around the edges of a long one."""
    size = np.unique(some_bits(form).astype(np.int64) & form.size)
    return size[size < form.inf]


def around(form: Form, kind: Kind) -> Iterator[tuple[str, npt.NDArray[Any], IntArray, IntArray]]:
    """Yield numbers of a type by where they are between neighbors, ordinals of the lower neighbors, and of RN.

    The neighbor of the largest number is where the next one would be, and counts as inf.
    """
    low = ordinals_of(form)
    if not holds(kind, form):
        x = ordinals_of(F32).astype(np.int32).view(np.float32)
        yield "on it", x, x.astype(np.float64).view(np.int64), x.astype(np.float64).view(np.int64)
        return

    def values(ordinals: IntArray) -> npt.NDArray[np.float64]:
        m, e = forms.integers(ordinals.astype(form.bits_type), form)
        return np.ldexp(m.astype(np.float64), e.astype(np.intc))

    yield "on it", values(low).astype(kind), low, low
    if form.precision >= {np.float32: 24, np.float64: 53}[kind]:
        return
    middle = (values(low) / 2 + values(low + 1) / 2).astype(kind)
    assert (middle.astype(np.float64) * 2 == values(low) + values(low + 1)).all()
    yield "in the middle", middle, low, low + low % 2
    yield "above it", np.nextafter(middle, kind(np.inf)), low, low + 1
    yield "below it", np.nextafter(middle, kind(0)), low, low


def special(kind: Kind) -> npt.NDArray[Any]:
    """Return inf, quiet nan, zeros, and the least and largest numbers, of both signs."""
    info = np.finfo(kind)
    some = np.array([np.inf, np.nan, 0, info.smallest_subnormal, info.tiny, 1e-30, 1, 1e30, info.max], kind)
    return np.concatenate([some, -some])


@kinds
@every_form
def test_widen_gives_every_number(form: Form, kind: Kind) -> None:
    if not holds(kind, form):
        return
    bits = some_bits(form)
    found = widen(Numbers(bits, form), np.empty(len(bits), kind))
    expected = tensor_of(Numbers(bits, form)).to(torch.from_numpy(found).dtype).numpy()
    nan = is_nan(bits, form)
    assert (np.isnan(found) == nan).all() and (np.isnan(expected) == nan).all()
    assert (found[~nan].view(f"i{found.itemsize}") == expected[~nan].view(f"i{found.itemsize}")).all()
    assert (np.signbit(found) == (bits < 0)).all()  # of nan too
    for k in np.flatnonzero((bits & form.size) < form.inf)[:: 1 if form.itemsize == 1 else 61]:
        assert F(float(found[k])) == forms.fraction(bits[k], form)


@every_form
def test_widen_of_any_strides(form: Form) -> None:
    """Into such too."""
    bits = some_bits(form)[:240]
    plain = widen(Numbers(bits, form), np.empty(240)).reshape(12, 20)
    x = Numbers(bits.reshape(12, 20), form)
    for part in (np.s_[:], np.s_[::2, ::3], np.s_[3:4], np.s_[:0]):
        assert np.array_equal(x[part].wide(), plain[part], equal_nan=True)
        assert np.array_equal(x[part].T.wide(), plain[part].T, equal_nan=True)
        out = np.empty((20, 12)).T[part]
        assert widen(x[part], out) is out and np.array_equal(out, plain[part], equal_nan=True)


@kinds
@every_form
def test_narrow_rounds_to_nearest(form: Form, kind: Kind) -> None:
    """float64 by way of float32, whose own neighbors are tried there, but straight to fp16 if ties matter."""
    straight = kind == np.float32 or form in (F16, F32, F64)
    for name, x, low, ordinals in around(form, kind if straight else np.float32):
        for sign in (1, -1):
            out, expected = Numbers.empty(form, len(x)), signed(np.minimum(ordinals, form.inf), sign < 0, form)
            some = slice(None, None, 1 if form.itemsize == 1 else 97)
            assert same(right((x * sign)[some], form), expected[some], form), name  # the oracle of this test
            narrow((x * sign).astype(kind), out)
            assert same(out.bits, expected, form), (name, sign)
            narrow((x * sign).astype(kind), out, ties=False)
            if name == "in the middle" or (name != "on it" and form == F16 and kind == np.float64):
                assert (out.bits < 0).all() == (sign < 0) and (((out.bits & form.size) - low) >> 1 == 0).all()
            else:
                assert same(out.bits, expected, form), (name, sign)


@kinds
@every_form
def test_narrow_is_torchs_cast(form: Form, kind: Kind) -> None:
    """Of numbers of any size and random bits; its casts of float64 go by way of float32, here but to fp16."""
    g = np.random.default_rng(0)
    wide_form = F32 if kind == np.float32 else F64
    bits = g.integers(-wide_form.size - 1, wide_form.size, 20_000, np.int64, True).astype(wide_form.bits_type)
    x = np.concatenate([bits.view(kind), g.standard_normal(20_000).astype(kind) * kind(0.02), special(kind)])
    x = x.reshape(2, -1)
    out = Numbers.empty(form, *x.shape)
    narrow(x, out)
    with np.errstate(all="ignore"):
        expected = by_torch(x if form in (F32, F64) else x.astype(np.float32), form)
    differ = (out.bits != expected) & ~(is_nan(out.bits, form) & is_nan(expected, form))
    assert not differ.any() or (form == F16 and kind == np.float64 and differ.sum() < 20)
    assert same(out.bits[differ], right(x[differ], form), form)


@kinds
@every_form
def test_what_has_no_neighbor(form: Form, kind: Kind) -> None:
    """Infinities, nan and zeros keep their signs; what is too small is a zero with its sign."""
    x = special(kind)
    out = Numbers.empty(form, len(x))
    for ties in (True, False):
        narrow(x, out, ties)
        number = ~np.isnan(x)
        # float64 is rounded by way of float32
        straight = x if form in (F16, F32, F64) else right(x, F32).view(np.float32)
        assert same(out.bits, right(straight, form), form)
        assert ((out.bits < 0) == np.signbit(x))[number].all()
        assert is_nan(out.bits, form)[~number].all()


PLAIN = (BF16, F16, F32, F64)


@pytest.mark.parametrize(("source", "form"), [*product(PLAIN, PLAIN)], ids=lambda form: form.name)
def test_numbers_are_cast_as_by_torch(source: Form, form: Form) -> None:
    """Also to fp16 from float64, by way of float32; and a type that holds two is the one that torch finds."""
    x = Numbers(some_bits(source), source)
    tensor, other = tensor_of(x), tensor_of(Numbers.empty(form, 0))
    expected = numbers_of(tensor.to(other.dtype))
    assert same(recast(x, form).bits, expected.bits, form)
    found = floats_of(x, form)
    assert found.dtype == (np.float64 if form == F64 else np.float32)
    assert np.array_equal(found, expected.wide(), equal_nan=True)
    assert torch.promote_types(tensor.dtype, other.dtype) == tensor_of(Numbers.empty(holding(source, form), 0)).dtype


@pytest.mark.parametrize("form", PLAIN, ids=lambda form: form.name)
def test_operations_are_rounded_as_by_torch(form: Form) -> None:
    g = np.random.default_rng(0)
    x, y = (Numbers(g.permutation(some_bits(form)), form) for _ in range(2))
    one, two = map(tensor_of, (x, y))
    with np.errstate(all="ignore"):
        found = [x.floats() + y.floats(), x.floats() - y.floats(), x.floats() / y.floats(), x.floats() / 448.0]
    for mine, torchs in zip(found, (one + two, one - two, one / two, one / 448.0), strict=True):
        assert np.array_equal(rounded_in(mine, form), numbers_of(torchs).wide(), equal_nan=True)


@every_form
def test_narrow_of_any_strides(form: Form) -> None:
    g = np.random.default_rng(0)
    for kind in (np.float32, np.float64):
        x = (g.standard_normal((12, 20)) * 2.0 ** g.integers(-30, 30, (12, 20))).astype(kind)
        plain, other = Numbers.empty(form, 12, 20), Numbers(np.zeros((20, 12), form.bits_type), form).T
        narrow(x, plain)
        for part in (np.s_[:], np.s_[::2, ::3], np.s_[3:4], np.s_[:0]):
            for ties in (True, False):
                narrow(x[part], other[part], ties)
                assert (other[part].bits == plain[part].bits).all()


@pytest.mark.parametrize("out", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("base", FORMS.values(), ids=FORMS)
def test_cast_rounded_of_every_pattern(base: Form, out: Form) -> None:
    x = Numbers(some_bits(base)[None], base)
    made = Numbers.empty(out, *x.shape)
    stats = cast_rounded(x, made, Workspace())
    nan, finite = is_nan(x.bits, base), (x.bits & base.size) < base.inf
    if base == out:
        assert (made.bits == x.bits).all() and stats.overflowed == 0
        return
    assert (made.bits[nan] == out.inf | 1 << (out.precision - 2)).all()  # whichever it was
    some, values = np.flatnonzero(~nan)[:: 1 if x.size < 3000 else 13], x.wide()[0]
    assert (made.bits[0, some] == right(values[some], out)).all()
    lost = finite & ((made.bits & out.size) == out.inf)
    assert stats.overflowed == int(lost.sum())
    assert stats.largest == (float(np.abs(values[lost[0]]).max()) if lost.any() else 0.0)
    if base.itemsize <= 2:  # float32 has them all, so that torch rounds once
        wide = widen(x, np.empty(x.shape, np.float64 if out == F64 else np.float32))
        assert (made.bits[~nan] == by_torch(wide, out)[~nan]).all()


@pytest.mark.parametrize(
    ("base", "out"),
    [
        pytest.param(a, b, id=f"{a.name}-{b.name}")
        for a in (F32, F64)
        for b in FORMS.values()
        if b.precision < a.precision
    ],
)
def test_cast_rounded_rounds_once(base: Form, out: Form) -> None:
    """On all numbers of the other form, all midpoints, and the next numbers on both sides of these."""
    for name, x, _, ordinals in around(out, np.float32 if base == F32 else np.float64):
        for sign in (1, -1):
            made = Numbers.empty(out, 1, len(x))
            stats = cast_rounded(Numbers.of(x[None] * x.dtype.type(sign)), made, Workspace())
            assert (made.bits == signed(np.minimum(ordinals, out.inf), sign < 0, out)).all(), (name, sign)
            assert stats.overflowed == int((ordinals >= out.inf).sum()) <= 1
            assert stats.largest == (x[-1] if ordinals[-1] >= out.inf else 0)


def test_a_cast_of_nothing_strange_counts_nothing() -> None:
    for base, out in PAIRS:
        x = Numbers(np.zeros((2, 3), base.bits_type), base)
        stats = cast_rounded(x, made := Numbers.empty(out, 2, 3), Workspace())
        assert not made.bits.any() and (stats.overflowed, stats.largest) == (0, 0)


def moved(x: Numbers, on_gpu: bool) -> Numbers:
    """Return numbers in a tensor if `on_gpu`."""
    return Numbers(torch.from_numpy(x.bits), x.form) if on_gpu else x


@on_both
@every_form
def test_the_largest_ordinal(form: Form, on_gpu: bool) -> None:
    bits = some_bits(form)
    parts = {
        "all": bits,
        "finite": bits[(bits & form.size) < form.inf],
        "negative": bits[bits < 0],
        "positive": bits[bits >= 0],
        "small": bits[(bits & form.size) < 9],
        "none is positive": bits[(bits < 0) & ((bits & form.size) < 7)],
        "zeros": np.array([0, -form.size - 1], form.bits_type),
        "one negative zero": np.array([-form.size - 1], form.bits_type),
        "the negative is larger": signed(np.array([3, 5]), np.array([False, True]), form),
        "the positive is larger": signed(np.array([3, 5]), np.array([True, False]), form),
    }
    for name, part in parts.items():
        expected = max(int(each) & form.size for each in np.unique(part).tolist())
        x = moved(Numbers(part, form), on_gpu)
        assert largest_ordinal(x) == expected, name
        assert largest_ordinal(x[::-1] if not on_gpu else x[::2]) == (
            expected if not on_gpu else max(int(each) & form.size for each in part[::2].tolist())
        )
        assert x.all_finite() == (expected < form.inf)
        assert (fetched(x.is_finite()) == ((part & form.size) < form.inf)).all()
    nothing = moved(Numbers(bits[:0], form), on_gpu)
    assert largest_ordinal(nothing) == 0 and nothing.all_finite()


@on_both
@every_form
def test_what_is_put_is_taken_and_nothing_else_changes(form: Form, on_gpu: bool) -> None:
    g = np.random.default_rng(0)
    before = g.choice(some_bits(form), (6, 7))
    x = moved(Numbers(before.copy(), form), on_gpu)
    places = np.array([0, 41, 8, 7, 20])
    assert (take(x, places) == before.ravel()[places]).all() and take(x, places).dtype == form.bits_type
    new = g.choice(some_bits(form), 5)
    put(x, places, new)
    expected = before.copy()
    expected.ravel()[places] = new
    assert (x.host() == expected).all()
    none = np.zeros(0, np.intp)
    put(x, none, new[:0])
    assert len(take(x, none)) == 0 and (x.host() == expected).all()
    rows = x[2:4]  # a view: what is put there is in the whole
    put(rows, np.array([1, 13]), new[:2])
    expected.reshape(-1)[[15, 27]] = new[:2]
    assert (x.host() == expected).all()


@on_both
@every_form
def test_parts_are_views_of_rows(form: Form, on_gpu: bool) -> None:
    before = np.random.default_rng(0).choice(some_bits(form), (6, 7))
    x = moved(Numbers(before.copy(), form), on_gpu)
    assert (x.shape, len(x), x.size, x.on_gpu) == ((6, 7), 6, 42, on_gpu)
    for count in (1, 2, 3, 6):
        parts = x.split(count)
        assert [part.shape for part in parts] == [(6 // count, 7)] * count
        assert (np.concatenate([part.host() for part in parts]) == before).all()
    x.split(3)[1].bits[0, 0] = 1
    assert int(x.bits[2, 0]) == 1
    assert (x.T.host() == x.host().T).all() and (x.reshape(-1, 14).host() == x.host().reshape(3, 14)).all()
    assert (x[1:5].host() == x.host()[1:5]).all() and x[1:5].form == form


@pytest.mark.parametrize("form", [F16, F32, F64], ids=["F16", "F32", "F64"])
def test_numpys_own_floats_are_shared(form: Form) -> None:
    x = np.array([[1.5, -0.0], [np.inf, 3]], form.native)
    found = Numbers.of(x)
    assert found.form == form and np.shares_memory(found.bits, x) and (found.wide() == x).all()
    assert (Numbers.of(x.T).wide() == x.T).all()


@every_form
def test_tensors_share_their_memory(form: Form) -> None:
    x = Numbers(some_bits(form)[:6].reshape(2, 3).copy(), form)
    tensor = tensor_of(x)
    back = numbers_of(tensor)
    assert back.form == form and np.shares_memory(back.bits, x.bits) and numbers_of(x) is x
    assert tuple(tensor.shape) == (2, 3) and tensor.is_floating_point()


@on_both
def test_places_where_two_differ(on_gpu: bool) -> None:
    x, y = np.arange(12, dtype=np.int16).reshape(3, 4), np.arange(12, dtype=np.int16).reshape(3, 4)
    y[1, 2] = y[2, 3] = -1
    one, two, out = (torch.from_numpy(each) if on_gpu else each for each in (x, y, np.empty((3, 4), np.bool_)))
    mask: Array = not_equal(one, two, out)
    assert positions(mask).tolist() == [6, 11] and positions(mask & False).tolist() == []
