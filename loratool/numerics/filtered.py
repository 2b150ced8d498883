"""The bits of `exact.apply_rounded` for 16-bit types at a third of its cost: float32 first, exact where it cannot tell.

A float32 GEMM is right to a bound that holds for any order of summation, and float32 has 16 bits more than bfloat16,
13 more than float16. Rounding is monotone: where a float32 that is no less than W + D and one that is no more round to
the same number, so does the exact sum (Shewchuk, 1997, calls this a filter). The few others, about one in five hundred,
are computed exactly one by one.
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

from .exact import Change, ExactProduct, Workspace

MOST = 32  # of a tile's weights, one in so many may be looked at closely, else the exact way is as cheap
U = 2.0**-24  # float32's rounding
LEAST, LARGEST = 2.0**-80, 2.0**60  # outside of which a product in float32 could underflow, or a square overflow
SLIGHT = 2.0**-32  # <D, D> to the largest W^2, below which a float32 total has lost too much of D to tell its sums
TILE = 1 << 18  # weights at a time: more than a core's own cache holds, but a call costs as much as a thousand weights
GATHERED = 1 << 14  # numbers of a factor at a time, which stay in a core's cache

Positions = npt.NDArray[np.intp]
Codes = npt.NDArray[np.uint16]
Wide = npt.NDArray[np.float64]


class _Tile:
    """The buffers for tiles of one shape, and every view of them: making one costs as much as a thousand weights."""

    def __init__(self, work: Workspace, like: Tensor) -> None:
        self.total, self.change, self.moved = (
            work.take(name, torch.float32, *like.shape) for name in ("total", "change", "moved")
        )
        self.flat = tuple(x.view(-1) for x in (self.total, self.change, self.moved))
        self.lower = work.take("lower", like.dtype, *like.shape)
        self.codes = self.lower.view(torch.uint16).numpy()
        self.hit = work.take("hit", torch.bool, *like.shape).numpy()


@dataclass(frozen=True)
class Filtered:
    """A tile, some whole rows, as its observer is shown it, in arrays that the next tile takes over.

    before, after: the codes of W and W', (rows, n), the second not yet right at the flat positions `at`, which float32
    could not tell. change: D + shift, flat, to within `error`.
    """

    before: Codes
    after: Codes
    change: npt.NDArray[np.float32]
    shift: float
    error: float
    at: Positions


@dataclass(frozen=True)
class Told:
    """Some weights: the codes of W and W'; which, by their places here, lie near a midpoint; D of these, exactly."""

    before: Codes
    after: Codes
    near: Positions
    exact: Callable[[Positions], Wide]


class Observer(Protocol):
    """Sees a block: each tile by `filtered`; then it is asked for the flat positions of the weights that it wants told,
    every tile's `at` among them, and for the places of those in that list; it hears of them by `settle`. Where it wants
    too many, which is None, or where float32 tells too little, it is asked to `forget` them.
    """

    def filtered(self, tile: Filtered) -> None: ...

    def wanted(self) -> tuple[Positions, Positions] | None: ...

    def settle(self, told: Told) -> None: ...

    def forget(self) -> None: ...


@dataclass
class _Block:
    """Rows under way, `row` the first, and what came of them. error: of D in float32; shift: what D is increased by, so
    that the float32 total is no less than W + D; span: less that, the total is no more than it; size: no |D| is larger.
    """

    base: Tensor
    out: Tensor
    row: int
    error: float
    shift: float
    span: float
    size: float
    slight: bool

    def __post_init__(self) -> None:
        self.before, self.after = (x.view(torch.uint16).numpy() for x in (self.base, self.out))
        self.squared, self.kept, self.changed = 0.0, 0.0, 0


class FilteredProduct:
    """An `ExactProduct` D with its right side as float32 multiplies it, and what bounds that."""

    def __init__(self, exact: ExactProduct) -> None:
        self.exact, rank = exact, len(exact.cross) // 2
        right = exact.cross[:rank] + exact.cross[rank:]
        self.right = torch.cat([right.float(), torch.ones(1, right.shape[1])])  # (R + 1, n), 1 for the common shift
        self.norm, self.gram, self.sums = float(right.norm(dim=0).max()), right @ right.T, right.sum(1)
        self._columns = right.T.contiguous().numpy()  # (n, R), each of which is read in one go
        # of a row's size, what `nearly` is off from the exact D: by float64's rounding, and by the products of the two
        # low slices, which the exact D leaves out (each slice is at most 2**-bits of the largest number)
        self.off = max(2.0**-40, 2 * rank * 4.0**-exact.bits)

    @cached_property
    def _slices(self) -> Wide:
        return self.exact.cross.T.contiguous().numpy()  # (n, 2R)

    def nearly(self, rows: Wide, at: Positions, columns: Positions) -> Wide:
        """D in some places, to `off`: in at[i] of `rows`, (m, R), and in columns[i]."""
        found = np.empty(len(at))
        for part in _parts(len(at), rows.shape[1]):
            one, two = rows.take(at[part], 0), self._columns.take(columns[part], 0)
            found[part] = torch.from_numpy(one).mul_(torch.from_numpy(two)).sum(1).numpy()
        return found

    def exactly(self, left: Wide, at: Positions, columns: Positions) -> Wide:
        """The same to the last bit. left: (m, 2R), as `exact.left` returns it."""
        found, rank = np.empty(len(at)), left.shape[1] // 2
        for part in _parts(len(at), 2 * rank):
            one, two = (torch.from_numpy(x) for x in (left.take(at[part], 0), self._slices.take(columns[part], 0)))
            found[part] = (one[:, :rank] * two[:, rank:]).sum(1).add_(one.mul_(two).sum(1)).numpy()
        return found


