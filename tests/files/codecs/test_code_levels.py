"""Hold the nearest codes of tables against exact arithmetic: at every number, every midpoint, and their neighbors."""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction

import numpy as np
import pytest

from loratool.numerics.code_levels import E2M1, E4M3, E5M2, Integers, Table, e8m0

# Numbers of float32 as nf4's are, with repeats and with two middles that begin with the same bits
UNEVEN = tuple(np.float32([-1, -0.7, -0.7, -0.25, -0.0, 0, 0.1, 0.33, 0.3300001, 0.3300002, 0.5, 1]).tolist())

TABLES = {
    "e2m1": E2M1,
    "e4m3": E4M3,
    "e5m2": E5M2,
    "uneven": Table(UNEVEN, even=False),
    "uneven, ties to even": Table(UNEVEN),
    "without zero": Table((3.0, -1.0, 1.0, -5.0)),
    "one number": Table((2.0,)),
}


def nearest_number(levels: list[Fraction], x: float) -> tuple[Fraction, ...]:
    """The numbers of a rising list that are nearest to x, two if it is in the middle."""
    if math.isinf(x):
        return (levels[-1] if x > 0 else levels[0],)
    exact = Fraction(x)
    at = bisect_left(levels, exact)
    around = levels[max(0, at - 1) : at + 1]
    least = min(abs(exact - v) for v in around)
    return tuple(v for v in around if abs(exact - v) == least)


def hard_numbers(table: Table) -> np.ndarray:
    levels = np.unique([v for v in table.numbers if math.isfinite(v)])
    found = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2])
    found = np.concatenate([found, np.nextafter(found, np.inf), np.nextafter(found, -np.inf)])
    ends = [0.0, -0.0, 5e-324, -5e-324, 2e-310, 1e300, -1e300, np.inf, -np.inf]
    random = np.random.default_rng(5)
    return np.concatenate([found, ends, random.normal(size=500) * 10.0 ** random.integers(-6, 7, 500)])


@pytest.mark.parametrize("name", TABLES)
def test_nearest_is_that_of_exact_arithmetic(name: str) -> None:
    table = TABLES[name]
    numbers = hard_numbers(table)
    codes = table.nearest(numbers.reshape(1, -1))[0]
    levels = sorted({Fraction(v) for v in table.numbers if math.isfinite(v)})
    for x, code in zip(numbers.tolist(), codes.tolist(), strict=True):
        found, best = table.numbers[code], nearest_number(levels, x)
        assert Fraction(found) in best, x
        if len(best) == 2 and not table.even:
            assert Fraction(found) == best[0], x
        if len(best) == 2 and table.even and name != "uneven, ties to even":
            assert code % 2 == 0 or all(table.numbers.index(float(v)) % 2 for v in best), x
        assert found or math.copysign(1, found) > 0, "0.0 is +0"


@pytest.mark.parametrize("name", TABLES)
def test_nan_is_the_code_of_zero(name: str) -> None:
    table = TABLES[name]
    nan = np.array([0x7FF8 << 48, 0xFFF8 << 48, (0x7FF0 << 48) + 1, (0xFFF0 << 48) + 1], np.uint64).view(np.float64)
    zero = table.nearest(np.zeros(1))[0]
    assert (table.nearest(nan) == zero).all()


@pytest.mark.parametrize(("name", "last"), [("e2m1", 6), ("e4m3", 448), ("e5m2", 57344)])
def test_numbers_beyond_the_range_are_the_last_ones(name: str, last: float) -> None:
    table = TABLES[name]
    assert table.values(table.nearest(np.array([1e9, np.inf, -1e9, -np.inf]))).tolist() == [last, last, -last, -last]


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2"])
def test_ordinals_rise_with_the_numbers(name: str) -> None:
    table = TABLES[name]
    codes = np.arange(len(table.numbers), dtype=np.uint8)
    ordinals = table.ordinals(codes)
    assert (table.from_ordinals(ordinals) == codes).all() and ordinals.dtype == np.int16
    numbers = table.values(table.from_ordinals(np.arange(len(codes), dtype=np.int16)))
    finite = numbers[np.isfinite(numbers)]
    assert (np.diff(finite) >= 0).all() and np.isnan(numbers[: len(finite)]).sum() == 0
    zeros = numbers[numbers == 0]
    assert np.signbit(zeros).tolist() == [True, False]


@pytest.mark.parametrize(("byte", "value"), [(0x01, 2**-9), (0x08, 2**-6), (0x38, 1), (0x7E, 448), (0xFE, -448)])
def test_numbers_of_e4m3(byte: int, value: float) -> None:
    assert E4M3.values(np.array([byte], np.uint8))[0] == value
    assert E4M3.nearest(np.array([value], np.float64))[0] == byte


def test_powers_of_two() -> None:
    assert e8m0(np.array([0, 127, 254], np.uint8)).tolist() == [2.0**-127, 1.0, 2.0**127]
    assert np.isnan(e8m0(np.array([255], np.uint8))[0])


def test_integers_round_half_to_even() -> None:
    numbers = np.array([0.5, 1.5, -0.5, -2.5, 127.5, -128.5, 300, np.inf, -np.inf, np.nan, -0.0])
    assert Integers(-128, 127, "int8").nearest(numbers).tolist() == [0, 2, 0, -2, 127, -128, 127, 127, -128, 0, 0]
    assert Integers(0, 15, offset=8).nearest(numbers).tolist() == [8, 10, 8, 6, 15, 0, 15, 15, 0, 8, 8]
