"""Compute the interval of weights from which a rounded sum can have come, and encode a weight as its index in it.

Rounding is monotone, so the W with `round_once(a * W + c) == W'` are consecutive representable numbers, and W', a and c
determine them. W is recorded as its index among them, which takes no bits if there is only one, as nearly always. All
decisions here are functions of (W', a, c) only, so that a reader without W makes the same ones.

The interval is closed-form: the two ends of what rounds to W' are taken back through a and c in float64, widened by far
more than the float64 errors on the way, and counted in ordinals of the format (the integers that its bit patterns
are). A number too many costs a bit, a number too few would lose W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


_MAGNITUDE = np.int64((1 << 63) - 1)


_END = 1 << 12  # float64 ulps (2**-40 of |W'|) by which the ends of the interval are moved outward


_SLACK = 1 << 10  # float64 ulps for the rounding on the way back through c and a


_MOST = float(np.finfo(np.float64).max)


_NEAR_ZERO = 2.0**-8  # times |W'|: an interval that comes closer to 0 contains too many numbers


_CHUNK = 1 << 14  # numbers at a time, so that they stay in a core's cache


_NEAR_TIE = 1 << 12  # float64 ulps around a midpoint


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format, with the integer type of its bit patterns."""

    mantissa: int  # stored bits
    bias: int  # of the exponent
    code: type[np.signedinteger[Any]]

    @cached_property
    def magnitude(self) -> int:
        return int(np.iinfo(self.code).max)

    @cached_property
    def exponent(self) -> int:
        return self.magnitude & ~((1 << self.mantissa) - 1)

    @cached_property
    def bits(self) -> int:
        return int(np.iinfo(self.code).bits)


# safetensors name -> format; float64 is recorded as differences, because no wider format can bound its intervals
FLOAT_FORMATS = {
    "BF16": FloatFormat(7, 127, np.int16),
    "F16": FloatFormat(10, 15, np.int16),
    "F32": FloatFormat(23, 127, np.int32),
}


def widen(code: Array, form: FloatFormat) -> Array:
    """Convert bit patterns to float64."""
    if form.code is np.int32:
        return code.view(np.float32).astype(np.float64)
    if form.mantissa == 10:
        return code.view(np.float16).astype(np.float64)
    return (code.astype(np.int32) << 16).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Candidates:
    """The candidates for some weights: each is one of `most + 1` numbers from ordinal `low` on."""

    at: Array  # flat positions of the weights, rising
    low: Array  # ordinals of the first candidates
    most: Array  # the highest index of a candidate
    raw: Array  # bool: there is no interval, and W is recorded unchanged
    negative: Array  # bool: the sign of the candidates


def _ordinal(value: Array, form: FloatFormat, up: bool) -> Array:
    """Return the ordinal of the first representable number from |value| on, up or down. value: float64 bits, >= 0."""
    shift = 52 - form.mantissa
    ordinal = ((value - 1) >> shift) + 1 if up else value >> shift
    ordinal -= (1023 - form.bias) << form.mantissa
    low = value < ((1024 - form.bias) << 52)
    if low.any():  # below the least normal number the grid is uniform
        steps = value[low].view(np.float64) * 2.0 ** (form.bias - 1 + form.mantissa)
        ordinal[low] = (np.ceil(steps) if up else np.floor(steps)).astype(np.int64)
    found: Array = np.maximum(ordinal, 0)
    return found


def perhaps_near_tie(x: Array, form: FloatFormat) -> Array:
    """Return the positions of float64 numbers that may be near ties, for `ambiguous` to look at."""
    shift = 52 - form.mantissa
    bits = x.view(np.int64) & _MAGNITUDE
    near = np.abs((bits & ((1 << shift) - 1)) - (1 << (shift - 1))) <= 2 * _NEAR_TIE
    near |= bits < ((1024 - form.bias) << 52)
    return np.flatnonzero(near)


def _near_tie(x: Array, form: FloatFormat) -> Array:
    """Return whether float64 numbers are within `_NEAR_TIE` ulps of the midpoint between two of the format."""
    shift = 52 - form.mantissa
    bits = x.view(np.int64) & _MAGNITUDE
    near: Array = np.abs((bits & ((1 << shift) - 1)) - (1 << (shift - 1))) <= _NEAR_TIE
    low = bits < ((1024 - form.bias) << 52)
    if low.any():
        steps = np.abs(x[low]) * 2.0 ** (form.bias - 1 + form.mantissa)
        near[low] = np.abs(steps - np.floor(steps) - 0.5) < 1e-9
    return near


