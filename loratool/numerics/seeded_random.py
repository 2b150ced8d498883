"""Draw random numbers that depend on a key only, and have the same bits on every machine.

numpy keeps the stream of a bit generator from release to release, but not that of a Generator (NEP 19). So the raw bits
are numpy's, and all further steps are +, -, *, / and sqrt, whose rounding IEEE 754 defines. We do not use the logarithm
of a C library, because no standard defines its last bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

CHUNK = 1 << 15  # numbers computed at a time, so that their buffers stay in the cache

# The rational functions of PPND16 (Wichura, Applied Statistics 37, 1988, algorithm AS 241), as (numerator, denominator)
# with the highest power first: for the middle, for the tails down to exp(-25), and beyond.
_MIDDLE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip

_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip

_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip

_LOG_2 = 0.6931471805599453

_LOG_TERMS = 12  # terms of atanh's series, enough for float64 since the argument is at most 0.172


def uniform(key: str, count: int) -> Floats:
    """Draw numbers (count,) uniformly between 0 and 1, on a grid of 2**-52 and never 0 or 1."""
    digest = hashlib.sha256(key.encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], "<u8").astype(np.uint64)).random_raw(count)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(key: str, count: int) -> Floats:
    """Draw normal numbers (count,) with mean 0 and variance 1: `uniform` through the quantile function, to 1e-15."""
    numbers = uniform(key, count)
    for start in range(0, count, CHUNK):
        numbers[start : start + CHUNK] = normal_quantile(numbers[start : start + CHUNK])
    return numbers


def normal_quantile(p: Floats) -> Floats:
    """Return the quantiles of the standard normal distribution for 0 < p < 1 (algorithm AS 241)."""
    q = p - 0.5
    x = _quotient(_MIDDLE, 0.180625 - q * q) * q
    outer = np.flatnonzero(np.abs(q) > 0.425)
    side = q[outer]
    r = np.sqrt(-_log(np.where(side < 0, p[outer], 1.0 - p[outer])))
    tails = np.where(r <= 5.0, _quotient(_TAIL, r - 1.6), _quotient(_FAR, r - 5.0))
    x[outer] = np.where(side < 0, -tails, tails)
    return x


def _quotient(coefficients: Sequence[Sequence[float]], x: Floats) -> Floats:
    above, below = (_horner(terms, x) for terms in coefficients)
    return above / below


def _horner(coefficients: Sequence[float], x: Floats) -> Floats:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _log(x: Floats) -> Floats:
    """Return the natural logarithm of positive numbers, from x = m 2**e and log m = 2 atanh((m - 1) / (m + 1))."""
    m, e = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2.0 * m, m), np.where(low, e - 1, e)
    s = (m - 1.0) / (m + 1.0)
    series = _horner([1.0 / (2 * k + 1) for k in reversed(range(_LOG_TERMS))], s * s)
    return e * _LOG_2 + 2.0 * s * series


@dataclass(frozen=True)
class Draw:
    """A source of random numbers for one weight."""

    seed: int
    name: str  # of the weight

    def uniform(self, label: str, *shape: int) -> Floats:
        """Draw numbers uniformly between -1 and 1, in float64. `label` distinguishes the draws for one weight."""
        return (uniform(f"{self.seed} {self.name} {label}", math.prod(shape)) * 2.0 - 1.0).reshape(shape)

    def normal(self, label: str, *shape: int) -> Floats:
        """Draw normal numbers with mean 0 and variance 1, in float64. `label` is as in `uniform`."""
        return normal(f"{self.seed} {self.name} {label}", math.prod(shape)).reshape(shape)
