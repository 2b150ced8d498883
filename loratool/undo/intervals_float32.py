"""Find the results of `intervals.candidates` for 16-bit weights at a fraction of its cost, with a float32 filter.

The record is the same: if float32 cannot decide an end of an interval, the exact D does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import torch

from ..numerics.filtered import MOST, FilteredTile, Positions, Told
from .intervals import Array, FloatFormat, ambiguous, candidates, pack, widths

CHUNK = 1 << 14  # weights at a time, so that they stay in a core's cache


Floats = npt.NDArray[np.float32]


class Estimates:
    """The ambiguous weights of a block, by cells of `height` rows and `width` columns.

    Each has its flat position in the block, its |W| as an ordinal, the bit pattern of W', and D + shift, which is nan
    if float32 could not decide W'.
    """

    def __init__(self, form: FloatFormat, height: int, width: int) -> None:
        self._form, self._height, self._width = form, height, width
        self._cells: dict[tuple[int, int], list[tuple[Positions, Array, Array, Floats]]] = {}  # of some tiles each
        self._rows = self._size = 0

    def add(self, tile: FilteredTile) -> None:
        form, (rows, columns) = self._form, tile.before.shape
        magnitude, code = tile.before.view(form.code) & form.magnitude, tile.after.view(form.code)
        exponent = code & form.exponent
        tile.change[tile.at] = np.nan
        exponent.reshape(-1)[tile.at] = form.exponent  # of no finite weight, so that these are among the hits
        start = 0
        while start < rows:  # those rows of the tile that lie in one row of cells
            row = (self._rows + start) // self._height
            stop = min((row + 1) * self._height - self._rows, rows)
            at, ends = self._hits(exponent[start:stop], magnitude[start:stop])
            at += start * columns
            weight, result, change = magnitude.take(at), code.take(at), tile.change.take(at)
            at += self._size
            for column, (left, right) in enumerate(pairwise([0, *ends])):
                part = slice(left, right)
                found = at[part], weight[part], result[part], change[part]
                self._cells.setdefault((row, column), []).append(found)
            start = stop
        self._rows += rows
        self._size += rows * columns
        self._shift, self._error = tile.shift, tile.error

    def _hits(self, exponent: Array, magnitude: Array) -> tuple[Positions, list[int]]:
        """Return where `exponent` >= `magnitude`, cell by cell, and where each cell ends among these positions."""
        rows, columns = exponent.shape
        cells, shift = -(-columns // self._width), (min(self._width, columns) - 1).bit_length()
        hit, by_cell = exponent >= magnitude, Flags((cells, rows, 1 << shift))
        for cell in range(cells):
            part = hit[:, cell * self._width : (cell + 1) * self._width]
            by_cell.values[cell, :, : part.shape[1]] = part
        at = by_cell.positions()
        ends = np.searchsorted(at, np.arange(1, cells + 1) * (rows << shift)).tolist()
        at += (at >> shift) * (columns - (1 << shift))
        for cell, (start, end) in enumerate(pairwise([0, *ends])):
            at[start:end] -= cell * (rows * columns - self._width)
        return at, ends

    def wanted(self) -> tuple[Positions, Positions] | None:
        """Return the flat positions of the weights whose exact D is needed, and the places among them of those that
        float32 could not decide; None if there are so many that computing all exactly is cheaper.
        """
        at, self._weight, code, change = (np.concatenate(side) for side in zip(*chain(*self._sorted()), strict=True))
        change -= np.float32(self._shift)
        self._first, self._most = np.empty((2, len(at)), np.int32)
        sure = np.empty(len(at), np.bool_)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(at), CHUNK):
                part = slice(start, start + CHUNK)
                found = self._first[part], self._most[part], sure[part]
                _interval(code[part], change[part], self._error, self._form, *found)
        self._unsure = np.flatnonzero(~sure)
        if len(self._unsure) * MOST > self._size:
            return None
        return at[self._unsure], np.flatnonzero(np.isnan(change[self._unsure]))

    def _sorted(self) -> list[list[tuple[Positions, Array, Array, Floats]]]:
        return [self._cells[place] for place in sorted(self._cells)]

    def encode(self, told: Told) -> Iterator[tuple[bytes, Array]]:
        """Return each cell's packed indices of the ambiguous weights among their candidates, and its raw patterns."""
        form, first, most = self._form, self._first, self._most
        before, after = told.before.view(form.code), told.after.view(form.code)
        maybe = (after & form.exponent) >= (before & form.magnitude)
        maybe[told.near] = True
        some = np.flatnonzero(maybe)
        c, before, after = told.exact(some), before[some], after[some]
        at = ambiguous(after, before, np.arange(len(some)), c, form)
        found = candidates(after, None, c, at, form)
        most[self._unsure] = 0
        place = self._unsure[some[at]]
        first[place], most[place] = found.low, found.most
        ends = np.cumsum([sum(len(tile[0]) for tile in cell) for cell in self._sorted()])
        packed = pack(self._weight - first, widths(most), ends.tolist())
        raw = at[found.raw]
        raws = np.split(before[raw], np.searchsorted(self._unsure[some[raw]], ends))[:-1]
        return zip(packed, raws, strict=True)


