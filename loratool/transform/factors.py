"""Compute the factors of a target module from its source modules' factors.

The stored tensors are used unchanged if possible. A scale stays in alpha, or is folded into B. The fold is exact if
B's form, or float32, holds every product, as it does for powers of two; any other fold, and a narrower form, round.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..numerics.arrays import Numbers, recast, rounded_to
from ..numerics.forms import F32, Bits, holding
from .module_map import RowSlice, TargetModule
from .numbers import is_exact_product


@dataclass(frozen=True)
class ModuleFactors:
    """The update scale * B A of a target module, with DoRA's magnitude."""

    A: Numbers  # (r, in, *kernel)
    B: Numbers  # (out, r), with a 1 for each dimension of the kernel
    scale: float
    magnitude: Numbers | None = None  # (out,), or (in,) of DoRA along the inputs
    exact: bool = True  # the update is the sources' to the bit


def make_factors(target: TargetModule, updates: Sequence[ModuleFactors]) -> ModuleFactors:
    """Return the factors of `target`.

    A module that is neither split nor fused keeps its tensors. Fused factors get the form that holds the factors of
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
    return replace(factors, magnitude=_below(magnitudes))


def _below(parts: Sequence[Numbers]) -> Numbers:
    """Return the rows of parts in one form, one part below the other."""
    return Numbers(np.concatenate([part.bits for part in parts]), parts[0].form)


def _low_rank(target: TargetModule, updates: Sequence[ModuleFactors]) -> ModuleFactors:
    first = updates[0]
    if target.how == "exact":
        return ModuleFactors(first.A, first.B, first.scale)
    if target.how == "swapped":
        return ModuleFactors(first.A, _below([first.B[part.start : part.stop] for part in target.parts]), first.scale)
    if target.how == "split":
        ranks = _ranks_of(first.B, target.parts)
        B_parts = _below([first.B[part.start : part.stop, ranks] for part in target.parts])
        return ModuleFactors(first.A[ranks], B_parts, first.scale)
    scale = common_scale([update.scale for update in updates])
    folded = [scaled(update.B, update.scale / scale) for update in updates]
    exact, sides = all(ok for _, ok in folded), [side for side, _ in folded]
    form = holding(*(side.form for side in (*sides, *(update.A for update in updates))))
    A, indices_of = _concatenate_rows([recast(update.A, form).bits for update in updates])
    B: Bits = np.zeros((target.rows, len(A)), form.bits_type)
    for part, side, indices in zip(target.parts, sides, indices_of, strict=True):
        stop = part.target_start + part.stop - part.start
        B[part.target_start : stop, indices] = recast(side[part.start : part.stop], form).bits
    return ModuleFactors(Numbers(A, form), Numbers(B, form), scale, exact=exact)


def _concatenate_rows(sides: Sequence[Bits]) -> tuple[Bits, list[list[int]]]:
    """Concatenate several A into one (r, in); rows of equal bytes from different A are stored once.

    Returns:
        The concatenated A, and for each of `sides` the indices of its rows in it.
    """
    places: dict[tuple[bytes, int], int] = {}
    rows: list[Bits] = []
    indices_of: list[list[int]] = []
    for A in sides:
        seen, indices = Counter[bytes](), list[int]()
        for row in A:
            key = row.tobytes()
            place = places.setdefault((key, seen[key]), len(places))
            rows += [row] if place == len(rows) else []
            indices.append(place)
            seen[key] += 1
        indices_of.append(indices)
    return np.stack(rows), indices_of


def common_scale(scales: Sequence[float]) -> float:
    """Return the first scale if its ratio to every other scale is a power of two, so that no fold rounds; else 1."""
    ratios = [scale / scales[0] if scales[0] else 0.0 for scale in scales]
    return scales[0] if all(abs(math.frexp(ratio)[0]) == 0.5 for ratio in ratios) else 1.0


@np.errstate(over="ignore")
def scaled(B: Numbers, scale: float) -> tuple[Numbers, bool]:
    """Return scale * B in B's form, or in float32 if that is too narrow, and whether this is exact."""
    product = B.wide() * scale
    rounded = rounded_to(product, B.form)
    if not np.array_equal(rounded.wide(), product):
        rounded = rounded_to(product, F32)
    return rounded, is_exact_product(B.form, scale) and np.array_equal(rounded.wide(), product)


def _ranks_of(B: Numbers, parts: Sequence[RowSlice]) -> npt.NDArray[np.bool_]:
    """Return a mask (r,) of the ranks that slices of a fused B need.

    If no rank reaches both the slices and other rows, as in factors that were fused from split ones, the result is the
    ranks that reach no other row. It includes ranks that reach no row at all, as in an untrained adapter. Otherwise
    every rank is needed.
    """
    reached = abs(B).bits.reshape(B.shape[:2]) != 0  # (out, r)
    in_slices = np.zeros(len(B), np.bool_)
    for part in parts:
        in_slices[part.start : part.stop] = True
    inside, outside = reached[in_slices].any(0), reached[~in_slices].any(0)
    apart = not bool((inside & outside).any()) and not bool(outside.all())
    return ~outside if apart else np.ones_like(outside)


def is_zero_filler(target: TargetModule, updates: Sequence[ModuleFactors], factors: ModuleFactors) -> bool:
    """Return whether a slice of a fused B is zero and other rows are not: then the part had no adapter."""
    return target.how == "split" and factors.magnitude is None and not _any(factors.B) and _any(updates[0].B)


def _any(x: Numbers) -> bool:
    """Return whether a number is not 0."""
    return bool(abs(x).bits.any())
