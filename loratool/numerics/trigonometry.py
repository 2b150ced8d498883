"""Compute cosines and sines by integers to some 300 bits, of which the C library has no part."""

from __future__ import annotations

from fractions import Fraction
from functools import cache, lru_cache

import numpy as np

from .forms import Wide

BITS = 320  # behind the point
LARGEST = 1 << 128  # angle, beyond all numbers of float32
COSINES = {0: 1.0, 2: 0.5, 3: 0.0, 4: -0.5, 6: -1.0, 8: -0.5, 9: 0.0, 10: 0.5}  # twelfths of a turn -> cosine
KEPT_TABLES = 8


def cos_sin(angle: Fraction) -> tuple[Fraction, Fraction]:
    """Return cosine and sine of an angle in radians, each to 2**-300; exactly of 0.

    Raises:
        ValueError: the angle is beyond LARGEST.
    """
    if abs(angle) > LARGEST:
        raise ValueError("an angle is beyond all reason")
    extra = max(0, angle.numerator.bit_length() - angle.denominator.bit_length())
    bits = BITS + extra
    x, quarter = (angle.numerator << bits) // angle.denominator, _pi(bits) >> 1
    quarters = (2 * x + quarter) // (2 * quarter)
    rest = (x - quarters * quarter) >> extra
    cosine, sine = _series(rest, 0), _series(rest, 1)
    pair = ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))[quarters % 4]
    return Fraction(pair[0], 1 << BITS), Fraction(pair[1], 1 << BITS)


@lru_cache(KEPT_TABLES)
def cosines_and_sines(count: int) -> tuple[Wide, Wide]:
    """Return the cosines and the sines of m / count of a turn, for m from 0 up to, and without, `count`.

    Each is the float64 number nearest to its real value. By Niven's theorem these are rational only where they are 0,
    1/2 or 1 in size, at twelfths of a turn. All others are irrational, so none is a tie.
    """
    first = cos_sin(Fraction(2 * _pi(2 * BITS), count << 2 * BITS))
    first_c, first_s = (int(x * (1 << BITS)) for x in first)
    c, s = 1 << BITS, 0
    found: tuple[list[float], list[float]] = [], []
    for m in range(count // 2 + 1):
        twelfths, between = divmod(12 * m, count)
        for value, into, shift in ((c, found[0], 0), (s, found[1], 9)):
            known = None if between else COSINES.get((twelfths + shift) % 12)
            into.append(value / (1 << BITS) if known is None else known)
        c, s = (c * first_c - s * first_s) >> BITS, (s * first_c + c * first_s) >> BITS
    half = np.array(found)
    back = half[:, count - len(half[0]) : 0 : -1]  # m and count - m have one cosine, and opposite sines
    cosines, sines = np.concatenate([half, [back[0], 0 - back[1]]], axis=1)
    for table in (cosines, sines):
        table.flags.writeable = False  # the cache has them
    return cosines, sines


def _series(x: int, first: int) -> int:
    """Return the sum of (-1)**k x**(2 k + first) / (2 k + first)!, 2**BITS being 1."""
    square = x * x >> BITS
    term = total = x if first else 1 << BITS
    n = first
    while term:
        term = -(term * square >> BITS) // ((n + 1) * (n + 2))
        if term == -1:  # what is left of rounding down
            break
        total, n = total + term, n + 2
    return total


@cache
def _pi(bits: int) -> int:
    """Return pi, 2**bits being 1, by Machin's formula."""
    guard = bits + 16

    def arctangent_of_inverse(n: int) -> int:
        power = total = (1 << guard) // n
        k, sign = 3, -1
        while power:
            power //= n * n
            total += sign * (power // k)
            k, sign = k + 2, -sign
        return total

    return 4 * (4 * arctangent_of_inverse(5) - arctangent_of_inverse(239)) >> 16
