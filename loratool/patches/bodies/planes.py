"""Steps by bytes, each with a table for each class of the base's exponents: numbers of many bits."""

from __future__ import annotations

from ...numerics.forms import FORMS
from ...numerics.rans import Bytes
from ...numerics.steps import Patterns
from ..streams import Sink, Source
from .body import put_planes, take_planes
from .stepped import SteppedBody


class Planes(SteppedBody):
    """A stream for each byte of the steps."""

    key = "planes"

    def takes(self, dtype: str) -> bool:
        return dtype in FORMS and FORMS[dtype].itemsize > 2

    def put_steps(self, steps: Patterns, of_class: Bytes | None, rows: int, sink: Sink) -> None:
        put_planes(steps, sink, of_class, rows)

    def take_steps(self, source: Source, of_class: Bytes | None, rows: int, out: Patterns) -> None:
        take_planes(source, out, of_class, rows)