def ambiguous(result: Array, like: Array, perhaps: Array, c: Array, form: FloatFormat) -> Array:
    """Return the positions that can have more than one candidate if a is 1; all others have one.

    result: W' as codes; like: W, or what the reader takes for it: round_once(W' - c); perhaps: positions, among them
    all where W + c, or W' - c, is within float64's rounding of a midpoint. Where |W| is above the power of two below
    |W'|, its grid is as coarse as that of W', so an interval of one step of W' holds one number, or two if both ends
    are numbers. Both sides tell by W' - c: below a power of two, W + c can be at a midpoint where W' - c is not.
    """
    wide = (result & form.exponent) >= (like & form.magnitude)
    perhaps = perhaps[finite(result[perhaps], form)]
    code = result[perhaps]
    back = widen(code, form)
    back -= c[perhaps]
    power = code & form.exponent
    above = 0.5 * (widen(power, form) + widen(power + 1, form))
    wide[perhaps[_near_tie(back, form) | (np.abs(back) <= above)]] = True
    at = np.flatnonzero(wide)
    kept = c[at] != 0
    kept &= finite(result[at], form)
    return at if kept.all() else at[kept]


def ambiguous_scaled(result: Array, a: Array, c: Array, form: FloatFormat) -> Array:
    """Return the positions that can have more than one candidate, for any a; at others W is nearest to (W' - c) / a.

    The interval around (W' - c) / a is half a step of W' over |a| to each side. It holds one number if it reaches the
    nearer but not the farther of the two around its middle, nor, from a power of two downward, the half step behind;
    and not 0, which has two signs.
    """
    found = []
    with np.errstate(all="ignore"):
        for start in range(0, len(result), _CHUNK):
            part = slice(start, start + _CHUNK)
            one = _single(result[part], a[part], c[part], form)
            found.append(np.flatnonzero(~one & finite(result[part], form)) + start)
    return np.concatenate(found)


def _single(result: Array, a: Array, c: Array, form: FloatFormat) -> Array:
    middle = widen(result, form)
    middle -= c
    middle /= a
    np.abs(middle, out=middle)
    reach = widen(np.maximum(result & form.exponent, 1 << form.mantissa).astype(form.code), form)
    reach *= 2.0 ** -(form.mantissa + 1)
    reach /= np.abs(a)
    reach += middle * 2.0**-40
    low = middle < 2.0 ** (1 - form.bias)
    if low.any():  # there W's steps do not shrink with it, and what float64 rounds of a large W' is more
        reach[low] += np.abs(widen(result[low], form) / a[low]) * 2.0**-52
    exponent = middle.view(np.int64) >> 52
    np.maximum(exponent, 1024 - form.bias, out=exponent)
    exponent -= form.mantissa
    exponent <<= 52
    step = exponent.view(np.float64)
    place = middle / step
    whole = np.floor(place)
    place -= whole
    limit = np.maximum(place, 1 - place)
    power = whole == 1 << form.mantissa
    limit[power] = np.minimum(limit[power], place[power] + 0.5)
    limit *= step
    one: Array = (reach < limit) & (middle > reach + step)
    return one


def finite(code: Array, form: FloatFormat) -> Array:
    """Return whether bit patterns are finite numbers; inf and nan take no update, and W is W'."""
    found: Array = (code & form.exponent) != form.exponent
    return found


