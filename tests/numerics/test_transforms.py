"""Hold sums of cosines and weights made of wavelets: each number and each bound against the fractions of its terms."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from loratool.numerics.arrays import ON_CPU, Numbers
from loratool.numerics.cosines import FFT_ERROR, Cosines
from loratool.numerics.wavelet_filters import FILTERS, reconstruction_filters
from loratool.numerics.wavelets import Wavelets

SHAPES = [(8, 8), (7, 10), (13, 17), (25, 6), (1, 1), (1, 5), (5, 1), (2, 3), (33, 20)]
LONG = [96, 97, 1000, 1009, 2048, 4093, 4096, 11008, 10007]


def numbers(count: int, kind: Any = np.float32, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(count).astype(kind)


def places(shape: tuple[int, int], count: int) -> tuple[Any, Any]:
    flat = np.random.default_rng(1).permutation(shape[0] * shape[1])[:count]
    return divmod(flat, shape[1])


def made(kind: str, shape: tuple[int, int], scale: Fraction, dtype: Any = np.float32) -> Cosines | Wavelets:
    count = min(shape[0] * shape[1], 30)
    value, (rows, columns) = Numbers.of(numbers(count, dtype)), places(shape, count)
    if kind == "cosines":
        return Cosines(value, rows, columns, shape, scale)
    return Wavelets(value, rows, columns, shape, reconstruction_filters(kind), scale)


@pytest.mark.parametrize("scale", [Fraction(3, 7), Fraction(1, 8), Fraction(-150, 64), Fraction(0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["cosines", "db1", "db4", "coif3"])
def test_all_bounds_hold(kind: str, dtype: Any, scale: Fraction) -> None:
    for shape in SHAPES[1:6]:
        of = made(kind, shape, scale, dtype)
        for start, stop in {(0, shape[0]), (shape[0] // 3, shape[0]), (shape[0] - 1, shape[0])}:
            rows = of.rows(start, stop)
            i, j = (x.reshape(-1) for x in np.indices(rows.shape))
            some = np.random.default_rng(2).permutation(len(i))[:25]
            i, j = i[some], j[some]
            exact = [rows.exact(int(x), int(y)) for x, y in zip(i, j, strict=True)]
            for type_ in (np.float32, np.float64):
                dense, out = rows.dense(type_, ON_CPU), np.empty(rows.shape, type_)
                dense.fill(slice(0, len(out)), 0.0, out)
                assert all(abs(x) <= size for x, size in zip(exact, dense.sizes[i], strict=True))
                errors = [abs(x - Fraction(float(y))) for x, y in zip(exact, out[i, j], strict=True)]
                assert all(error <= bound for error, bound in zip(errors, dense.errors[i], strict=True))
            for high, low, bound in (rows.near(i, j), rows.nearer(i, j)):
                found = [Fraction(x) + Fraction(y) for x, y in zip(high.tolist(), low.tolist(), strict=True)]
                assert all(abs(x - y) <= Fraction(b) for x, y, b in zip(exact, found, bound.tolist(), strict=True))
            assert (bound <= rows._sizes[i] * (abs(float(scale)) + 1) * 2.0**-80).all()


@pytest.mark.parametrize("kind", ["cosines", *FILTERS])
def test_some_rows_are_those_of_all(kind: str) -> None:
    """Also of the transpose, which swaps rows and columns."""
    for shape in SHAPES:
        count = min(shape[0] * shape[1], 30)
        value, (rows, columns) = Numbers.of(numbers(count)), places(shape, count)
        other = shape[1], shape[0]
        if kind == "cosines":
            of = Cosines(value, rows, columns, shape, Fraction(1)), Cosines(value, columns, rows, other, Fraction(1))
        else:
            filters = reconstruction_filters(kind)
            plain = Wavelets(value, rows, columns, shape, filters, Fraction(1))
            of = plain, Wavelets(value, columns, rows, other, filters, Fraction(1))  # type: ignore[assignment]
        whole, turned = (each.rows(0, each.shape[0])._numbers for each in of)
        assert np.allclose(whole, turned.T, rtol=0, atol=1e-13)
        parts = [of[0].rows(start, min(start + 3, shape[0]))._numbers for start in range(0, shape[0], 3)]
        assert np.allclose(np.concatenate(parts), whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", LONG)
def test_ffts_are_far_more_exact_than_their_bound(length: int) -> None:
    """Of lengths with small factors, and of primes, which are computed in another way."""
    turn = 2 * np.longdouble(np.pi) + np.longdouble(2.4492935982947064e-16)
    across = np.random.default_rng(0).integers(0, length // 2, 40)
    phases = np.random.default_rng(1).standard_normal((2, 40))
    spectrum = np.zeros(length // 2 + 1, np.complex128)
    spectrum[across] = phases[0] + 1j * phases[1]
    spectrum[0] = spectrum[0].real
    found = np.fft.irfft(spectrum, length, norm="forward")
    used = np.unique(across)
    angles = (used[None] * np.arange(length)[:, None] % length).astype(np.longdouble) * turn / length
    share = np.where(used == 0, 1, 2)
    wanted = (np.cos(angles) * spectrum.real[used] - np.sin(angles) * spectrum.imag[used]) @ share.astype(np.longdouble)
    error = float(np.sqrt(np.square(found - wanted).sum()) / np.sqrt(np.square(wanted).sum()))
    assert error < FFT_ERROR / 64


@pytest.mark.parametrize("kind", ["cosines", "db2"])
@pytest.mark.parametrize("scale", [Fraction(2) ** 400, Fraction(2) ** -400, Fraction(10) ** 330])
def test_scales_beyond_float64_are_left_to_the_fractions(kind: str, scale: Fraction) -> None:
    rows = made(kind, (6, 6), scale).rows(0, 6)
    plain = made(kind, (6, 6), Fraction(1)).rows(0, 6)
    i, j = np.array([3]), np.array([4])
    assert np.isinf(rows.dense(np.float64, ON_CPU).errors).all()
    assert np.isinf(rows.near(i, j)[2]).all() and np.isinf(rows.nearer(i, j)[2]).all()
    assert rows.exact(3, 4) == scale * plain.exact(3, 4)


def test_where_no_number_reaches_nothing_is_added() -> None:
    """So W keeps its bits there, and a mask of all rows tells, not each number."""
    of = Wavelets(
        Numbers.of(numbers(1)), np.array([9]), np.array([3]), (40, 40), reconstruction_filters("db2"), Fraction(1)
    )
    rows = of.rows(0, 40)
    i, j = (x.reshape(-1) for x in np.indices(rows.shape))
    high, low, bound = rows.nearer(i, j)
    empty = (high == 0) & (low == 0) & (bound == 0)
    assert empty.sum() == 40 * 40 - 16
    assert all(rows.exact(int(x), int(y)) == 0 for x, y in zip(i[empty][::50], j[empty][::50], strict=True))
