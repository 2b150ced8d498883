"""Multiply stored factors with each other before they become terms, without rounding error.

A product of two numbers of 24 bits or fewer is exact in float64. A float64 number is split into two halves of 26 bits,
so that the product is a sum of several tensors, each exact. So a term's factor may be a product of two stored tensors:
a Tucker core and a side, or a factor and AdaLoRA's singular values or VeRA's vectors.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from .error_free import halves
from .forms import FORMS, Wide, numpy_bits, wide
from .products import Term

REACH = 98  # `Products` can balance products of halves of float64 numbers from 2**-98 to 2**98


def multiply_exactly(first: Tensor, second: Tensor) -> list[Tensor]:
    """Return float64 tensors whose sum is first * second, element by element, exactly.

    Args:
        first, second: shapes that broadcast, any types of FORMS.

    Raises:
        ValueError: a float64 number is so small or large that a product could be lost, or it is inf or nan.
    """
    with np.errstate(invalid="ignore"):  # inf and nan, which `Products` refuses
        return [torch.from_numpy(x * y) for x in _parts(first) for y in _parts(second)]


def _parts(x: Tensor) -> list[Wide]:
    """Return the numbers, or the two halves of each."""
    bits, form = numpy_bits(x.cpu().contiguous()), FORMS[x.dtype]
    if form.precision < 53:
        return [wide(bits, form)]
    size = bits & form.size
    if not ((size == 0) | ((size >= (1023 - REACH) << 52) & (size <= (1023 + REACH) << 52))).all():
        raise ValueError(f"a factor in float64 is beyond 2**-{REACH} and 2**{REACH}")
    return list(halves(wide(bits, form)))


def tucker_terms(up: Tensor, mid: Tensor, down: Tensor, scale: Fraction) -> list[Term]:
    """Return the terms of D[p, (s, k)] = scale * sum over i and j of up[p, i] * mid[i, j, k] * down[j, s].

    Args:
        up: (out, r1).
        mid: (r1, r2, ...), the kernel's dimensions last; k counts them flattened.
        down: (r2, in).

    Raises:
        ValueError: as `multiply_exactly`.
    """
    core = mid.reshape(*mid.shape[:2], -1)
    r1, r2, size = core.shape
    left = up.repeat_interleave(r2, 1)  # (out, r1 * r2)
    rights = multiply_exactly(core[:, :, None], down[None, :, :, None])  # each (r1, r2, in, k)
    return [Term(left, right.reshape(r1 * r2, down.shape[1] * size), scale) for right in rights]
