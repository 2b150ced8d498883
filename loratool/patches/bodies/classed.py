"""Steps as symbols with a table for each class of the base's exponents; rare and large ones follow in full."""

from __future__ import annotations

import numpy as np

from ...numerics import rans
from ...numerics.forms import FORMS
from ...numerics.rans import Bytes
from ...numerics.steps import Patterns
from ..streams import Sink, Source
from .body import put_planes, take_planes
from .packing import capped
from .stepped import SteppedBody

_ESCAPE = 255
_RARE = 1 << 14  # a symbol less frequent than this in its class costs the others more than what it saves


class Classed(SteppedBody):
    """A stream of symbols, then the steps of those that are 255, by bytes."""

    key = "classes"

    def takes(self, dtype: str) -> bool:
        return dtype in FORMS and FORMS[dtype].itemsize <= 2

    def put_steps(self, steps: Patterns, of_class: Bytes | None, rows: int, sink: Sink) -> None:
        symbols = capped(steps, _ESCAPE)
        counts = rans.count(symbols, of_class, rows)
        marks = (counts > 0) & (counts < counts.sum(1, keepdims=True) // _RARE)
        marks[:, _ESCAPE] = True
        escaped = rans.mark(symbols, of_class, marks)
        moved = np.where(marks, counts, 0).sum(1)
        counts[marks] = 0
        counts[:, _ESCAPE] = moved
        sink.put_stream(symbols, of_class, rows, counts)
        put_planes(steps[escaped], sink)

    def take_steps(self, source: Source, of_class: Bytes | None, rows: int, out: Patterns) -> None:
        symbols = source.stream(out.size, of_class, rows)
        out[:] = symbols
        escaped = np.flatnonzero(symbols == _ESCAPE)
        full = np.empty(escaped.size, out.dtype)
        take_planes(source, full)
        out[escaped] = full
