"""Differences of bytes, or of half bytes, modulo their range: integers and packed codes."""

from __future__ import annotations

import numpy as np

from ...numerics.forms import FORMS
from ...numerics.rans import Bytes
from ...numerics.steps import BLOCK, Patterns
from ..streams import Meter, Sink, Source
from .body import Body, put_planes, take_planes

_BYTES, _HALVES = range(2)


class Codes(Body):
    """A byte says whether halves are subtracted, then a stream of differences for each byte of the numbers.

    A difference d of n bits is folded to 0, -1, 1, -2, ... -> 0, 1, 2, 3, ...; those of two halves make a byte.
    """

    key = "codes"

    def takes(self, dtype: str) -> bool:
        return dtype not in FORMS

    def write(self, base: Patterns, target: Patterns, dtype: str, sink: Sink) -> None:
        found = []
        for halves in (_BYTES, _HALVES):
            folded, meter = _differences(base, target, halves), Meter()
            put_planes(folded, meter)
            found.append((meter.bits, halves, folded))
        _, halves, folded = min(found, key=lambda each: each[:2])
        sink.put(bytes([halves]))
        put_planes(folded, sink)

    def decode(self, base: Patterns, data: bytes | memoryview, dtype: str, out: Patterns) -> None:
        _take(base, data, out, back=False)

    def back(self, base: Patterns, target: Patterns, dtype: str) -> bytes:
        return b""

    def undo(
        self, target: Patterns, data: bytes | memoryview, back: bytes | memoryview, dtype: str, out: Patterns
    ) -> None:
        Source(back).end()
        _take(target, data, out, back=True)


def _fold(bits: int) -> Bytes:
    """Return the folded form of each difference of so many bits."""
    d = np.arange(1 << bits)
    d = np.where(d >> (bits - 1), d - (1 << bits), d)
    return np.where(d < 0, -2 * d - 1, 2 * d).astype(np.uint8)


def _of_halves(table: Bytes) -> Bytes:
    high: Bytes = table << np.uint8(4)
    return np.bitwise_or.outer(high, table).reshape(-1)


_FOLDED = (_fold(8), _of_halves(_fold(4)))
_UNFOLDED = tuple(np.argsort(table).astype(np.uint8) for table in _FOLDED)


def _differences(base: Patterns, target: Patterns, halves: int) -> Patterns:
    out = np.empty_like(target)
    b, t, to = (each.view(np.uint8) for each in (base, target, out))
    for start in range(0, to.size, BLOCK):
        part = slice(start, start + BLOCK)
        to[part] = _FOLDED[halves][_subtract(t[part], b[part], halves)]
    return out


def _take(start: Patterns, data: bytes | memoryview, out: Patterns, back: bool) -> None:
    source = Source(data)
    halves = source.byte()
    if halves not in (_BYTES, _HALVES):
        raise ValueError(f"differences of kind {halves}")
    take_planes(source, out)
    source.end()
    x, to = start.view(np.uint8), out.view(np.uint8)
    for first in range(0, to.size, BLOCK):
        part = slice(first, first + BLOCK)
        d = _UNFOLDED[halves][to[part]]
        to[part] = _subtract(x[part], d if back else _subtract(np.zeros_like(d), d, halves), halves)


def _subtract(x: Bytes, y: Bytes, halves: int) -> Bytes:
    if not halves:
        return np.subtract(x, y)
    high, low = np.uint8(0xF0), np.uint8(0x0F)
    difference: Bytes = ((x & high) - (y & high)) | ((x - y) & low)
    return difference
