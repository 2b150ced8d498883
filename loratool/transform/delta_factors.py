"""Factor the delta of a weight. The factors are stored in a journal, so that memory does not grow with the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters.weight_kinds import WEIGHT_KINDS, Shape, stack_shape
from ..durable.fileio import read_into
from ..durable.journal import StoredBytes
from ..numerics.factored_svd import core
from ..numerics.input_weights import residuals
from ..numerics.product_spectrum import effective_rank
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

    def triplets(self, rank: int) -> tuple[Tensor, Tensor]:
        """Read A (rank, E, in) and B (rank, E, out), in float32."""
        E, out, inp = self.sizes
        assert isinstance(self.data, StoredBytes), "a journal has returned it"
        A, B = torch.empty(rank, E, inp, dtype=torch.float32), torch.empty(rank, E, out, dtype=torch.float32)
        for side, first in ((A, 0), (B, 4 * self.known * E * inp)):
            read_into(self.data.file, side.view(torch.uint8).numpy().data.cast("B"), self.data.offset + first)
        return A, B

    def tensors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B in the shapes that an adapter stores."""
        A, B = WEIGHT_KINDS[self.kind].lay(*self.triplets(rank), self.shape)
        return A.to(dtype).contiguous(), B.to(dtype).contiguous()

    def rounding_error(self, rank: int, dtype: torch.dtype) -> float:
        """Return ||B A - B' A'|| / ||B A||, the error of rounding the factors to `dtype`."""
        if dtype == torch.float32 or not rank:
            return 0.0
        A, B = (side.double() for side in self.triplets(rank))
        small_A, small_B = A.to(dtype).double(), B.to(dtype).double()
        # ||L R^T|| = ||R_L R_R^T||, with the R factors of the QR decompositions of L = [B, -B'] and R = [A; A']^T
        left = torch.cat([B, -small_B]).permute(1, 2, 0)  # (E, out, 2r)
        right = torch.cat([A, small_A]).permute(1, 2, 0)  # (E, in, 2r)
        R = core(left, right.mT)
        norm = float(torch.linalg.vector_norm(core(B.permute(1, 2, 0), A.permute(1, 0, 2))))
        return float(torch.linalg.vector_norm(R)) / norm if norm else 0.0

    def effective_rank(self, rank: int) -> float:
        """Return the exp of the entropy of the top `rank` singular values (of a stack: root mean squares)."""
        return float(effective_rank(np.sqrt(self.spectrum.squares[:rank])))

    def curve(self) -> SpectrumPoints:
        """Return the points of the known singular values; energies are shares of the full delta's energy."""
        squares = torch.tensor(self.spectrum.squares, dtype=torch.float64)
        return spectrum_points(squares, self.sizes[0], self.spectrum.total)


# The dataclasses of a journal with factors
RESULTS = {kind.__name__: kind for kind in (DeltaFactors, SingularValues)}


def as_matrix(D: Tensor, kind: str, shape: Shape) -> Tensor:
    """Return the delta of a weight, or of one expert, as (out, in), a view except for convolutions."""
    matrix: Tensor
    (matrix,) = WEIGHT_KINDS[kind].stack(D.unsqueeze(0) if kind.startswith("experts") else D.view(shape))
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
    matrices: Iterable[Tensor],
    rank: int,
    cost: int,
    choices: SvdChoices,
    weights: Tensor | None = None,
) -> DeltaFactors:
    """Compute the first `rank` triplets of a delta.

    Args:
        name: of the weight; with the seed it determines the random numbers.
        shape: of the weight.
        matrices: the delta in float32: of its shape, or of experts one after another.
        cost: parameters per rank.
        weights: of the inputs (`input_weights`); the columns of the matrices are already multiplied by them.
    """
    E, out, inp = sizes = stack_shape(kind, shape)
    svds, pairs, left, missed = list[TruncatedSVD](), list[tuple[Tensor, Tensor]](), list[Tensor](), 0.0
    for e, D in enumerate(matrices):
        matrix, start = as_matrix(D, kind, shape), Draw(choices.seed, f"{name} {e}").generator(D.device)
        svd = truncated_svd(matrix, rank, start, certify=choices.certify)
        scales = None if weights is None else weights[e].to(matrix.device)
        V = svd.V if scales is None else svd.V / scales[:, None]
        B, A = (svd.U.double() * svd.S.sqrt()).float(), (V.double() * svd.S.sqrt()).T.float()
        missed += residual_energy(matrix, B, A if scales is None else A.double() * scales)
        if scales is not None:
            left.append(residuals(matrix, B, A, scales).cpu())
        svds.append(svd)
        pairs.append((B.cpu(), A.cpu()))
    known = max(len(residual.S) for residual in svds)
    data = torch.zeros(known * E * (inp + out), dtype=torch.float32)
    all_A, all_B = data[: known * E * inp].view(known, E, inp), data[known * E * inp :].view(known, E, out)
    squares = torch.zeros(known, dtype=torch.float64)
    for e, (svd, (B, A)) in enumerate(zip(svds, pairs, strict=True)):
        all_A[: len(A), e], all_B[: len(A), e] = A, B.T
        squares[: len(A)] += svd.S.square().cpu()
    complete = all(len(svd.S) < min(rank, out, inp) or rank >= min(out, inp) for svd in svds)
    total = math.fsum([*squares.tolist(), missed])  # so that total - sum(squares) is `missed`, however small
    spectrum = SingularValues(tuple(squares.tolist()), total, cost, complete)
    gap = max((svd.gap for svd in svds), default=0.0)
    how = "exact" if gap == 0 else "certified" if choices.certify else "estimate"
    if weights is None:
        left = [torch.cat([squares, squares.new_tensor([missed])]).flip(0).cumsum(0).flip(0)]
    padded = [torch.cat([residual, residual[-1:].expand(known + 1 - len(residual))]) for residual in left]
    remaining = tuple(torch.stack(padded).sum(0).tolist())
    stored = data.view(torch.uint8).numpy().data
    return DeltaFactors(kind, shape, sizes, known, stored, remaining, spectrum, gap, how, weights is not None)
