"""Sum cosines over an (m, n) weight (FourierFT): D[x, y] = scale * sum of s cos(2 pi (u x / m + v y / n)).

By the addition theorem a cosine is cos a cos b - sin a sin b, with a of the row and b of the column. These are the
numbers of `trigonometry`, and define D: their products and sums are exact. Each row is computed by an FFT.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from .arrays import Numbers
from .decide import U
from .error_free import halves
from .exact_factors import multiply_exactly
from .forms import IntArray, Positions, Wide
from .transforms import TransformedRows
from .trigonometry import cosines_and_sines

# An FFT is off by this share of the norm of its result at most, 1024 u: the error is a few u for each factor of the
# length, or some hundred u if a prime factor is large (Higham, Accuracy and Stability of Numerical Algorithms, 24.1).
FFT_ERROR = 2.0**-43


class Cosines:
    """A sum of cosines.

    Args:
        value: (k,), s.
        down, across: k each, u and v.
        shape: (m, n).

    Raises:
        ValueError: a float64 number is too small or large, as for `multiply_exactly`.
    """

    def __init__(
        self, value: Numbers, down: IntArray, across: IntArray, shape: tuple[int, int], scale: Fraction
    ) -> None:
        mirrored = 2 * across > shape[1]  # to -u and -v, which have the same cosine: half of the columns are left
        down, across = np.where(mirrored, -down % shape[0], down), np.where(mirrored, shape[1] - across, across)
        order = np.argsort(across, kind="stable")
        self.shape, self.scale = shape, scale
        self.down, self.across = down[order], across[order]
        self.parts = [x.wide()[order] for x in multiply_exactly(value, Numbers.of(np.ones(1, np.float32)))]
        self.value = value.wide()[order]
        self.columns, self.firsts = np.unique(self.across, return_index=True)
        self.share = np.where((self.columns == 0) | (2 * self.columns == shape[1]), 1.0, 0.5)  # the mirror has the rest
        sums = np.add.reduceat(np.abs(self.value), self.firsts)
        self.size = float(sums.sum())
        norm = float(np.sqrt(np.square(sums).sum())) * shape[1] ** 0.5  # of a row, at most
        most = int(np.diff(self.firsts, append=len(order)).max())  # numbers of a column
        # the second part is of the products and sums of a column's numbers, and of the tables
        self.error = FFT_ERROR * norm + (most + 16) * U * self.size
        (c, s), self.of_columns = cosines_and_sines(shape[0]), cosines_and_sines(shape[1])
        self.of_rows = c + 1j * s

    def rows(self, start: int, stop: int) -> CosineRows:
        return CosineRows(self, start, stop)


class CosineRows(TransformedRows):
    """Some rows of a sum of cosines."""

    def __init__(self, cosines: Cosines, start: int, stop: int) -> None:
        sizes, errors = (np.full(stop - start, x) for x in (cosines.size, cosines.error))
        super().__init__(start, stop, cosines.shape[1], cosines.scale, 2 * len(cosines.value), sizes, errors)
        self._cosines = cosines

    def _transform(self, start: int, stop: int) -> Wide:
        of, width = self._cosines, self.shape[1]
        turned = of.of_rows[self._phases(np.arange(start, stop))] * of.value
        spectrum = np.zeros((stop - start, width // 2 + 1), np.complex128)
        spectrum[:, of.columns] = np.add.reduceat(turned, of.firsts, axis=1) * of.share
        rows: Wide = np.fft.irfft(spectrum, width, axis=1, norm="forward")
        return rows

    def _factors(self, i: Positions, j: Positions) -> tuple[list[Wide], Wide]:
        of = self._cosines
        turned, across = of.of_rows[self._phases(i)], j[:, None] * of.across % self.shape[1]
        left = np.concatenate([turned.real, -turned.imag], axis=1)
        right = np.concatenate([table[across] for table in of.of_columns], axis=1)
        return [np.tile(part, 2) * half for part in of.parts for half in halves(left)], right

    def _are_empty(self, i: Positions, j: Positions) -> npt.NDArray[np.bool_]:
        return np.full(len(i), self._cosines.size == 0)

    def _phases(self, i: Positions) -> Positions:
        """Return u x modulo m, (rows, k)."""
        phases: Positions = (self._start + i)[:, None] * self._cosines.down % self._cosines.shape[0]
        return phases
