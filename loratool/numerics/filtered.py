"""The bits of `exact.apply_rounded` for 16-bit types at a third of its cost: float32 first, exact where it cannot tell.

A float32 GEMM is right to a bound that holds for any order of summation, and float32 has 16 bits more than bfloat16,
13 more than float16. So nearly every W + D is further from a midpoint between two numbers of the type than the bound,
and rounds like the exact sum (Shewchuk, 1997, calls this a filter). The few others, about one in a thousand, are
computed exactly one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .exact import Change, ExactProduct, Workspace, apply_rounded

MOST = 8  # of a tile's weights, one in so many may be looked at closely, else the exact way is as cheap
U = 2.0**-24  # float32's rounding
LEAST, LARGEST = 2.0**-80, 2.0**80  # outside of which a product in float32 could underflow, or overflow
SLIGHT = 2.0**-26  # <D, D> to <W, W>, below which a float32 total has lost too much of D to tell what is kept of it
TILE = 1 << 16  # weights at a time: what is kept of them in float32 stays in a core's cache

Positions = npt.NDArray[np.intp]
Sums = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]
Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Form:
    """A type's numbers as float32 has them. below: the bits under the last of its own; window: float32 steps around a
    midpoint that are looked at closely, more of which make fewer sums near 0; least: its lowest code with all bits,
    below which midpoints lie elsewhere.
    """

    below: int
    window: int
    least: int

    @property
    def mask(self) -> int:
        return (1 << self.below) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.below - 1)


FORMS = {
    torch.bfloat16: _Form(16, 256, 0),
    torch.float16: _Form(13, 128, 0x0400),
}
SUBNORMAL = 2.0**-14  # float16's: numbers below are whole steps of
STEP = 2.0**-24


class _Tile:
    """The buffers for some whole rows, with every view of them: making one costs as much as a thousand weights."""

    def __init__(self, work: Workspace, rows: int, n: int) -> None:
        self.total, self.change, self.moved = (
            work.take(name, torch.float32, rows, n) for name in ("total", "change", "moved")
        )
        self.flat = tuple(x.view(-1) for x in (self.total, self.change, self.moved))
        self.total_bits, self.low = self.total.view(torch.int32), work.take("low", torch.int16, rows, n)
        self.totals, self.bits = self.flat[0].numpy(), self.low.numpy().view(np.uint16)
        self.hit, self.small = (work.take(name, torch.bool, rows, n).numpy() for name in ("hit", "small"))


class FilteredRows:
    """Some rows of an `ExactProduct`, with what is needed to bound their product in float32.

    left: what `product.left` returned for these rows, (m, 2R).
    """

    def __init__(self, product: ExactProduct, left: Tensor) -> None:
        self._product, self._exact = product, left
        rank = left.shape[1] // 2
        rows = left[:, :rank] + left[:, rank:]
        self._right, norm, gram = product.right_in_float32  # (R, n), the others (), (R, R)
        self._left = rows.float()  # (m, R)
        # |fl(B A) - B A| <= R u |B||A| in any order; the factors were rounded too
        self._bound = (rows.norm(dim=1) * (norm * (rank + 4) * U)).numpy()  # (m,)
        self._squares = ((rows @ gram) * rows).sum(1).tolist()  # (m,): ||D||^2 of each row
        self._tiles: dict[int, _Tile] = {}

    def apply(self, base: Tensor, row: int, out: Tensor, work: Workspace) -> Change:
        """`exact.apply_rounded` of W + D for the rows of `base`, whose first is this one's row `row`.

        base, out: (rows, n) of one dtype of FORMS, contiguous.
        """
        rows, columns = base.shape
        error = float(self._bound[row : row + rows].max())
        if not (_float32_is_whole() and LEAST < error < LARGEST):
            return self._apply_exactly(base, row, out, work)
        form, change, sums = FORMS[base.dtype], Change(), [0.0, 0.0, 0.0, 0]
        least, step, near = _least(error, form, base.dtype), max(1, TILE // columns), []
        before, after = (x.view(torch.uint16).numpy() for x in (base, out))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            found = self._apply_tile(base[part], out[part], before[part], after[part], row + start, least, work, sums)
            if found is None:
                change += self._apply_exactly(base[part], row + start, out[part], work)
            else:
                near.append((found[0] + start * columns, found[1]))
        if near:
            at, totals = (np.concatenate(side) for side in zip(*near, strict=True))
            mended = self._mend(base, row, at[_is_doubtful(totals, error, form)], out)
            if mended is None:
                return self._apply_exactly(base, row, out, work)
            change += mended
        return change + Change(sums[0], sums[1], sums[2], int(sums[3]))

    def _apply_exactly(self, base: Tensor, row: int, out: Tensor, work: Workspace) -> Change:
        return apply_rounded(base, self._product.fill(self._exact[row : row + base.shape[0]]), out, work)

    def _apply_tile(
        self,
        base: Tensor,
        out: Tensor,
        before: Codes,
        after: Codes,
        row: int,
        least: int,
        work: Workspace,
        sums: list[float],
    ) -> tuple[Positions, Sums] | None:
        """The flat positions of the totals that may lie near a midpoint, or near 0, and these totals; None where they
        are many, or not all finite. before, after: the codes of base and out; sums: what is added to, as in a `Change`.
        """
        rows = base.shape[0]
        tile = self._tiles.get(rows)
        if tile is None:
            tile = self._tiles[rows] = _Tile(work, *base.shape)
        total, change, moved = tile.flat
        tile.total.copy_(base)
        squared = torch.dot(total, total).item()
        torch.mm(self._left[row : row + rows], self._right, out=tile.change)
        total.add_(change)  # in place: a third stream of numbers would not stay in the cache
        out.copy_(tile.total)
        at = _near(tile, after, least, FORMS[base.dtype])
        if len(at) * MOST > after.size:
            return None
        own = sum(self._squares[row : row + rows])
        tile.moved.copy_(out)
        if own < SLIGHT * squared:
            tile.moved.sub_(base)
            kept = torch.dot(moved, change).item()
        else:  # what W' is off from the total, which is at hand
            kept = torch.dot(moved.sub_(total), change).item() + own
        if not (math.isfinite(squared) and math.isfinite(kept)):
            return None
        np.not_equal(before, after, out=tile.hit)
        for place, value in enumerate((squared, own, kept, np.count_nonzero(tile.hit))):
            sums[place] += value
        return at, tile.totals[at]

    def _mend(self, base: Tensor, row: int, at: Positions, rounded: Tensor) -> Change | None:
        """Round the weights at these flat positions exactly; returns what that changes in the sums, or None where one
        becomes infinite.
        """
        columns = base.shape[1]
        rows = torch.from_numpy(at // columns + row)
        c = self._product.elements(self._exact, rows, torch.from_numpy(at % columns)).numpy()
        before, after = (x.view(torch.uint16).numpy().reshape(-1) for x in (base, rounded))
        weight, former = before[at], after[at]
        wide, exactly = _CODES[base.dtype]
        result = np.where(c == 0, weight, exactly(wide(weight) + c))
        if not np.isfinite(wide(result)).all():
            return None
        after[at] = result
        changed = np.count_nonzero(result != weight) - np.count_nonzero(former != weight)
        return Change(kept=float(np.dot(wide(result) - wide(former), c)), changed=int(changed))


def _wide_bfloat16(code: Codes) -> Wide:
    """The numbers behind bit patterns."""
    return (code.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _to_bfloat16(x: Wide) -> Codes:
    """To nearest even in one rounding, as codes; `x` is within the type's range."""
    narrow = x.astype(np.float32)
    # a float32 that was moved onto a midpoint has lost the side on which x lies
    moved = ((narrow.view(np.uint32) & 0xFFFF) == 0x8000) & (narrow != x)
    toward = np.where(x > narrow, np.float32(np.inf), np.float32(-np.inf))
    bits = np.where(moved, np.nextafter(narrow, toward), narrow).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _wide_float16(code: Codes) -> Wide:
    return code.view(np.float16).astype(np.float64)


