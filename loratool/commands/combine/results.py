"""Apply a method to a module's changes: to their factors, their entries, or their cores in a common space.

A result is an SVD, from factors or from a small core, without any (out, in) matrix. Only methods of entries have dense
results. Compress then merge (`rank`) runs every method in a space with a given number of shared directions per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...errors import InputError
from ...numerics.arrays import Array, fetched, sent
from ...numerics.core_space import CoreSpace, core_space
from ...numerics.factored_svd import FactoredSVD, factored_svd
from ...numerics.linalg import eye, isfinite, norm, padded, stack, svd
from .methods.delta import WeightedDelta
from .methods.table import CombineMethod

GRID = 2.0**-40  # of a core's largest entry: far above float64's rounding, far below what factors in float32 can tell


@dataclass(frozen=True)
class LowRankResult:
    """The result of a method for a stack of E matrices."""

    svd: FactoredSVD  # of the stack, (E, ...)
    factors: tuple[Array, Array] | None  # B (E, out, r) and A (E, r, in) of a method that gives them
    held: float | None  # of changes that were compressed: the share of their energy that is left, each by its own norm


def low_rank_result(
    method: CombineMethod, matrices: Sequence[Sequence[WeightedDelta]], density: float, rank: int | None
) -> LowRankResult:
    """Compute the result of each matrix's changes.

    Args:
        method: one that acts on factors or cores; with a rank, any that is not in NOT_COMPRESSED.
        matrices: the changes of each one.
        rank: the number of shared directions per side to which changes are compressed first; None for no compression.
    """
    if rank is None and method.acts_on == "factors":
        B, A = result_factors(method, matrices, density)
        return LowRankResult(factored_svd(B, A), (B, A), None)
    svds, shares = [], []
    for changes in matrices:
        deltas = _present(changes) if method.acts_on == "core" else changes
        space = core_space([factored_svd(delta.B, delta.A) for delta in deltas])
        if rank is not None:
            full_space, space = space, space.compressed(rank)
            shares += _shares(full_space, space)
        svds.append(_in_space(method, space, deltas, density, compressed=rank is not None))
    share = sum(shares) / len(shares) if shares else 1.0
    return LowRankResult(_stacked(svds), None, None if rank is None else share)


def result_factors(
    method: CombineMethod, matrices: Sequence[Sequence[WeightedDelta]], density: float
) -> tuple[Array, Array]:
    """Return B (E, out, r) and A (E, r, in) of a method whose result is factors."""
    factors = [method.run(deltas, density) for deltas in matrices]
    return stack([B for B, _ in factors]), stack([A for _, A in factors])


def dense_result(method: CombineMethod, deltas: Sequence[WeightedDelta], density: float, module: str) -> Array:
    """Return the (out, in) result of a method of entries for one matrix's changes.

    Raises:
        InputError: an entry is not finite.
    """
    D = method.run(deltas, density)
    assert not isinstance(D, tuple)
    if not isfinite(D).all():
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
        B, A = method.run([replace(delta, B=space.U @ core, A=space.V.T) for delta, core in parts], density)
        return factored_svd(B, A)
    cores = space.cores if method.acts_on == "core" else _snapped(space.cores)
    identity, side = eye(cores.shape[2], cores), min(cores.shape[1:])
    given = [
        WeightedDelta(core, identity, delta.weight, delta.key, side if compressed else delta.side, np.float64)
        for delta, core in zip(deltas, cores, strict=True)
    ]
    core = method.run(given, density)
    assert not isinstance(core, tuple)
    U, S, Vh = svd(core)
    return FactoredSVD(space.U @ U, S, space.V @ Vh.T)


def _snapped(cores: Array) -> Array:
    """Round each core's entries to multiples of GRID, so that no decision depends on float64's rounding.

    Then the same entries are 0, equal, or cancel on every machine.
    """
    x = fetched(cores)
    largest = np.abs(x).max((1, 2), keepdims=True, initial=0.0)
    steps = np.ldexp(GRID, np.frexp(largest)[1])
    return sent(np.rint(x / steps) * steps, cores)


def _shares(full_space: CoreSpace, space: CoreSpace) -> list[float]:
    """Return the share of each nonzero change's energy that a compressed space holds."""
    norms, held = (norm(each.cores, (1, 2)) for each in (full_space, space))
    return [min(1.0, float(h / n) ** 2) for n, h in zip(norms, held, strict=True) if n]


def _stacked(svds: Sequence[FactoredSVD]) -> FactoredSVD:
    """Return the SVDs of single matrices as that of their stack, padded with zeros to the same rank."""
    k = max(len(each.S) for each in svds)
    return FactoredSVD(*(stack([padded(getattr(each, side), -1, k) for each in svds]) for side in ("U", "S", "V")))
