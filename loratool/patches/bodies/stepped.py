"""Bodies that write steps from the base's numbers (`numerics.steps`), by classes of the base's exponents or without."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from ...numerics.forms import FORMS, Form
from ...numerics.rans import MOST_CLASSES, Bytes
from ...numerics.steps import Patterns, classes, exponent_fields, step_back, step_on, steps
from ..streams import Sink, Source, Writer
from .body import Body, put_positions, take_positions

Bounds = npt.NDArray[np.uint16]

_SAMPLED = 1 << 20  # numbers in a span of which one in 16 is looked at for bounds
_CLASS = np.uint8(15)  # the bits of a class beside that of a sign
_LEAST_CLASS = 2048  # numbers in a class, whose table takes some 50 bytes


class SteppedBody(Body):
    """Writes the bounds of the classes, if it has any, and the steps."""

    has_classes = True

    @abstractmethod
    def put_steps(self, steps: Patterns, of_class: Bytes | None, rows: int, sink: Sink) -> None:
        """Put steps, each of a class."""

    @abstractmethod
    def take_steps(self, source: Source, of_class: Bytes | None, rows: int, out: Patterns) -> None:
        """Read steps."""

    def write(self, base: Patterns, target: Patterns, dtype: str, sink: Sink) -> None:
        form = FORMS[dtype]
        bounds = self._bounds(base, form)
        if self.has_classes:
            sink.put(bytes([bounds.size]) + bounds.astype("<u2").tobytes())
        self.put_steps(steps(base, target, form), self._classes(base, bounds, form), bounds.size + 1, sink)

    def decode(self, base: Patterns, data: bytes | memoryview, dtype: str, out: Patterns) -> None:
        form, source = FORMS[dtype], Source(data)
        bounds = self._take_bounds(source, form)
        self._take_steps(source, self._classes(base, bounds, form), bounds, out)
        step_on(base, out, form, out)

    def back(self, base: Patterns, target: Patterns, dtype: str) -> bytes:
        """Return the positions where target's class or sign is not base's, and those of base."""
        form, sink = FORMS[dtype], Writer()
        bounds = self._bounds(base, form)
        wanted, known = (self._signed_classes(each, bounds, form) for each in (base, target))
        positions = np.flatnonzero(wanted != known)
        put_positions(positions, sink)
        sink.put_stream(wanted[positions], known[positions] & _CLASS, bounds.size + 1)
        return sink.data()

    def undo(
        self, target: Patterns, data: bytes | memoryview, back: bytes | memoryview, dtype: str, out: Patterns
    ) -> None:
        form, source, listed = FORMS[dtype], Source(data), Source(back)
        bounds = self._take_bounds(source, form)
        of_class = self._classes(target, bounds, form)
        positions = take_positions(listed, target.size)
        changed = target[positions]
        known = None if of_class is None else of_class[positions]
        wanted = listed.stream(positions.size, known, bounds.size + 1)
        listed.end()
        if of_class is not None:
            of_class[positions] = wanted & _CLASS
            if (wanted & _CLASS > bounds.size).any():
                raise ValueError("a class that there is not")
        self._take_steps(source, of_class, bounds, out)
        turned = (changed >> (8 * form.itemsize - 1)) != wanted >> 7
        positions, changed = positions[turned], changed[turned]
        fixed = np.empty_like(changed)
        step_on(changed, out[positions], form, fixed)  # away from zero by base's sign, which is the other one
        step_back(target, out, form, out)
        out[positions] = fixed

    def _take_steps(self, source: Source, of_class: Bytes | None, bounds: Bounds, out: Patterns) -> None:
        self.take_steps(source, of_class, bounds.size + 1, out)
        source.end()

    def _bounds(self, base: Patterns, form: Form) -> Bounds:
        return class_bounds(base, form) if self.has_classes else np.empty(0, np.uint16)

    def _classes(self, x: Patterns, bounds: Bounds, form: Form) -> Bytes | None:
        return classes(x, bounds, form) if bounds.size else None

    def _signed_classes(self, x: Patterns, bounds: Bounds, form: Form) -> Bytes:
        signed: Bytes = (x >> (8 * form.itemsize - 1)).astype(np.uint8) << np.uint8(7)
        if bounds.size:
            signed |= classes(x, bounds, form)
        return signed

    def _take_bounds(self, source: Source, form: Form) -> Bounds:
        count = source.byte() if self.has_classes else 0
        if count >= MOST_CLASSES:
            raise ValueError(f"{count + 1} classes")
        bounds = np.frombuffer(source.take(2 * count), "<u2").astype(np.uint16)
        if (bounds >> (8 * form.itemsize - form.precision)).any():
            raise ValueError("a bound beyond all exponents")
        return bounds


def class_bounds(base: Patterns, form: Form) -> Bounds:
    """Return the least exponent field of each class but the last, from the largest numbers down.

    The relative size of a step depends on the exponent, so each exponent that many numbers have is a class.
    """
    seen = base[::16] if base.size >= _SAMPLED else base
    counts = np.bincount(exponent_fields(seen, form)).tolist()
    enough = max(seen.size // 100, _LEAST_CLASS * seen.size // max(1, base.size))
    bounds, held, left = list[int](), 0, seen.size
    for field in range(len(counts) - 1, 0, -1):
        held, left = held + counts[field], left - counts[field]
        if held >= enough and left >= enough // 4 and len(bounds) < MOST_CLASSES - 1:
            bounds.append(field)
            held = 0
    return np.array(bounds, np.uint16)
