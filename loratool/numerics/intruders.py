"""Count intruder dimensions: leading left singular vectors of a changed matrix that the matrix before did not have.

Shuttleworth et al. (2024, arXiv:2410.21228, definition 1 and algorithm 1): a left singular vector u of W' is an
intruder if no left singular vector w of W has |cos(u, w)| >= threshold. W's singular vectors are those whose singular
value is not 0; only the leading ones are computed. Both matrices get a block Krylov space of W W^T (`svd.Krylov`). That
of W starts from the vectors u, so it bounds cos(u, w) for any w: the component of w in the space depends on its
eigenvalue x alone (`_largest_possible`). In most matrices some 200 columns decide each u: either a leading w matches,
or no w can.

The eigenvectors of the smaller Gram matrix in float64 decide the others: a u closer to the threshold than its error, a
u that is mainly a w from W's bulk, or nearly equal singular values. If W is tall, most of u may be outside W's outputs,
which looks like a w of a tiny singular value. That part is projected away first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .arrays import Array, doubled, fetched, sent
from .forms import Wide
from .linalg import cast, concatenate, eigh, eye, is_positive, norm, qr, solve, zeros
from .seeded_random import Draw
from .svd import BLOCK, IN_CACHE, SMALL, TINY, WIDE, Krylov, energy_of, gram, random_block, row_blocks

ANGLE = 0.01  # a singular vector may be off by so much, in radians

ROUNDING = 3e-7  # of float32 products, beside the largest eigenvalue of W W^T

RESOLUTION = 1e-12  # of eigenvalues of a Gram matrix in float64, beside the largest

FIRST = 8  # blocks after which the Krylov space of a tall matrix waits for the projection

MOST = 640  # columns of a Krylov space; with more, evaluating it takes longer than a full decomposition

GROWTH = 1.3  # of a Krylov space between two evaluations

EXTRA = 6  # random columns beside the vectors u, for W's leading vectors that are orthogonal to all u

STEPS = (1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5)  # of the way between two eigenvalues, from either side

Mask = npt.NDArray[np.bool_]

Matrix = Callable[[], Array]  # reads or computes (m, n) in float32, so that only one is in memory


@dataclass(frozen=True)
class Leading:
    """Leading left singular vectors of a matrix, fewer than requested if its rank is less."""

    U: Array  # (m, k)
    S: Wide  # (k,), largest first
    angle: Wide  # (k,): the error bound of each, in radians
    energy: float  # ||W||^2


@dataclass(frozen=True)
class Intruders:
    """Which leading left singular vectors of W' are new; each array is (k,), from the largest singular value.

    A vector is undecided if its cosine is closer to the threshold than its error, as singular values are too close.
    """

    S: Wide
    new: Mask
    undecided: Mask
    energy: float  # ||W'||^2


def find_intruders(tuned: Matrix, base: Matrix, top: int, threshold: float, draw: Draw) -> Intruders:
    """Compare the leading `top` left singular vectors of W' (`tuned`) with all of W (`base`).

    Args:
        threshold: above 0, at most 1
        draw: of random starts
    """
    intruders = None
    for exact in (False, True):
        leading = leading_left(tuned(), top, draw, exact)
        intruders = compare_with(base(), leading, threshold, draw)
        if not intruders.undecided.any():
            break
    assert intruders is not None
    return intruders


def leading_left(W: Array, top: int, draw: Draw, exact: bool = False) -> Leading:
    """Return the leading left singular vectors of W (m, n), with singular values above float64's rounding error.

    Args:
        exact: compute them from a Gram matrix in float64. A small W, or close singular values, need that anyway.
    """
    m, n = W.shape
    top, energy = min(top, m, n), energy_of(W)
    leading = None
    if not exact and _is_large(W, energy) and WIDE * (top + 2 * BLOCK) <= min(m, n):
        space = Krylov(W.T, min(m, n) // WIDE, random_block(m, max(BLOCK, top + EXTRA), draw, "tuned", W))
        while leading is None and _grow(space):
            leading = _converged(space, top, energy)
    return leading or _leading_of_gram(W, top, energy)


def _is_large(W: Array, energy: float) -> bool:
    """Return whether W is large enough for a Krylov space, and its squares are within float32's range."""
    return min(W.shape) > SMALL and TINY < math.sqrt(energy) < 1 / TINY


