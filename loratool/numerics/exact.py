"""`W' = round_once(W + B @ A)`, the same bits on every machine.

A float GEMM sums in an order that depends on the library, the tile, the thread count and FMA, and each order
rounds differently. Here every number that enters a GEMM is first put on a power-of-two grid so coarse that
all products and partial sums fit into float64's 53 bits: they are exact, so no order can change them. Two
grids of 24 bits each at rank 16 (21 at rank 1024) keep twice that of each factor, so that D is right to about
1e-14 of its largest elements, where a float32 GEMM gives 1e-7.

`ARITHMETIC_VERSION` names this arithmetic in every output: raise it when a result's bits can change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ARITHMETIC_VERSION = 1

BLOCK = 1 << 18  # weights computed at a time: 2 MB in float64, which stays in a core's cache

# Low bits of a float32, and what they are exactly halfway between two values of the type. In fp16 the
# cut moves in the subnormal range, but there too the 12 lowest bits are zero at every midpoint.
_HALFWAY = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0x0FFF, 0)}

_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True)
class Factors:
    """One low-rank term: `left @ right`, scale included.

    left: (m, r), any float dtype, scaled by `multiplier` when used, so that a tall one stays small in memory
    right: (r, n) in float64
    """

    left: Tensor
    multiplier: float
    right: Tensor


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float64 from its bits (torch's pow and ldexp are inexact in places); -1022 <= exponent <= 1023."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _exponent(x: Tensor) -> Tensor:
    """The least e with |x| < 2**e, and 0 for 0."""
    return torch.frexp(x)[1].to(torch.int64)


def _slices(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """`x` as high + low, each a multiple of its grid along `dim` and at most 2**bits grid steps large."""
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
        # a sum of 2 * rank products of two such numbers must stay within 2**53
        self._bits = (53 - math.ceil(math.log2(2 * rank))) // 2
        left_max = torch.cat([left.abs().amax(0).double() * abs(m) for left, m in self._lefts])  # (R,)
        right_max = right.abs().amax(1)
        shift = torch.div(_exponent(left_max) - _exponent(right_max), 2, rounding_mode="trunc")  # odd: either layout
        dead = (left_max == 0) | (right_max == 0)  # contributes nothing, and must not set a grid
        self._left_scale = torch.where(dead, 0.0, power_of_two(-shift))  # (R,)
        right = right * torch.where(dead, 0.0, power_of_two(shift)).unsqueeze(1)
        high, low = _slices(right, 0, self._bits)
        self._cross = torch.cat([low, high])  # (2R, n), met by [high, low] of the left side
        self._high = self._cross[rank:]

    def left(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of the left side on their grids, (stop - start, 2R), high slices then low."""
        rows = torch.cat([part[start:stop].double() * m for part, m in self._lefts], 1)
        return torch.cat(_slices(rows * self._left_scale, 1, self._bits), 1)

    def multiply(self, left: Tensor, out: Tensor, scratch: Tensor) -> None:
        """Write the rows of D that belong to `left` into `out`; both buffers are (rows, n) in float64."""
        torch.mm(left[:, : len(self._high)], self._high, out=out)
        torch.mm(left, self._cross, out=scratch)
        out.add_(scratch)


class Workspace:
    """The buffers of one worker, made once and cut to each block's shape."""

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        self._device = device
        self._pinned = pinned
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        size = rows * columns
        flat = self._flat.get((name, dtype))
        if flat is None or len(flat) < size:
            flat = self._flat[name, dtype] = torch.empty(
                max(size, BLOCK), dtype=dtype, device=self._device, pin_memory=self._pinned
            )
        return flat[:size].view(rows, columns)


