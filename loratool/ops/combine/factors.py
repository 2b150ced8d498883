"""Make the factors that are written of a method's result D, at their rank and in their type, and measure what is lost.

With the weights W of the inputs what is cut is what matters least for D W, and A is divided by W again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...adapters.stacked import round_factors
from ...numerics.factored_svd import FactoredSVD, factored_svd, relative_distance, rounding_distance
from ...numerics.svd import TruncatedSVD
from ...streaming.workers import one_thread
from .results import LowRankResult

ROWS = 1024  # of a dense result, compared with its factors at a time


@dataclass(frozen=True)
class Figures:
    """The figures that are measured of a module."""

    norm: float  # ||D|| of the method's result D
    energy: float  # ||D||^2, or with the weights W of the inputs ||D W||^2
    kept: float  # the share of the energy in the rank, or that of compressed changes in the directions that they share
    error: float  # ||D' - D|| / ||D|| of what is written
    weighted_error: float | None  # the same of D' W and D W; None without W


class DenseResult(NamedTuple):
    """A dense result of one matrix, and its part of a rank."""

    D: Tensor  # (out, in), float32
    inputs: Tensor | None  # W, (1, in), float64; None if nothing is known of them
    top: TruncatedSVD  # of D W


def weigh_by_inputs(D: FactoredSVD, inputs: Tensor) -> FactoredSVD:
    """Return the SVD of D W for the weights W of its inputs, (E, 1, in)."""
    return factored_svd(D.U * D.S.unsqueeze(-2), D.V.mT * inputs)


def low_rank_factors(
    module: str, result: LowRankResult, rank: int, inputs: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Figures]:
    """Return B (E, out, rank) and A (E, rank, in) of a result: its own factors if they have the rank, or the best.

    Raises:
        NeedsFlag, InputError: as `round_factors`.
    """
    D, factors = result.svd, result.factors
    C = D if inputs is None else weigh_by_inputs(D, inputs)
    if inputs is not None or factors is None or factors[0].shape[-1] != rank:
        factors = C.truncated(rank)
    B, A = factors
    B, A = round_factors(module, (B, A if inputs is None else A / inputs), dtype)
    energy, kept = (float(S.square().sum()) for S in (C.S, C.S[..., :rank]))
    lost = rounding_distance(C, factors, (B, A if inputs is None else A.double() * inputs))
    error = float(torch.linalg.vector_norm(lost)) / math.sqrt(energy) if energy else 0.0
    figures = Figures(
        norm=float(torch.linalg.vector_norm(D.S)),
        energy=energy,
        kept=_share(kept, energy) if result.held is None else result.held,
        error=error if inputs is None else relative_distance(D, factored_svd(B, A)),
        weighted_error=None if inputs is None else error,
    )
    return (B, A), figures


def best_factors(
    module: str, results: Iterable[DenseResult], rank: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Figures]:
    """Return B (E, out, rank) and A (E, rank, in) of dense results, one in memory at a time.

    Raises:
        NeedsFlag, InputError: as `round_factors`.
    """
    pairs, is_weighted = list[tuple[Tensor, Tensor]](), False
    norm = lost = energy = kept = weighted_lost = 0.0  # squares
    for D, inputs, top in results:
        padding = rank - len(top.S)
        U, V = (side.double() * top.S.sqrt() for side in (top.U, top.V))
        V = V if inputs is None else V / inputs.mT
        sides = (torch.nn.functional.pad(side, (0, padding)) for side in (U, V))
        B, V = round_factors(module, (next(sides), next(sides)), dtype)
        pairs.append((B, V.mT))
        energy, kept = energy + top.total, kept + top.energy
        is_weighted = inputs is not None
        with one_thread():
            for start in range(0, len(D), ROWS):
                block = slice(start, start + ROWS)
                left = B[block].double() @ V.mT.double() - D[block]
                lost += float(left.square().sum())
                if inputs is not None:
                    norm += float(D[block].double().square().sum())
                    weighted_lost += float((left * inputs).square().sum())
    norm = norm if is_weighted else energy
    figures = Figures(
        norm=math.sqrt(norm),
        energy=energy,
        kept=_share(kept, energy),
        error=math.sqrt(lost / norm) if norm else 0.0,
        weighted_error=(math.sqrt(weighted_lost / energy) if energy else 0.0) if is_weighted else None,
    )
    return (torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])), figures


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 1.0
