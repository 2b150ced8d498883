"""Make the factors that are written of a method's result, at their rank and in their type, and measure what is lost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...adapters.stacked import round_factors
from ...adapters.truncated import Figures, Weighted, share_of, truncated_factors
from ...numerics.factored_svd import FactoredSVD, factored_svd
from ...numerics.spectrum import spectrum_points
from ...numerics.svd import TruncatedSVD
from ...streaming.workers import one_thread
from .results import LowRankResult

ROWS = 1024  # of a dense result, compared with its factors at a time


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
    """Return B (E, out, rank) and A (E, rank, in) of a result, as `truncated_factors` makes them.

    Of compressed changes `kept` is their share in the directions that they share.
    """
    D = result.svd
    weighted = None if inputs is None else Weighted(weigh_by_inputs(D, inputs), inputs)
    factors, figures = truncated_factors(module, D, rank, dtype, weighted, result.factors)
    return factors, figures if result.held is None else replace(figures, kept=result.held)


def best_factors(
    module: str, results: Iterable[DenseResult], rank: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Figures]:
    """Return B (E, out, rank) and A (E, rank, in) of dense results, one in memory at a time.

    Raises:
        NeedsFlag, InputError: as `round_factors`.
    """
    pairs, is_weighted = list[tuple[Tensor, Tensor]](), False
    norm = lost = energy = kept = weighted_lost = 0.0  # squares
    squares = torch.zeros(rank, dtype=torch.float64)
    for D, inputs, top in results:
        padding = rank - len(top.S)
        U, V = (side.double() * top.S.sqrt() for side in (top.U, top.V))
        V = V if inputs is None else V / inputs.mT
        sides = (torch.nn.functional.pad(side, (0, padding)) for side in (U, V))
        B, V = round_factors(module, (next(sides), next(sides)), dtype)
        pairs.append((B, V.mT))
        energy, kept = energy + top.total, kept + top.energy
        squares[: len(top.S)] += top.S.square().cpu()
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
        kept=share_of(kept, energy),
        error=math.sqrt(lost / norm) if norm else 0.0,
        weighted_error=(math.sqrt(weighted_lost / energy) if energy else 0.0) if is_weighted else None,
        spectrum=spectrum_points(squares, len(pairs), energy),
    )
    return (torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])), figures