def _grow(space: Krylov) -> bool:
    """Grow a space until it is worth an evaluation; return whether there was room."""
    enough = GROWTH * space.width
    while not space.is_full:
        space.grow()
        if space.width >= enough and space.width > space.block:
            return True
    return False


def _converged(space: Krylov, top: int, energy: float) -> Leading | None:
    """Return the leading vectors of the space, or None while one of them is off by more than ANGLE."""
    values, vectors, rests = _ritz_pairs(space)
    angle = _angles(values, rests)[:top]
    if bool((angle > ANGLE).any()):
        return None
    U = qr(space.Q @ cast(sent(vectors[:, :top], space.Q), space.Q))[0]
    return Leading(U, np.sqrt(values[:top]), angle, energy)


def _ritz_pairs(space: Krylov) -> tuple[Wide, Wide, Wide]:
    """Return the eigenvalues of T, falling, its eigenvectors, and the residual of each outside the space.

    Returns:
        values (width,), vectors (width, width), rests (block, width): M y = x y + V rest for y = Q vector.
    """
    values, vectors = eigh(fetched(space.T))
    return np.maximum(values, 0.0), vectors, fetched(space.R) @ vectors[-space.block :]


def _angles(values: Wide, rests: Wide) -> Wide:
    """Bound the angle between each Ritz vector and its eigenvector: the residual over the gap to the other ones."""
    rest = norm(rests, 0) + ROUNDING * values[0]
    below = np.append(values[:-1] - values[1:] - rest[1:], values[-1:])
    above = np.append(np.inf, values[:-1] - values[1:])
    angles: Wide = rest / np.maximum(np.minimum(above, below), 1e-300)
    return angles


def _leading_of_gram(W: Array, top: int, energy: float) -> Leading:
    """Return the leading vectors from float64. Their error from rounding W to float32 is inverse to the gap (Wedin)."""
    m, n = W.shape
    values, vectors = eigh(gram(W.T if m <= n else W))
    S = np.sqrt(np.maximum(fetched(values), 0.0))
    rank = min(top, int((np.square(S) > RESOLUTION * S[0] ** 2).sum()))
    gaps = np.concatenate([[np.inf], S[:-1] - S[1:], S[-1:]])
    angle = 2.0**-24 * norm(S) / np.maximum(np.minimum(gaps[:-1], gaps[1:]), 1e-300)
    U = vectors[:, :rank]
    if m > n:
        U = concatenate([doubled(block) @ U for block in row_blocks(W)]) / sent(S[:rank], W)
    return Leading(cast(U, W), S[:rank], angle[:rank], energy)


