"""Find the weights that a merge can have started from: {W : RN(a W + D) = W'}, a run of numbers of W's format.

D and a are the merge's exact reals, so the set is the same for every writer and reader. Its ends, (midpoint - D) / a,
are computed in floating point with an error bound. If no number of the format is within the bound of an end, the
run's first number and count follow from the bits. A run in doubt is computed again from `near`. If that does not
decide, it is bisected with the merge's own `decide`: no second arithmetic could be wrong.

Numbers are counted by their places (`numerics.forms.place`); -0.0 and +0.0 are two. A run that contains 0.0, and one
where a is 0, counts as `every` number including inf and nan, because so many numbers are near zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..numerics.decide import CHUNK, LEAST, SLACK, Reals, U, decide
from ..numerics.error_free import two_sum
from ..numerics.forms import Bits, Form, IntArray, Positions, Wide, number, place


@dataclass(frozen=True)
class Runs:
    """The runs of some weights.

    Attributes:
        start: the place of each run's first number.
        count: how many numbers each has; `every(form)` for a run that counts as all numbers.
    """

    start: IntArray
    count: IntArray


def every(form: Form) -> int:
    """Return how many bit patterns the format has."""
    return 2 * (form.size + 1)


def find_runs(
    x: Reals,
    result: Bits,
    flat: Positions,
    first: int,
    columns: int,
    change: npt.NDArray[Any],
    reach: float | Wide,
    form: Form,
) -> Runs:
    """Return the run of each weight.

    Args:
        result: the bit patterns of W', finite.
        flat: positions of the weights in a block of `columns` columns. Its first row is row `first` of `x`.
        change: D, float32 or float64, with an error of at most `reach`; nan if unknown.
        reach: one bound, 0 if D is exact; or one for each weight, in the type of D.
    """

    def places(some: Positions) -> tuple[Positions, Positions]:
        i = flat.take(some) // columns
        return i + first, flat.take(some) - i * columns

    if x.factor:
        start, count, known = _by_bits(result, change, reach, form, *x.factor.at(*places(np.arange(len(flat)))))
    else:
        exact = np.zeros((), change.dtype) if isinstance(reach, float) and reach == 0 else None
        start, count, known = _by_bits(result, change, reach, form, low=exact)
    doubt = np.flatnonzero(~known)
    if len(doubt):
        start[doubt], count[doubt] = _closer(x, result.take(doubt), *places(doubt), form)
    zero = np.flatnonzero((result & form.size) == 0)
    if len(zero):
        same = zero[_is_zero(x, *places(zero))]
        start[same], count[same] = place(result.take(same), form), 1
    return Runs(start, count)


@np.errstate(all="ignore")
def _by_bits(
    result: Bits,
    change: npt.NDArray[Any],
    reach: float | Wide,
    form: Form,
    a: Wide | None = None,
    error: Wide | None = None,
    low: npt.NDArray[Any] | None = None,
) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_]]:
    """Return the start and count of each run, and whether both are certain.

    Args:
        a, error: a and a bound on its error; None for a = 1.
        low: a lower part of D: change + low has an error of `reach`. If an end is a number of the format, it decides
            whether that number is in the run. Only for a = 1.
    """
    kind, precision, bias = (np.int32, 24, 127) if change.dtype == np.float32 else (np.int64, 53, 1023)
    # of a normal number x: x's bits >> shift = zero + ordinal; below the second binade: x = ordinal * step
    shift, zero = precision - form.precision, (form.least + bias - 1) << (form.precision - 1)
    half, second, minus_zero = 1 << (shift - 1), 2 << (form.precision - 1), kind(np.iinfo(kind).min)
    step = change.dtype.type(2.0 ** (form.least - form.precision + 1))
    apart = 2.0 ** (40 if kind is np.int32 else 400)  # a beyond it or its inverse: quotients or a itself lose bits
    start: IntArray = np.empty(len(change), kind)
    count: IntArray = np.empty(len(change), kind)
    known = np.empty(len(change), np.bool_)
    roundings = change.dtype.type(2.0 ** (4 - precision))
    for k in range(0, len(change), CHUNK):
        part = slice(k, k + CHUNK)
        bits: Any = result[part].astype(kind)
        off: Any = reach[part] if isinstance(reach, np.ndarray) else change.dtype.type(reach)
        size, sign = bits & form.size, bits & minus_zero
        # all of this with the sign of W': the cell of X is (inner, outer), and D is `d`
        middle, d = (size + zero) << shift, (change[part].view(kind) ^ sign).view(change.dtype)
        inner, outer = (middle - half).view(change.dtype), (middle + half).view(change.dtype)
        if int(size.min()) < second:
            small = np.flatnonzero(size < second)
            inner[small] = np.maximum(size[small] - 0.5, 0) * step
            outer[small] = (size[small] + 0.5) * step
        if low is not None:
            rest = np.where(sign < 0, -low[part], low[part]) if low.ndim else low
            (inner, e1, lost1), (outer, e2, lost2) = (_less(end, d, rest) for end in (inner, outer))
            sure = ((np.abs(e1) > off + lost1) | (off + lost1 == 0)) & ((np.abs(e2) > off + lost2) | (off + lost2 == 0))
            falls = outer < 0
            straddles = (inner < 0) != falls
            sure &= ~straddles
            e1, e2 = np.where(falls, -e2, e1), np.where(falls, -e1, e2)  # of the nearer end, and of the farther
            near, far = np.abs(np.where(falls, outer, inner)), np.abs(np.where(falls, inner, outer))
            open_ends = bits & 1  # ties go to even
            below = (near.view(kind) - 1 + ((e1 > 0) | ((e1 == 0) & (open_ends == 1)))) >> shift
            last = (far.view(kind) - ((e2 < 0) | ((e2 == 0) & (open_ends == 1)))) >> shift
            margin = off
            sure &= below >= zero + second
        else:
            inner -= d
            outer -= d
            extra: Any = off
            if a is not None and error is not None:
                by = a[part].astype(change.dtype)
                inner, outer = inner / by, outer / by
                extra = off / np.abs(by)
            falls = outer < 0
            straddles = (inner < 0) != falls
            inner, outer = np.abs(inner, out=inner), np.abs(outer, out=outer)
            near, far = np.minimum(inner, outer), np.maximum(inner, outer, out=outer)
            margin = np.multiply(far, roundings, out=inner) + extra
            if a is not None and error is not None:
                margin += far * (error[part] / np.abs(a[part])).astype(change.dtype) * 2
                margin[(np.abs(a[part]) <= 1 / apart) | (np.abs(a[part]) >= apart)] = np.inf
            ends = near - margin, near + margin, far - margin, far + margin
            below, same, last, equal = (end.view(kind) >> shift for end in ends)
            if not near.min() > second * step:
                for end, ordinal in zip(ends, (below, same, last, equal), strict=True):
                    small = np.flatnonzero(np.abs(end) < second * step)
                    ordinal[small] = zero + np.floor(end[small] / step).astype(kind)
            sure = (below == same) & (last == equal) & ~straddles
        sure &= last < zero + form.inf
        sure |= straddles
        sure &= near > 2 * margin
        np.subtract(last, below, out=count[part])
        # first .. last - 1 as ordinals, which for negative numbers are ~place
        last += 1
        below += 1
        start[part] = np.where(falls ^ (sign < 0), zero - last, below - zero)
        np.copyto(count[part], every(form), where=straddles)  # such a run holds 0.0
        known[part] = sure
    return start, count, known


def _less(x: Wide, d: Wide, low: Wide) -> tuple[Wide, Wide, Wide]:
    """Return x - d - low as a number, a rest of at most half its last bit, and a bound on the rounding error."""
    s, e = two_sum(x, -d)
    e, rest = two_sum(e, -low)
    s, e = two_sum(s, e)
    return s, e, np.abs(rest)


def _closer(x: Reals, result: Bits, i: Positions, j: Positions, form: Form) -> tuple[IntArray, IntArray]:
    """Return the start and count of each run from `near`, or by bisection if that does not decide."""
    high, low, bound = x.delta.near(i, j)
    off = (bound + np.abs(low) + np.abs(high) * (16 * U)) * SLACK + LEAST
    if x.factor:
        a, error = x.factor.at(i, j)
        start, count, known = _by_bits(result, high, off, form, a, error)
    else:
        start, count, known = _by_bits(result, high, off, form)
        exact = np.flatnonzero(~known & (bound == 0))
        some = result.take(exact), high.take(exact), bound.take(exact)
        start[exact], count[exact], known[exact] = _by_bits(*some, form, low=low.take(exact))
    doubt = np.flatnonzero(~known)
    for k in range(0, len(doubt), CHUNK):
        part = doubt[k : k + CHUNK]
        guess = start.take(part), count.take(part)
        start[part], count[part] = _by_halves(x, result.take(part), i.take(part), j.take(part), form, guess)
    return start, count


def _by_halves(
    x: Reals, result: Bits, i: Positions, j: Positions, form: Form, guess: tuple[IntArray, IntArray]
) -> tuple[IntArray, IntArray]:
    """Return the start and count of each run by bisection with `decide`. guess: probable starts and counts."""
    start = np.zeros(len(result), np.int64)
    count = np.full(len(result), every(form))
    falls, stands = np.zeros((2, len(result)), np.bool_)
    if x.factor:
        a, error = x.factor.at(i, j)
        for k in np.flatnonzero(np.abs(a) <= error):
            exact = x.factor.exact_at(int(i[k]), int(j[k]))  # which float64 may not hold
            a[k] = (exact > 0) - (exact < 0)
        falls, stands = a < 0, a == 0
    holds_zero = stands | (decide(x, np.zeros(len(i), form.bits_type), form, i, j, form) == result)
    some = np.flatnonzero(~holds_zero)
    i, j, target, falls = i[some], j[some], place(result[some], form).astype(np.int64), falls[some]

    def is_past(places: IntArray, which: Positions, after: int) -> npt.NDArray[np.bool_]:
        """Return whether RN(X) of the numbers at these places is W' + `after` or more; or less, where a < 0."""
        result_places = place(decide(x, number(places, form), form, i[which], j[which], form), form).astype(np.int64)
        goal = target[which]
        return np.where(falls[which], result_places <= goal - after, result_places >= goal + after)

    ends, everything = [], np.arange(len(some))
    for after, near in ((0, guess[0][some]), (1, guess[0][some] + guess[1][some])):
        low, high = (np.clip(near.astype(np.int64) + k, -form.inf, form.inf) for k in (-1, 1))
        wrong = is_past(np.maximum(low - 1, -form.inf), everything, after) & (low > -form.inf)
        wrong |= ~is_past(np.minimum(high, form.inf - 1), everything, after) & (high < form.inf)
        low[wrong], high[wrong] = -form.inf, form.inf
        while len(open_ := np.flatnonzero(low < high)):
            middle = (low[open_] + high[open_]) >> 1
            past = is_past(middle, open_, after)
            high[open_[past]] = middle[past]
            low[open_[~past]] = middle[~past] + 1
        ends.append(low)
    start[some], count[some] = ends[0], ends[1] - ends[0]
    return start, count


def _is_zero(x: Reals, i: Positions, j: Positions) -> npt.NDArray[np.bool_]:
    """Return where D = 0 and a = 1, so that W' has W's own bits."""
    high, low, bound = x.delta.near(i, j)
    zero = (high == -low) & (bound == 0)
    for k in np.flatnonzero((np.abs(high) + np.abs(low) <= bound) & (bound > 0)):
        zero[k] = x.delta.exact(int(i[k]), int(j[k])) == 0
    if x.factor:
        a, error = x.factor.at(i, j)
        zero &= (a == 1) & (error == 0)
    unchanged: npt.NDArray[np.bool_] = zero
    return unchanged
