"""Bodies that write steps from the base's numbers (`numerics.steps`), by classes of the base's exponents or without."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from ...numerics import rans
from ...numerics.forms import FORMS, Form
from ...numerics.rans import MOST_CLASSES, Bytes
from ...numerics.steps import BLOCK, Patterns, classes, exponent_fields, step_back, step_on, steps
from ..streams import Sink, Source, Writer
from .body import Body, put_positions, take_positions

Bounds = npt.NDArray[np.uint16]

_SAMPLED = 1 << 20  # numbers in a span of which one in 16 is looked at for bounds
_CLASS, _SIGN = np.uint8(15), np.uint8(128)
_SORTS = 16
_LISTED = 256  # times as many numbers as differences make a list shorter than a stream
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
        """Return how base's class and sign differ from target's.

        A difference is base's class less target's, modulo 16, and 128 if the signs differ. A difference is likely where
        target is near an end of its class, so numbers are sorted by that (`_edges`); a bit for each of 16 sorts says
        whether its differences are a stream, 0 where there is none. All others are a list of positions, and a stream.
        """
        form, sink = FORMS[dtype], Writer()
        bounds = self._bounds(base, form)
        differences = self._signed_classes(base, bounds, form)
        known = self._signed_classes(target, bounds, form)
        turned = (differences ^ known) & _SIGN
        differences -= known
        differences &= _CLASS
        differences |= turned
        positions = np.flatnonzero(differences != 0)
        if self.has_classes:
            edges = _edges(target, form)
            dense = np.bincount(edges[positions], minlength=_SORTS) * _LISTED > rans.count(edges, None, 1)[0, :_SORTS]
            sink.put(sum(1 << sort for sort in np.flatnonzero(dense).tolist()).to_bytes(2, "little"))
            chosen = _of_sorts(edges, dense)
            sink.put_stream(differences[chosen], edges[chosen], _SORTS)
            positions = positions[~dense[edges[positions]]]
        put_positions(positions, sink)
        sink.put_stream(differences[positions])
        return sink.data()

    def undo(
        self, target: Patterns, data: bytes | memoryview, back: bytes | memoryview, dtype: str, out: Patterns
    ) -> None:
        form, source = FORMS[dtype], Source(data)
        bounds = self._take_bounds(source, form)
        positions, differences = self._take_differences(target, back, form)
        of_class = self._classes(target, bounds, form)
        if of_class is not None:
            wanted = (of_class[positions] + differences) & _CLASS
            if (wanted > bounds.size).any():
                raise ValueError("a class that there is not")
            of_class[positions] = wanted
        self._take_steps(source, of_class, bounds, out)
        positions = positions[differences >= _SIGN]
        turned = target[positions]
        fixed = np.empty_like(turned)
        step_on(turned, out[positions], form, fixed)  # away from zero by base's sign, which is the other one
        step_back(target, out, form, out)
        out[positions] = fixed

    def _take_differences(
        self, target: Patterns, back: bytes | memoryview, form: Form
    ) -> tuple[npt.NDArray[np.intp], Bytes]:
        source, positions, found = Source(back), list[npt.NDArray[np.intp]](), list[Bytes]()
        if self.has_classes:
            sorts, edges = int.from_bytes(source.take(2), "little"), _edges(target, form)
            dense = np.array([sorts >> sort & 1 for sort in range(_SORTS)], np.bool_)
            positions.append(_of_sorts(edges, dense))
            found.append(source.stream(positions[0].size, edges[positions[0]], _SORTS))
            positions[0], found[0] = positions[0][found[0] > 0], found[0][found[0] > 0]
        positions.append(take_positions(source, target.size))
        found.append(source.stream(positions[-1].size))
        source.end()
        return np.concatenate(positions), np.concatenate(found)

    def _take_steps(self, source: Source, of_class: Bytes | None, bounds: Bounds, out: Patterns) -> None:
        self.take_steps(source, of_class, bounds.size + 1, out)
        source.end()

    def _bounds(self, base: Patterns, form: Form) -> Bounds:
        return class_bounds(base, form) if self.has_classes else np.empty(0, np.uint16)

    def _classes(self, x: Patterns, bounds: Bounds, form: Form) -> Bytes | None:
        return classes(x, bounds, form) if bounds.size else None

    def _signed_classes(self, x: Patterns, bounds: Bounds, form: Form) -> Bytes:
        signed = classes(x, bounds, form) if bounds.size else np.zeros(x.size, np.uint8)
        for start in range(0, x.size, BLOCK):
            part = slice(start, start + BLOCK)
            signed[part] |= (x[part] >> (8 * form.itemsize - 8)).astype(np.uint8) & _SIGN
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


def _edges(x: Patterns, form: Form) -> Bytes:
    """Return how near each number's fraction is to 0, or to the largest one, on a scale of powers of two.

    Of the first 10 bits of the fraction, f, or of their complement, g: the bits of f, at most 7, if f <= g; else 8 and
    the bits of g, at most 7.
    """
    bits = min(10, form.precision - 1)
    f = np.arange(1 << bits)
    nearest = np.minimum(f, f[::-1])
    edge = np.minimum(7, np.frexp(nearest.astype(np.float64))[1]) + np.where(f <= f[::-1], 0, 8)
    of_fraction, out = edge.astype(np.uint8), np.empty(x.size, np.uint8)
    shift, mask = x.dtype.type(form.precision - 1 - bits), x.dtype.type((1 << bits) - 1)
    for start in range(0, x.size, BLOCK):
        part = slice(start, start + BLOCK)
        np.take(of_fraction, (x[part] >> shift) & mask, out=out[part])
    return out


def _of_sorts(edges: Bytes, sorts: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Return the positions of the numbers of some sorts."""
    starts = range(0, edges.size if sorts.any() else 0, BLOCK)
    found = [np.flatnonzero(np.take(sorts, edges[start : start + BLOCK])) + start for start in starts]
    return np.concatenate([np.empty(0, np.intp), *found])
