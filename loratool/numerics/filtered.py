"""Compute the bits of `exact.apply_rounded` for 16-bit types at a third of its cost, with a float32 filter.

The error of a float32 GEMM has a bound that holds for any order of summation, and float32 has 16 bits more than
bfloat16, 13 more than float16. Rounding is monotone: if a float32 that is no less than W + D and one that is no more
round to the same number, so does the exact sum (a floating-point filter: Shewchuk, 1997). The few others, about
one in five hundred, are computed exactly, one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .exact import ExactProduct, RoundingStats, Workspace, slices

MOST = 32  # if more than one weight in MOST of a tile is uncertain, the exact way is as cheap


U = 2.0**-24  # unit roundoff of float32


LEAST, LARGEST = 2.0**-70, 2.0**60  # outside this range a product in float32 could underflow, or a square overflow


SLIGHT = 2.0**-28  # of the largest W^2: if <D, D> is less, a float32 total has lost too much of D for its sums


SAMPLED = 1 << 11  # weights from which the size of a block's is estimated


SPREAD = 2.0**14  # times the width of a curved bound: it may not hold for a larger total


TILE = 1 << 18  # weights at a time: more than a core's own cache holds, as a call costs as much as a thousand weights


GATHERED = 1 << 16  # numbers of a factor at a time, so that they stay in a core's cache


Positions = npt.NDArray[np.intp]


Codes = npt.NDArray[np.uint16]


Wide = npt.NDArray[np.float64]


class _Tile:
    """The buffers for tiles of one shape, with all their views: making one costs as much as a thousand weights."""

    def __init__(self, work: Workspace, like: Tensor) -> None:
        self.total, self.change, self.end = (
            work.take(name, torch.float32, *like.shape) for name in ("total", "change", "end")
        )
        self.flat = tuple(x.view(-1) for x in (self.total, self.change, self.end))
        self.lower = work.take("lower", like.dtype, *like.shape)
        self.codes = self.lower.view(torch.uint16).numpy()
        self.hit = work.take("hit", torch.bool, *like.shape).numpy()


@dataclass(frozen=True)
class FilteredTile:
    """A tile (some complete rows) for its observer, in arrays that the next tile overwrites."""

    before: Codes  # (rows, n), bit patterns of W
    after: Codes  # (rows, n), bit patterns of W', not yet right at the positions `at`
    change: npt.NDArray[np.float32]  # (rows * n,), D + shift, to within `error`
    shift: float
    error: float
    at: Positions  # flat positions that float32 cannot decide


@dataclass(frozen=True)
class Told:
    """Some weights before and after, which of them are near a midpoint, and their exact D."""

    before: Codes  # bit patterns of W
    after: Codes  # bit patterns of W'
    near: Positions  # places in these arrays of the weights near a midpoint
    exact: Callable[[Positions], Wide]  # places in these arrays -> D, exactly


class Observer(Protocol):
    """Sees a block of a filtered product tile by tile, and gets exact values for the weights that it asks for.

    `filtered` shows each tile. Then `wanted` returns the flat positions of the weights that it wants, every tile's `at`
    among them, and the places of those in that list; `settle` tells them. If it wants too many, which is None, or if
    float32 decides too little, `forget` drops the block.
    """

    def filtered(self, tile: FilteredTile) -> None: ...

    def wanted(self) -> tuple[Positions, Positions] | None: ...

    def settle(self, told: Told) -> None: ...

    def forget(self) -> None: ...


@dataclass
class _Block:
    """A block of rows under way, with its bounds and its sums.

    With a row's shift times a column's bound added to D, `total + curve total^2` in float32 is no less than W + D. That
    less `3 curve total^2`, and less span times the column's bound, is no more than W + D.
    """

    base: Tensor  # (m, n)
    out: Tensor  # (m, n)
    row: int  # the block's first row in the product
    error: float  # a bound on the error of any D in float32
    size: float  # a bound on |D|
    shift: Tensor  # (m,)
    span: Tensor  # (m,)
    curve: float  # 0 if the bounds are constant
    limit: float  # the largest total for which the bounds hold
    slight: bool  # D is too small for its sums to be taken from float32 totals

    def __post_init__(self) -> None:
        self.before, self.after = (x.view(torch.uint16).numpy() for x in (self.base, self.out))
        self.squared, self.kept, self.changed, self.deepest = 0.0, 0.0, 0, float(self.span.max())

    @property
    def holds(self) -> bool:
        """Return whether all weights are finite, and all totals within the limit."""
        if not (math.isfinite(self.squared) and math.isfinite(self.kept)):
            return False
        return math.sqrt(self.squared) + self.size <= self.limit or _largest(self.base) + self.size <= self.limit


class FilteredProduct:
    """An `ExactProduct` D with its right side in float32, and the bounds of its columns.

    Args:
        even: give every column the bound of the largest one
    """

    def __init__(self, exact: ExactProduct, even: bool = False) -> None:
        self.exact, self.even, right = exact, even, exact.right
        columns = right.T.contiguous()
        self._columns = columns.numpy()  # (n, R), so that a column of `right` is read in one go
        sizes = columns.norm(dim=1)
        self.norm = float(sizes.max())
        # (n,): a row's bound is multiplied by it; at least a half, since rounding would lose that of a small column
        self.bounds = (torch.ones_like(sizes) if even else (sizes / self.norm).clamp_(min=0.5)).float()
        self.least, self.bounds_squared = float(self.bounds.min()), float(self.bounds.square().sum())
        self.right = torch.cat([right.float(), self.bounds.unsqueeze(0)])  # (R + 1, n), the last row for the shifts
        self.gram, self.sums = right @ right.T, right @ self.bounds.double()
        # the error of `nearly` as a share of a row's size: float64's rounding, and what the exact D leaves out, the
        # products of two low slices and what is below them (2**-bits of the largest number, and that squared)
        self.off = len(right) * (2.0**-51 + 4 * 4.0**-exact.bits)

    def nearly(self, rows: Wide, at: Positions, columns: Positions) -> Wide:
        """Return D in rows at[i] of `rows` (m, R) and columns[i], with an error of `off` times the row's size."""
        found = np.empty(len(at))
        for part in _parts(len(at), rows.shape[1]):
            found[part] = np.einsum("ij,ij->i", rows.take(at[part], 0), self._columns.take(columns[part], 0))
        return found

    @cached_property
    def _slices(self) -> Wide:
        high, low = slices(torch.from_numpy(self._columns), 1, self.exact.bits)
        return torch.cat([low, high], 1).numpy()  # (n, 2R)

    def exactly(self, left: Wide, at: Positions, columns: Positions) -> Wide:
        """Return D in the same places to the last bit. left: (m, 2R), as `ExactProduct.left` returns it."""
        found, rank = np.empty(len(at)), left.shape[1] // 2
        for part in _parts(len(at), 2 * rank):
            one, two = (torch.from_numpy(x) for x in (left.take(at[part], 0), self._slices.take(columns[part], 0)))
            found[part] = (one[:, :rank] * two[:, rank:]).sum(1).add_(one.mul_(two).sum(1)).numpy()
        return found


