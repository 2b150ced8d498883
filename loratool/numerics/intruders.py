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

import torch
from torch import Tensor

from .svd import BLOCK, SMALL, TINY, WIDE, Krylov, energy_of, gram, random_block, row_blocks

ANGLE = 0.01  # a singular vector may be off by so much, in radians

ROUNDING = 3e-7  # of float32 products, beside the largest eigenvalue of W W^T

RESOLUTION = 1e-12  # of eigenvalues of a Gram matrix in float64, beside the largest

FIRST = 8  # blocks after which the Krylov space of a tall matrix waits for the projection

MOST = 640  # columns of a Krylov space; with more, evaluating it takes longer than a full decomposition

GROWTH = 1.3  # of a Krylov space between two evaluations

EXTRA = 6  # random columns beside the vectors u, for W's leading vectors that are orthogonal to all u

STEPS = (1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5)  # of the way between two eigenvalues, from either side

Matrix = Callable[[], Tensor]  # reads or computes (m, n) in float32, so that only one is in memory


@dataclass(frozen=True)
class Leading:
    """Leading left singular vectors of a matrix, fewer than requested if its rank is less."""

    U: Tensor  # (m, k)
    S: Tensor  # (k,), float64, largest first
    angle: Tensor  # (k,), float64: the error bound of each, in radians
    energy: float  # ||W||^2


@dataclass(frozen=True)
class Intruders:
    """Which leading left singular vectors of W' are new; each tensor is (k,), from the largest singular value.

    A vector is undecided if its cosine is closer to the threshold than its error, as singular values are too close.
    """

    S: Tensor  # float64
    new: Tensor  # bool
    undecided: Tensor  # bool
    energy: float  # ||W'||^2


def find_intruders(tuned: Matrix, base: Matrix, top: int, threshold: float, generator: torch.Generator) -> Intruders:
    """Compare the leading `top` left singular vectors of W' (`tuned`) with all of W (`base`).

    Args:
        threshold: above 0, at most 1
        generator: on the matrices' device, for random starts
    """
    intruders = None
    for exact in (False, True):
        leading = leading_left(tuned(), top, generator, exact)
        intruders = compare_with(base(), leading, threshold, generator)
        if not intruders.undecided.any():
            break
    assert intruders is not None
    return intruders