class Flags:
    """An array of booleans, false at first, that finds true values at random positions faster than numpy does."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = math.prod(shape)
        self._size = -(-size // 8) * 8
        # numpy looks at each without a branch where a tenth is true, and else stumbles over each that is
        self._flat = np.ones(self._size + self._size // 8 + 8, np.bool_)
        self._flat[: self._size] = False
        self.values = self._flat[:size].reshape(shape)

    def positions(self) -> Positions:
        """Return what `numpy.flatnonzero` returns for `values`."""
        flat = self._flat[: self._size]
        if self._size <= 64 or np.count_nonzero(flat) * 12 >= self._size:
            return np.flatnonzero(self._flat)[: self._size - len(self._flat)]
        octets = flat.view(np.uint64)
        words = Flags(octets.shape)
        np.not_equal(octets, 0, out=words.values)
        some = words.positions()
        inner = Flags((8 * len(some),))
        octets.take(some, out=inner.values.view(np.uint64))
        inside = inner.positions()
        return (some.take(inside >> 3) << 3) + (inside & 7)


def _interval(
    code: Array, c: Floats, error: float, form: FloatFormat, low: Array, most: Array, known: npt.NDArray[np.bool_]
) -> None:
    """Write the first ordinal that W can be, how many more, and whether both are sure. c: D to within `error`.

    W lies between the middles beside W', less D. Moved outward by all that float32 rounds, each end must lie between
    the same two numbers as when moved inward. Near 0 and at the ends of the range nothing is sure.
    """
    shift = 23 - form.mantissa
    value = torch.from_numpy(code).view(torch.bfloat16 if form.mantissa == 7 else torch.float16).float().numpy()
    bits, half = value.view(np.int32), 1 << (shift - 1)
    inner, outer = (bits - half).view(np.float32), (bits + half).view(np.float32)
    inner -= c
    outer -= c
    sure = np.equal(inner < 0, outer < 0, out=known)
    np.abs(inner, out=inner)
    np.abs(outer, out=outer)
    near, far = np.minimum(inner, outer), np.maximum(inner, outer, out=outer)
    reach = np.multiply(far, np.float32(2.0**-21), out=inner)
    reach += np.float32(error)
    first, last = ((end + reach).view(np.int32) for end in (near, far))
    first >>= shift
    last >>= shift
    np.abs(value, out=value)
    value *= np.float32(2.0**-7)
    sure &= near > value
    for end, found in ((near, first), (far, last)):
        end -= reach
        inward = end.view(np.int32)
        inward >>= shift
        sure &= inward == found
    least, offset = 1 << form.mantissa, (127 - form.bias) << form.mantissa
    size = code & form.magnitude
    sure &= (size > least) & (size < form.exponent - least)  # below, steps do not shrink; the last binade's are raw
    sure &= (first >= least + offset) & (last < form.exponent + offset)
    np.add(first, 1 - offset, out=low)
    last -= first
    np.subtract(last, 1, out=most)
