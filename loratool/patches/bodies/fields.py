"""Steps as fields of 2, 4 or 8 bits, as the places of those that are not 0, or by bytes: fast, with one table."""

from __future__ import annotations

import numpy as np

from ...numerics.forms import FORMS
from ...numerics.rans import Bytes
from ...numerics.steps import Patterns
from ..streams import Meter, Sink, Source
from .body import put_planes, put_positions, take_planes, take_positions
from .packing import capped, pack, unpack
from .stepped import SteppedBody

_PLACES = 1
_LAYOUTS = (2, 4, 8, 0, _PLACES)  # bits of a field; 0: all steps by bytes
_SAMPLE, _RUNS = 1 << 15, 8  # numbers that the layout is chosen by


class Fields(SteppedBody):
    """A byte says the layout.

    Fields: a stream of them, packed into bytes; those that are the largest are followed by the step less that, by
    bytes. Places: of the steps that are not 0, then the steps less 1, by bytes.
    """

    key = "fields"
    has_classes = False

    def takes(self, dtype: str) -> bool:
        return dtype in FORMS

    def put_steps(self, steps: Patterns, of_class: Bytes | None, rows: int, sink: Sink) -> None:
        layout = _choose(steps)
        sink.put(bytes([layout]))
        _put(steps, layout, sink)

    def take_steps(self, source: Source, of_class: Bytes | None, rows: int, out: Patterns) -> None:
        layout = source.byte()
        if layout not in _LAYOUTS:
            raise ValueError(f"fields of layout {layout}")
        if layout == _PLACES:
            positions = take_positions(source, out.size)
            full = np.empty(positions.size, out.dtype)
            take_planes(source, full)
            out[:] = 0
            out[positions] = full + 1
        elif layout:
            top = (1 << layout) - 1
            fields = unpack(source.stream(-(-out.size * layout // 8)), layout, out.size)
            out[:] = fields
            large = np.flatnonzero(fields == top)
            full = np.empty(large.size, out.dtype)
            take_planes(source, full)
            out[large] = full + out.dtype.type(top)
        else:
            take_planes(source, out)


def _put(steps: Patterns, layout: int, sink: Sink) -> None:
    if layout == _PLACES:
        positions = np.flatnonzero(steps != 0)
        put_positions(positions, sink)
        put_planes(steps[positions] - 1, sink)
    elif layout:
        top = (1 << layout) - 1
        fields = capped(steps, top)
        sink.put_stream(pack(fields, layout))
        put_planes(steps[np.flatnonzero(fields == top)] - steps.dtype.type(top), sink)
    else:
        put_planes(steps, sink)


def _choose(steps: Patterns) -> int:
    """Return the layout that takes the least for some of the steps."""
    if steps.size > _SAMPLE:
        run = _SAMPLE // _RUNS
        starts = [(steps.size - run) * i // (_RUNS - 1) for i in range(_RUNS)]
        steps = np.concatenate([steps[start : start + run] for start in starts])
    sizes = {}
    for layout in _LAYOUTS:
        meter = Meter()
        _put(steps, layout, meter)
        sizes[layout] = meter.bits
    return min(sizes, key=sizes.__getitem__)
