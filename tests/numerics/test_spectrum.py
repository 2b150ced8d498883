"""Hold the points of spectra against matrices whose singular values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loratool.numerics.forms import Wide
from loratool.numerics.spectrum import spectrum_points


def squares(*values: float) -> Wide:
    return np.square(np.array(values, float))


def test_few_values_are_all_points() -> None:
    found = spectrum_points(squares(4.0, 2.0, 2.0, 1.0))
    assert found.places == (1, 2, 3, 4) and found.values == (4.0, 2.0, 2.0, 1.0)
    assert found.energies == (0.64, 0.8, 0.96, 1.0)
    assert spectrum_points(squares(3.0)) == type(found)((1,), (3.0,), (1.0,))
    assert spectrum_points(squares()) == type(found)((), (), ())


def test_of_nothing_all_is_there() -> None:
    found = spectrum_points(squares(0.0, 0.0))
    assert found.values == (0.0, 0.0) and found.energies == (1.0, 1.0)


@pytest.mark.parametrize(
    ("known", "points"),
    [(9, [9]), (16, [11, 16]), (64, [11, 16, 23, 32, 45, 64]), (70, [11, 16, 23, 32, 45, 64, 70])],
)
def test_from_the_eighth_the_steps_are_about_sqrt_2(known: int, points: list[int]) -> None:
    """All values are 1, so the first k have k / known of the energy."""
    found = spectrum_points(np.ones(known))
    assert found.places == (*range(1, 9), *points)
    assert found.values == (1.0,) * len(found.places)
    assert all(abs(e - k / known) < 1e-6 for k, e in zip(found.places, found.energies, strict=True))


def test_a_full_spectrum_is_few_points_to_six_digits() -> None:
    """sigma_k = 1 / k: the sum of all squares is pi^2 / 6, less about 1 / n beyond n."""
    n = 4096
    found = spectrum_points(np.arange(1.0, n + 1) ** -2)
    assert len(found.places) == 26 and found.places[-1] == n
    exact = [
        math.fsum(i**-2 for i in range(1, k + 1)) / math.fsum(i**-2 for i in range(1, n + 1)) for k in found.places
    ]
    assert found.energies == pytest.approx(exact, rel=6e-6)
    assert found.values == pytest.approx([1 / k for k in found.places], rel=6e-6)
    assert all(len(repr(each).replace(".", "").strip("0")) <= 6 for each in found.values)


def test_stacks_and_what_is_not_known() -> None:
    """Two matrices of 3, 1 and of 4, 2: root mean squares; and the leading ones of a larger sum."""
    found = spectrum_points(squares(3.0, 1.0) + squares(4.0, 2.0), matrices=2)
    assert found.values == pytest.approx((12.5**0.5, 2.5**0.5), rel=6e-6)
    assert found.energies == pytest.approx((25 / 30, 1.0), rel=6e-6)
    assert spectrum_points(squares(3.0, 1.0), total=20.0).energies == (0.45, 0.5)
    assert spectrum_points(squares(3.0), total=9.0 - 1e-12).energies == (1.0,)


def test_what_rounding_may_have_made_is_0() -> None:
    found = spectrum_points(squares(1.0, 1e-6, 1e-8), noise=1e-7)
    assert found.values == (1.0, 1e-06, 0.0)
    assert spectrum_points(squares(1.0, 1e-11, 1e-13)).values == (1.0, 1e-11, 0.0)
