"""Pack numbers by their steps from predicted ones, in the body that takes the least."""

from __future__ import annotations

import numpy as np

from ...numerics.forms import Bits, Form
from ...numerics.steps import Patterns
from .body import MOST
from .table import BODIES, choose

SAMPLE = 1 << 16  # numbers by which a body is chosen
NAMES = sorted(BODIES)  # the number of a body


def pack_steps(predicted: Bits, numbers: Bits, form: Form) -> bytes:
    """Return numbers as spans of at most 2**24: a byte with the body, 4 with the length of the data, and the data.

    Args:
        predicted, numbers: (n,), bit patterns.
    """
    parts, base, target = [], _patterns(predicted), _patterns(numbers)
    apart = max(1, len(base) // SAMPLE)
    key = choose(np.ascontiguousarray(base[::apart]), np.ascontiguousarray(target[::apart]), form.name)
    for start in range(0, len(base), MOST):
        here = slice(start, start + MOST)
        data = BODIES[key].encode(base[here], target[here], form.name)
        parts += [bytes([NAMES.index(key)]), len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def unpack_steps(predicted: Bits, data: bytes, form: Form) -> Bits:
    """Return the numbers that `pack_steps` has packed.

    Raises:
        ValueError: the data is damaged, or of another prediction.
    """
    base, at = _patterns(predicted), 0
    out = np.empty_like(base)
    for start in range(0, len(base), MOST):
        here, head = slice(start, start + MOST), data[at : at + 5]
        if len(head) < 5 or head[0] >= len(NAMES):
            raise ValueError("ends too early")
        length = int.from_bytes(head[1:], "little")
        BODIES[NAMES[head[0]]].decode(base[here], data[at + 5 : at + 5 + length], form.name, out[here])
        at += 5 + length
    if at != len(data):
        raise ValueError("is of another length")
    restored: Bits = out.view(form.bits_type)
    return restored


def _patterns(bits: Bits) -> Patterns:
    return np.ascontiguousarray(bits).view(f"u{bits.itemsize}")
