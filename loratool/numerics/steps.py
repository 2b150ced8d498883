"""Compute the steps from numbers to others of the same type, and the classes of numbers by their exponents.

A step from b to t is place(t) - place(b) modulo 2**bits (`forms.place`), negated where b has its sign bit set, so that
it is away from zero; then folded to 0, -1, 1, -2, ... -> 0, 1, 2, 3, ... Every bit pattern comes back from b and its
step, and so does b from t, its step and b's sign.

Arrays are bit patterns in one dimension, of the unsigned integer type of their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .forms import Form, number, place
from .passes.native import native

Patterns = npt.NDArray[Any]  # unsigned integers
Bytes = npt.NDArray[np.uint8]

BLOCK = 1 << 15  # numbers whose intermediate results stay in the cache


def steps(base: Patterns, target: Patterns, form: Form) -> Patterns:
    """Return the step from each number to another."""
    out, module = np.empty_like(base), native()
    if module is not None:
        module.make_steps(form.itemsize, *_addresses(base, target), base.size, *_addresses(out))
        return out
    for part in _blocks(base.size):
        b = _signed(base[part], form)
        up = place(_signed(target[part], form), form)
        up -= place(b, form)
        up = away(up, b)
        out[part] = ((up << 1) ^ (up >> (8 * form.itemsize - 1))).view(base.dtype)
    return out


def step_back(target: Patterns, steps: Patterns, form: Form, out: Patterns) -> None:
    """Write the number that each step came from, if it has the sign of the one that the step led to."""
    _take(target, steps, form, out, back=True)


def step_on(base: Patterns, steps: Patterns, form: Form, out: Patterns) -> None:
    """Write the number that each step leads to."""
    _take(base, steps, form, out, back=False)


def _take(start: Patterns, steps: Patterns, form: Form, out: Patterns, back: bool) -> None:
    module = native()
    if module is not None and out.flags.c_contiguous:
        module.take_steps(form.itemsize, *_addresses(start, steps), start.size, back, *_addresses(out))
        return
    for part in _blocks(start.size):
        z, b = steps[part], _signed(start[part], form)
        up = away(_signed(z >> 1, form) ^ -_signed(z & 1, form), b)
        places = place(b, form)
        if back:
            places -= up
        else:
            places += up
        out[part] = number(places, form).view(start.dtype)


def away(steps: Patterns, base: Patterns) -> Patterns:
    """Return steps upwards as steps away from zero, and the other way round. Both are signed."""
    sign = base >> (8 * base.itemsize - 1)
    turned: Patterns = (steps ^ sign) - sign
    return turned


def exponent_fields(x: Patterns, form: Form) -> npt.NDArray[np.intp]:
    """Return the bits between the sign and the fraction."""
    fields: npt.NDArray[np.intp] = ((x & x.dtype.type(form.size)) >> x.dtype.type(form.precision - 1)).astype(np.intp)
    return fields


def classes(x: Patterns, bounds: npt.NDArray[np.uint16], form: Form) -> Bytes:
    """Return how many of the bounds, at most 15, are larger than the exponent field of each number."""
    out, module = np.empty(x.size, np.uint8), native()
    limits = bounds.astype(np.uint64) << np.uint64(form.precision - 1)
    if module is not None:
        module.classify(form.itemsize, *_addresses(x), x.size, *_addresses(limits), limits.size, *_addresses(out))
        return out
    fields = np.arange(2 ** (8 * form.itemsize - form.precision))
    of_field = (bounds > fields[:, None]).sum(1).astype(np.uint8)
    for part in _blocks(x.size):
        out[part] = of_field[exponent_fields(x[part], form)]
    return out


def _signed(x: Patterns, form: Form) -> Patterns:
    bits: Patterns = x.view(form.bits_type)
    return bits


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def _addresses(*arrays: Patterns) -> Iterator[int]:
    assert all(each.flags.c_contiguous for each in arrays)
    return (int(each.ctypes.data) for each in arrays)
