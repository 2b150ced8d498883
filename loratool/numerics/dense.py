"""Decide nearly all weights of some rows by one GEMM with a bound, in float32 or float64.

`upper` is W + D + shift and at least X, whatever the order of summation; `upper` - `span` is at most X. Where both cast
to one number, X does too, as rounding is monotone. The few others, one in 300 for 16 bits, stay undecided.

If the result has 16 bits or fewer, the GEMM is in float32: its products are four times as fast, and it has 16 bits more
than bfloat16, 13 more than float16. For float16 the bound grows with the sum's square, as weights near zero need less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .decide import PerMatrix, Reals
from .forms import FORMS, Bits, Positions, Wide, fraction, numpy_bits, tensor_bits, widen
from .products import LEAST_OF, UNIT_OF, ProductRows
from .rounding_stats import dot_by_matrix
from .workspace import Workspace

TILE = {torch.float32: 1 << 19, torch.float64: 1 << 18}  # weights that fit the caches, and outweigh the calls
CUDA_TILE = 1 << 23  # more, since on a GPU the number of calls matters
IN_RANGE = 2.0**60  # products of larger factors could overflow in float32
BEYOND = 2.0**120  # larger bounds are near the end of float32
APART = 256  # at most one in so many rows or columns is set apart
MARGIN = 1.01  # for the roundings of `shift` itself
SAMPLED = 1 << 11  # weights that are sampled to estimate the size of a block's
SPREAD = 2.0**14  # times the width of a curved bound: beyond that it may not hold


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
        curve: factor of a bound that grows with the sum's square, else 0.
        apart: if it is not None, all sums but these are exact, and shift and span are 0.
        slight: whether D is so small beside W that W + D in this type has lost most of its digits.
    """

    shift: PerMatrix
    span: PerMatrix
    curve: PerMatrix = 0.0
    apart: Apart | None = None
    slight: bool = False


