"""Multiply stored factors with each other before they become terms, without rounding error.

A product of two numbers of 24 bits or fewer is exact in float64. A float64 number is split into two halves of 26 bits,
so that the product is a sum of several tensors, each exact. So a term's factor may be a product of two stored tensors:
a Tucker core and a side, or a factor and AdaLoRA's singular values or VeRA's vectors.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from .arrays import Numbers
from .error_free import halves
from .forms import Wide, wide
from .products import Term

REACH = 98  # `Products` can balance products of halves of float64 numbers from 2**-98 to 2**98


def multiply_exactly(first: Numbers, second: Numbers) -> list[Numbers]:
    """Return float64 numbers whose sum is first * second, element by element, exactly.

    Args:
        first, second: shapes that broadcast.

    Raises:
        ValueError: a float64 number is so small or large that a product could be lost, or it is inf or nan.
    """
    with np.errstate(invalid="ignore"):  # inf and nan, which `Products` refuses
        return [Numbers.of(x * y) for x in _parts(first) for y in _parts(second)]


def _parts(x: Numbers) -> list[Wide]:
    """Return the numbers, or the two halves of each."""
    bits, form = x.host(), x.form
    if form.precision < 53:
        return [wide(bits, form)]
    size = bits & form.size
    if not ((size == 0) | ((size >= (1023 - REACH) << 52) & (size <= (1023 + REACH) << 52))).all():
        raise ValueError(f"a factor in float64 is beyond 2**-{REACH} and 2**{REACH}")
    return list(halves(wide(bits, form)))


def tucker_terms(up: Numbers, mid: Numbers, down: Numbers, scale: Fraction) -> list[Term]:
    """Return the terms of D[p, (s, k)] = scale * sum over i and j of up[p, i] * mid[i, j, k] * down[j, s].

    Args:
        up: (out, r1).
        mid: (r1, r2, ...), the kernel's dimensions last; k counts them flattened.
        down: (r2, in).

    Raises:
        ValueError: as `multiply_exactly`.
    """
    core = mid.reshape(*mid.shape[:2], math.prod(mid.shape[2:]))
    r1, r2, size = core.shape
    left = Numbers(up.bits.repeat(r2, 1), up.form)  # (out, r1 * r2)
    rights = multiply_exactly(core[:, :, None], down[None, :, :, None])  # each (r1, r2, in, k)
    return [Term(left, right.reshape(r1 * r2, down.shape[1] * size), scale) for right in rights]
