"""Decide nearly all weights of some rows by one GEMM with a bound, in float32 or float64.

`upper` is W + D + shift and at least X, whatever the order of summation; `upper` - `span` is at most X. Where both cast
to one number, X does too, as rounding is monotone. The few others, one in 300 for 16 bits, stay undecided.

If the result is bfloat16 or has 8 bits, the GEMM is in float32: its products are twice as fast, and it has 16 bits more
than bfloat16. It has 13 more than float16, of which it would leave one in twelve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .arrays import (
    Array,
    Kind,
    Numbers,
    dots_of_rows,
    fetched,
    largest_ordinal,
    narrow,
    not_equal,
    sent,
    widen,
)
from .decide import PerMatrix, Reals
from .forms import BF16, F32, Form, Positions, Wide, fraction
from .products import LEAST_OF, UNIT_OF, ProductRows
from .workspace import Workspace

TILE: dict[Kind, int] = {np.float32: 1 << 19, np.float64: 1 << 18}  # fit the caches, and outweigh the calls
CUDA_TILE = 1 << 23  # more, since on a GPU the number of calls matters
IN_RANGE = 2.0**60  # products of larger factors could overflow in float32
BEYOND = 2.0**120  # larger bounds are near the end of float32
APART = 256  # at most one in so many rows or columns is set apart
MARGIN = 1.01  # for the roundings of `shift` itself


@dataclass(frozen=True)
class Apart:
    """The weights for which an exact GEMM is not exact."""

    rows: npt.NDArray[np.bool_]  # (rows of the block,)
    columns: Positions  # of all matrices, one after the other
    matrices: int
    ordinal: int  # all W of a lower ordinal but 0
    negative_zeros: bool  # W has -0, which stays where D = 0


@dataclass(frozen=True)
class Bounds:
    """The bounds of a block of rows.

    Attributes:
        shift: an upper bound of the errors in the block, added to each number.
        span: `upper` exceeds X by at most this.
        apart: if it is not None, all sums but these are exact, and shift and span are 0.
        slight: whether D is so small beside W that W + D in this type has lost most of its digits.
    """

    shift: PerMatrix
    span: PerMatrix
    apart: Apart | None = None
    slight: bool = False


class DenseRows:
    """Some rows with an update, prepared for a GEMM.

    Args:
        x: their reals.
        base, out: the forms of W and W'.
        like: an array where the rows are.
    """

    @np.errstate(over="ignore")  # a factor beyond float32 is inf there, and decides nothing
    def __init__(self, x: Reals, base: Form, out: Form, like: Array) -> None:
        in_range = x.delta.largest < IN_RANGE
        few = out == BF16 or out.itemsize == 1
        self.single = few and base.itemsize <= 4 and in_range and float32_is_whole(like)
        self.kind: Kind = np.float32 if self.single else np.float64
        self.out, self.unit = out, UNIT_OF[self.kind]
        self.delta = x.delta.dense(self.kind, like)
        self._products = x.delta if isinstance(x.delta, ProductRows) and x.factor is None else None
        self.matrices = self._products.products.matrices if self._products else 1
        self.factor = x.factor
        if x.factor:
            self._a = sent(x.factor.of_rows_in(slice(None))[0].astype(self.kind), like)

    def height(self, base: Numbers) -> int:
        """Return the number of rows of a tile of a block; several matrices are one tile."""
        if self.matrices > 1:
            return len(self.delta.sizes)
        return max(1, (CUDA_TILE if base.on_gpu else TILE[self.kind]) // max(1, base.shape[1]))

    def bounds(self, base: Numbers, first: int, backward: bool = False) -> Bounds:
        """Return the bounds for a block, (rows, n), whose first row is row `first` of these.

        Args:
            backward: the block is W', and D is subtracted.
        """
        products, largest = self._products, largest_of(base)
        if products and products.products.binary and self.out == F32 and base.form.itemsize <= 4 and not base.on_gpu:
            size = float(self.delta.sizes[first : first + len(base)].max(initial=0.0))
            apart = _apart(products, base, first, largest + size)
            if apart:
                return Bounds(0.0, 0.0, apart=apart)
        if self.matrices == 1:
            return self._bounds(base, first, largest, backward)
        height = len(base) // self.matrices
        parts = [
            self._bounds(rows, k * height, largest_of(rows), backward)
            for k, rows in enumerate(base.split(self.matrices))
        ]
        numbers = np.repeat(np.array([(b.shift, b.span) for b in parts], self.kind), height, 0)
        shift, span = (sent(np.ascontiguousarray(numbers[:, k : k + 1]), base.bits) for k in range(2))
        return Bounds(shift, span, None, any(b.slight for b in parts))

    def _bounds(self, base: Numbers, first: int, largest: float, backward: bool) -> Bounds:
        """Return the bounds for a block of one matrix. largest: the largest |W| of the block."""
        here = slice(first, first + len(base))
        size, error = (float(x[here].max(initial=0.0)) for x in (self.delta.sizes, self.delta.errors))
        # float64 is rounded to 16 bits by way of float32
        units = self.unit + (UNIT_OF[np.float32] if self.out.itemsize <= 2 else UNIT_OF[np.float64])
        scale, inexact = 1.0, 0.0
        if self.factor:
            values, errors = self.factor.of_rows_in(here)
            scale = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))  # no copy of them all
            inexact = float(errors.max(initial=0.0)) + LEAST_OF[self.kind]  # as a small factor is cast
        rounding = units * (3 if self.factor else 1) * (largest * scale + size) * 1.001 + largest * inexact + 2.0**-120
        slight = not self.factor and size < 2.0**-12 * largest
        shift, span = MARGIN * (error + rounding), MARGIN * (2 * error + 3 * rounding)
        if self.single and shift > BEYOND:
            shift = span = np.inf  # nothing is decided
        return Bounds(shift, span, None, slight)

    def fill(self, base: Numbers, row: int, shift: PerMatrix, work: Workspace) -> tuple[Array, Array, Wide]:
        """Return a * W + D + shift and D + shift of some rows from row `row` on, in buffers of `work`, and <W, W>.

        <W, W> is of each matrix. If there are several matrices, the rows are all rows.
        """
        total, change = (work.take(name, self.kind, *base.shape) for name in ("total", "change"))
        widen(base, total)
        flat = total.reshape(self.matrices, -1)
        squared = dots_of_rows(flat, flat)
        self.delta.fill(slice(row, row + len(base)), shift, change)
        if self.factor:
            total *= self._a[row : row + len(base)] if len(self._a) > 1 else self._a
        total += change
        return total, change, squared

    def settle(self, upper: Array, bounds: Bounds, out: Numbers, work: Workspace) -> Array:
        """Round `upper` into `out`, and return a mask of the weights that stay undecided. It overwrites `upper`."""
        lower, hit = work.numbers("lower", out.form, *out.shape), work.take("hit", np.bool_, *out.shape)
        narrow(upper, out, ties=False)  # no tie is ever decided, as it is strictly between the ends
        upper -= bounds.span  # in place: a third stream of numbers would not stay in the cache
        narrow(upper, lower, ties=False)
        not_equal(out.bits, lower.bits, hit)
        form = out.form
        if out.on_gpu and not form.has_inf:  # torch's cast stops at the largest number, or gives a nan
            hit |= (out.bits & form.size) >= form.inf - 1
        return hit


def each_number(x: PerMatrix, matrices: int) -> Wide:
    """Return the number of each matrix."""
    if isinstance(x, (int, float)):
        return np.full(matrices, float(x))
    return fetched(x).reshape(matrices, -1)[:, 0].astype(np.float64)


def mask_apart(base: Numbers, row: int, apart: Apart, work: Workspace) -> npt.NDArray[np.bool_]:
    """Return where an exact GEMM may be wrong, in some rows of a block from row `row` on."""
    hit: npt.NDArray[np.bool_] = work.take("hit", np.bool_, *base.shape)
    form, bits = base.form, base.bits
    if apart.ordinal > 1:
        size = np.bitwise_and(bits, form.bits_type(form.size), out=work.take("size", form.bits_type, *base.shape))
        size -= 1  # of 0 it is the largest without a sign
        np.less(size.view(f"u{size.itemsize}"), apart.ordinal - 1, out=hit)
    else:
        hit[...] = False
    if apart.negative_zeros:
        hit |= bits == -form.size - 1
    hit[apart.rows[row : row + len(base)]] = True
    columns = base.shape[1]
    hit.reshape(apart.matrices, -1, columns)[apart.columns // columns, :, apart.columns % columns] = True
    return hit


def _apart(rows: ProductRows, base: Numbers, first: int, size: float) -> Apart | None:
    """Return the weights for which an exact GEMM is not exact; None if they are too many.

    For all others, the products, partial sums and W are multiples of one power of two, and less than 2**53 times it.
    """
    form = base.form
    least = int(np.frexp(size)[1]) - 53 if np.isfinite(size) else 1024
    low, columns = rows.lowest[first : first + len(base)] - 1, rows.products.lowest  # the significands are +-1/2
    usual = np.sort(low)[len(low) // APART]
    outliers = np.flatnonzero(columns < least - usual)
    if least <= -100 or least > 900 or len(outliers) * (APART // 2) > len(columns):
        return None
    # |W| from 2**(least + precision - 1) on has no lower bit
    above = least + form.precision - form.least
    ordinal = above << (form.precision - 1) if above > 1 else 0
    return Apart(
        low < usual, outliers, rows.products.matrices, ordinal, int(base.bits.min(initial=0)) == -form.size - 1
    )


def midpoints(total: Wide, work: Workspace) -> npt.NDArray[np.bool_]:
    """Return where a float64 is a midpoint of float32: its low 29 bits are 2**28."""
    low = work.take("low", np.int32, *total.shape)
    np.left_shift(total.view(np.int32)[:, ::2], 3, out=low)
    ties: npt.NDArray[np.bool_] = work.take("tie", np.bool_, *total.shape)
    return np.equal(low, np.int32(-(1 << 31)), out=ties)


def largest_of(x: Numbers) -> float:
    """Return the largest finite |x|, from bits."""
    form, most = x.form, largest_ordinal(x)
    if most >= form.inf:
        size = x.bits & form.size
        most = int((size * (size < form.inf)).max())
    return float(fraction(form.bits_type(most), form))


def float32_is_whole(like: Array) -> bool:
    """Return whether float32 is multiplied with all bits. torch has a setting for fewer; then no bound holds."""
    if isinstance(like, np.ndarray):
        return True
    import torch

    try:
        if torch.backends.cuda.matmul.allow_tf32:
            return False
    except RuntimeError:  # raised if the caller has used torch's newer setting
        return False
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return str(matmul.fp32_precision) in ("none", "ieee")
