"""Define the formats of numbers, and convert bit patterns to the exact numbers that they stand for.

A stored number is the real number of its bits (IEEE 754-2019, section 3; bfloat16: Intel 338302; float8: OCP OFP8
1.0). Integers and fractions are computed from the bits, so that no setting of the machine, such as flushing subnormals
to zero, changes them.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Arrays of bit patterns are of the signed integer type of their width, -0.0 being the least.
Bits = npt.NDArray[Any]
IntArray = npt.NDArray[Any]  # exponents, places and differences, of any integer type
Wide = npt.NDArray[np.float64]
Positions = npt.NDArray[np.intp]


class Form(NamedTuple):
    """A binary format of numbers."""

    precision: int  # bits of the significand, the hidden one included
    least: int  # exponent of the least normal number, which is 2**least
    bits_type: type  # numpy's integer type of the bit patterns
    size: int  # the mask of all bits but the sign; the masked bits are the ordinal of |x| among the numbers
    inf: int  # the ordinal after that of the largest number


FORMS = {
    torch.bfloat16: Form(8, -126, np.int16, 0x7FFF, 0x7F80),
    torch.float16: Form(11, -14, np.int16, 0x7FFF, 0x7C00),
    torch.float32: Form(24, -126, np.int32, 2**31 - 1, 0xFF << 23),
    torch.float64: Form(53, -1022, np.int64, 2**63 - 1, 0x7FF << 52),
    torch.float8_e4m3fn: Form(4, -6, np.int8, 0x7F, 0x7F),
    torch.float8_e5m2: Form(3, -14, np.int8, 0x7F, 0x7C),
}

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_bits(x: Tensor) -> Tensor:
    """Return the bit patterns of a tensor as signed integers, a view in its shape."""
    return x.view(_INTEGERS[x.element_size()])


def finite(x: Tensor) -> Tensor:
    """Return where a tensor is neither inf nor nan; torch.isfinite does not support e4m3."""
    form = FORMS[x.dtype]
    return (tensor_bits(x) & form.size) < form.inf


@cache
def _numbers_of_8_bits(x: torch.dtype, out: torch.dtype) -> npt.NDArray[Any]:
    table: npt.NDArray[Any] = torch.arange(256, dtype=torch.uint8).view(x).to(out).numpy()
    return table


def widen(x: Tensor, out: Tensor) -> Tensor:
    """Write numbers into `out`, of a wider type, and return it. Numbers of 8 bits use a table, as torch is slow."""
    if x.itemsize > 1 or x.is_cuda:
        return out.copy_(x)
    np.take(_numbers_of_8_bits(x.dtype, out.dtype), x.view(torch.uint8).numpy(), out=out.numpy(), mode="wrap")
    return out


def numpy_bits(x: Tensor) -> Bits:
    """Return the bit patterns of a CPU tensor as signed integers, a view in its shape."""
    return tensor_bits(x).numpy()


def integers(bits: Bits, form: Form) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (m, e) with the value m * 2**e of each number; inf counts as the number after the largest."""
    size = bits.astype(np.int64) & form.size
    exponent = size >> (form.precision - 1)
    m = (size & ((1 << (form.precision - 1)) - 1)) + (np.minimum(exponent, 1) << (form.precision - 1))
    return np.where(bits < 0, -m, m), np.maximum(exponent, 1) + (form.least - form.precision)


def wide(bits: Bits, form: Form) -> Wide:
    """Return the values in float64; subnormal numbers are right even if this thread flushes them."""
    if form.precision == 53:
        return bits.view(np.float64)
    if form.precision == 24 and _keeps_subnormals():
        return bits.view(np.float32).astype(np.float64)
    if form.bits_type is np.int16 and _keeps_subnormals():
        kind = torch.bfloat16 if form.precision == 8 else torch.float16
        return torch.from_numpy(bits).view(kind).double().numpy()
    m, e = integers(bits, form)
    values: Wide = np.copysign(m.astype(np.float64) * ((e + 1023) << 52).view(np.float64), bits)  # an integer has no -0
    return values


def _keeps_subnormals() -> bool:
    return bool(np.float32(2.0**-140) * np.float32(1.0))


def power(e: int) -> Fraction:
    """Return 2**e."""
    return Fraction(1 << e) if e >= 0 else Fraction(1, 1 << -e)


def fraction(bits: Any, form: Form) -> Fraction:
    """Return the value of one number."""
    m, e = integers(np.asarray(bits), form)
    return int(m) * power(int(e))


def exponent(x: Fraction) -> int:
    """Return the e with 2**e <= |x| < 2**(e + 1), for x that is not 0."""
    e = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return e - (abs(x) < power(e))


def rounded(x: Fraction, form: Form) -> int:
    """Return the ordinal of |x| rounded to nearest, ties to even; the form's `inf` or more if that overflows."""
    e = max(exponent(x), form.least) if x else form.least
    return ((e - form.least) << (form.precision - 1)) + round(abs(x) / power(e - form.precision + 1))


def signed(ordinal: Any, negative: Any, form: Form) -> Bits:
    """Return the bit pattern of an ordinal with a sign, or of arrays of them."""
    patterns: Bits = np.where(negative, ordinal | ~form.size, ordinal).astype(form.bits_type)
    return patterns


def place(bits: Bits, form: Form) -> IntArray:
    """Return the places of numbers in their order: -1 for -0.0, 0 for +0.0, 1 for the least positive number."""
    places: IntArray = (bits & form.size) ^ (bits >> (8 * bits.itemsize - 1))
    return places


def number(place: IntArray, form: Form) -> Bits:
    """Return the bit patterns of places."""
    shifted: Any = place.astype(form.bits_type)
    sign = shifted >> (8 * shifted.itemsize - 1)
    patterns: Bits = (shifted ^ sign) | (sign & ~form.bits_type(form.size))
    return patterns