class DenseRows:
    """Some rows with an update, prepared for a GEMM.

    Args:
        x: their reals.
        base, out: the types of W and W'.
    """

    def __init__(self, x: Reals, base: torch.dtype, out: torch.dtype, device: torch.device) -> None:
        in_range = x.delta.largest < IN_RANGE
        self.single = out.itemsize <= 2 and base.itemsize <= 4 and in_range and float32_is_whole()
        self.kind = torch.float32 if self.single else torch.float64
        self.out, self.unit = out, UNIT_OF[self.kind]
        self.delta = x.delta.dense(self.kind, device)
        self._products = x.delta if isinstance(x.delta, ProductRows) and x.factor is None else None
        self.matrices = self._products.products.matrices if self._products else 1
        self.factor = x.factor
        if x.factor:
            value = torch.from_numpy(x.factor.value).to(self.kind).to(device)
            self._a = value[:, None] if x.factor.axis == 0 else value[None]

    def height(self, columns: int, device: torch.device) -> int:
        """Return the number of rows of a tile; several matrices are one tile."""
        if self.matrices > 1:
            return len(self.delta.sizes)
        return max(1, (CUDA_TILE if device.type == "cuda" else TILE[self.kind]) // max(1, columns))

    def bounds(self, base: Tensor, first: int, backward: bool = False) -> Bounds:
        """Return the bounds for a block, (rows, n), whose first row is row `first` of these.

        Args:
            backward: the block is W', and D is subtracted.
        """
        products, largest = self._products, largest_of(base)
        if (
            products
            and products.products.binary
            and self.out == torch.float32
            and base.itemsize <= 4
            and not base.is_cuda
        ):
            size = float(self.delta.sizes[first : first + len(base)].max(initial=0.0))
            apart = _apart(products, base, first, largest + size)
            if apart:
                return Bounds(0.0, 0.0, apart=apart)
        if self.matrices == 1:
            return self._bounds(base, first, largest, backward)
        height = len(base) // self.matrices
        parts = [
            self._bounds(rows, k * height, largest_of(rows), backward)
            for k, rows in enumerate(base.chunk(self.matrices))
        ]
        numbers = torch.tensor([(b.shift, b.span, b.curve) for b in parts], dtype=self.kind, device=base.device)
        shift, span, curve = (column[:, None] for column in numbers.repeat_interleave(height, 0).unbind(1))
        is_curved = any(b.curve for b in parts)
        return Bounds(shift, span, curve if is_curved else 0.0, None, any(b.slight for b in parts))

    def _bounds(self, base: Tensor, first: int, largest: float, backward: bool) -> Bounds:
        """Return the bounds for a block of one matrix. largest: the largest |W| of the block."""
        here = slice(first, first + len(base))
        size, error = (float(x[here].max(initial=0.0)) for x in (self.delta.sizes, self.delta.errors))
        # torch rounds float64 to 16 bits by way of float32, though not on every processor
        units = self.unit + (UNIT_OF[torch.float32] if self.out.itemsize <= 2 else UNIT_OF[torch.float64])
        scale, inexact = 1.0, 0.0
        if self.factor:
            part = here if self.factor.axis == 0 else slice(None)
            scale = float(np.abs(self.factor.value[part]).max(initial=0.0))
            inexact = float(self.factor.error[part].max(initial=0.0)) + LEAST_OF[self.kind]  # as a small factor is cast
        rounding = units * (3 if self.factor else 1) * (largest * scale + size) * 1.001 + largest * inexact + 2.0**-120
        curve = 0.0
        if self.single and self.out == torch.float16 and not self.factor and not backward:
            width = _width(base, size)
            if largest + size < SPREAD * width:
                # the arithmetic mean of both parts is nowhere less than the geometric one, 2.05 u |sum|
                rounding, curve = 2.05 * self.unit * width + 2.0**-120, 2.05 * self.unit / 4 / width
        slight = not self.factor and size < 2.0**-12 * largest
        shift, span = MARGIN * (error + rounding), MARGIN * (2 * error + 3 * rounding)
        if self.single and shift > BEYOND:
            shift = span = np.inf  # nothing is decided
        return Bounds(shift, span, curve, None, slight)

    def fill(self, base: Tensor, row: int, shift: PerMatrix, work: Workspace) -> tuple[Tensor, Tensor, Wide]:
        """Return a * W + D + shift and D + shift of some rows from row `row` on, in buffers of `work`, and <W, W>.

        <W, W> is of each matrix. If there are several matrices, the rows are all rows.
        """
        total, change = (work.take(name, self.kind, *base.shape) for name in ("total", "change"))
        widen(base, total)
        squared = dot_by_matrix(total, total, self.matrices)
        self.delta.fill(slice(row, row + len(base)), shift, change)
        if self.factor:
            total.mul_(self._a[row : row + len(base)] if self.factor.axis == 0 else self._a)
        return total.add_(change), change, squared

    def settle(self, upper: Tensor, bounds: Bounds, out: Tensor, work: Workspace) -> Tensor:
        """Round `upper` into `out`, and return a mask of the weights that stay undecided. It overwrites `upper`."""
        lower, hit = (work.take(name, kind, *out.shape) for name, kind in (("lower", out.dtype), ("hit", torch.bool)))
        if isinstance(bounds.curve, Tensor) or bounds.curve:
            top = _curved(upper, bounds.curve, work.take("top", self.kind, *out.shape))
            out.copy_(top)
            lower.copy_(_curved(top, -3 * bounds.curve, top).sub_(bounds.span))
        else:
            out.copy_(upper)
            lower.copy_(upper.sub_(bounds.span))  # in place: a third stream of numbers would not stay in the cache
        differ(out, lower, hit)
        form = FORMS[out.dtype]
        if form.inf == form.size:  # there is no inf, and torch's cast stops at the largest number, or gives a nan
            hit |= (tensor_bits(out) & form.size) >= form.inf - 1
        return hit


def _curved(x: Tensor, curve: PerMatrix, out: Tensor) -> Tensor:
    """Return x + curve * x**2."""
    if isinstance(curve, Tensor):
        return torch.addcmul(x, x * curve, x, out=out)
    return torch.addcmul(x, x, x, value=curve, out=out)


def each_number(x: PerMatrix, matrices: int) -> Wide:
    """Return the number of each matrix."""
    numbers: Wide = x.view(matrices, -1)[:, 0].double().cpu().numpy() if isinstance(x, Tensor) else np.full(matrices, x)
    return numbers


def differ(x: Tensor, y: Tensor, hit: Tensor) -> Tensor:
    """Write into a mask where two tensors' bits differ, and return it; numpy takes a sixth of torch's time."""
    if hit.is_cuda:
        return torch.ne(tensor_bits(x), tensor_bits(y), out=hit)
    np.not_equal(numpy_bits(x), numpy_bits(y), out=hit.numpy())
    return hit


def mask_apart(base: Tensor, row: int, apart: Apart, work: Workspace) -> Tensor:
    """Return where an exact GEMM may be wrong, in some rows of a block from row `row` on."""
    mask, form, bits = work.take("hit", torch.bool, *base.shape), FORMS[base.dtype], numpy_bits(base)
    hit = mask.numpy()
    if apart.ordinal > 1:
        size = np.bitwise_and(bits, form.size, out=numpy_bits(work.take("size", base.dtype, *base.shape)))
        size -= 1  # of 0 it is the largest without a sign
        np.less(size.view(f"u{size.itemsize}"), apart.ordinal - 1, out=hit)
    else:
        hit[...] = False
    if apart.negative_zeros:
        hit |= bits == -form.size - 1
    hit[apart.rows[row : row + len(base)]] = True
    columns = base.shape[1]
    hit.reshape(apart.matrices, -1, columns)[apart.columns // columns, :, apart.columns % columns] = True
    return mask


def _apart(rows: ProductRows, base: Tensor, first: int, size: float) -> Apart | None:
    """Return the weights for which an exact GEMM is not exact; None if they are too many.

    For all others, the products, partial sums and W are multiples of one power of two, and less than 2**53 times it.
    """
    form = FORMS[base.dtype]
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
        low < usual, outliers, rows.products.matrices, ordinal, int(numpy_bits(base).min(initial=0)) == -form.size - 1
    )


def midpoints(total: Tensor, work: Workspace) -> Tensor:
    """Return where a float64 is a midpoint of float32: its low 29 bits are 2**28."""
    low = numpy_bits(work.take("low", torch.int32, *total.shape))
    np.left_shift(total.view(torch.int32).numpy()[:, ::2], 3, out=low)
    mask = work.take("tie", torch.bool, *total.shape)
    np.equal(low, np.int32(-(1 << 31)), out=mask.numpy())
    return mask


def largest_of(x: Tensor) -> float:
    """Return the largest finite |x|, from bits."""
    form, bits = FORMS[x.dtype], tensor_bits(x)
    if not x.numel():
        return 0.0
    if x.is_cuda:
        size = bits & form.size
        most = int(size.max())
    else:  # numpy's, several times as fast
        patterns: Bits = bits.numpy()
        most = max(int(patterns.max()), int(patterns.view(f"u{patterns.itemsize}").max()) & form.size)
    if most >= form.inf:
        size = bits & form.size
        most = int(torch.where(size < form.inf, size, 0).max())
    return float(fraction(form.bits_type(most), form))


def _width(base: Tensor, size: float) -> float:
    """Return about a fifth of the size of the weights and of D; the bounds hold for any width."""
    # an odd stride, to sample all columns if their number is a power of two
    some = base.view(-1)[:: base.numel() // SAMPLED | 1].double()
    some = some[some.isfinite()]
    weights = float(torch.linalg.vector_norm(some)) / math.sqrt(max(1, len(some)))
    return 0.2 * weights + 0.02 * size + 2.0**-30


def float32_is_whole() -> bool:
    """Return whether torch multiplies float32 with all bits. A setting allows fewer; then no bound holds."""
    try:
        if torch.backends.cuda.matmul.allow_tf32:
            return False
    except RuntimeError:  # raised if the caller has used torch's newer setting
        return False
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        return torch.get_float32_matmul_precision() == "highest"
    return str(matmul.fp32_precision) in ("none", "ieee")
