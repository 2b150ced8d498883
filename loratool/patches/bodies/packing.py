"""Cap numbers to bytes, and pack small ones into bytes."""

from __future__ import annotations

import numpy as np

from ...numerics.rans import Bytes
from ...numerics.steps import BLOCK, Patterns


def capped(x: Patterns, top: int) -> Bytes:
    """Return each number, or `top` if that is less, as a byte."""
    out = np.empty(x.size, np.uint8)
    for start in range(0, x.size, BLOCK):
        part = slice(start, start + BLOCK)
        np.minimum(x[part], x.dtype.type(top), out=out[part], casting="unsafe")
    return out


def pack(x: Bytes, bits: int) -> Bytes:
    """Return numbers of 2, 4 or 8 bits packed into bytes, the first in the lowest bits; the last are filled with 0."""
    if bits == 8:
        return x
    per = 8 // bits
    padded = np.zeros(-(-x.size // per) * per, np.uint8)
    padded[: x.size] = x
    groups = padded.view(f"<u{per}")
    out = np.empty(groups.size, np.uint8)
    for start in range(0, groups.size, BLOCK):
        y = groups[start : start + BLOCK].copy()
        for i in range(1, per):
            y |= groups[start : start + BLOCK] >> ((8 - bits) * i)
        out[start : start + BLOCK] = y  # the lowest byte
    return out


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """Return the first numbers that `pack` has packed.

    Raises:
        ValueError: those that are left are not 0.
    """
    if bits == 8:
        return packed
    per = 8 // bits
    mask = int.from_bytes(bytes([(1 << bits) - 1]) * per, "little")
    out = np.empty(packed.size, f"<u{per}")
    for start in range(0, out.size, BLOCK):
        y = packed[start : start + BLOCK].astype(out.dtype)
        spread = y.copy()
        for i in range(1, per):
            spread |= y << ((8 - bits) * i)
        out[start : start + BLOCK] = spread & out.dtype.type(mask)
    numbers = out.view(np.uint8)
    if numbers[count:].any():
        raise ValueError("numbers that are left over")
    return numbers[:count]