def _to_float16(x: Wide) -> Codes:
    return x.astype(np.float16).view(np.uint16)  # which numpy rounds once


_CODES = {torch.bfloat16: (_wide_bfloat16, _to_bfloat16), torch.float16: (_wide_float16, _to_float16)}


def _float32_is_whole() -> bool:
    """torch may have been told to multiply float32 by fewer bits, for which the bound does not hold."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return str(matmul.fp32_precision) in ("none", "ieee")


def _least(error: float, form: _Form, dtype: torch.dtype) -> int:
    """The code of a number beyond which the window is more than the error and the rounding of the sum."""
    beyond = torch.tensor([error / U / (form.window - 2)]).to(dtype).view(torch.int16)
    return max(int(beyond) + 1, form.least)


def _near(tile: _Tile, rounded: Codes, least: int, form: _Form) -> Positions:
    """Flat positions of the sums within the window of a midpoint, and of those up to `least`."""
    bits, hit = tile.bits, tile.hit
    tile.low.copy_(tile.total_bits)  # the upper half falls off
    np.add(bits, form.window - form.middle & 0xFFFF, out=bits)
    if form.below < 16:
        np.bitwise_and(bits, form.mask, out=bits)
    np.less_equal(bits, 2 * form.window, out=hit)
    np.bitwise_and(rounded, 0x7FFF, out=bits)
    np.less_equal(bits, least, out=tile.small)
    np.logical_or(hit, tile.small, out=hit)
    return np.flatnonzero(hit)


def _is_doubtful(x: Sums, error: float, form: _Form) -> npt.NDArray[np.bool_]:
    """Which float32 sums lie within `error` of a midpoint, or of 0."""
    size = np.abs(x)
    middle = ((size.view(np.int32) & ~form.mask) | form.middle).view(np.float32)
    if form.least:
        middle = np.where(size < SUBNORMAL, (np.floor(size / STEP) + 0.5) * STEP, middle).astype(np.float32)
    reach = error + size * (2 * U)
    doubtful: npt.NDArray[np.bool_] = (np.abs(size - middle) <= reach) | (size <= reach)
    return doubtful
