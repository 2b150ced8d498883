"""Factor the delta of a weight. The factors are stored in a journal, so that memory does not grow with the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..adapters.weight_kinds import WEIGHT_KINDS, Shape, lay_factors, stack_shape
from ..durable.fileio import read_into
from ..durable.journal import StoredBytes
from ..numerics.arrays import Array, Numbers, bytes_of, doubled, fetched, rounded_to, sent
from ..numerics.factored_svd import core, effective_rank
from ..numerics.forms import F32, Form, Single, Wide
from ..numerics.input_weights import residuals
from ..numerics.linalg import adjoint, norm, singled, sqrt
from ..numerics.seeded_random import Draw
from ..numerics.spectrum import SpectrumPoints, spectrum_points
from ..numerics.svd import TruncatedSVD, residual_energy, truncated_svd
from .rank_rules import SingularValues


@dataclass(frozen=True)
class DeltaFactors:
    """The factors of a delta, A and B each with the square roots of the sigmas, and the figures of its SVD."""

    kind: str  # a key of WEIGHT_KINDS
    shape: Shape  # of the weight
    sizes: tuple[int, int, int]  # (E, out, in)
    known: int  # triplets
    data: memoryview | StoredBytes  # A (known, E, in), then B (known, E, out), in float32; stored by a journal
    residuals: tuple[float, ...]  # ||D - D_k||^2 of the first k triplets, k = 0 .. known
    spectrum: SingularValues  # of D; with weights, of D W
    gap: float  # the share of the best triplets' energy that these miss
    how: str  # the kind of `gap`: exact, certified, or estimate
    weighted: bool  # the spectrum is of D W

    @property
    def norm_squared(self) -> float:
        """Return ||D||^2."""
        return self.residuals[0]

    @property
    def full(self) -> int:
        return min(self.sizes[1:])

    def triplets(self, rank: int) -> tuple[Single, Single]:
        """Read A (rank, E, in) and B (rank, E, out)."""
        E, out, inp = self.sizes
        assert isinstance(self.data, StoredBytes), "a journal has returned it"
        A, B = np.empty((rank, E, inp), np.float32), np.empty((rank, E, out), np.float32)
        for side, first in ((A, 0), (B, 4 * self.known * E * inp)):
            read_into(self.data.file, bytes_of(side), self.data.offset + first)
        return A, B

    def tensors(self, rank: int, form: Form) -> tuple[Numbers, Numbers]:
        """Return A and B in the shapes that an adapter stores."""
        A, B = lay_factors(self.kind, *self.triplets(rank), self.shape)
        return rounded_to(A, form), rounded_to(B, form)

    def rounding_error(self, rank: int, form: Form) -> float:
        """Return ||B A - B' A'|| / ||B A||, the error of rounding the factors to `form`."""
        if form == F32 or not rank:
            return 0.0
        triplets = self.triplets(rank)
        (A, B), (small_A, small_B) = map(doubled, triplets), (rounded_to(side, form).wide() for side in triplets)
        # ||L R^T|| = ||R_L R_R^T||, with the R factors of the QR decompositions of L = [B, -B'] and R = [A; A']^T
        left = np.concatenate([B, -small_B]).transpose(1, 2, 0)  # (E, out, 2r)
        right = np.concatenate([A, small_A]).transpose(1, 0, 2)  # (E, 2r, in)
        size = float(norm(core(B.transpose(1, 2, 0), A.transpose(1, 0, 2))))
        return float(norm(core(left, right))) / size if size else 0.0

    def effective_rank(self, rank: int) -> float:
        """Return the exp of the entropy of the top `rank` singular values (of a stack: root mean squares)."""
        return float(effective_rank(np.sqrt(self.spectrum.squares[:rank])))

    def curve(self) -> SpectrumPoints:
        """Return the points of the known singular values; energies are shares of the full delta's energy."""
        return spectrum_points(np.array(self.spectrum.squares), self.sizes[0], self.spectrum.total)


# The dataclasses of a journal with factors
RESULTS = {kind.__name__: kind for kind in (DeltaFactors, SingularValues)}


def as_matrix(D: Array, kind: str, shape: Shape) -> Array:
    """Return the delta of a weight, or of one expert, as (out, in), a view except for convolutions."""
    (matrix,) = WEIGHT_KINDS[kind].stack(D[None] if kind.startswith("experts") else D.reshape(shape))
    return matrix


@dataclass(frozen=True)
class SvdChoices:
    """The seed of an SVD's starting block, and whether the SVD must prove its distance from the best."""

    seed: int = 0
    certify: bool = False


def factor_delta(
    name: str,
    kind: str,
    shape: Shape,
    matrices: Iterable[Array],
    rank: int,
    cost: int,
    choices: SvdChoices,
    weights: Single | None = None,
) -> DeltaFactors:
    """Compute the first `rank` triplets of a delta.

    Args:
        name: of the weight; with the seed it determines the random numbers.
        shape: of the weight.
        matrices: the delta in float32: of its shape, or of experts one after another.
        cost: parameters per rank.
        weights: of the inputs, (E, in) (`input_weights`); the columns of the matrices are already multiplied by them.
    """
    E, out, inp = sizes = stack_shape(kind, shape)
    svds, pairs, left, missed = list[TruncatedSVD](), list[tuple[Single, Single]](), list[Wide](), 0.0
    for e, D in enumerate(matrices):
        matrix = as_matrix(D, kind, shape)
        svd = truncated_svd(matrix, rank, Draw(choices.seed, f"{name} {e}"), certify=choices.certify)
        scales = None if weights is None else sent(weights[e], matrix)
        V, root = svd.V if scales is None else svd.V / scales[:, None], sqrt(svd.S)
        B, A = singled(doubled(svd.U) * root), singled(adjoint(doubled(V) * root))
        missed += residual_energy(matrix, B, A if scales is None else doubled(A) * scales)
        if scales is not None:
            left.append(fetched(residuals(matrix, B, A, scales)))
        svds.append(svd)
        pairs.append((fetched(B), fetched(A)))
    known = max(len(svd.S) for svd in svds)
    data: Single = np.zeros(known * E * (inp + out), np.float32)
    all_A, all_B = data[: known * E * inp].reshape(known, E, inp), data[known * E * inp :].reshape(known, E, out)
    squares: Wide = np.zeros(known)
    for e, (svd, (B, A)) in enumerate(zip(svds, pairs, strict=True)):
        all_A[: len(A), e], all_B[: len(A), e] = A, B.T
        squares[: len(A)] += np.square(fetched(svd.S))
    complete = all(len(svd.S) < min(rank, out, inp) or rank >= min(out, inp) for svd in svds)
    total = math.fsum([*squares.tolist(), missed])  # so that total - sum(squares) is `missed`, however small
    spectrum = SingularValues(tuple(squares.tolist()), total, cost, complete)
    gap = max((svd.gap for svd in svds), default=0.0)
    how = "exact" if gap == 0 else "certified" if choices.certify else "estimate"
    if weights is None:
        left = [np.append(squares, missed)[::-1].cumsum()[::-1]]
    padded = [np.pad(each, (0, known + 1 - len(each)), "edge") for each in left]
    remaining = tuple(np.sum(padded, 0).tolist())
    return DeltaFactors(kind, shape, sizes, known, bytes_of(data), remaining, spectrum, gap, how, weights is not None)
