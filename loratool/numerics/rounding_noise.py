"""Bound the singular values that rounding errors alone can have, so that larger ones must be something else.

The rounding error of a number is uniform up to half a step of its type, which is a variance of step^2 / 12. The step is
known from the number, and larger for larger numbers. So each row and each column has its own sum of variances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# a type's name in safetensors -> (mantissa bits, least exponent of a normal number)
FLOAT_STEPS = {
    "BF16": (7, -126), "F16": (10, -14), "F32": (23, -126), "F64": (52, -1022), "F8_E4M3": (3, -6), "F8_E5M2": (2, -14),
}  # fmt: skip

_EXPONENTS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}  # their bits

LEAST = 1e-20  # smaller sums of squares may lack terms that underflowed in float32


@dataclass(frozen=True)
class RoundingNoise:
    """The variances of the errors of a matrix (m, n), summed over its rows and over its columns, in float64."""

    rows: Tensor  # (m,)
    columns: Tensor  # (n,)

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
    return RoundingNoise(torch.cat([part.rows for part in parts]), torch.stack([p.columns for p in parts]).sum(0))


def noise_of_steps(steps: Tensor) -> RoundingNoise:
    """Return the noise of numbers (m, n) that were rounded with these steps."""
    squares = steps.square()
    rows, columns = squares.sum(1).double(), squares.sum(0).double()
    if steps.dtype != torch.float64 and not LEAST < float(rows.sum()) < math.inf:
        return noise_of_steps(steps.double())
    return RoundingNoise(rows / 12, columns / 12)


def float_steps(x: Tensor, dtype: str) -> Tensor:
    """Return the distance between neighboring numbers of a type at each x. It overwrites x.

    Args:
        x: contiguous, in float32 or float64.
        dtype: a key of FLOAT_STEPS, the type that x was stored in.
    """
    mantissa, least = FLOAT_STEPS[dtype]
    bits, exponents = _EXPONENTS[x.dtype]
    steps: Tensor = x.view(bits).bitwise_and_(exponents).view(x.dtype)  # 2^exponent: frexp takes ten times as long
    return steps.clamp_(min=2.0**least).mul_(2.0**-mantissa)


def product_noise_edge(B: Tensor, A: Tensor, dtypes: tuple[str, str]) -> float:
    """Return an upper bound of ||B' A' - B A||, where B (m, r) and A (r, n) are roundings of B' and A'.

    By Weyl's inequality, a larger singular value of B A belongs to one of B' A' that is not 0. The norm is at most
    ||dB|| ||A|| + ||B|| ||dA|| + ||dB|| ||dA||.

    Args:
        B, A: float64.
        dtypes: keys of FLOAT_STEPS, of B and of A.
    """
    norm_B, norm_A = (float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()) for gram in (B.mT @ B, A @ A.mT))
    dB, dA = (
        noise_of_steps(float_steps(x.clone(memory_format=torch.contiguous_format), dtype)).edge()
        for x, dtype in zip((B, A), dtypes, strict=True)
    )
    return dB * norm_A + (norm_B + dB) * dA


def unknown_noise_edge(S: Tensor, shape: tuple[int, int]) -> float:
    """Return the threshold for noise of unknown size that is uniform over the matrix.

    Most singular values must be noise. The threshold is omega(beta) times their median (Gavish and Donoho, IEEE
    Transactions on Information Theory 60, 2014, equation 5).

    Args:
        S: all singular values of a matrix of this shape, in any order.
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return omega * float(S.quantile(0.5))
