"""Statistics of how rounding changed weights, and casts of weights from one type to another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import (
    Array,
    Numbers,
    dot,
    dots_of_rows,
    fetched,
    largest_ordinal,
    narrow,
    not_equal,
    sent,
    take,
    widen,
)
from .forms import F32, F64, Wide, wide
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


def cast_rounded(base: Numbers, out: Numbers, work: Workspace) -> RoundingStats:
    """Write RN(base) into `out`, for any two forms; only the overflow is counted."""
    if out.on_gpu:
        made = Numbers.empty(out.form, *out.shape)
        stats = cast_rounded(Numbers(base.host(), base.form), made, work)
        out.bits[...] = sent(made.bits, out.bits)
        return stats
    if base.form == out.form:
        np.copyto(out.bits, base.bits)
    elif base.form != F64:
        kind = np.float64 if out.form == F64 else np.float32
        narrow(widen(base, work.take("narrow", kind, *base.shape)), out)
    elif out.form == F32:
        narrow(base.wide(), out)
    else:
        narrow(_round_to_odd(base.wide()), out)
    if largest_ordinal(out) < out.form.inf:
        return RoundingStats()
    if base.form != out.form:
        set_quiet_nan(out, (base.bits & base.form.size) >= base.form.inf + base.form.has_inf)
    overflowed = np.flatnonzero(~out.is_finite() & base.is_finite())
    largest = float(np.abs(wide(take(base, overflowed), base.form)).max(initial=0.0))
    return RoundingStats(overflowed=len(overflowed), largest=largest)


def set_quiet_nan(out: Numbers, mask: Array) -> None:
    """Write the format's quiet nan, positive and without payload; a cast's bits would depend on the processor."""
    out.bits[mask] = out.form.inf | 1 << (out.form.precision - 2)


@np.errstate(all="ignore")
def _round_to_odd(x: Wide) -> npt.NDArray[np.float32]:
    """Round float64 to float32; a number between two neighbors becomes the one whose last bit is 1.

    Rounding the result to 16 or 8 bits is the same as rounding x directly (Boldo and Melquiond 2008, theorem 3).
    """
    near = x.astype(np.float32)
    back, pattern = near.astype(np.float64), near.view(np.int32)
    pattern -= np.abs(back) > np.abs(x)
    pattern |= back != x
    return near


@np.errstate(all="ignore")
def replaced_change(base: Numbers, value: Numbers, out: Numbers, work: Workspace, cast: RoundingStats) -> RoundingStats:
    """Return the statistics of rows of `base` that were replaced by `value`, rounded to `out`. All are (rows, n).

    Args:
        cast: the statistics that `cast_rounded` returned for the replacement, with its overflow.
    """
    weight, new, total = (
        widen(each, work.take(name, np.float64, *base.shape))
        for name, each in (("wide", base), ("change", value), ("total", out))
    )
    new -= weight
    total -= weight
    kept, change, squared = dot(total, new), dot(new, new), dot(weight, weight)
    if not math.isfinite(squared):
        kept = change = squared = 0.0  # inf and nan have no size
    return RoundingStats(
        squared, change, kept, int(count_different(out, base, work)[0]), 0, cast.overflowed, cast.largest
    )


def dot_by_matrix(x: Array, y: Array, matrices: int) -> Wide:
    """Return <x, y> of each matrix; x and y hold `matrices` matrices, one below the other."""
    return dots_of_rows(x.reshape(matrices, -1), y.reshape(matrices, -1))


def count_different(x: Numbers, base: Numbers, work: Workspace, matrices: int = 1) -> npt.NDArray[np.intp]:
    """Return how many values of each matrix differ, by their bits if the forms are equal."""
    both = [x.bits, base.bits]
    if x.form != base.form:
        kind = np.float64 if F64 in (x.form, base.form) else np.float32
        both = [widen(each, work.take(name, kind, *x.shape)) for name, each in (("one", x), ("two", base))]
    hit = not_equal(both[0], both[1], work.take("different", np.bool_, *x.shape)).reshape(matrices, -1)
    if x.on_gpu:
        return fetched(hit.sum(1))
    return np.array([np.count_nonzero(row) for row in hit])  # by axis numpy takes ten times as long
