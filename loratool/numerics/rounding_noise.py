"""Bound the singular values that rounding errors alone can have, so that larger ones must be something else.

The rounding error of a number is uniform up to half a step of its type, which is a variance of step^2 / 12. The step is
known from the number, and larger for larger numbers. So each row and each column has its own sum of variances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .forms import Form, Wide

Floats = npt.NDArray[np.float32] | Wide

# bytes of a float -> the integer of its bits, those of its exponent
_EXPONENTS: dict[int, tuple[type, int]] = {4: (np.int32, 0x7F800000), 8: (np.int64, 0x7FF << 52)}

LEAST = 1e-20  # smaller sums of squares may lack terms that underflowed in float32


@dataclass(frozen=True)
class RoundingNoise:
    """The variances of the errors of a matrix (m, n), summed over its rows and over its columns, in float64."""

    rows: Wide  # (m,)
    columns: Wide  # (n,)

    @property
    def energy(self) -> float:
        """The mean of the square of the errors' norm."""
        return float(self.rows.sum())

    def edge(self) -> float:
        """Return an upper bound of the largest singular value of such errors.

        It is sqrt(max row) + sqrt(max column) (Bandeira and van Handel, Annals of Probability 44, 2016, theorem 3.1),
        for even variances sigma^2 the edge sigma (sqrt(m) + sqrt(n)) of Marchenko and Pastur's law. About this the
        largest value varies by n^(-2/3) of it (Johnstone, Annals of Statistics 29, 2001, theorem 1.1), n the smaller
        side, and is above it by as much more in one of a thousand matrices.
        """
        largest = math.sqrt(float(self.rows.max())) + math.sqrt(float(self.columns.max()))
        return largest * (1 + math.pow(min(len(self.rows), len(self.columns)), -2 / 3))

    def at_most(self, energy: float) -> RoundingNoise:
        """Return the noise, scaled down if its energy exceeds `energy`, that of the matrix that contains the errors."""
        share = min(1.0, energy / self.energy) if self.energy else 1.0
        return RoundingNoise(self.rows * share, self.columns * share)

    def __add__(self, other: RoundingNoise) -> RoundingNoise:
        return RoundingNoise(self.rows + other.rows, self.columns + other.columns)


def below_one_another(parts: Sequence[RoundingNoise]) -> RoundingNoise:
    """Return the noise of several matrices, one below the other."""
    return RoundingNoise(np.concatenate([part.rows for part in parts]), np.sum([p.columns for p in parts], 0))


@np.errstate(over="ignore", under="ignore")
def noise_of_steps(steps: Floats) -> RoundingNoise:
    """Return the noise of numbers (m, n) that were rounded with these steps."""
    squares = np.square(steps)
    rows, columns = (squares.sum(axis).astype(np.float64) for axis in (1, 0))
    if steps.dtype != np.float64 and not LEAST < float(rows.sum()) < math.inf:
        return noise_of_steps(steps.astype(np.float64))
    return RoundingNoise(rows / 12, columns / 12)


def float_steps(x: Floats, form: Form) -> Floats:
    """Return the distance between neighboring numbers of a type at each x. It overwrites x.

    Args:
        x: contiguous.
        form: of the type that x was stored in.
    """
    integer, exponents = _EXPONENTS[x.itemsize]
    bits: npt.NDArray[Any] = x.view(integer)
    bits &= integer(exponents)  # 2^exponent: frexp takes ten times as long
    np.maximum(x, x.dtype.type(2.0**form.least), out=x)
    x *= x.dtype.type(2.0 ** (1 - form.precision))
    return x


def product_noise_edge(B: Wide, A: Wide, forms: tuple[Form, Form]) -> float:
    """Return an upper bound of ||B' A' - B A||, where B (m, r) and A (r, n) are roundings of B' and A'.

    By Weyl's inequality, a larger singular value of B A belongs to one of B' A' that is not 0. The norm is at most
    ||dB|| ||A|| + ||B|| ||dA|| + ||dB|| ||dA||.

    Args:
        forms: of the types of B and of A.
    """
    (norm_B, dB), (norm_A, dA) = (_norm_and_noise(x, form) for x, form in zip((B, A.T), forms, strict=True))
    return dB * norm_A + (norm_B + dB) * dA


def _norm_and_noise(x: Wide, form: Form) -> tuple[float, float]:
    """Return ||x|| and the edge of its rounding noise, also where squares would overflow float64. x: (n, r)."""
    scale = 2.0 ** (math.frexp(float(np.abs(x).max()))[1] - 1)
    steps, x = float_steps(np.array(x, order="C"), form) / scale, x / scale
    norm = math.sqrt(max(0.0, float(np.linalg.eigvalsh(x.T @ x)[-1])))
    return norm * scale, noise_of_steps(steps).edge() * scale


def unknown_noise_edge(S: Wide, shape: tuple[int, int]) -> float:
    """Return the threshold for noise of unknown size that is uniform over the matrix.

    Most singular values must be noise. The threshold is omega(beta) times their median (Gavish and Donoho, IEEE
    Transactions on Information Theory 60, 2014, equation 5).

    Args:
        S: all singular values of a matrix of this shape, in any order.
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return omega * float(np.median(S))
