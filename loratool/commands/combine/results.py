"""Apply a method to a module's changes: to their factors, their entries, or their cores in a common space.

A result is an SVD, from factors or from a small core, without any (out, in) matrix. Only methods of entries have dense
results. Compress then merge (`rank`) runs every method in a space with a given number of shared directions per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import InputError
from ...files.tensor_ref import is_finite
from ...numerics.core_space import CoreSpace, core_space
from ...numerics.factored_svd import FactoredSVD, factored_svd
from .methods.delta import WeightedDelta
from .methods.table import CombineMethod

GRID = 2.0**-40  # of a core's largest entry: far above float64's rounding, far below what factors in float32 can tell


@dataclass(frozen=True)
class LowRankResult:
    """The result of a method for a stack of E matrices."""

    svd: FactoredSVD  # of the stack, (E, ...)
    factors: tuple[Tensor, Tensor] | None  # B (E, out, r) and A (E, r, in) of a method that gives them
    held: float | None  # of changes that were compressed: the share of their energy that is left, each by its own norm


def low_rank_result(
    method: CombineMethod, stack: Sequence[Sequence[WeightedDelta]], density: float, rank: int | None
) -> LowRankResult:
    """Compute the result of each matrix's changes.

    Args:
        method: one that acts on factors or cores; with a rank, any that is not in NOT_COMPRESSED.
        stack: the changes of each matrix.
        rank: the number of shared directions per side to which changes are compressed first; None for no compression.
    """
    if rank is None and method.acts_on == "factors":
        B, A = result_factors(method, stack, density)
        return LowRankResult(factored_svd(B, A), (B, A), None)
    svds, shares = [], []
    for changes in stack:
        deltas = _present(changes) if method.acts_on == "core" else changes
        space = core_space([factored_svd(delta.B, delta.A) for delta in deltas])
        if rank is not None:
            full_space, space = space, space.compressed(rank)
            shares += _shares(full_space, space)
        svds.append(_in_space(method, space, deltas, density, compressed=rank is not None))
    share = sum(shares) / len(shares) if shares else 1.0
    return LowRankResult(_stacked(svds), None, None if rank is None else share)


def result_factors(
    method: CombineMethod, stack: Sequence[Sequence[WeightedDelta]], density: float
) -> tuple[Tensor, Tensor]:
    """Return B (E, out, r) and A (E, r, in) of a method whose result is factors."""
    factors = [method.run(deltas, density) for deltas in stack]
    return torch.stack([B for B, _ in factors]), torch.stack([A for _, A in factors])


def dense_result(method: CombineMethod, deltas: Sequence[WeightedDelta], density: float, module: str) -> Tensor:
    """Return the (out, in) result of a method of entries for one matrix's changes.

    Raises:
        InputError: an entry is not finite.
    """
    D = method.run(deltas, density)
    assert isinstance(D, Tensor)
    if not is_finite(D):
        raise InputError("the combined delta overflows float32", culprit=module)
    return D


def _present(deltas: Sequence[WeightedDelta]) -> Sequence[WeightedDelta]:
    """Return the changes with a weight other than 0, or the first if there is none."""
    return [delta for delta in deltas if delta.weight] or deltas[:1]


def _in_space(
    method: CombineMethod, space: CoreSpace, deltas: Sequence[WeightedDelta], density: float, *, compressed: bool
) -> FactoredSVD:
    """Return the SVD of a method's result for the changes that a space's cores stand for."""
    if method.acts_on == "factors":
        parts = zip(deltas, space.cores, strict=True)
        B, A = method.run([replace(delta, B=space.U @ core, A=space.V.mT) for delta, core in parts], density)
        return factored_svd(B, A)
    cores = space.cores if method.acts_on == "core" else _snapped(space.cores)
    identity, side = torch.eye(cores.shape[2], dtype=cores.dtype, device=cores.device), min(cores.shape[1:])
    given = [
        WeightedDelta(core, identity, delta.weight, delta.key, side if compressed else delta.side, core.dtype)
        for delta, core in zip(deltas, cores, strict=True)
    ]
    core = method.run(given, density)
    assert isinstance(core, Tensor)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return FactoredSVD(space.U @ U, S, space.V @ Vh.mT)


def _snapped(cores: Tensor) -> Tensor:
    """Round each core's entries to multiples of GRID, so that no decision depends on float64's rounding.

    Then the same entries are 0, equal, or cancel on every machine.
    """
    steps = cores.abs().amax((1, 2), keepdim=True) if cores.numel() else cores.new_ones(len(cores), 1, 1)
    steps = torch.ldexp(torch.ones_like(steps), torch.frexp(steps).exponent) * GRID
    return (cores / steps).round() * steps


def _shares(full_space: CoreSpace, space: CoreSpace) -> list[float]:
    """Return the share of each nonzero change's energy that a compressed space holds."""
    norms, held = (torch.linalg.vector_norm(each.cores, dim=(1, 2)) for each in (full_space, space))
    return [min(1.0, float(h / n) ** 2) for n, h in zip(norms, held, strict=True) if n]


def _stacked(svds: Sequence[FactoredSVD]) -> FactoredSVD:
    """Return the SVDs of single matrices as that of their stack, padded with zeros to the same rank."""
    k = max(len(svd.S) for svd in svds)
    sides = [
        torch.stack([torch.nn.functional.pad(getattr(svd, side), (0, k - len(svd.S))) for svd in svds])
        for side in ("U", "S", "V")
    ]
    return FactoredSVD(*sides)
