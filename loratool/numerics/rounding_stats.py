"""Statistics of how rounding changed weights, and casts of weights from one type to another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .decide import CHUNK, nearest
from .forms import FORMS, Wide, finite, numpy_bits, tensor_bits
from .workspace import Workspace


@dataclass(frozen=True)
class RoundingStats:
    """Sums over some weights that describe their rounding. W is the base, D = X - W the change, W' the result.

    Attributes:
        base_squared: <W, W>.
        change_squared: <D, D>.
        kept: <W' - W, D>.
        changed: count of weights that differ from the base's.
        not_finite: count of base weights that are inf or nan, which are copied unchanged.
        overflowed: count of finite weights that would become inf.
        largest: the largest |X| of the overflowed weights.
        moved_squared: <W' - W, W' - W>, only of weights that are rounded to codes.
        steps: how many weights each step of `decide` computed. It depends on the machine, so no report has it.
    """

    base_squared: float = 0.0
    change_squared: float = 0.0
    kept: float = 0.0
    changed: int = 0
    not_finite: int = 0
    overflowed: int = 0
    largest: float = 0.0
    moved_squared: float = 0.0
    steps: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, parts: Sequence[RoundingStats]) -> RoundingStats:
        """Return the sums over all parts."""
        sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in SUMMED}
        steps = sum((part.steps for part in parts if part.steps), Counter[str]())
        return cls(**sums, largest=max((part.largest for part in parts), default=0.0), steps=steps)


SUMMED = ("base_squared", "change_squared", "kept", "changed", "not_finite", "overflowed", "moved_squared")


def cast_rounded(base: Tensor, out: Tensor, work: Workspace) -> RoundingStats:
    """Write RN(base) into `out`, for any two float types; only the overflow is counted."""
    form = FORMS[out.dtype]
    if base.dtype == torch.float64 and out.itemsize == 2:
        out.copy_(_round_to_odd(base))
    elif base.dtype == torch.float64 and out.itemsize == 1:
        _cast_double(base, out)
    elif form.inf == form.size and base.dtype != out.dtype:  # where there is no inf, torch stops at the largest number
        _cast_double(base.double(), out)
    elif base.itemsize == out.itemsize and base.dtype != out.dtype:  # torch is slow between two types of 16 bits
        out.copy_(work.take("narrow", torch.float32, *base.shape).copy_(base))
    else:
        out.copy_(base)  # torch goes through float32, which holds every value of base: one rounding
    if out.itemsize > 1 and math.isfinite(float(out.abs().max())):
        return RoundingStats()
    if out.dtype != base.dtype:
        set_quiet_nan(out, base.isnan())
    overflowed = ((tensor_bits(out) & form.size) >= form.inf).logical_and_(finite(base))
    count = int(overflowed.sum())
    return RoundingStats(overflowed=count, largest=float(base[overflowed].double().abs().max()) if count else 0.0)


def set_quiet_nan(out: Tensor, where: Tensor) -> None:
    """Write the format's quiet nan, positive and without payload; a cast's bits would depend on the processor."""
    form = FORMS[out.dtype]
    tensor_bits(out).masked_fill_(where, form.inf | 1 << (form.precision - 2))


def _round_to_odd(x: Tensor) -> Tensor:
    """Round float64 to float32; a number between two neighbors becomes the one whose last bit is 1.

    Rounding the result to 16 bits is the same as rounding x directly (Boldo and Melquiond 2008, theorem 3). On some
    processors torch's own cast goes through the nearest float32, which is not.
    """
    near = x.float()
    back, pattern = near.double(), near.view(torch.int32)
    pattern.sub_((back.abs() > x.abs()).int()).bitwise_or_((back != x).int())
    return near


@np.errstate(all="ignore")
def _cast_double(base: Tensor, out: Tensor) -> None:
    """Cast float64 in one rounding; torch takes two on some processors. An overflow gets the bits of inf."""
    out.copy_(base)
    flat, result, form = base.reshape(-1).cpu().numpy(), torch.empty(base.shape, dtype=out.dtype), FORMS[out.dtype]
    patterns = numpy_bits(result).reshape(-1)
    patterns[...] = numpy_bits(out.cpu().contiguous()).reshape(-1)
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        zero = np.zeros(len(flat[part]))
        rounded, sure = nearest(flat[part], zero, zero, form)
        patterns[part] = np.where(sure & (flat[part] != 0), rounded, patterns[part])  # of 0 the sign stays
    out.copy_(result)


def replaced_change(base: Tensor, value: Tensor, out: Tensor, work: Workspace, cast: RoundingStats) -> RoundingStats:
    """Return the statistics of rows of `base` that were replaced by `value`, rounded to `out`. All are (rows, n).

    Args:
        cast: the statistics that `cast_rounded` returned for the replacement, with its overflow.
    """
    wide, new, total = (work.take(name, torch.float64, *base.shape) for name in ("wide", "change", "total"))
    wide.copy_(base)
    new.copy_(value).sub_(wide)
    total.copy_(out).sub_(wide)
    kept, change, squared = dot(total, new), dot(new, new), dot(wide, wide)
    if not math.isfinite(squared):
        kept = change = squared = 0.0  # inf and nan have no size
    return RoundingStats(
        squared, change, kept, int(count_different(out, base, work)[0]), 0, cast.overflowed, cast.largest
    )


def dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.view(-1), y.view(-1)))


def dot_by_matrix(x: Tensor, y: Tensor, matrices: int) -> Wide:
    """Return <x, y> of each matrix; x and y hold `matrices` matrices, one below the other."""
    if matrices == 1:
        return np.array([dot(x, y)])
    products: Wide = torch.linalg.vecdot(x.view(matrices, -1), y.view(matrices, -1)).double().cpu().numpy()
    return products


def count_different(x: Tensor, base: Tensor, work: Workspace, matrices: int = 1) -> npt.NDArray[np.intp]:
    """Return how many values of each matrix differ, by their bits if the types are equal."""
    if x.is_cuda or x.itemsize == 1:
        differ = x.double() != base.double() if x.dtype != base.dtype else tensor_bits(x) != tensor_bits(base)
        return differ.view(matrices, -1).sum(1).cpu().numpy()
    hit = work.take("different", torch.bool, *x.shape).numpy()
    if x.dtype == base.dtype:
        np.not_equal(numpy_bits(x), numpy_bits(base), out=hit)
    else:
        kind = torch.float64 if 8 in (x.itemsize, base.itemsize) else torch.float32
        first, second = (work.take(name, kind, *x.shape).copy_(source) for name, source in (("one", x), ("two", base)))
        np.not_equal(first.numpy(), second.numpy(), out=hit)
    by_matrix = hit.reshape(matrices, -1)
    return np.array([np.count_nonzero(row) for row in by_matrix])  # by axis numpy takes ten times as long
