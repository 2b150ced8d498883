"""Hold the cosines and sines of parts of a turn against those of mpmath, with more bits."""

from __future__ import annotations

import mpmath
import pytest

from loratool.numerics.trigonometry import cosines_and_sines


def nearest(function: object, part: int, count: int) -> float:
    with mpmath.workprec(400):
        value = float(function(2 * mpmath.pi * part / count))  # type: ignore[operator]
    return value if abs(value) > 1e-50 else 0.0  # what is 0 has only a rounding error of pi


@pytest.mark.parametrize("count", [*range(1, 14), 24, 25, 97, 360, 1000, 1021])
def test_they_are_the_nearest_numbers(count: int) -> None:
    cosines, sines = cosines_and_sines(count)
    assert cosines.tolist() == [nearest(mpmath.cos, part, count) for part in range(count)]
    assert sines.tolist() == [nearest(mpmath.sin, part, count) for part in range(count)]


def test_those_of_a_long_side() -> None:
    count = 128_256
    cosines, sines = cosines_and_sines(count)
    for part in (1, 2, 7, 32_063, 32_064, 32_065, 64_127, 64_129, 100_000, count - 1):
        assert cosines[part] == nearest(mpmath.cos, part, count) and sines[part] == nearest(mpmath.sin, part, count)
