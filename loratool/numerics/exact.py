"""Compute `W' = round_once(W + B @ A)` with the same bits on every machine.

A float GEMM sums in an order that depends on the library, the tile, the thread count and FMA, and each order
rounds differently. So every number that enters a GEMM is first put on a power-of-two grid so coarse that all products
and partial sums fit into float64's 53 bits: they are exact, and no order can change them. Two grids of 24 bits
each at rank 16 (21 at rank 1024) keep twice that of each factor, so that D is right to about 1e-14 of its largest
elements, where a float32 GEMM gives 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

ARITHMETIC_VERSION = 1  # named in every output: raise it when a result's bits can change


# Weights computed at a time: few enough that the float64 buffers stay in a core's cache, and enough that a call of
# torch costs less than its work.
TILE = 1 << 17


CUDA_TILE = 1 << 23  # more, since on a GPU the number of calls counts


LANES = 64  # running sums that make up a sum of squares


# dtype -> (mask, value) of the low bits of a float32 that is halfway between two values of the dtype. The bits of
# float16's subnormals end higher, but there too the 12 lowest bits are zero at every midpoint.
_HALFWAY = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0x0FFF, 0)}


_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True)
class Factors:
    """A low-rank term `multiplier * left @ right`, scale included."""

    left: Tensor  # (m, r), any float dtype: multiplied by blocks only, so that a tall one stays small in memory
    multiplier: float
    right: Tensor  # (r, n), float64


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent in float64, for -1022 <= exponent <= 1023.

    It is made from its bits, because torch's pow and ldexp are inexact for some exponents.
    """
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _exponent(x: Tensor) -> Tensor:
    """Return the least e with |x| < 2**e, and 0 for 0."""
    return torch.frexp(x)[1].to(torch.int64)


def slices(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Split `x` into high + low, each a multiple of its grid along `dim` and at most 2**bits of its units large."""
    grid = (_exponent(x.abs().amax(dim, keepdim=True)) - bits).clamp_(-1022 + bits, 1000)
    step, inverse = power_of_two(grid), power_of_two(-grid)
    high = (x * inverse).round_().mul_(step)
    step, inverse = power_of_two(grid - bits), power_of_two((bits - grid).clamp(max=1023))
    low = (x - high).mul_(inverse).round_().mul_(step)
    return high, low


class ExactProduct:
    """D = sum of `left @ right` over the terms, computed by blocks of rows, exact in any order.

    Each rank is first balanced, so that its column in `left` and its row in `right` are of the same size:
    without that, a rank large in one factor and small in the other would fall below the other ranks' grid.
    """

    def __init__(self, terms: Sequence[Factors]) -> None:
        self._lefts = [(term.left, term.multiplier) for term in terms]
        right = torch.cat([term.right for term in terms])  # (R, n)
        rank = len(right)
        self.shape = (len(terms[0].left), right.shape[1])
        # of a slice: a sum of 2 * rank products of two such numbers must stay within 2**53
        self.bits = (53 - math.ceil(math.log2(2 * rank))) // 2
        left_max = torch.cat([left.abs().amax(0).double() * abs(m) for left, m in self._lefts])  # (R,)
        right_max = right.abs().amax(1)
        shift = torch.div(_exponent(left_max) - _exponent(right_max), 2, rounding_mode="trunc").clamp_(-1000, 1000)
        dead = (left_max == 0) | (right_max == 0)  # contributes nothing, and must not set a grid
        self._left_scale = torch.where(dead, 0.0, power_of_two(-shift))  # (R,)
        self.right = right * torch.where(dead, 0.0, power_of_two(shift)).unsqueeze(1)  # (R, n)
        if right.is_cuda:
            _ = self._cross  # now: the workers' streams will share it

    @cached_property
    def _cross(self) -> Tensor:
        """(2R, n), met by [high, low] of the left side."""
        high, low = slices(self.right, 0, self.bits)
        return torch.cat([low, high])

    def balanced(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of the left side, (stop - start, R), not yet on their grids."""
        return torch.cat([part[start:stop].double() * m for part, m in self._lefts], 1) * self._left_scale

    def left(self, start: int, stop: int) -> Tensor:
        """Return rows `start:stop` of the left side on their grids, (stop - start, 2R), high slices first."""
        return torch.cat(slices(self.balanced(start, stop), 1, self.bits), 1)

    def fill(self, left: Tensor) -> Fill:
        """Return the Fill that adds D to the rows that `left` belongs to."""

        def fill(columns: slice, out: Tensor, scratch: Tensor) -> None:
            self.multiply(left, columns, out, scratch)

        return fill

    def multiply(self, left: Tensor, columns: slice, out: Tensor, scratch: Tensor) -> None:
        """Write some columns of the rows of D that belong to `left` into `out`; both buffers are float64."""
        rank, cross = len(self.right), self._cross[:, columns]
        torch.mm(left[:, :rank], cross[rank:], out=out)
        torch.mm(left, cross, out=scratch)
        out.add_(scratch)


class Workspace:
    """The buffers of one worker, flat and reused for every shape; views are kept, because making one costs a call."""

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self.tile = CUDA_TILE if device.type == "cuda" else TILE
        self._device = device
        self._pinned = pinned
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, int, int], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        """Return the buffer of this name and dtype as (rows, columns); it overwrites the one taken before."""
        view = self._views.get((name, dtype, rows, columns))
        if view is None:
            size = rows * columns
            flat = self._flat.get((name, dtype))
            if flat is None or len(flat) < size:
                flat = torch.empty(size, dtype=dtype, device=self._device, pin_memory=self._pinned)
                self._flat[name, dtype] = flat
                self._views = {key: old for key, old in self._views.items() if key[:2] != (name, dtype)}
            view = self._views[name, dtype, rows, columns] = flat[:size].view(rows, columns)
        return view


