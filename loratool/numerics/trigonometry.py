"""Compute cosines and sines to some 300 bits, by integers."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

BITS = 320  # behind the point
LARGEST = 1 << 128  # angle, beyond all numbers of float32


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