def _parts(count: int, numbers: int) -> Iterator[slice]:
    """Split `count` elements of so many numbers each into slices that stay in a core's cache."""
    step = max(1, GATHERED // numbers)
    return (slice(start, start + step) for start in range(0, count, step))


class FilteredRows:
    """Some rows of a product, with the bounds of their float32 values.

    Args:
        rows: (m, R), as `ExactProduct.balanced` returns them
    """

    def __init__(self, product: FilteredProduct, rows: Tensor) -> None:
        self._product, self._rows = product, rows.numpy()
        self._left = torch.cat([rows, rows.new_zeros(len(rows), 1)], 1).float()  # (m, R + 1), the last column `shift`
        self._sizes = rows.norm(dim=1) * product.norm  # (m,), a bound on |D| of the row
        # |fl(B A) - B A| <= (R + 1) u |B||A| in any order; besides, the factors are rounded, and `shift` is added
        self._error = (rows.shape[1] + 8) * U
        self._squares = ((rows @ product.gram) * rows).sum(1).numpy()  # (m,), ||D||^2 of the row
        self._sums = rows @ product.sums  # (m,), the sum of the row of D, its columns weighted by their bounds
        self._tiles: dict[int, _Tile] = {}
        self._worth_it = True

    @cached_property
    def _exact(self) -> Wide:
        """(m, 2R), as `ExactProduct.left` returns it."""
        return torch.cat(slices(torch.from_numpy(self._rows), 1, self._product.exact.bits), 1).numpy()

    def apply(
        self, base: Tensor, row: int, out: Tensor, work: Workspace, observer: Observer | None = None
    ) -> RoundingStats | None:
        """Write W + D, rounded as by `exact.apply_rounded`, into `out`; return None if float32 decides too little.

        Args:
            base: (rows, n), a dtype of FORMS, contiguous; its first row belongs to row `row` of these
            out: (rows, n), the dtype of `base`, contiguous
        """
        assert self._product.even or observer is None, "an observer is told one shift"
        block = self._block(base, row, out) if self._worth_it else None
        change = self._apply_tiles(block, work, observer) if block else None
        if change is None:
            self._worth_it = False  # it will not be for the next rows
            if observer:
                observer.forget()
        return change

    def _block(self, base: Tensor, row: int, out: Tensor) -> _Block | None:
        """Return the block with its bounds, or None if no bound holds for it."""
        rows = slice(row, row + len(base))
        size, curve, limit = float(self._sizes[rows].max()), 0.0, math.inf
        if base.dtype == torch.float16:
            width = _width(base, size)
            largest, limit = 25 * width, SPREAD * width
            # float32 rounds by 2 u |total| up to the upper end, and by as much to the lower. `rounding + curve total^2`
            # is nowhere less, as an arithmetic mean is not less than the geometric, and equal at 2 width
            rounding, curve = 2.05 * U * width, 2.05 * U / 4 / (width or 1.0)
        else:
            largest = _largest(base)
            rounding = U * (size + largest)
        # with a larger right side, rows that are below float32's normal numbers could still have some D
        bounded = self._product.norm < LARGEST and size + largest < LARGEST and size * self._error > LEAST
        if not (bounded and _float32_is_whole()):
            return None
        error = self._error * self._sizes[rows].clamp(min=size if self._product.even else size / 16)
        rounding /= self._product.least
        shift = 1.01 * (error + rounding)  # 1 % for what `shift` itself adds, and for sums near a midpoint
        span = 1.01 * (2 * error + 3 * rounding)  # downward the rounding of both totals counts
        self._left[rows, -1] = shift.float()
        slight = float(self._squares[rows].sum()) < SLIGHT * largest**2 * base.numel()
        most = size * self._error + float(shift.max()) * self._error
        return _Block(base, out, row, most, size, shift.float(), span.float(), curve, limit, slight)

    def _apply_tiles(self, block: _Block, work: Workspace, observer: Observer | None) -> RoundingStats | None:
        """Apply a block tile by tile; return None if float32 decides too little, or something is not finite."""
        rows, columns = block.base.shape
        height, found = max(1, TILE // columns), []
        for start in range(0, rows, height):
            at = self._apply_tile(block, slice(start, min(start + height, rows)), work, observer)
            if len(at) * MOST > block.base[start : start + height].numel():
                return None
            found.append(at + start * columns)
        wanted = observer.wanted() if observer else None
        if (observer and wanted is None) or not block.holds:
            return None
        near = self._mend(block, wanted[0][wanted[1]] if wanted else np.concatenate(found))
        if near is None:
            return None
        if observer and wanted:
            at, places = wanted
            before, after = block.before.take(at), block.after.take(at)
            observer.settle(Told(before, after, places[near], lambda some: self._exactly(block, at[some])))
        here, shift = slice(block.row, block.row + rows), block.shift.double()
        own, kept = float(self._squares[here].sum()), block.kept
        # the sum so far is <W' - total, D + shift>, with total = W + D + shift, lowered by span if there is no curve
        if not block.slight:
            moved = shift if block.curve else shift - block.span.double()
            kept += own + float(moved @ (self._sums[here] + shift * self._product.bounds_squared))
        return RoundingStats(block.squared, own, kept if block.changed else 0.0, block.changed)

    def _apply_tile(self, block: _Block, part: slice, work: Workspace, observer: Observer | None) -> Positions:
        """Apply some rows of the block, and return the flat positions of the weights that float32 cannot decide."""
        base, out, before, after = block.base[part], block.out[part], block.before[part], block.after[part]
        tile = self._tiles.get(len(base))
        if tile is None:
            tile = self._tiles[len(base)] = _Tile(work, base)
        total, change, end = tile.flat
        bounds, span = self._product.bounds, block.span[part]
        tile.total.copy_(base)
        block.squared += torch.dot(total, total).item()
        torch.mm(self._left[block.row + part.start : block.row + part.stop], self._product.right, out=tile.change)
        total.add_(change)  # in place: a third stream of numbers would not stay in the cache
        upper = tile.total
        if block.curve:
            upper = torch.addcmul(tile.total, tile.total, tile.total, value=block.curve, out=tile.end)
        out.copy_(upper)
        lower = upper.addcmul_(upper, upper, value=-3 * block.curve) if block.curve else upper
        tile.lower.copy_(lower.sub_(block.deepest) if self._product.even else lower.addr_(span, bounds, alpha=-1))
        np.not_equal(after, tile.codes, out=tile.hit)
        at = np.flatnonzero(tile.hit)
        tile.end.copy_(out)
        if block.slight:
            tile.end.sub_(base)
            block.kept -= torch.dot(torch.mv(tile.end, bounds), block.shift[part]).item()
        else:  # W' - total, as the total is at hand
            end.sub_(total)
        block.kept += torch.dot(end, change).item()
        np.not_equal(before, after, out=tile.hit)
        block.changed += int(np.count_nonzero(tile.hit))
        if observer:
            observer.filtered(FilteredTile(before, after, change.numpy(), block.shift[0].item(), block.error, at))
        return at

    def _mend(self, block: _Block, at: Positions) -> Positions | None:
        """Round the weights at these flat positions correctly, and correct the sums.

        Returns the places in `at` of those near a midpoint, or None if a weight becomes infinite.
        """
        after, dtype = block.after.reshape(-1), block.base.dtype
        weight, former = block.before.take(at), after.take(at)
        value, c = _wide(weight, dtype), self._product.nearly(self._rows, *self._places(block, at))
        total = value + c
        reach = np.abs(total) * (1.1 * U) + block.size * self._product.off  # the first rounding, to float32, and c
        result = _narrow(total + reach, dtype)
        near = np.flatnonzero(result != _narrow(total - reach, dtype))
        if len(near):
            result[near] = self._round(block, at[near], value[near] + c[near], weight[near])
        final = _wide(result, dtype)
        if not np.isfinite(final).all():
            return None
        after[at] = result
        block.changed += int(np.count_nonzero(result != weight)) - int(np.count_nonzero(former != weight))
        # torch's, since numpy's dot would wake threads of its own, which wait in a loop
        block.kept += torch.dot(torch.from_numpy(final - _wide(former, dtype)), torch.from_numpy(c)).item()
        return near

    def _round(self, block: _Block, at: Positions, total: Wide, weight: Codes) -> Codes:
        """Return W + D in one rounding. total: W + D from `nearly`; weight: the bit patterns of W."""
        dtype = block.base.dtype
        reach = np.abs(total) * 2.0**-52 + block.size * self._product.off
        result = _ROUNDED[dtype](total + reach)
        unsure = np.flatnonzero(result != _ROUNDED[dtype](total - reach))
        if len(unsure):
            c, some = self._exactly(block, at[unsure]), weight[unsure]
            result[unsure] = np.where(c == 0, some, _ROUNDED[dtype](_wide(some, dtype) + c))
        return result

    def _exactly(self, block: _Block, at: Positions) -> Wide:
        return self._product.exactly(self._exact, *self._places(block, at))

    @staticmethod
    def _places(block: _Block, at: Positions) -> tuple[Positions, Positions]:
        """Return rows of the product and columns of the block's flat positions."""
        rows, columns = np.divmod(at, block.base.shape[1])
        rows += block.row
        return rows, columns


def _largest(x: Tensor) -> float:
    """Return the largest |x|, or inf or nan if it has one."""
    bits = x.view(torch.uint16).numpy()
    largest = max(int(bits.view(np.int16).max()), int(bits.max()) & 0x7FFF)
    return float(_wide(np.array([largest], np.uint16), x.dtype)[0])


def _width(base: Tensor, size: float) -> float:
    """Return about a fifth of the size of the weights and of D; the bounds hold for any width."""
    # an odd stride, to sample all columns if their number is a power of two
    some = base.view(-1)[:: base.numel() // SAMPLED | 1].float()
    return 0.2 * float(some.norm()) / math.sqrt(len(some)) + 0.02 * size


def _wide(codes: Codes, dtype: torch.dtype) -> Wide:
    return torch.from_numpy(codes).view(dtype).double().numpy()


def _narrow(x: Wide, dtype: torch.dtype) -> Codes:
    """Round through float32, so in two roundings, to bit patterns."""
    return torch.from_numpy(x).to(dtype).view(torch.uint16).numpy()


def _float32_is_whole() -> bool:
    """Return whether torch multiplies float32 with all its bits; with fewer, as a setting allows, no bound holds."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return str(matmul.fp32_precision) in ("none", "ieee")


def _to_bfloat16(x: Wide) -> Codes:
    """Round to nearest even, in one rounding, to bit patterns; `x` is within the type's range."""
    narrow = x.astype(np.float32)
    # a float32 that was moved onto a midpoint has lost the side on which x lies
    moved = ((narrow.view(np.uint32) & 0xFFFF) == 0x8000) & (narrow != x)
    toward = np.where(x > narrow, np.float32(np.inf), np.float32(-np.inf))
    bits = np.where(moved, np.nextafter(narrow, toward), narrow).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _to_float16(x: Wide) -> Codes:
    return x.astype(np.float16).view(np.uint16)  # numpy rounds once


_ROUNDED = {torch.bfloat16: _to_bfloat16, torch.float16: _to_float16}


FORMS = tuple(_ROUNDED)