def round_once(x: Tensor, out: Tensor, work: Workspace) -> None:
    """Round float64 `x` (rows, n) to the dtype of `out`, to nearest even, in one rounding.

    torch rounds float64 to float32 and that to 16 bits. The two steps differ from one exactly where the
    float32 lies on a midpoint to which `x` was moved: those few are found by their bits and moved one
    float32 step back toward `x`. Both tensors are contiguous.
    """
    if out.dtype not in _HALFWAY:
        out.copy_(x)
        return
    narrow = work.take("narrow", torch.float32, *x.shape)
    narrow.copy_(x)
    out.copy_(narrow)
    at = _midpoints(narrow, *_HALFWAY[out.dtype], work)
    if len(at) == 0:
        return
    exact, rounded = x.view(-1)[at], narrow.view(-1)[at]
    moved = exact != rounded.double()
    at, exact, rounded = at[moved], exact[moved], rounded[moved]
    toward = torch.where(exact > rounded.double(), math.inf, -math.inf).to(torch.float32)
    out.view(-1)[at] = torch.nextafter(rounded, toward).to(out.dtype)


def _midpoints(x: Tensor, mask: int, half: int, work: Workspace) -> Tensor:
    """Flat positions of the float32 values whose low bits are `half`."""
    if x.is_cuda:
        return ((x.view(torch.int32) & mask) == half).view(-1).nonzero().squeeze(1)
    # numpy's integer operations are several times faster than torch's on a CPU
    low = work.take("low", torch.int32, *x.shape).numpy()
    hit = work.take("hit", torch.bool, *x.shape).numpy()
    np.bitwise_and(x.view(torch.int32).numpy(), mask, out=low)
    np.equal(low, half, out=hit)
    return torch.from_numpy(np.flatnonzero(hit))


@dataclass(frozen=True)
class Change:
    """What rounding made of one block: sums over its weights (W is the base, D the change, W' the result)."""

    base_squared: float  # <W, W>
    change_squared: float  # <D, D>
    kept: float  # <W' - W, D>
    changed: int  # weights whose value is not the base's
    not_finite: int  # base weights that are inf or nan: copied as they are
    overflowed: int  # finite base weights that became inf


def add_rounded(base: Tensor, product: ExactProduct, left: Tensor, out: Tensor, work: Workspace) -> Change:
    """`out = round_once(base + D)` for the rows that `left` (of `product.left`) belongs to; returns what came of it.

    base, out: (rows, n), of any two float dtypes. An element whose change is 0 keeps its value, the sign of
    zero and the payload of a nan included; inf and nan stay what they are.
    """
    rows, columns = base.shape
    change, wide, total = (work.take(name, torch.float64, rows, columns) for name in ("change", "wide", "total"))
    product.multiply(left, change, total)
    wide.copy_(base)
    torch.add(wide, change, out=total)
    round_once(total, out, work)
    if _has_negative_zero(base):
        still = change == 0
        out[still] = base[still].to(out.dtype)
    total.copy_(out).sub_(wide)  # W' - W
    kept, base_squared = _dot(total, change), _dot(wide, wide)
    not_finite = overflowed = 0
    if not (math.isfinite(kept) and math.isfinite(base_squared)):
        odd = ~wide.isfinite()
        out[odd] = base[odd].to(out.dtype)
        not_finite = int(odd.sum())
        overflowed = int((~out.isfinite()).sum()) - not_finite
        total.copy_(out).sub_(wide)
        for x in (total, wide):
            x[odd] = 0
        kept, base_squared = _dot(total, change), _dot(wide, wide)
    return Change(base_squared, _dot(change, change), kept, _count_nonzero(total, work), not_finite, overflowed)


def cast_rounded(base: Tensor, out: Tensor, work: Workspace) -> int:
    """`out = round_once(base)`, any two float dtypes; returns how many finite values became inf."""
    wide = work.take("wide", torch.float64, *base.shape)
    wide.copy_(base)
    round_once(wide, out, work)
    return int((~out.isfinite()).sum()) - int((~wide.isfinite()).sum())


def _has_negative_zero(x: Tensor) -> bool:
    """-0.0 is the least integer among the bit patterns."""
    bits = x.view(_BITS[x.dtype])
    least = bits.min() if x.is_cuda else bits.numpy().min()
    return int(least) == torch.iinfo(bits.dtype).min


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.view(-1), y.view(-1)))


def _count_nonzero(x: Tensor, work: Workspace) -> int:
    if x.is_cuda:
        return int(torch.count_nonzero(x))
    hit = work.take("hit", torch.bool, *x.shape).numpy()
    np.not_equal(x.numpy(), 0.0, out=hit)
    return int(np.count_nonzero(hit))