def candidates(result: Array, a: Array | None, c: Array, at: Array, form: FloatFormat) -> Candidates:
    """Return the candidates of the elements at `at`.

    Args:
        result: (n,), bit patterns of W'
        a: (n,), float64, or None for 1
        c: (n,), float64
    """
    code, back = result[at], c[at]
    value = widen(code, form)
    inner, outer = _ends(value, form)
    inner -= back
    outer -= back
    if a is not None:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inner /= a[at]
            outer /= a[at]
    negative = inner < 0
    raw = negative != (outer < 0)
    np.abs(inner, out=inner)
    np.abs(outer, out=outer)
    near, far = np.minimum(inner, outer), np.maximum(inner, outer, out=outer)
    np.abs(value, out=value)
    raw |= ~(near > value * _NEAR_ZERO)
    raw |= ~(far < _MOST)
    raw |= (code & form.magnitude) >= form.exponent - (1 << form.mantissa)
    if raw.any():
        near[raw], far[raw] = 1.0, 1.0
    low = _ordinal(near.view(np.int64) - _SLACK, form, up=True)
    most = _ordinal(far.view(np.int64) + _SLACK, form, up=False)
    np.minimum(most, form.exponent - 1, out=most)
    most -= low
    most[raw] = 0
    return Candidates(at, low, most, raw, negative)


def _ends(value: Array, form: FloatFormat) -> tuple[Array, Array]:
    """Return the midpoints between W' and its neighbours, toward 0 and away from it, moved outward by `_END` ulps.

    Half a step of the format is a fixed number of float64 steps, below a power of two as well, so both are integer
    sums of bit patterns; only below the least normal number the steps are all of one size.
    """
    half = (1 << (51 - form.mantissa)) + _END
    bits = value.view(np.int64)
    inner, outer = (bits - half).view(np.float64), (bits + half).view(np.float64)
    least = 2.0 ** (2 - form.bias)
    low = np.abs(value) < least
    if low.any():
        step = np.where(value[low] < 0, -1.0, 1.0) * least * 2.0 ** (-2 - form.mantissa)
        slack = value[low] * 2.0**-40
        inner[low], outer[low] = value[low] - step - slack, value[low] + step + slack
    return inner, outer


def encode(weight: Array, found: Candidates, form: FloatFormat) -> tuple[Array, Array, Array]:
    """Return (index, width in bits) of each ambiguous weight, and the raw bit patterns. weight: (n,), bit patterns."""
    many = np.flatnonzero(found.most)
    index = (weight[found.at[many]] & form.magnitude).astype(np.int64) - found.low[many]
    return index, widths(found.most[many]), weight[found.at[found.raw]]


def widths(most: Array) -> Array:
    """Return how many bits hold any number up to `most`."""
    return np.frexp(most.astype(np.float64))[1].astype(np.int64)


def decode(guess: Array, found: Candidates, index: Array, raw: Array, form: FloatFormat) -> Array:
    """Return the weights as bit patterns: `guess` if there is one candidate, else what `encode` recorded."""
    out = guess.copy()
    ordinal = found.low.copy()
    ordinal[np.flatnonzero(found.most)] += index
    signed = np.where(found.negative, ordinal | ~form.magnitude, ordinal).astype(form.code)
    out[found.at] = signed
    out[found.at[found.raw]] = raw
    return out


def pack(index: Array, width: Array, ends: Sequence[int]) -> list[bytes]:
    """Pack numbers of any width one after the other, lowest bits first; a byte string ends before each of `ends`."""
    end = np.cumsum(width)
    start, width = end - width, width.astype(np.uint8)
    index = index.astype(np.min_scalar_type((1 << int(width.max(initial=0))) - 1))
    bits = np.zeros(int(end[-1]) + 1 if len(end) else 0, np.uint8)
    bits[start] = index & 1  # a number without bits is overwritten by the next, or is behind the last
    more = np.flatnonzero(width > 1)
    while len(more):
        start, index, width = start.take(more) + 1, index.take(more) >> 1, width.take(more) - 1
        bits[start] = index & 1
        more = np.flatnonzero(width > 1)
    cuts = [int(end[i - 1]) if i else 0 for i in ends]
    parts = (bits[start:stop] for start, stop in pairwise([0, *cuts]))
    return [np.packbits(part, bitorder="little").tobytes() for part in parts]


def unpack(data: bytes, width: Array) -> Array:
    """Return the numbers that `pack` packed; raise ValueError for data of another length."""
    end = np.cumsum(width)
    total = int(end[-1]) if len(end) else 0
    if len(data) != (total + 7) // 8:
        raise ValueError(f"{len(data)} bytes hold no {total} bits")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=total, bitorder="little")
    index = np.zeros(len(width), np.int64)
    for bit in range(int(width.max()) if len(width) else 0):
        has = width > bit
        index[has] |= bits[(end - width)[has] + bit].astype(np.int64) << bit
    return index