def round_once(x: Tensor, out: Tensor, work: Workspace) -> Tensor | None:
    """Round float64 `x` (rows, n) to the dtype of `out`, to nearest even, in one rounding.

    Returns the flat positions whose float32 is a midpoint of 16 bits, which are all that are near one; None for others.

    torch rounds float64 to float32 and that to 16 bits. The two steps differ from one exactly where the
    float32 lies on a midpoint to which `x` was moved: those few are found by their bits and moved one
    float32 step back toward `x`. Both tensors are contiguous.
    """
    if out.dtype not in _HALFWAY:
        out.copy_(x)
        return None
    narrow = work.take("narrow", torch.float32, *x.shape)
    narrow.copy_(x)
    out.copy_(narrow)
    mask, half = _HALFWAY[out.dtype]
    if x.is_cuda:
        at = ((narrow.view(torch.int32) & mask) == half).view(-1).nonzero().squeeze(1)
        exact, rounded = x.view(-1)[at], narrow.view(-1)[at]
        step = torch.where(exact > rounded, math.inf, -math.inf).to(torch.float32)
        nudged = torch.where(exact == rounded, rounded, torch.nextafter(rounded, step))
    else:  # numpy finds and mends the few in a fraction of torch's time
        found = _where_low_bits(narrow, mask, half, work)
        if len(found) == 0:
            return torch.from_numpy(found)
        at, one, two = torch.from_numpy(found), x.numpy().ravel()[found], narrow.numpy().ravel()[found]
        toward = np.where(one > two, np.float32(math.inf), np.float32(-math.inf))
        nudged = torch.from_numpy(np.where(one == two, two, np.nextafter(two, toward)))
    out.view(-1)[at] = nudged.to(out.dtype)
    return at


def _where_low_bits(x: Tensor, mask: int, half: int, work: Workspace) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Return the flat positions in a float32 CPU tensor whose lower 16 bits, masked, are `half`."""
    low = work.take("low", torch.int16, *x.shape)
    low.copy_(x.view(torch.int32))  # the upper half falls off
    bits, hit = low.numpy().view(np.uint16), work.take("hit", torch.bool, *x.shape).numpy()
    if mask != 0xFFFF:
        np.bitwise_and(bits, mask, out=bits)
    np.equal(bits, half, out=hit)
    return np.flatnonzero(hit)


@dataclass(frozen=True)
class RoundingStats:
    """Sums over some weights that tell how rounding changed them; W is the base, D the update, W' the result."""

    base_squared: float = 0.0  # <W, W>
    change_squared: float = 0.0  # <D, D>
    kept: float = 0.0  # <W' - W, D>
    changed: int = 0  # weights with another value than the base's
    not_finite: int = 0  # base weights that are inf or nan: copied unchanged
    overflowed: int = 0  # finite base weights that became inf
    largest: float = 0.0  # the largest absolute value before rounding of the overflowed

    def __add__(self, other: RoundingStats) -> RoundingStats:
        return RoundingStats(
            self.base_squared + other.base_squared,
            self.change_squared + other.change_squared,
            self.kept + other.kept,
            self.changed + other.changed,
            self.not_finite + other.not_finite,
            self.overflowed + other.overflowed,
            max(self.largest, other.largest),
        )


