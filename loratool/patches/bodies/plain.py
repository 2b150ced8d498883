"""Bodies without steps: nothing, if the numbers are the base's, and the target's own bytes."""

from __future__ import annotations

from ...numerics.steps import Patterns
from ..streams import Sink, Source
from .body import Body, put_planes, take_planes


class Same(Body):
    """No data."""

    key = "same"

    def takes(self, dtype: str) -> bool:
        return True

    def write(self, base: Patterns, target: Patterns, dtype: str, sink: Sink) -> None:
        pass

    def decode(self, base: Patterns, data: bytes | memoryview, dtype: str, out: Patterns) -> None:
        Source(data).end()
        out[:] = base

    def back(self, base: Patterns, target: Patterns, dtype: str) -> bytes:
        return b""

    def undo(
        self, target: Patterns, data: bytes | memoryview, back: bytes | memoryview, dtype: str, out: Patterns
    ) -> None:
        Source(back).end()
        self.decode(target, data, dtype, out)


class OwnBytes(Body):
    """A stream for each byte of the target's numbers; the base is not used, and lost."""

    key = "bytes"

    def takes(self, dtype: str) -> bool:
        return True

    def write(self, base: Patterns | None, target: Patterns, dtype: str, sink: Sink) -> None:
        put_planes(target, sink)

    def decode(self, base: Patterns | None, data: bytes | memoryview, dtype: str, out: Patterns) -> None:
        source = Source(data)
        take_planes(source, out)
        source.end()

    def back(self, base: Patterns | None, target: Patterns, dtype: str) -> None:
        return None

    def undo(
        self, target: Patterns, data: bytes | memoryview, back: bytes | memoryview, dtype: str, out: Patterns
    ) -> None:
        raise ValueError("the bytes alone do not say what was there before")
