"""Compute the factors of a target module from its source modules' factors.

The stored tensors are used unchanged if possible. A scale stays in alpha, or is folded into B. The fold is exact if
B's dtype, or float32, holds every product, as it does for powers of two; any other fold, and a narrower dtype, round.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .module_map import RowSlice, TargetModule
from .numbers import is_exact_product


@dataclass(frozen=True)
class ModuleFactors:
    """The update scale * B A of a target module, with DoRA's magnitude."""

    A: Tensor  # (r, in, *kernel)
    B: Tensor  # (out, r), with a 1 for each dimension of the kernel
    scale: float
    magnitude: Tensor | None = None  # (out,), or (in,) of DoRA along the inputs
    exact: bool = True  # the update is the sources' to the bit


def make_factors(target: TargetModule, updates: Sequence[ModuleFactors]) -> ModuleFactors:
    """Return the factors of `target`.

    A module that is neither split nor fused keeps its tensors. Fused factors get the dtype that holds the factors of
    all slices.

    Args:
        updates: the updates of the target's slices, in their order.
    """
    factors = _low_rank(target, updates)
    if updates[0].magnitude is None:
        return factors
    if target.parts[0].source.update.along_inputs:
        return replace(factors, magnitude=updates[0].magnitude)
    magnitudes = [
        update.magnitude[part.start : part.stop]
        for update, part in zip(updates, target.parts, strict=True)
        if update.magnitude is not None
    ]
    return replace(factors, magnitude=torch.cat(magnitudes) if len(magnitudes) > 1 else magnitudes[0].clone())


def _low_rank(target: TargetModule, updates: Sequence[ModuleFactors]) -> ModuleFactors:
    first = updates[0]
    if target.how == "exact":
        return ModuleFactors(first.A, first.B, first.scale)
    if target.how == "swapped":
        return ModuleFactors(
            first.A, torch.cat([first.B[part.start : part.stop] for part in target.parts]), first.scale
        )
    if target.how == "split":
        ranks = _ranks_of(first.B, target.parts)
        B = torch.cat([first.B[part.start : part.stop, ranks] for part in target.parts])
        return ModuleFactors(first.A[ranks], B, first.scale)
    scale = common_scale([update.scale for update in updates])
    folded = [scaled(update.B, update.scale / scale) for update in updates]
    exact, sides = all(ok for _, ok in folded), [side for side, _ in folded]
    dtype = sides[0].dtype
    for factor in (*sides, *(update.A for update in updates)):
        dtype = torch.promote_types(dtype, factor.dtype)
    A, indices_of = _concatenate_rows([update.A.to(dtype) for update in updates])
    B = torch.zeros(target.rows, len(A), dtype=dtype)
    for part, side, indices in zip(target.parts, sides, indices_of, strict=True):
        stop = part.target_start + part.stop - part.start
        B[part.target_start : stop, indices] = side[part.start : part.stop].to(dtype)
    return ModuleFactors(A, B, scale, exact=exact)


def _concatenate_rows(sides: Sequence[Tensor]) -> tuple[Tensor, list[list[int]]]:
    """Concatenate several A into one (r, in); rows of equal bytes from different A are stored once.

    Returns:
        The concatenated A, and for each of `sides` the indices of its rows in it.
    """
    places: dict[tuple[bytes, int], int] = {}
    rows: list[Tensor] = []
    indices_of: list[list[int]] = []
    for A in sides:
        seen, indices = Counter[bytes](), list[int]()
        for row in A.contiguous():
            key = row.view(torch.uint8).numpy().tobytes()
            place = places.setdefault((key, seen[key]), len(places))
            rows += [row] if place == len(rows) else []
            indices.append(place)
            seen[key] += 1
        indices_of.append(indices)
    return torch.stack(rows), indices_of


def common_scale(scales: Sequence[float]) -> float:
    """Return the first scale if its ratio to every other scale is a power of two, so that no fold rounds; else 1."""
    ratios = [scale / scales[0] if scales[0] else 0.0 for scale in scales]
    return scales[0] if all(abs(math.frexp(ratio)[0]) == 0.5 for ratio in ratios) else 1.0


def scaled(B: Tensor, scale: float) -> tuple[Tensor, bool]:
    """Return scale * B in B's dtype, or in float32 if that is too narrow, and whether this is exact."""
    product = B.double() * scale
    rounded = product.to(B.dtype)
    if not torch.equal(rounded.double(), product):
        rounded = product.float()
    return rounded, is_exact_product(B.dtype, scale) and torch.equal(rounded.double(), product)


def _ranks_of(B: Tensor, parts: Sequence[RowSlice]) -> Tensor:
    """Return a mask (r,) of the ranks that slices of a fused B need.

    If no rank reaches both the slices and other rows, as in factors that were fused from split ones, the result is the
    ranks that reach no other row. It includes ranks that reach no row at all, as in an untrained adapter. Otherwise
    every rank is needed.
    """
    reached = B.reshape(B.shape[:2]) != 0  # (out, r)
    in_slices = torch.zeros(len(B), dtype=torch.bool)
    for part in parts:
        in_slices[part.start : part.stop] = True
    inside, outside = reached[in_slices].any(0), reached[~in_slices].any(0)
    apart = not bool((inside & outside).any()) and not bool(outside.all())
    return ~outside if apart else torch.ones_like(outside)


def is_zero_filler(target: TargetModule, updates: Sequence[ModuleFactors], factors: ModuleFactors) -> bool:
    """Return whether a slice of a fused B is zero and other rows are not: then the part had no adapter."""
    return target.how == "split" and factors.magnitude is None and not factors.B.any() and bool(updates[0].B.any())
