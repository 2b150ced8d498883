"""Sum up what rounding did to some weights, and cast weights from one type to another."""

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
from .forms import FORMS, Wide, bits, codes, finite
from .workspace import Workspace


@dataclass(frozen=True)
class RoundingStats:
    """Sums over some weights that tell how rounding changed them; W is the base, D = X - W the change, W' the result.

    Attributes:
        base_squared: <W, W>.
        change_squared: <D, D>.
        kept: <W' - W, D>.
        changed: weights with another value than the base's.
        not_finite: base weights that are inf or nan, which are copied unchanged.
        overflowed: finite weights that would become inf.
        largest: the largest |X| of those.
        moved_squared: <W' - W, W' - W>, only of weights that are rounded to codes.
        steps: how many weights each step of `decide` was asked for; it depends on the machine, so no report has it.
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
    lost = ((bits(out) & form.size) >= form.inf).logical_and_(finite(base))
    count = int(lost.sum())
    return RoundingStats(overflowed=count, largest=float(base[lost].double().abs().max()) if count else 0.0)


def set_quiet_nan(out: Tensor, where: Tensor) -> None:
    """Set the format's quiet nan, positive and without a payload: which bits a cast gives depends on the processor."""
    form = FORMS[out.dtype]
    bits(out).masked_fill_(where, form.inf | 1 << (form.bits - 2))


def _round_to_odd(x: Tensor) -> Tensor:
    """Return float64 as float32, of the two neighbors of a number between two the one whose last bit is 1.

    Rounding that to 16 bits gives what rounding x itself would (Boldo and Melquiond 2008, theorem 3), where torch's own
    cast is through the nearest float32, on some processors.
    """
    near = x.float()
    back, pattern = near.double(), near.view(torch.int32)
    pattern.sub_((back.abs() > x.abs()).int()).bitwise_or_((back != x).int())
    return near


@np.errstate(all="ignore")
def _cast_double(base: Tensor, out: Tensor) -> None:
    """Cast float64 in one rounding, where torch takes two on some processors; what overflows gets the code of inf."""
    out.copy_(base)
    flat, result, form = base.reshape(-1).cpu().numpy(), torch.empty(base.shape, dtype=out.dtype), FORMS[out.dtype]
    made = codes(result).reshape(-1)
    made[...] = codes(out.cpu().contiguous()).reshape(-1)
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        zero = np.zeros(len(flat[part]))
        found, sure = nearest(flat[part], zero, zero, form)
        made[part] = np.where(sure & (flat[part] != 0), found, made[part])  # of 0 the sign stays
    out.copy_(result)


def replaced_change(base: Tensor, value: Tensor, out: Tensor, work: Workspace, cast: RoundingStats) -> RoundingStats:
    """Return the statistics of rows of `base` that were replaced by `value`, rounded to `out`. All are (rows, n).

    Args:
        cast: what `cast_rounded` returned for the replacement, the source of the overflow.
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


def dot_each(x: Tensor, y: Tensor, matrices: int) -> Wide:
    """Return <x, y> of each of so many matrices, one below the other."""
    if matrices == 1:
        return np.array([dot(x, y)])
    found: Wide = torch.linalg.vecdot(x.view(matrices, -1), y.view(matrices, -1)).double().cpu().numpy()
    return found


def count_different(x: Tensor, base: Tensor, work: Workspace, matrices: int = 1) -> npt.NDArray[np.intp]:
    """Return how many values of each of so many matrices differ, by their bits if the types are equal."""
    if x.is_cuda or x.itemsize == 1:
        differ = x.double() != base.double() if x.dtype != base.dtype else bits(x) != bits(base)
        return differ.view(matrices, -1).sum(1).cpu().numpy()
    hit = work.take("different", torch.bool, *x.shape).numpy()
    if x.dtype == base.dtype:
        np.not_equal(codes(x), codes(base), out=hit)
    else:
        kind = torch.float64 if 8 in (x.itemsize, base.itemsize) else torch.float32
        one, two = (work.take(name, kind, *x.shape).copy_(each) for name, each in (("one", x), ("two", base)))
        np.not_equal(one.numpy(), two.numpy(), out=hit)
    each = hit.reshape(matrices, -1)
    return np.array([np.count_nonzero(own) for own in each])  # by axis numpy takes ten times as long
