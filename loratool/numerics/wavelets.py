"""Undo one step of a wavelet transform: D = scale * sum over a and b of L_b S_ab R_a, for a sparse S (WaveFT).

S is as large as the weight. It is centred in a matrix that has F - 2 more rows and columns, F being the length of the
filters, and one more where a side is odd. S_ab are the quarters of that matrix: a is 1 for the lower two, b for the
right two. b tells the filter along the rows and a that along the columns, as in PEFT. A quarter's number at (t, q)
counts in the rows from 2 t up to 2 t + F - 1, and so many columns; F - 2 are cut off on either side of the sum. Defined
by `peft/tuners/waveft/layer.py` and `waverec2d.py`.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .arrays import Numbers
from .decide import U
from .error_free import halves
from .exact_factors import multiply_exactly
from .forms import IntArray, Positions, Wide
from .transforms import TransformedRows


class Wavelets:
    """A weight made of wavelets.

    Args:
        value: (k,), the numbers of S.
        rows, columns: k each, their places in S, none of them twice.
        shape: of the weight.
        filters: (2, F), the low-pass and the high-pass one.

    Raises:
        ValueError: a float64 number is too small or large, as for `multiply_exactly`.
    """

    def __init__(
        self,
        value: Numbers,
        rows: IntArray,
        columns: IntArray,
        shape: tuple[int, int],
        filters: Wide,
        scale: Fraction,
    ) -> None:
        multiply_exactly(value, Numbers.of(np.ones(1, np.float32)))  # it raises
        self.shape, self.filters, self.scale, self.is_double = shape, filters, scale, value.form.precision == 53
        self.reach = filters.shape[1] // 2  # numbers of a quarter that count for one of the weight, along a side
        self.sides = tuple((side + 1) // 2 + self.reach - 1 for side in shape)  # of a quarter
        (a, t), (b, q) = (
            divmod(each + (self.reach - 1), side) for each, side in zip((rows, columns), self.sides, strict=True)
        )
        order = np.argsort(t, kind="stable")
        self.t, self.value, self.places = t[order], value.wide()[order], tuple(x[order] for x in (a, q, b))

    def rows(self, start: int, stop: int) -> WaveletRows:
        return WaveletRows(self, start, stop)


class WaveletRows(TransformedRows):
    """Some rows of a weight made of wavelets."""

    def __init__(self, wavelets: Wavelets, start: int, stop: int) -> None:
        reach, first = wavelets.reach, start // 2
        count = (stop - 1) // 2 - first + reach  # of the quarters' rows
        some = slice(*np.searchsorted(wavelets.t, (first, first + count)))
        a, q, b = (each[some] for each in wavelets.places)
        self._wavelets, self._quarters = wavelets, np.zeros((2, wavelets.sides[1], 2, count))  # (a, q, b, t)
        self._quarters[a, q, b, wavelets.t[some] - first] = wavelets.value[some]
        filters = np.abs(wavelets.filters)
        most = np.abs(self._quarters).max(1, initial=0.0)  # (a, b, t)
        along_columns = filters.reshape(2, reach, 2).sum(1).max(1)  # sums of a filter's sizes, at most
        sizes = _undo_step((along_columns[:, None, None] * most).sum(0), filters, start, stop)
        errors = (4 * reach + 8) * U * sizes  # along either side, 2 * reach products are summed
        super().__init__(start, stop, wavelets.shape[1], wavelets.scale, 4 * reach**2, sizes, errors)

    def _transform(self, start: int, stop: int) -> Wide:
        return self._undo(self._quarters, self._wavelets.filters, start, stop)

    def _undo(self, quarters: Wide, filters: Wide, start: int, stop: int) -> Wide:
        start, stop, first = self._start + start, self._start + stop, self._start // 2
        of_rows = slice(start // 2 - first, (stop - 1) // 2 - first + self._wavelets.reach)
        columns = _undo_step(quarters[..., of_rows], filters, 0, self.shape[1])  # (n, b, t)
        return _undo_step(np.ascontiguousarray(columns.transpose(1, 2, 0)), filters, start, stop)

    @cached_property
    def _empty(self) -> npt.NDArray[np.bool_]:
        """Where all summands are 0, (rows, n)."""
        sizes = self._undo(np.abs(self._quarters), np.abs(self._wavelets.filters), 0, self.shape[0])
        empty: npt.NDArray[np.bool_] = sizes == 0
        return empty

    def _are_empty(self, i: Positions, j: Positions) -> npt.NDArray[np.bool_]:
        return self._empty[i, j] if len(i) else np.zeros(0, np.bool_)

    def _factors(self, i: Positions, j: Positions) -> tuple[list[Wide], Wide]:
        filters, first = self._wavelets.filters, self._start // 2
        a, b, t, q = np.ogrid[:2, :2, : self._wavelets.reach, : self._wavelets.reach]
        i, j = ((self._start + i)[:, None, None, None, None], j[:, None, None, None, None])
        values = self._quarters[a, j // 2 + q, b, i // 2 - first + t]
        of_rows, of_columns = filters[b, i % 2 - 2 - 2 * t], filters[a, j % 2 - 2 - 2 * q]
        parts = halves(values) if self._wavelets.is_double else (values,)
        lefts = [(part * half).reshape(len(i), -1) for part in parts for half in halves(of_rows)]
        return lefts, np.broadcast_to(of_columns, values.shape).reshape(len(i), -1)


def _undo_step(x: Wide, filters: Wide, start: int, stop: int) -> Wide:
    """Return numbers start:stop along a side of the sum of a low and a high part, (stop - start, ...).

    Args:
        x: (2, n, ...), both parts from number start // 2 on.
    """
    total = np.zeros((stop - start, *x.shape[2:]))
    for first in range(min(2, stop - start)):
        into, parity, skip = total[first::2], (start + first) % 2, (start + first) // 2 - start // 2
        for part, of_part in zip(x, filters, strict=True):
            for k in range(len(of_part) // 2):
                into += of_part[parity - 2 - 2 * k] * part[skip + k : skip + k + len(into)]
    return total