def compare_with(W: Array, leading: Leading, threshold: float, draw: Draw) -> Intruders:
    """Find the leading vectors of W' that match no left singular vector of W (m, n)."""
    m, n = W.shape
    new = np.zeros(len(leading.S), bool)
    intruders = Intruders(leading.S, new, ~new, leading.energy)
    if not len(leading.S):
        return intruders
    room = min(m // WIDE, n, MOST)
    if _is_large(W, energy_of(W)) and 2 * (len(leading.S) + EXTRA + BLOCK) <= room:
        first = FIRST * BLOCK if m > n else room
        intruders = _search(W, leading, leading.U, intruders, threshold, min(first, room), draw, "base")
        if m > n and intruders.undecided.any() and (inside := _projected(W, leading.U)) is not None:
            intruders = _search(W, leading, inside, intruders, threshold, room, draw, "inside")
    if intruders.undecided.any():
        cosines = _cosines(W, leading.U)
        intruders = replace(
            intruders,
            new=np.where(intruders.undecided, cosines < threshold, intruders.new),
            undecided=intruders.undecided & (np.abs(cosines - threshold) <= leading.angle),
        )
        intruders = replace(intruders, new=intruders.new & ~intruders.undecided)
    return intruders


def _search(
    W: Array,
    leading: Leading,
    U: Array,
    former: Intruders,
    threshold: float,
    columns: int,
    draw: Draw,
    label: str,
) -> Intruders:
    """Decide as many of the undecided vectors as a Krylov space of `columns` columns can.

    Args:
        U: (m, k), the leading vectors, or their projections on W's outputs.
    """
    start = concatenate([U, random_block(len(W), max(BLOCK - U.shape[1], EXTRA), draw, label, W)], 1)
    space = Krylov(W.T, columns, start)
    parts = fetched(doubled(space.V.T @ U))  # (b, k)
    angle, intruders = leading.angle, former
    while intruders.undecided.any() and _grow(space):
        values, vectors, rests = _ritz_pairs(space)
        inside = vectors[: space.block].T @ parts  # (width, k): the cosines with the Ritz vectors
        off = _angles(values, rests)[:, None]
        leads = np.logical_and.accumulate(off <= 5 * ANGLE)  # those before which none is missing
        matched = (leads & (np.abs(inside) - off - angle >= threshold)).any(0)
        most = _largest_possible(values, rests, inside)
        new = most < threshold - angle
        intruders = replace(
            intruders,
            new=intruders.new | (intruders.undecided & new & ~matched),
            undecided=intruders.undecided & ~(matched | new),
        )
    return intruders


def _largest_possible(values: Wide, rests: Wide, inside: Wide) -> Wide:
    """Bound |cos(u, w)| over all eigenvectors w of M = W W^T, for vectors u in the first block of a Krylov space.

    With Ritz pairs M y_i = x_i y_i + V g_i, a w of eigenvalue x has (x - x_i) y_i.w = g_i.h with h = V^T w. So
    u.w = sum_i (u.y_i) (g_i.h) / (x - x_i) = p.h, and |w| <= 1 means h^T H h <= 1 with
    H = I + sum_i g_i g_i^T / (x - x_i)^2. So (u.w)^2 <= p^T H^-1 p, a rational function of x. It is evaluated close to
    each x_i and between them. In exact arithmetic and for one vector this is the Christoffel function of u's spectral
    measure, which bounds the measure of a single point (Akhiezer, The Classical Moment Problem, 2.5).

    Args:
        values: x_i (width,), falling.
        rests: g_i (b, width).
        inside: u.y_i (width, k).

    Returns:
        (k,)
    """
    near = ROUNDING * values[0]
    steps = np.array(STEPS)[:, None]
    high = np.append(values[0] + max(values[0] - values[1], near), values)
    low = np.append(values, 0.0)
    points = np.concatenate([low + steps * (high - low), high - steps * (high - low), low[None] + near]).reshape(-1)
    most = np.zeros(inside.shape[1])
    count = max(1, IN_CACHE // rests.size)
    for start in range(0, len(points), count):
        apart = points[start : start + count, None] - values  # (points, width)
        scaled = rests / np.where(np.abs(apart) < near, np.where(apart < 0, -near, near), apart)[:, None]
        H = scaled @ scaled.swapaxes(1, 2) + np.eye(len(rests))
        p = scaled @ inside
        most = np.maximum(most, (p * np.linalg.solve(H, p)).sum(1).max(0))
    within = np.abs(values[:, None] - values) <= 2 * near  # eigenvalues equal within float32's rounding error
    together = (within @ np.square(inside)).max(0)
    cosines: Wide = np.sqrt(np.maximum(np.maximum(most, together), 0.0))
    return cosines


def _projected(W: Array, U: Array) -> Array | None:
    """Project U (m, k) on the column space of a tall W (m, n); None if W is numerically rank-deficient."""
    G = gram(W)
    if not is_positive(G - RESOLUTION * norm(G) * eye(len(G), G)):
        return None
    return W @ cast(solve(G, doubled(W.T @ U)), W)


def _cosines(W: Array, U: Array) -> Wide:
    """Return the largest |cos| of each of U (m, k) with any left singular vector of W, (k,), from a full decomposition.

    If singular values are equal in float64, every direction in the span of their vectors is a singular vector.
    """
    m, n = W.shape
    all_values, vectors = eigh(gram(W.T if m <= n else W))
    values = fetched(all_values)
    rank = int((values > RESOLUTION * max(values[0], 0.0)).sum())
    if not rank:
        return np.zeros(U.shape[1])
    values, wide = values[:rank], doubled(U)
    inside = fetched(vectors[:, :rank].T @ (wide if m <= n else _transposed_product(W, wide)))
    squares = np.square(inside) if m <= n else np.square(inside) / values[:, None]
    starts = [0, *(np.flatnonzero(values[:-1] - values[1:] > RESOLUTION * values[0]) + 1)]
    together: Wide = np.sqrt(np.add.reduceat(squares, starts).max(0))
    return together


def _transposed_product(W: Array, X: Array) -> Array:
    """Return W^T X in float64, by blocks of rows."""
    total, start = zeros((W.shape[1], X.shape[1]), X), 0
    for block in row_blocks(W):
        total += doubled(block).T @ X[start : start + len(block)]
        start += len(block)
    return total