def leading_left(W: Tensor, top: int, generator: torch.Generator, exact: bool = False) -> Leading:
    """Return the leading left singular vectors of W (m, n), with singular values above float64's rounding error.

    Args:
        exact: compute them from a Gram matrix in float64. A small W, or close singular values, need that anyway.
    """
    m, n = W.shape
    top, energy = min(top, m, n), energy_of(W)
    leading = None
    if not exact and _is_large(W, energy) and WIDE * (top + 2 * BLOCK) <= min(m, n):
        space = Krylov(W.T, min(m, n) // WIDE, random_block(m, max(BLOCK, top + EXTRA), generator, W))
        while leading is None and _grow(space):
            leading = _converged(space, top, energy)
    return leading or _leading_of_gram(W, top, energy)


def _is_large(W: Tensor, energy: float) -> bool:
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
    U = torch.linalg.qr(space.Q @ vectors[:, :top].to(space.Q.dtype)).Q
    return Leading(U, values[:top].sqrt(), angle, energy)


def _ritz_pairs(space: Krylov) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues of T, falling, its eigenvectors, and the residual of each outside the space.

    Returns:
        values (width,), vectors (width, width), rests (block, width): M y = x y + V rest for y = Q vector.
    """
    values, vectors = torch.linalg.eigh(space.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return values, vectors, space.R @ vectors[-space.block :]


def _angles(values: Tensor, rests: Tensor) -> Tensor:
    """Bound the angle between each Ritz vector and its eigenvector: the residual over the gap to the other ones."""
    rest = torch.linalg.vector_norm(rests, dim=0) + ROUNDING * values[0]
    below = torch.cat([values[:-1] - values[1:] - rest[1:], values[-1:]])
    above = torch.cat([values.new_full((1,), torch.inf), values[:-1] - values[1:]])
    angles: Tensor = rest / torch.minimum(above, below).clamp(min=1e-300)
    return angles


def _leading_of_gram(W: Tensor, top: int, energy: float) -> Leading:
    """Return the leading vectors from float64. Their error from rounding W to float32 is inverse to the gap (Wedin)."""
    m, n = W.shape
    values, vectors = torch.linalg.eigh(gram(W.T if m <= n else W))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    S, rank = values.sqrt(), min(top, int((values > RESOLUTION * values[0]).sum()))
    gaps = torch.cat([S.new_full((1,), torch.inf), S[:-1] - S[1:], S[-1:]])
    angle = 2.0**-24 * torch.linalg.vector_norm(S) / torch.minimum(gaps[:-1], gaps[1:]).clamp(min=1e-300)
    U = vectors[:, :rank]
    if m > n:
        U = torch.cat([block.double() @ U for block in row_blocks(W)]) / S[:rank]
    return Leading(U.to(W.dtype), S[:rank], angle[:rank], energy)


def compare_with(W: Tensor, leading: Leading, threshold: float, generator: torch.Generator) -> Intruders:
    """Find the leading vectors of W' that match no left singular vector of W (m, n)."""
    m, n = W.shape
    new = torch.zeros(len(leading.S), dtype=torch.bool)
    intruders = Intruders(leading.S.cpu(), new, ~new, leading.energy)
    if not len(leading.S):
        return intruders
    room = min(m // WIDE, n, MOST)
    if _is_large(W, energy_of(W)) and 2 * (len(leading.S) + EXTRA + BLOCK) <= room:
        first = FIRST * BLOCK if m > n else room
        intruders = _search(W, leading, leading.U, intruders, threshold, min(first, room), generator)
        if m > n and intruders.undecided.any() and (inside := _projected(W, leading.U)) is not None:
            intruders = _search(W, leading, inside, intruders, threshold, room, generator)
    if intruders.undecided.any():
        cosines = _cosines(W, leading.U).cpu()
        angle = leading.angle.cpu()
        intruders = replace(
            intruders,
            new=torch.where(intruders.undecided, cosines < threshold, intruders.new),
            undecided=intruders.undecided & ((cosines - threshold).abs() <= angle),
        )
        intruders = replace(intruders, new=intruders.new & ~intruders.undecided)
    return intruders


def _search(
    W: Tensor,
    leading: Leading,
    U: Tensor,
    former: Intruders,
    threshold: float,
    columns: int,
    generator: torch.Generator,
) -> Intruders:
    """Decide as many of the undecided vectors as a Krylov space of `columns` columns can.

    Args:
        U: (m, k), the leading vectors, or their projections on W's outputs.
    """
    start = torch.cat([U, random_block(len(W), max(BLOCK - U.shape[1], EXTRA), generator, W)], 1)
    space = Krylov(W.T, columns, start)
    parts = (space.V.T @ U).double()  # (b, k)
    angle, intruders = leading.angle, former
    while intruders.undecided.any() and _grow(space):
        values, vectors, rests = _ritz_pairs(space)
        inside = vectors[: space.block].T @ parts  # (width, k): the cosines with the Ritz vectors
        off = _angles(values, rests)[:, None]
        leads = (off <= 5 * ANGLE).cumprod(0).bool()  # those before which none is missing
        matched = (leads & (inside.abs() - off - angle >= threshold)).any(0).cpu()
        most = _largest_possible(values, rests, inside)
        new = (most < threshold - angle).cpu()
        intruders = replace(
            intruders,
            new=intruders.new | (intruders.undecided & new & ~matched),
            undecided=intruders.undecided & ~(matched | new),
        )
    return intruders


def _largest_possible(values: Tensor, rests: Tensor, inside: Tensor) -> Tensor:
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
    steps = torch.tensor(STEPS, dtype=values.dtype, device=values.device)[:, None]
    high = torch.cat([values[:1] + (values[0] - values[1]).clamp(min=near), values])
    low = torch.cat([values, values.new_zeros(1)])
    points = torch.cat([low + steps * (high - low), high - steps * (high - low), low[None] + near]).flatten()
    most = inside.new_zeros(inside.shape[1])
    for x in torch.split(points, max(1, (1 << 19) // len(values))):
        apart = x[:, None] - values  # (points, width)
        apart = 1 / torch.where(apart.abs() < near, torch.where(apart < 0, -near, near), apart)
        H = torch.einsum("pi,bi,ci->pbc", apart.square(), rests, rests)
        H.diagonal(dim1=1, dim2=2).add_(1.0)
        p = torch.einsum("pi,bi,ik->pbk", apart, rests, inside)
        most = torch.maximum(most, (p * torch.linalg.solve(H, p)).sum(1).amax(0))
    within = (values[:, None] - values).abs() <= 2 * near  # eigenvalues equal within float32's rounding error
    together = within.to(inside.dtype) @ inside.square()
    return torch.maximum(most, together.amax(0)).clamp(min=0).sqrt()


def _projected(W: Tensor, U: Tensor) -> Tensor | None:
    """Project U (m, k) on the column space of a tall W (m, n); None if W is numerically rank-deficient."""
    G = gram(W)
    largest = torch.linalg.vector_norm(G)
    G.diagonal().sub_(RESOLUTION * largest)
    if int(torch.linalg.cholesky_ex(G).info):
        return None
    G.diagonal().add_(RESOLUTION * largest)
    solved = torch.cholesky_solve((W.T @ U).double(), torch.linalg.cholesky(G))
    return W @ solved.to(W.dtype)


def _cosines(W: Tensor, U: Tensor) -> Tensor:
    """Return the largest |cos| of each of U (m, k) with any left singular vector of W, (k,), from a full decomposition.

    If singular values are equal in float64, every direction in the span of their vectors is a singular vector.
    """
    m, n = W.shape
    values, vectors = torch.linalg.eigh(gram(W.T if m <= n else W))
    nonzero = values > RESOLUTION * values[-1].clamp(min=0)
    values, vectors = values[nonzero], vectors[:, nonzero]
    wide = U.double()
    inside = vectors.T @ (wide if m <= n else _transposed_product(W, wide))
    inside = inside if m <= n else inside / values.sqrt()[:, None]
    if not len(values):
        return wide.new_zeros(U.shape[1])
    ties = torch.cat([values.new_zeros(1), values[1:] - values[:-1] > RESOLUTION * values[-1]]).cumsum(0).long()
    together = wide.new_zeros(int(ties[-1]) + 1, U.shape[1]).index_add_(0, ties, inside.square())
    return together.amax(0).sqrt()


def _transposed_product(W: Tensor, X: Tensor) -> Tensor:
    """Return W^T X in float64, by blocks of rows."""
    total = X.new_zeros(W.shape[1], X.shape[1])
    step = max(1, (1 << 22) // W.shape[1])
    for start in range(0, len(W), step):
        total += W[start : start + step].double().T @ X[start : start + step]
    return total
