"""The bits of `exact.apply_rounded` for bfloat16 at a third of its cost: float32 first, exact where that cannot tell.

A float32 GEMM is right to a bound that holds for any order of summation, and float32 has 16 bits more than bfloat16.
So nearly every W + D is further from a midpoint between two bfloat16 than the bound, and rounds like the exact sum
(Shewchuk, 1997, calls this a filter). The few others, about one in a thousand, are computed exactly one by one.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .exact import Change, ExactProduct, Workspace, apply_rounded, count_different, round_once

WINDOW = 256  # float32 steps around a midpoint that are looked at closely; more of them, and fewer sums near 0
MOST = 8  # of a block's weights, one in so many may be looked at closely, else the exact way is as cheap
U = 2.0**-24  # float32's rounding
LEAST, LARGEST = 2.0**-80, 2.0**80  # outside of which a product in float32 could underflow, or overflow


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
        self._bound = rows.norm(dim=1) * (norm * (rank + 4) * U)  # (m,)
        self._squares = ((rows @ gram) * rows).sum(1)  # (m,): ||D||^2 of each row

    def apply(self, base: Tensor, row: int, out: Tensor, work: Workspace) -> Change:
        """`exact.apply_rounded` of W + D for the rows of `base`, whose first is this one's row `row`.

        base, out: (rows, n) in bfloat16, contiguous.
        """
        rows = slice(row, row + len(base))
        exactly = partial(apply_rounded, base, self._product.fill(self._exact[rows]), out, work)
        if not _float32_is_whole():
            return exactly()
        wide, change, total = (work.take(name, torch.float32, *base.shape) for name in ("wide", "change", "total"))
        torch.mm(self._left[rows], self._right, out=change)
        wide.copy_(base)
        torch.add(wide, change, out=total)
        out.copy_(total)
        doubtful = _doubtful(total, out, float(self._bound[rows].max()), work)
        if doubtful is not None:
            self._mend(base, row, doubtful, out, work)
            total.copy_(out).sub_(wide)
            squared, kept = _dot(wide, wide), _dot(total, change)
            if math.isfinite(squared) and math.isfinite(kept):
                return Change(squared, float(self._squares[rows].sum()), kept, count_different(out, base, total, work))
        return exactly()

    def _mend(
        self, base: Tensor, row: int, at: np.ndarray[Any, np.dtype[np.intp]], rounded: Tensor, work: Workspace
    ) -> None:
        """Round the weights at these flat positions exactly."""
        where, columns = torch.from_numpy(at), base.shape[1]
        rows = torch.from_numpy(at // columns + row)
        c = self._product.elements(self._exact, rows, torch.from_numpy(at % columns))
        weight = base.view(-1)[where]
        result = torch.empty_like(weight)
        round_once((weight.double() + c).unsqueeze(0), result.unsqueeze(0), work)
        rounded.view(-1)[where] = torch.where(c == 0, weight, result)


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.view(-1), y.view(-1)))


def _float32_is_whole() -> bool:
    """torch may have been told to multiply float32 by fewer bits, for which the bound does not hold."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return str(matmul.fp32_precision) in ("none", "ieee")


def _doubtful(total: Tensor, rounded: Tensor, error: float, work: Workspace) -> np.ndarray[Any, Any] | None:
    """Flat positions in a float32 sum that lie within `error` of a midpoint of bfloat16, or of 0; None for too many."""
    if not LEAST < error < LARGEST:
        return None
    low = work.take("low", torch.int16, *total.shape)
    low.copy_(total.view(torch.int32))  # the upper half falls off
    bits = low.numpy().view(np.uint16)
    hit, small = (work.take(name, torch.bool, *total.shape).numpy() for name in ("hit", "small"))
    np.add(bits, WINDOW - 0x8000 & 0xFFFF, out=bits)
    np.less_equal(bits, 2 * WINDOW, out=hit)
    # of a sum beyond `least`, WINDOW - 2 steps are more than the error, and 2 the rounding of the sum
    least = int(np.array([error / U / (WINDOW - 2)], np.float32).view(np.int32)[0]) >> 16
    code = rounded.view(torch.int16).numpy().view(np.uint16)
    np.bitwise_and(code, 0x7FFF, out=bits)
    np.less_equal(bits, least + 1, out=small)
    np.logical_or(hit, small, out=hit)
    at = np.flatnonzero(hit)
    if len(at) * MOST > hit.size:
        return None
    x = total.numpy().reshape(-1)[at]
    middle = ((x.view(np.int32) & -0x10000) | 0x8000).view(np.float32)
    reach = error + np.abs(x) * (2 * U)
    found: np.ndarray[Any, Any] = at[(np.abs(x - middle) <= reach) | (np.abs(x) <= reach)]
    return found