def _parts(count: int, numbers: int) -> Iterator[slice]:
    """Some elements at a time, of so many numbers each."""
    step = max(1, GATHERED // numbers)
    return (slice(start, start + step) for start in range(0, count, step))


class FilteredRows:
    """Some rows of a product, with what is needed to bound them in float32.

    left: what `product.exact.left` returned for these rows, (m, 2R).
    """

    def __init__(self, product: FilteredProduct, left: Tensor) -> None:
        self._product, self._exact = product, left
        rank = left.shape[1] // 2
        rows = left[:, :rank] + left[:, rank:]
        self._rows = rows.numpy()  # (m, R)
        self._left = torch.cat([rows.float(), torch.zeros(len(rows), 1)], 1)  # (m, R + 1), the last column `shift`
        self._sizes = (rows.norm(dim=1) * product.norm).numpy()  # (m,): no |D| of the row is larger
        # |fl(B A) - B A| <= (R + 1) u |B||A| in any order; the factors were rounded too, and `shift` is added
        self._error = (rank + 8) * U
        self._squares = ((rows @ product.gram) * rows).sum(1).numpy()  # (m,): ||D||^2 of the row
        self._sums = (rows @ product.sums).numpy()  # (m,): the sum of the row of D
        self._tiles: dict[int, _Tile] = {}
        self._worth_it = True

    def apply(
        self, base: Tensor, row: int, out: Tensor, work: Workspace, observer: Observer | None = None
    ) -> Change | None:
        """`exact.apply_rounded` of W + D for the rows of `base`, whose first is this one's row `row`.

        base, out: (rows, n) of one dtype of FORMS, contiguous. None where float32 tells too little of them.
        """
        block = self._block(base, row, out) if self._worth_it else None
        change = self._apply_tiles(block, work, observer) if block else None
        if change is None:
            self._worth_it = False  # it will not be for the next rows
            if observer:
                observer.forget()
        return change

    def _block(self, base: Tensor, row: int, out: Tensor) -> _Block | None:
        """None where the bounds do not hold."""
        rows = slice(row, row + len(base))
        size = float(self._sizes[rows].max())
        largest = _largest(base)
        # (beside a larger right side, rows that are below float32's normal numbers could still have some D)
        bounded = self._product.norm < LARGEST and size + largest < LARGEST and size * self._error > LEAST
        if not (bounded and _float32_is_whole()):
            return None
        error = size * self._error
        rounding = U * (size + largest)
        shift = 1.01 * (error + rounding)  # 1 % for what `shift` itself adds, and for what is near a midpoint
        span = 1.01 * (2 * error + 3 * rounding)  # down again, where the rounding of both totals counts
        self._left[rows, -1] = shift
        slight = float(self._squares[rows].sum()) < SLIGHT * largest**2 * base.numel()
        return _Block(base, out, row, error + shift * self._error, shift, span, size, slight)

    def _apply_tiles(self, block: _Block, work: Workspace, observer: Observer | None) -> Change | None:
        """None where float32 can tell too little, or where something is not finite."""
        rows, columns = block.base.shape
        height, found = max(1, TILE // columns), []
        for start in range(0, rows, height):
            at = self._apply_tile(block, slice(start, min(start + height, rows)), work, observer)
            if len(at) * MOST > block.base[start : start + height].numel():
                return None
            found.append(at + start * columns)
        wanted = observer.wanted() if observer else None
        if (observer and wanted is None) or not (math.isfinite(block.squared) and math.isfinite(block.kept)):
            return None
        near = self._mend(block, wanted[0][wanted[1]] if wanted else np.concatenate(found))
        if near is None:
            return None
        if observer and wanted:
            at, places = wanted
            before, after = block.before.take(at), block.after.take(at)
            observer.settle(Told(before, after, places[near], lambda some: self._exactly(block, at[some])))
        here = slice(block.row, block.row + rows)
        own, kept = float(self._squares[here].sum()), block.kept
        if not block.slight:  # <W' - (W + D + shift - span), D + shift> is what was summed up
            total = float(self._sums[here].sum()) + block.shift * block.base.numel()
            kept += own - (block.span - block.shift) * total
        return Change(block.squared, own, kept, block.changed)

    def _apply_tile(self, block: _Block, part: slice, work: Workspace, observer: Observer | None) -> Positions:
        """The flat positions of the weights that float32 cannot tell. part: rows of the block."""
        base, out, before, after = block.base[part], block.out[part], block.before[part], block.after[part]
        tile = self._tiles.get(len(base))
        if tile is None:
            tile = self._tiles[len(base)] = _Tile(work, base)
        left = self._left[block.row + part.start : block.row + part.stop]
        total, change, moved = tile.flat
        tile.total.copy_(base)
        block.squared += torch.dot(total, total).item()
        torch.mm(left, self._product.right, out=tile.change)
        total.add_(change)  # in place: a third stream of numbers would not stay in the cache
        out.copy_(tile.total)
        total.sub_(block.span)
        tile.lower.copy_(tile.total)
        np.not_equal(after, tile.codes, out=tile.hit)
        at = np.flatnonzero(tile.hit)
        tile.moved.copy_(out)
        if block.slight:
            tile.moved.sub_(base)
            block.kept -= block.shift * moved.sum().item()
        else:  # what W' is off from the total, which is at hand
            moved.sub_(total)
        block.kept += torch.dot(moved, change).item()
        np.not_equal(before, after, out=tile.hit)
        block.changed += int(np.count_nonzero(tile.hit))
        if observer:
            observer.filtered(Filtered(before, after, change.numpy(), block.shift, block.error, at))
        return at

    def _mend(self, block: _Block, at: Positions) -> Positions | None:
        """Round the weights at these flat positions rightly, and correct the sums; None where one becomes infinite.

        Returns the places in `at` of those that lie near a midpoint.
        """
        after, dtype = block.after.reshape(-1), block.base.dtype
        weight, former = block.before.take(at), after.take(at)
        value, c = _wide(weight, dtype), self._product.nearly(self._rows, *self._places(block, at))
        total = value + c
        reach = np.abs(total) * (1.1 * U) + block.size * self._product.off  # the first rounding, to float32, and c
        result = _narrow(total + reach, dtype)
        near = np.flatnonzero(result != _narrow(total - reach, dtype))
        if len(near):
            c[near] = self._exactly(block, at[near])
            result[near] = np.where(c[near] == 0, weight[near], _ROUNDED[dtype](value[near] + c[near]))
        final = _wide(result, dtype)
        if not np.isfinite(final).all():
            return None
        after[at] = result
        block.changed += int(np.count_nonzero(result != weight)) - int(np.count_nonzero(former != weight))
        # (numpy's dot would wake threads of its own, which wait in a loop)
        block.kept += torch.dot(torch.from_numpy(final - _wide(former, dtype)), torch.from_numpy(c)).item()
        return near

    def _exactly(self, block: _Block, at: Positions) -> Wide:
        return self._product.exactly(self._exact.numpy(), *self._places(block, at))

    @staticmethod
    def _places(block: _Block, at: Positions) -> tuple[Positions, Positions]:
        """The rows of the product, and the columns."""
        rows, columns = np.divmod(at, block.base.shape[1])
        rows += block.row
        return rows, columns


def _largest(x: Tensor) -> float:
    """The largest |x|, or inf or nan where it has one."""
    codes = x.view(torch.uint16).numpy()
    code = max(int(codes.view(np.int16).max()), int(codes.max()) & 0x7FFF)
    return float(_wide(np.array([code], np.uint16), x.dtype)[0])


def _wide(codes: Codes, dtype: torch.dtype) -> Wide:
    return torch.from_numpy(codes).view(dtype).double().numpy()


def _narrow(x: Wide, dtype: torch.dtype) -> Codes:
    """By way of float32, in two roundings."""
    return torch.from_numpy(x).to(dtype).view(torch.uint16).numpy()


def _float32_is_whole() -> bool:
    """torch may have been told to multiply float32 by fewer bits, for which the bound does not hold."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return str(matmul.fp32_precision) in ("none", "ieee")


def _to_bfloat16(x: Wide) -> Codes:
    """To nearest even in one rounding, as codes; `x` is within the type's range."""
    narrow = x.astype(np.float32)
    # a float32 that was moved onto a midpoint has lost the side on which x lies
    moved = ((narrow.view(np.uint32) & 0xFFFF) == 0x8000) & (narrow != x)
    toward = np.where(x > narrow, np.float32(np.inf), np.float32(-np.inf))
    bits = np.where(moved, np.nextafter(narrow, toward), narrow).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _to_float16(x: Wide) -> Codes:
    return x.astype(np.float16).view(np.uint16)  # which numpy rounds once


_ROUNDED = {torch.bfloat16: _to_bfloat16, torch.float16: _to_float16}
FORMS = tuple(_ROUNDED)
