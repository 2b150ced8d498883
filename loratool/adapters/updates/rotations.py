"""Compute the rotations R of OFT, BOFT and others from skew matrices, as derived numbers (`numerics.derived`).

R is (I + Q)(I - Q)^-1, Cayley's transform, or a part of its series 1 + 2 Q + 2 Q**2 + ..., where Q = -Q.T. What is
returned is R - I, since that is what changes a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers
    from ...numerics.forms import Wide

SMALL = 2.0**-4  # the square of a norm of R - I
BITS = 400  # of a square root before it is rounded to three float64 numbers


def upper_triangles(numbers: Numbers, size: int) -> list[Wide]:
    """Return skew matrices, (n, b, b), as a sum of one. numbers: (n, b (b - 1) / 2), row by row of the triangles."""
    import numpy as np

    i, j = np.triu_indices(size, 1)
    Q = np.zeros((len(numbers), size, size))
    Q[:, i, j] = numbers.wide()
    return [Q - Q.swapaxes(1, 2)]


def skew_parts(blocks: Numbers) -> list[Wide]:
    """Return O - O.T of each block, (n, b, b), as a sum of two."""
    O = blocks.wide()  # noqa: E741
    return [O, -O.swapaxes(1, 2)]


def rotations(Q: Sequence[Wide], coefficients: Sequence[int] | None, factors: Sequence[Fraction]) -> Wide:
    """Return R - I of each matrix, the nearest float64 numbers, (n, b, b).

    Args:
        Q: matrices whose sum it is, each (n, b, b).
        coefficients: of Q, Q**2, ... in a series; None for Cayley's transform.
        factors: what Q is multiplied by first, for each matrix or for all.
    """
    import numpy as np

    from ...numerics.derived import derived_numbers

    found = np.zeros_like(Q[0])
    some = np.flatnonzero((sum(Q[1:], Q[0]) != 0).any((1, 2)))
    for factor in dict.fromkeys(factors):  # nearly always one
        alike = some if len(factors) == 1 else np.array([k for k in some.tolist() if factors[k] == factor], np.intp)
        if len(alike):
            found[alike] = derived_numbers(partial(_rotation, coefficients, factor), [part[alike] for part in Q])
    return found


def _rotation(coefficients: Sequence[int] | None, factor: Fraction, Q: Any) -> Any:
    Q = Q * factor
    return cayley(Q) if coefficients is None else series(Q, coefficients)


def are_small(R: Wide) -> bool:
    """Return whether the transposes of all 1 + (R - I) of a series are so near to their inverses that they will do.

    They are off by some 2 Q**5. The sums are exact, so that all machines agree. R: R - I, (n, b, b).
    """
    return all(math.fsum((matrix * matrix).reshape(-1).tolist()) < SMALL for matrix in R)


def defect(R: Wide) -> float:
    """Return the largest Frobenius norm of R.T R - 1. R: R - I, (n, b, b)."""
    import numpy as np

    T = R.swapaxes(1, 2)
    return float(np.sqrt(np.square(R + T + T @ R).sum((1, 2))).max(initial=0.0))


def cayley(Q: Any) -> Any:
    """Return (I + Q)(I - Q)^-1 - I of `numerics.derived.Matrices`."""
    one = Q.unit()
    return ((one - Q).inverse() - one) * Fraction(2)


def series(Q: Any, coefficients: Sequence[int]) -> Any:
    """Return the sum of coefficients times powers of Q, from the first on."""
    total = Q * Fraction(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = Q * Fraction(coefficient) + Q @ total
    return total


def butterfly(stages: Sequence[Any], orders: Sequence[Sequence[int]]) -> Any:
    """Return the product of factors, less the unit matrix, the last factor first, (G, L, L).

    A factor multiplies runs of b rows, after the rows of each of G parts are put into an order, and puts them back.

    Args:
        stages: of each factor the matrices less the unit matrix, `Matrices` of (G L / b, b, b).
        orders: the places of a part, L each, that a factor takes its rows from.
    """
    import numpy as np

    length = len(orders[0])
    total = None
    for stage, order in zip(stages, orders, strict=True):
        places, b = np.array(order), stage.shape[1]
        back = np.argsort(places)
        parts = stage.shape[0] * b // length
        one = stage.unit(length)
        rows = one.moved(lambda x, parts=parts: x.repeat(parts, 0)) if total is None else one + total
        rows = rows.moved(lambda x, places=places, b=b: x[:, places].reshape(-1, b, length))
        change = (stage @ rows).moved(lambda x, back=back: x.reshape(-1, length, length)[:, back])
        total = change if total is None else total + change
    return total


def squares(Q: Sequence[Wide]) -> list[Fraction]:
    """Return the sum of the squares of the numbers of each matrix, exactly."""
    import numpy as np

    from ...numerics.forms import F64, integers

    sides = [integers(np.ascontiguousarray(part).view(np.int64).reshape(len(part), -1), F64) for part in Q]
    used = [e[m != 0] for m, e in sides]
    least = min((int(e.min()) for e in used if e.size), default=0)
    total: Any = sum(m.astype(object) << np.maximum(e - least, 0).astype(object) for m, e in sides)
    return [Fraction(int(row.dot(row))) * Fraction(2) ** (2 * least) for row in total]


def root(x: Fraction) -> Fraction:
    """Return the square root, exactly or to some 2**-400 of it."""
    if x <= 0:
        return Fraction(0)
    shift = BITS + max(0, x.denominator.bit_length() - x.numerator.bit_length()) // 2
    return Fraction(math.isqrt((x * (1 << (2 * shift))).__floor__()), 1 << shift)
