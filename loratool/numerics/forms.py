"""Define the formats of numbers, and convert bit patterns to the exact numbers that they stand for.

A stored number is the real number of its bits (IEEE 754-2019, section 3; bfloat16: Intel 338302; float8: OCP OFP8
1.0). Integers and fractions are computed from the bits, so that no setting of the machine, such as flushing subnormals
to zero, changes them.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Arrays of bit patterns are of the signed integer type of their width, -0.0 being the least.
Bits = npt.NDArray[Any]
IntArray = npt.NDArray[Any]  # exponents, places and differences, of any integer type
Wide = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]
Positions = npt.NDArray[np.intp]


class Form(NamedTuple):
    """A binary format of numbers."""

    name: str  # as safetensors spells it
    precision: int  # bits of the significand, the hidden one included
    least: int  # exponent of the least normal number, which is 2**least
    bits_type: type  # numpy's integer type of the bit patterns
    size: int  # the mask of all bits but the sign; the masked bits are the ordinal of |x| among the numbers
    inf: int  # the ordinal after that of the largest number
    itemsize: int  # bytes of a number

    @property
    def has_inf(self) -> bool:
        return self.inf < self.size

    @property
    def torch_name(self) -> str:
        """torch's name of its type."""
        return TORCH_NAMES[self.name]

    @property
    def native(self) -> npt.DTypeLike | None:
        """numpy's type of the numbers, if it has one."""
        return {"F16": np.float16, "F32": np.float32, "F64": np.float64}.get(self.name)


BF16 = Form("BF16", 8, -126, np.int16, 0x7FFF, 0x7F80, 2)
F16 = Form("F16", 11, -14, np.int16, 0x7FFF, 0x7C00, 2)
F32 = Form("F32", 24, -126, np.int32, 2**31 - 1, 0xFF << 23, 4)
F64 = Form("F64", 53, -1022, np.int64, 2**63 - 1, 0x7FF << 52, 8)
E4M3 = Form("F8_E4M3", 4, -6, np.int8, 0x7F, 0x7F, 1)
E5M2 = Form("F8_E5M2", 3, -14, np.int8, 0x7F, 0x7C, 1)
TORCH_NAMES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
FORMS = {form.name: form for form in (BF16, F16, F32, F64, E4M3, E5M2)}


def holding(*forms: Form) -> Form:
    """Return the smallest form that holds all numbers of some forms of 16 bits or more."""
    most = max(forms, key=lambda form: form.itemsize)
    return F32 if most.itemsize == 2 and len({*forms}) > 1 else most


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
    if form.precision == 11:  # numpy widens by integers
        return bits.view(np.float16).astype(np.float64)
    if form.precision == 8 and _keeps_subnormals():
        return (bits.astype(np.int32) << 16).view(np.float32).astype(np.float64)
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
