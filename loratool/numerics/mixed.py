"""Deltas of updates that multiply a weight by matrices, so that numbers of a row or of a column mix, as OFT's do.

X = W + D, and D is W M by blocks of columns, or M W by blocks of rows, with W as it is stored. `Mixing` is the update
of all rows. On the way back W is predicted from W' by the inverse matrices; the undo file has the steps from there.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from .arrays import Array, Kind, Numbers, sent, widen
from .composed import Scaled
from .decide import LEAST, SLACK, Delta, DenseDelta, Factor, U
from .dense import largest_of
from .derived import derived_numbers
from .error_free import two_product, two_sum
from .forms import Bits, Positions, Wide, wide
from .products import GATHER, LEAST_OF, UNIT_OF
from .stored import Stored, Sum

RANGE = 2.0**300  # a pair with numbers beyond it, or its inverse, is left to the fractions
MOST = 2.0**20  # an inverse with larger numbers predicts nothing


class Mixed:
    """D of some rows, by blocks of b columns (`axis` 1) or rows (0); what a last block lacks of b is 0.

    Args:
        base: W, (rows, n), finite. If rows mix, these are whole blocks, but for the last one.
        matrices: M in float64, (P, Q, b, b), for each block of b rows and of b columns; 1 in place of P or Q for one
            that all blocks share. D is W @ M (axis 1) or M @ W (axis 0).
        first: the first row's number, for P.
    """

    def __init__(self, base: Numbers, matrices: Wide, axis: int, first: int = 0) -> None:
        self.shape = base.shape[0], base.shape[1]
        self._matrices, self._axis, self._size = matrices, axis, matrices.shape[-1]
        self._first = first if len(matrices) > 1 else 0
        self._form = base.form
        self._largest = largest_of(base)
        pad = [(0, -self.shape[k] % self._size if k == axis else 0) for k in range(2)]
        self._bits: Bits = np.pad(base.host(), pad) if any(end for _, end in pad) else base.host()
        self.largest = max(self._largest, float(np.abs(matrices).max(initial=0.0)))

    @cached_property
    def _factors(self) -> Wide:
        """The columns of the matrices if columns mix, else the rows, one below the other."""
        M = self._matrices.swapaxes(2, 3) if self._axis else self._matrices
        return np.ascontiguousarray(M).reshape(-1, self._size)

    def dense(self, kind: Kind, like: Array) -> DenseDelta:
        x = widen(Numbers(self._bits, self._form), np.empty(self._bits.shape, kind))
        with np.errstate(all="ignore"):
            matrices = self._matrices.astype(kind)
            sizes = self._sizes(x) * (1 + self._size * 2 * UNIT_OF[kind])  # in which W's norms are rounded
            sizes = sizes * SLACK + LEAST_OF[kind] ** 0.5
            most = 1 + self._largest + float(np.abs(self._matrices).max(initial=0.0))
            errors = (self._size + 8) * UNIT_OF[kind] * sizes + 4 * self._size * LEAST_OF[kind] * most
            errors = np.where(np.isnan(errors), np.inf, errors)

        def fill(rows: slice, shift: Any, out: Array) -> None:
            found = out if isinstance(out, np.ndarray) else np.empty(tuple(out.shape), kind)
            (self._by_columns if self._axis else self._by_rows)(x, matrices, rows, found)
            if found is not out:
                out[...] = sent(found, like)
            out += shift

        return DenseDelta(sizes, errors, fill)

    def _sizes(self, x: Array) -> Wide:
        """Return an upper bound of |D| in each row. x: W, padded."""
        b = self._size
        if self._axis:
            blocks = x.reshape(len(x), -1, b)
            norms = np.sqrt(np.einsum("ijk,ijk->ij", blocks, blocks)).astype(np.float64)  # (rows, blocks)
            most = np.sqrt(np.square(self._matrices).sum(2)).max(2)  # of the columns of a matrix, (P, Q)
            sizes: Wide = (norms * most[self._of_rows(np.arange(len(x)))]).max(1, initial=0.0)
            return sizes
        blocks = x.reshape(-1, b, x.shape[1])
        norms = np.sqrt(np.einsum("ijk,ijk->ik", blocks, blocks)).max(1).astype(np.float64)  # of a block
        rows = np.arange(self.shape[0])
        of_rows = np.sqrt(np.square(self._matrices).sum(3)).max(1)[self._of_rows(rows), rows % b]
        sizes = norms[rows // b] * of_rows
        return sizes

    def _of_rows(self, i: Positions) -> Positions:
        """Return which matrices, along the first axis, belong to rows."""
        return (self._first + i) // self._size if len(self._matrices) > 1 else np.zeros_like(i)

    def _by_columns(self, x: Array, matrices: Array, rows: slice, out: Array) -> None:
        b, part = self._size, x[rows]
        whole = out if part.shape == out.shape else np.empty(part.shape, out.dtype)
        if len(matrices) > 1:
            start = self._first + (rows.start or 0)
            for first, last in _runs(start, start + len(part), b):
                here = slice(first - start, last - start)
                np.matmul(part[here].reshape(-1, b), matrices[first // b, 0], out=whole[here].reshape(-1, b))
        elif matrices.shape[1] == 1:
            np.matmul(part.reshape(-1, b), matrices[0, 0], out=whole.reshape(-1, b))
        else:
            blocks, found = (each.reshape(len(part), -1, b).swapaxes(0, 1) for each in (part, whole))
            np.matmul(blocks, matrices[0], out=found)
        if whole is not out:
            out[...] = whole[:, : out.shape[1]]

    def _by_rows(self, x: Array, matrices: Array, rows: slice, out: Array) -> None:
        b, start = self._size, rows.start or 0
        for first, last in _runs(start, start + len(out), b):
            of = matrices[(self._first + first) // b if len(matrices) > 1 else 0]
            of = of[:, first % b : first % b + last - first]
            block, part = x[first // b * b : first // b * b + b], out[first - start : last - start]
            if len(of) == 1:
                np.matmul(of[0], block, out=part)
            else:
                found = np.matmul(of, block.reshape(b, -1, b).swapaxes(0, 1))
                part[...] = found.swapaxes(0, 1).reshape(part.shape)

    def _gathered(self, i: Positions, j: Positions) -> tuple[Wide, Wide]:
        """Return the numbers of W and of M whose products D sums, (count, b) each."""
        b = self._size
        p, q = self._of_rows(i), j // b if self._matrices.shape[1] > 1 else np.zeros_like(j)
        place = (p * self._matrices.shape[1] + q) * b + (j if self._axis else i) % b
        columns = self._bits.shape[1]
        run = i * (columns // b) + j // b if self._axis else i // b * columns + j
        return wide(self._bit_runs.take(run, 0), self._form), self._factors.take(place, 0)

    @cached_property
    def _bit_runs(self) -> Bits:
        """W's numbers that mix, side by side, (runs, b)."""
        b = self._size
        if self._axis:
            return self._bits.reshape(-1, b)
        turned = self._bits.reshape(-1, b, self._bits.shape[1]).swapaxes(1, 2)
        return np.ascontiguousarray(turned).reshape(-1, b)

    def near(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        found, bound = np.empty(len(i)), np.empty(len(i))
        for part in _parts(len(i), self._size):
            x, m = self._gathered(i[part], j[part])
            np.einsum("ij,ij->i", x, m, out=found[part])
            size = np.sqrt(np.einsum("ij,ij->i", x, x)) * np.sqrt(np.einsum("ij,ij->i", m, m))
            bound[part] = np.where(_is_zero(x, m), 0.0, ((self._size + 8) * U * size + LEAST) * SLACK)
        bound[~np.isfinite(found)] = np.inf
        return np.where(bound > 0, found, 0.0), np.zeros(len(i)), bound

    def nearer(self, i: Positions, j: Positions) -> tuple[Wide, Wide, Wide]:
        high, low, bound = np.zeros((3, len(i)))
        for part in _parts(len(i), self._size):
            x, m = self._gathered(i[part], j[part])
            s, rest, size = np.zeros((3, len(x)))
            for k in range(self._size):
                product, e = two_product(x[:, k], m[:, k])
                s, e1 = two_sum(s, product)
                rest, size = rest + (e + e1), size + np.abs(product)
            most, least = ((np.where(each == 0, 1.0, np.abs(each))) for each in (x, m))
            usual = [(each < RANGE).all(1) & (each > 1 / RANGE).all(1) for each in (most, least)]
            off = ((self._size + 4) * U) ** 2 * size * SLACK + LEAST
            high[part], low[part] = s, rest
            bound[part] = np.where(_is_zero(x, m), 0.0, np.where(usual[0] & usual[1], off, np.inf))
        return high, low, bound

    def exact(self, i: int, j: int) -> Fraction:
        x, m = self._gathered(np.array([i]), np.array([j]))
        return sum((Fraction(a) * Fraction(c) for a, c in zip(x[0].tolist(), m[0].tolist(), strict=True)), Fraction(0))


def _runs(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Return the ends of the runs into which multiples of `size` divide start:stop."""
    edges = [start, *range((start // size + 1) * size, stop, size), stop]
    return list(pairwise(edges)) if start < stop else []


def _parts(count: int, width: int) -> list[slice]:
    step = max(1, GATHER // width)
    return [slice(k, k + step) for k in range(0, count, step)]


def _is_zero(x: Wide, m: Wide) -> Any:
    """Return where all products are 0, by the numbers themselves, so that a flushed one does not count."""
    mask = np.int64(2**63 - 1)
    return ~((x.view(np.int64) & mask != 0) & (np.ascontiguousarray(m).view(np.int64) & mask != 0)).any(1)


@dataclass(frozen=True)
class Mixing:
    """X = (1 - w) W + w s (W + M(W)) + w V, with M(W) as `Mixed` has it. All are as the base stores the weight.

    Attributes:
        matrices: M, (P, Q, b, b).
        axis: 1 if the numbers of a row mix, 0 those of a column.
        weight: w.
        scales: s, a number for each row or column; None for 1.
        scales_axis: 0 for a number for each row.
        added: V, (rows, n) or a row or column of blocks that repeat along the other axis; None for 0.
        is_rotation: 1 + M is orthogonal, so that its inverse needs no computing.
    """

    matrices: Wide
    axis: int
    weight: float = 1.0
    scales: Wide | None = None
    scales_axis: int = 0
    added: Numbers | None = None
    is_rotation: bool = False

    @property
    def T(self) -> Mixing:
        """The same for a base that stores the weight transposed."""
        added = None if self.added is None else self.added.T
        return replace(
            self,
            matrices=np.ascontiguousarray(self.matrices.transpose(1, 0, 3, 2)),
            axis=1 - self.axis,
            scales_axis=1 - self.scales_axis,
            added=added,
        )

    def change(self, base: Numbers, first: int) -> Delta:
        """Return X - W of rows from row `first` on. base: their W."""
        w = Fraction(self.weight)
        mixed = Mixed(base, self.matrices, self.axis, first)
        if self.scales is None:
            parts = [_scaled(mixed, [w], base, first)]
        else:
            s = [w * Fraction(x) for x in self.scales.tolist()]
            parts = [self._by_scales(mixed, s, base, first)]
            parts.append(self._by_scales(Stored(base, 1.0), [x - w for x in s], base, first))
        return _summed(parts + self._value(base, first))

    def undone(self, merged: Numbers, first: int) -> Delta:
        """Return what to subtract from W' of rows from row `first` on, to be near W."""
        back = self._back
        if self.scales is None:
            parts: list[Delta] = [Mixed(merged, -back, self.axis, first)]
            return _summed(parts + self._value(merged, first))
        inverse = self._inverse_scales
        mixed, s = Mixed(merged, -back, self.axis, first), [Fraction(x) for x in inverse.tolist()]
        parts = [self._by_scales(Stored(merged, 1.0), [1 - x for x in s], merged, first)]
        parts.append(mixed if self.scales_axis == self.axis else self._by_scales(mixed, s, merged, first))
        return _summed(parts)

    @cached_property
    def _inverse_scales(self) -> Wide:
        """1 / (1 - w + w s), or 1 where that cannot be; any numbers will do that all machines agree on."""
        assert self.scales is not None
        a = (1 - self.weight) + self.weight * self.scales
        with np.errstate(all="ignore"):
            inverse: Wide = np.where(np.abs(a) > 1 / MOST, 1 / a, 1.0)
        return inverse

    @cached_property
    def _back(self) -> Wide:
        """(1 + w M)^-1 - 1 of each matrix, the nearest float64 numbers; 0 where an inverse is none or too large."""
        M, shape = self.matrices, self.matrices.shape
        if self.is_rotation and self.weight == 1:
            back = M.swapaxes(2, 3)
        else:
            w = Fraction(self.weight)
            flat = M.reshape(-1, *shape[2:])
            back = np.zeros_like(flat)
            changed = np.flatnonzero(flat.any((1, 2)))
            try:
                back[changed] = derived_numbers(lambda x: (x.unit() + x * w).inverse() - x.unit(), [flat[changed]])
            except ValueError:
                for k in changed:
                    back[k] = _inverse_or_zero(flat[k], w)
            back[np.abs(back).max((1, 2), initial=0.0) > MOST] = 0.0
            back = back.reshape(shape)
        if self.scales is None or self.scales_axis != self.axis:
            return back
        b = shape[-1]
        inverse = np.append(self._inverse_scales, np.zeros(-len(self.scales) % b)).reshape(-1, 1, b)
        # W' is first divided by s, whose numbers are those of the axis that mixes
        scaled: Wide = back * (inverse.reshape(1, -1, b, 1) if self.axis else inverse[:, :, None])
        return scaled

    def _by_scales(self, delta: Delta, numbers: list[Fraction], base: Numbers, first: int) -> Delta:
        if self.scales_axis == 0:
            return Scaled(delta, Factor.of_rows(numbers[first : first + len(base)]))
        return Scaled(delta, Factor.of_columns(numbers))

    def _value(self, base: Numbers, first: int) -> list[Delta]:
        """Return V of some rows."""
        if self.added is None:
            return []
        rows, columns = np.arange(first, first + len(base)), np.arange(base.shape[1])
        bits = self.added.bits[np.ix_(rows % len(self.added), columns % self.added.shape[1])]
        return [Stored(Numbers(bits, self.added.form), self.weight)]


def _inverse_or_zero(matrix: Wide, w: Fraction) -> Wide:
    back = np.zeros_like(matrix)
    with suppress(ValueError):
        back[:] = derived_numbers(lambda x: (x.unit() + x * w).inverse() - x.unit(), [matrix[None]])[0]
    return back


def _scaled(delta: Delta, ratio: list[Fraction], base: Numbers, first: int) -> Delta:
    return delta if ratio == [1] else Scaled(delta, Factor.of_rows(ratio * len(base)))


def _summed(parts: list[Delta]) -> Delta:
    return parts[0] if len(parts) == 1 else Sum(parts)