# An update W' = a * W + c of some rows, as a function (columns, out, scratch): it writes c of these columns into `out`
# and returns a, or None for 1. Every update of a weight can be written so.
Fill = Callable[[slice, Tensor, Tensor], Tensor | None]


# Called with each tile when it is done: (W, W', a * W + c, c, a, the near ties that `round_once` found).
Witness = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], None]


def apply_rounded(
    base: Tensor, fill: Fill, out: Tensor, work: Workspace, witness: Witness | None = None, width: int | None = None
) -> RoundingStats:
    """Write `round_once(a * base + c)` into `out`, for the rows that `fill` belongs to.

    An unchanged element keeps its bits, the sign of zero and the payload of a nan included; inf and nan stay.

    Args:
        base: (rows, n), any float dtype
        out: (rows, n), any float dtype
        witness: called with each tile
        width: columns of a tile, None for as many as suit the cache
    """
    stats = RoundingStats()
    for columns in tiles(base, work, width):
        stats += _apply_tile(base[:, columns], fill, columns, out[:, columns], work, witness)
    return stats


def tiles(base: Tensor, work: Workspace, width: int | None = None) -> Iterator[slice]:
    """Yield ranges of columns that fit a tile, each a multiple of LANES wide except the last."""
    rows, columns = base.shape
    width = width or max(LANES, work.tile // rows // LANES * LANES)
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def row_norms(base: Tensor, fill: Fill, work: Workspace) -> Tensor:
    """Return ||W + c|| of each row in float64, the same bits for any blocks and tiles; `fill` returns no a."""
    lanes = torch.zeros(len(base), LANES, dtype=torch.float64, device=base.device)
    for columns in tiles(base, work):
        add_squares(sum_tile(base[:, columns], fill, columns, work).T, lanes.T)
    return total_of_lanes(lanes.T).sqrt_()


def sum_tile(base: Tensor, fill: Fill, columns: slice, work: Workspace) -> Tensor:
    """Return W + c of one tile, in a buffer of `work`."""
    change, wide, scratch = (work.take(name, torch.float64, *base.shape) for name in ("change", "wide", "total"))
    fill(columns, change, scratch)
    return wide.copy_(base).add_(change)


def add_squares(x: Tensor, lanes: Tensor) -> None:
    """Add x[i]**2 to lanes[i % LANES], one i after another: a fixed order, so that blocks of rows show nowhere.

    x: (m, n), its first row at a multiple of LANES; lanes: (LANES, n).
    """
    squares = x.square()
    for start in range(0, len(squares), LANES):
        part = squares[start : start + LANES]
        lanes[: len(part)].add_(part)


def total_of_lanes(lanes: Tensor) -> Tensor:
    """Return the sum of the lanes by halves, (n,)."""
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def _apply_tile(
    base: Tensor, fill: Fill, columns: slice, out: Tensor, work: Workspace, witness: Witness | None
) -> RoundingStats:
    change, wide, total = (work.take(name, torch.float64, *base.shape) for name in ("change", "wide", "total"))
    rounded = work.take("rounded", out.dtype, *base.shape)
    factor = fill(columns, change, total)
    wide.copy_(base)
    if factor is None:
        torch.add(wide, change, out=total)
    else:
        torch.mul(wide, factor, out=total)
        if bool((factor == 0).any()):
            total.masked_fill_(factor == 0, 0.0)  # what is replaced does not matter, inf and nan included
        total.add_(change)
    ties = round_once(total, rounded, work)
    c = change
    if factor is not None:
        c = change.clone() if witness else change
        torch.sub(total, wide, out=change)
    if _has_negative_zero(base):
        _keep(base, change == 0, rounded)
    base_squared = _dot(wide, wide)
    if witness:
        if not math.isfinite(base_squared):
            _keep_not_finite(base, wide, factor, rounded)
        witness(base, rounded, total, c, factor, ties)
    total.copy_(rounded).sub_(wide)  # W' - W
    kept = _dot(total, change)
    not_finite = overflowed = 0
    largest = 0.0
    if not (math.isfinite(kept) and math.isfinite(base_squared)):
        bad = ~wide.isfinite()
        odd = _keep_not_finite(base, wide, factor, rounded)
        not_finite = int(odd.sum())
        lost = rounded.isfinite().logical_not_().logical_and_(~odd)
        overflowed = int(lost.sum())
        largest = float((wide + change)[lost].abs().max()) if overflowed else 0.0
        total.copy_(rounded).sub_(wide)
        for x in (total, wide, change):
            x[bad] = 0
        kept, base_squared = _dot(total, change), _dot(wide, wide)
    out.copy_(rounded)
    changed = count_different(rounded, base, total, work)
    return RoundingStats(base_squared, _dot(change, change), kept, changed, not_finite, overflowed, largest)


def _keep_not_finite(base: Tensor, wide: Tensor, factor: Tensor | None, rounded: Tensor) -> Tensor:
    """Copy inf and nan of the base, unless the update replaces them (a is 0), and return where they are."""
    not_finite = ~wide.isfinite()
    if factor is not None:
        not_finite &= factor != 0
    _keep(base, not_finite, rounded)
    return not_finite


def _keep(base: Tensor, where: Tensor, rounded: Tensor) -> None:
    """Copy the base's bits; an assignment through a mask of one element would lose a nan's payload."""
    rounded.copy_(torch.where(where, base.to(rounded.dtype), rounded))


def replaced_change(base: Tensor, value: Tensor, out: Tensor, work: Workspace, cast: RoundingStats) -> RoundingStats:
    """Return the statistics of rows of `base` that were replaced by `value`, rounded to `out`. All are (rows, n).

    Args:
        cast: what `cast_rounded` returned for the replacement, the source of the overflow
    """
    wide, new, total = (work.take(name, torch.float64, *base.shape) for name in ("wide", "change", "total"))
    wide.copy_(base)
    new.copy_(value).sub_(wide)
    total.copy_(out).sub_(wide)
    different = count_different(out, base, total, work) if out.dtype == base.dtype else int(total.count_nonzero())
    kept, change, squared = _dot(total, new), _dot(new, new), _dot(wide, wide)
    if not math.isfinite(squared):
        kept = change = squared = 0.0  # inf and nan have no size
    return RoundingStats(squared, change, kept, different, 0, cast.overflowed, cast.largest)


def cast_rounded(base: Tensor, out: Tensor, work: Workspace) -> RoundingStats:
    """Write `round_once(base)` into `out`, for any two float dtypes; only the overflow is counted."""
    if base.dtype == torch.float64:
        round_once(base, out, work)
    elif base.itemsize == out.itemsize and base.dtype != out.dtype:  # torch is slow between two types of 16 bits
        out.copy_(work.take("narrow", torch.float32, *base.shape).copy_(base))
    else:
        out.copy_(base)  # torch goes through float32, which holds every value of base: one rounding
    if math.isfinite(float(out.abs().max())):
        return RoundingStats()
    lost = out.isfinite().logical_not_().logical_and_(base.isfinite())
    count = int(lost.sum())
    return RoundingStats(overflowed=count, largest=float(base[lost].double().abs().max()) if count else 0.0)


def _has_negative_zero(x: Tensor) -> bool:
    """Return whether some element is -0.0, whose bit pattern is the least integer."""
    bits = x.view(_BITS[x.dtype])
    return int(bits.min() if x.is_cuda else bits.numpy().min()) == torch.iinfo(bits.dtype).min


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.view(-1), y.view(-1)))


def count_different(x: Tensor, base: Tensor, difference: Tensor, work: Workspace) -> int:
    """Return how many values differ, by their bits if the dtypes are equal, else by `difference`, which is x - base.

    On a GPU it is always `difference`.
    """
    if x.is_cuda:
        return int(torch.count_nonzero(difference))
    hit = work.take("hit", torch.bool, *x.shape).numpy()
    if x.dtype == base.dtype:
        np.not_equal(x.view(_BITS[x.dtype]).numpy(), base.view(_BITS[x.dtype]).numpy(), out=hit)
    else:
        np.not_equal(difference.numpy(), 0.0, out=hit)
    return int(np.count_nonzero(hit))
