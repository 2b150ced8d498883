"""Compute Q of a QR decomposition by Householder's reflections, with the signs that LAPACK's dgeqrf gives it.

Q is determined by its matrix, as soon as the signs of its columns are. A reflection makes R_kk = -sign(alpha) times a
norm, where alpha is what the reflections before it left on the diagonal. Q with a positive R follows from a Cholesky
decomposition of P.T P, and the signs from eliminating in Q's first rows (Ballard et al., "Reconstructing Householder
vectors from tall-skinny QR", 2014, algorithm 6). All is computed in integers, and rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .derived import UNIT, Fixed, derived_numbers, power_above
from .forms import Wide

LEAST_PIVOT = UNIT - 80  # the squared distance of a column from those before it is at least 2**-80 of its own size


def householder_q(P: Wide) -> Wide:
    """Return Q, (n, r), as derived numbers. P: (n, r), finite.

    Raises:
        ValueError: a column depends on those before it.
    """
    n, r = P.shape
    if r > n:
        raise ValueError(f"has {r} columns of {n} numbers, and no QR decomposition of so many")
    X = P / power_above(np.abs(P).max(0, initial=0.0))
    fixed = Fixed.of([X[None]])
    inverse = _inverse_of_cholesky((fixed.T @ fixed).numbers[0])
    top = (Fixed(fixed.numbers[:, :r]) @ Fixed(inverse[None])).numbers[0]
    signs = _signs([list(row) for row in top], [k == n - 1 or not X[k + 1 :, : k + 1].any() for k in range(r)])
    signed = Fixed((inverse * np.array(signs, object))[None])
    parts, rest = list[Wide](), signed.numbers
    for _ in range(5):  # of 53 bits each
        parts.append(Fixed(rest).wide())
        rest = rest - Fixed.of(parts[-1:]).numbers
    Q: Wide = derived_numbers(lambda x, m: x @ m, [X[None]], parts)[0]
    return Q


def _inverse_of_cholesky(gram: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return M, upper triangular, with M.T G M = 1, in integers, 2**UNIT being 1."""
    r = len(gram)
    L, M = np.zeros((r, r), object), np.zeros((r, r), object)
    for k in range(r):
        for i in range(k, r):
            rest = gram[i, k] - (int(L[i, :k] @ L[k, :k]) >> UNIT)
            if i == k:
                if rest < 1 << LEAST_PIVOT:
                    raise ValueError("a column depends on those before it, so that its QR decomposition is open")
                L[k, k] = math.isqrt(rest << UNIT)
            else:
                L[i, k] = (rest << UNIT) // L[k, k]
    for j in range(r):  # L.T M = 1
        M[j, j] = (1 << 2 * UNIT) // L[j, j]
        for i in range(j - 1, -1, -1):
            M[i, j] = -int(L[i + 1 : j + 1, i] @ M[i + 1 : j + 1, j]) // L[i, i]
    return M


def _signs(top: list[list[int]], is_left: list[bool]) -> list[int]:
    """Return the sign of each column of Q. top: Q's first rows; is_left: nothing is below, and no reflection made."""
    signs = []
    for k, row in enumerate(top):
        sign = 1 if row[k] >= 0 else -1
        signs.append(sign if is_left[k] else -sign)
        if is_left[k]:
            continue
        row[k] += sign << UNIT
        for lower in top[k + 1 :]:
            factor = (lower[k] << UNIT) // row[k]
            for j in range(k + 1, len(top)):
                lower[j] -= factor * row[j] >> UNIT
    return signs
