"""Deltas of stored values, zero deltas, and sums of deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .arrays import Array, Kind, Numbers, empty, sent, widen
from .decide import LEAST, SLACK, Delta, DenseDelta, U
from .error_free import two_product, two_sum
from .forms import Positions, Wide, fraction, wide
from .products import LEAST_OF, UNIT_OF
from .tensors import AnyNumbers, numbers_of


class Stored:
    """D = weight * V for stored values V.

    Args:
        value: (k, n), in any of FORMS, finite.
        weight: a float64, so that D is the product of two numbers.
        index: (rows,), the row of V for each row, -1 for D = 0; by default all in order.
    """

    def __init__(self, value: AnyNumbers, weight: float, index: Positions | None = None) -> None:
        stored = numbers_of(value)
        self._value, self._weight = Numbers(stored.host(), stored.form), weight
        self._index, self._is_whole = np.arange(len(value)) if index is None else index, index is None
        self.shape = len(self._index), value.shape[1]
        bits, form = self._value.bits, self._value.form
        self._most = wide((bits & form.size).max(1, initial=0).astype(form.bits_type), form)  # of each row of V
        most = float(self._most.max(initial=0.0))
        self.largest = max(most, most * abs(weight), abs(weight))

    @np.errstate(all="ignore")
    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        value, weight = Numbers(sent(self._value.bits, like), self._value.form), abs(self._weight)
        most = np.append(self._most, 0.0)[self._index]
        sizes = most * weight * SLACK
        # rounding errors of the values' cast, the weight's cast, and the product; a flushed part of one is multiplied
        # by the other, and 16 bits are cast through float32
        errors = 3 * UNIT_OF[kind] * sizes + 4 * LEAST_OF[np.float32] * (1 + most) * (1 + weight)

        def fill(rows: slice, shift: float, out: Array) -> None:
            if self._is_whole:
                widen(value[rows], out)
            else:
                index = self._index[rows]
                some = np.flatnonzero(index >= 0)
                out[...] = 0
                taken = value[sent(index[some], like)]
                out[sent(some, like)] = widen(taken, empty(kind, *taken.shape, like=like))
            if self._weight != 1:
                out *= self._weight
            out += shift

        return DenseDelta(sizes, errors, fill)

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        row = self._index.take(i)
        bits = (
            self._value.bits[np.maximum(row, 0), j]
            if len(self._value)
            else np.zeros(len(i), self._value.form.bits_type)
        )
        value = np.where(row >= 0, wide(bits, self._value.form), 0.0)
        if self._weight == 1:
            size = value.view(np.int64) & np.int64(2**63 - 1)
            subnormal = (size > 0) & (size < 1 << 52)  # in float64: may be flushed
            return value, np.zeros(len(i)), np.where(subnormal, np.inf, 0.0)
        high, low = two_product(value, np.full_like(value, self._weight))
        in_range = (value == 0) | (self._weight == 0) | ((np.abs(high) > 2.0**-400) & (np.abs(high) < 2.0**500))
        return high, low, np.where(in_range, 0.0, np.abs(high) * (4 * U) + LEAST)

    nearer = near

    def exact(self, i: int, j: int) -> Fraction:
        row = int(self._index[i])
        if row < 0:
            return Fraction(0)
        return Fraction(self._weight) * fraction(self._value.bits[row, j], self._value.form)


@dataclass(frozen=True)
class Zero:
    """D = 0, where an update only multiplies W (IA3)."""

    shape: tuple[int, int]
    largest: float = 0.0

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        none = np.zeros(self.shape[0])

        def fill(rows: slice, shift: float, out: Array) -> None:
            out[...] = shift

        return DenseDelta(none, none, fill)

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        return np.zeros(len(i)), np.zeros(len(i)), np.zeros(len(i))

    nearer = near

    def exact(self, i: int, j: int) -> Fraction:
        return Fraction(0)


@dataclass(frozen=True)
class Sum:
    """The sum of deltas of one shape."""

    deltas: Sequence[Delta]

    @property
    def shape(self) -> tuple[int, int]:
        return self.deltas[0].shape

    @property
    def largest(self) -> float:
        return max(delta.largest for delta in self.deltas)

    @np.errstate(all="ignore")
    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        first, *rest = parts = [delta.dense(kind, like) for delta in self.deltas]
        sizes = np.sum([part.sizes for part in parts], axis=0) * SLACK
        errors = np.sum([part.errors for part in parts], axis=0) * SLACK + len(parts) * UNIT_OF[kind] * sizes

        def fill(rows: slice, shift: float, out: Array) -> None:
            first.fill(rows, shift, out)
            for part in rest:
                part.fill(rows, 0.0, more := empty(kind, *out.shape, like=out))
                out += more

        return DenseDelta(sizes, errors, fill)

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        return _add([delta.near(i, j) for delta in self.deltas])

    def nearer(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        return _add([delta.nearer(i, j) for delta in self.deltas])

    def exact(self, i: int, j: int) -> Fraction:
        return sum((delta.exact(i, j) for delta in self.deltas), Fraction(0))


@dataclass(frozen=True)
class RowsOf:
    """Rows start:stop of another delta."""

    delta: Delta
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.delta.shape[1]

    @property
    def largest(self) -> float:
        return self.delta.largest

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        inner, start = self.delta.dense(kind, like), self.start

        def fill(rows: slice, shift: float, out: Array) -> None:
            first = start + (rows.start or 0)
            inner.fill(slice(first, first + len(out)), shift, out)

        return DenseDelta(inner.sizes[start : self.stop], inner.errors[start : self.stop], fill)

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        return self.delta.near(i + self.start, j)

    def nearer(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        return self.delta.nearer(i + self.start, j)

    def exact(self, i: int, j: int) -> Fraction:
        return self.delta.exact(i + self.start, j)


@dataclass(frozen=True)
class Negated:
    """D = -D1."""

    delta: Delta

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    @property
    def largest(self) -> float:
        return self.delta.largest

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        inner = self.delta.dense(kind, like)

        def fill(rows: slice, shift: float, out: Array) -> None:
            inner.fill(rows, 0.0, out)
            out *= -1
            out += shift

        return DenseDelta(inner.sizes, inner.errors, fill)

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        high, low, bound = self.delta.near(i, j)
        return -high, -low, bound

    def nearer(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        high, low, bound = self.delta.nearer(i, j)
        return -high, -low, bound

    def exact(self, i: int, j: int) -> Fraction:
        return -self.delta.exact(i, j)


def _add(parts: Sequence[tuple[Wide, Wide, Wide]]) -> tuple[Wide, Wide, Wide]:
    high, low, bound = parts[0]
    for more, less, more_bound in parts[1:]:
        high, e = two_sum(high, more)
        low, e1 = two_sum(low, less)
        low, e2 = two_sum(low, e)
        bound = bound + more_bound + np.abs(e1) + np.abs(e2)
    return high, low, bound * SLACK
