"""One notation for each kind of number; expected values are written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from loratool.views.parts.numbers import (
    correlation,
    degrees,
    duration,
    kept_share,
    measure,
    nbytes,
    number_ranges,
    plural,
    quantity,
    rank,
    scaling,
    share,
    spread,
)
from loratool.views.parts.writing import one_text, without_numbers

CASES: list[tuple[Callable[..., str], float, str]] = [
    (measure, 0.02881, "0.0288"), (measure, 13.66, "13.7"), (measure, 2.51e-8, "2.5e-8"), (measure, 0, "0"),
    (measure, 9.9996, "10.0"), (measure, 0.0009996, "0.00100"), (measure, 0.000999, "1.0e-3"),
    (measure, 123456, "123,456"), (measure, 1.25e7, "1.2e7"), (measure, -0.5, "-0.500"),
    (measure, float("inf"), "inf"), (measure, 99.96, "100"),
    (share, 0.0656, "6.56%"), (share, 1.413, "141%"), (share, 7.5e-6, "7.5e-6"), (share, 0.0001, "0.0100%"),
    (share, 0, "0%"), (share, 1, "100%"),
    (kept_share, 0.997, "99.7%"), (kept_share, 0.9995, "100%"), (kept_share, 0.99949, "99.9%"),
    (kept_share, 1.02, "100%"), (kept_share, 0.164, "16.4%"), (kept_share, -0.03, "-3.0%"),
    (quantity, 8192, "8,192"), (quantity, 9999, "9,999"), (quantity, 582_000, "582K"), (quantity, 20e6, "20.0M"),
    (quantity, 6.738e9, "6.74B"), (quantity, 999_700, "1.00M"), (quantity, 671e9, "671B"),
    (nbytes, 0, "0 B"), (nbytes, 999, "999 B"), (nbytes, 32_768, "32.8 kB"), (nbytes, 2_920_000, "2.92 MB"),
    (nbytes, 999_600, "1.00 MB"), (nbytes, 812e9, "812 GB"), (nbytes, 1.3e12, "1.30 TB"),
    (correlation, 0.744, "0.74"), (correlation, -0.03, "-0.03"), (correlation, -0.001, "0.00"),
    (scaling, 2, "2"), (scaling, 22.6274, "22.6"), (scaling, 0.70711, "0.707"), (scaling, 999.7, "1000"),
    (scaling, 1024, "1024"), (degrees, 1.5707963267948966, "90°"), (degrees, 0, "0°"),
    (rank, 16, "16"), (rank, 9.44, "9.4"),
    (duration, 9, "9 s"), (duration, 240, "4 min"), (duration, 4320, "1 h 12 min"), (duration, 3590, "1 h 0 min"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "value", "text"), CASES)
def test_a_number(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text


@pytest.mark.parametrize(
    ("values", "write", "text"),
    [
        ([0.0223, 0.05, 0.0656], share, "2.23..6.56%"),
        ([7.5e-6, 0.0656], share, "<0.01..6.56%"),
        ([7.5e-6, 8.1e-6], share, "7.5e-6..8.1e-6"),
        ([0.9999, 1.0], kept_share, "100%"),
        ([0.997, 1.0, None], kept_share, "99.7..100%"),
        ([32_768, 65_536], nbytes, "32.8..65.5 kB"),
        ([900, 65_536], nbytes, "900 B..65.5 kB"),
        ([3, 5], measure, "3.00..5.00"),
        ([None, None], share, "-"),
        ([], share, "-"),
        ([-0.04, 0.03], correlation, "-0.04..0.03"),
    ],
)
def test_a_range(values: list[float | None], write: Callable[[float], str], text: str) -> None:
    assert spread(values, write) == text


def test_counts_and_ranges_of_numbers() -> None:
    assert number_ranges([3, 0, 1, 2, 18, 17, 31]) == "0-3,17-18,31" and number_ranges([]) == ""
    assert plural(1, "tensor") == "1 tensor" and plural(3191, "tensor") == "3,191 tensors"
    assert plural(2, "matrix", "matrices") == "2 matrices"


@pytest.mark.parametrize("exponent", range(-12, 13))
def test_a_measure_has_three_digits_and_is_near(exponent: int) -> None:
    for mantissa in (1.0, 1.2345, 5.5555, 9.9949, 9.9999):
        x = mantissa * 10.0**exponent
        text = measure(x)
        digits = re.sub(r"e.*", "", text).replace(",", "").replace(".", "").lstrip("0")
        assert abs(float(text.replace(",", "")) / x - 1) < (0.05 if "e" in text else 0.006)
        assert len(digits) <= 3 or x > 999


@pytest.mark.parametrize(
    ("low", "high"), [(1, 3), (15, 174_993), (1_001, 2_002), (999, 1_234_567), (1_000_000, 1_000_001)]
)
def test_texts_with_counts_are_one_text_with_their_range(low: int, high: int) -> None:
    """The comma of thousands is part of a number, wherever it is."""
    texts = [f"{plural(n, 'weight')} altered, by up to {plural(n, 'ulp')}" for n in (high, low, high)]
    assert one_text(texts) == f"{low:,}..{high:,} weights altered, by up to {low:,}..{high:,} ulps"
    assert len({without_numbers(text) for text in texts}) == 1


def test_numbers_beside_a_comma_are_numbers_of_their_own() -> None:
    assert one_text(["in row 3, column 45", "in row 7, column 5"]) == "in row 3..7, column 5..45"
    assert one_text(["layers 1,2000", "layers 3,4000"]) == "layers 1..3,2000..4000"
