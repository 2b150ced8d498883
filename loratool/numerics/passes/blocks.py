"""Pass blocks to the compiled passes, with the bounds by which these decide numbers, and return what they leave.

In the following, u is the unit roundoff of the type T of a pass (float32 for bf16, else float64), b and a are the norms
of a row of the left side and of a column of the right side, R is the rank, t the least normal number of T and M the
largest factor. All sums are rounded to nearest, and no subnormal number is flushed (`kernel.c` sees to it).

**D.** A pass sums CHUNK products at a time, and then these sums. So each product goes through at most min(R, CHUNK) +
ceil(R / CHUNK) - 1 sums (with or without FMA) and its own rounding. Both factors are rounded to T, and the left one was
rounded in float64: twice by its scale, and once by DoRA's ratio, which itself is off by 4 u. With `extra` for all of
these and second-order terms, 5 if T is float32 and else 10, gamma_n times the sum of |B A|, which is at most b a
(Cauchy, Schwarz), gives `(min(R, CHUNK) + ceil(R / CHUNK) + extra) u b a`. Underflows add `4 R t max(1, M)`, as in
`products`. This is E. The passes get 1.01 E, which is more than E by more than T's least number.

**W + D.** Let s be the computed sum. |s - (W + D)| <= u |s| + E, and the ends s +- r are off by u |s +- r|. So with
r = 1.01 E + c |s| and c > 2 u, X is strictly between the ends. A tie never has equal ends then, and neither has 0
between ends of two signs. For fp16 the ends are cast by way of float32: c is more than 2**-24, float32's unit roundoff,
and float64's are small beside that.

**f W + D**, with DoRA's factor f of a row: f is known to rho |f|, is rounded to T, and so is its product with W. So
|f W| (2 u + rho) is added to E + c |s|. As |f W| is at most |X| + |D|, and |D| at most b a, (2 u + rho) is added to c,
and times b a to E. What underflows in the product is far below E's underflows, as |f| is at least 1 / `APART`.

**A cast.** W of another type than W' is exact in float32, and so in T. So all bounds are those of the type of W'.

**Exact sums.** If W and the products of a row are multiples of one power of two, and |W| + b a is less than 2**53 times
as large, then D, all partial sums and W + D are exact in float64. The lowest bit of a W in float32 is more than
2**-24 |W|. For W' in float32, r is 2**-1000 then: s +- r is s, and a tie is rounded to even by the cast. Only if s is 0
have the ends two signs. Without this, bf16 factors leave many ties.

**A dot product** in float64 is off by (R + 16) u b a + 4 R t max(1, M) at most (`products`); the passes get R + 24, for
the roundings of the bound. c is 4 u.

**In pairs** the same sum is off by (2 R + 8)**2 u**2 b a at most: 2 R errors of at most (R + 1) u b a together are
summed in float64. Where errors could underflow, nothing is decided. If a scale is no power of two, or there is a ratio,
the left side itself is off by up to seven roundings: 12 u b a more. What lies strictly between two neighbors of float64
rounds as every number between them.

**The end of a run** is a midpoint, which is exact, minus D. Its rounding and those of the margin are below 16 u times
the larger end. D is off by E. Ends times the inverse of f are off by E / |f|, and by rho times themselves; the
roundings of the inverse and of the product are among the 16 u.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import Kind, Numbers
from ..decide import Factor, Reals, U
from ..forms import Positions, Wide
from ..products import EXPONENTS, LEAST_OF, UNIT_OF, ProductRows, Products
from ..workspace import Workspace
from .native import native

STRIP = 1 << 15  # weights between two looks at what a pass left, so that it is still in the cache
GROUP = 6  # rows that a pass multiplies together
WIDEST = 1 << 18  # columns; of longer rows the sums of a group would take much memory
LARGEST = 2.0**60  # products of larger factors could overflow in float32
BEYOND = 2.0**100  # of larger bounds too
APART = 2.0**10  # DoRA's a are rarely larger, or smaller than its inverse
UNSURE = 2.0**-45  # and their relative errors
LOST = 2.0**10  # times its errors: of a D that is not larger the sums have lost digits
LEAST_SQUARES = {np.float32: 2.0**-80, np.float64: 2.0**-800}  # of smaller ones squares may have underflowed
TOGETHER = 1 << 16  # runs that are handed back at a time, which bounds the memory

FP32 = 2  # `kernel.c`'s number of float32
EVERY, UNKNOWN = -1, 0  # counts of a run that counts as every number, and of one that is not known


def has_exact_sides(products: Products) -> bool:
    """Return whether both sides are the factors, times powers of two."""
    return all(side.is_power for side in products.sides) and not products.scaled


@dataclass(frozen=True)
class PassBounds:
    """The constants of the bounds for a type of weights; the module's docstring derives them.

    Attributes:
        number: of the type in `kernel.c`.
        real: T.
        chunk, extra: roundings of D beside ceil(R / chunk), as `min(R, chunk) + extra`.
        underflow: times R t max(1, M).
        spread: c.
        dot_extra: roundings of a dot product beside R.
        dot_spread: c of a sum with a dot product.
        margin: times the larger end of a run.
        pair_extra: roundings of a dot product in pairs beside 2 R.
        pair_rounded: the same of its left side, if a scale is no power of two, or there is a ratio.
        room: times what all products of a row are multiples of, and more than exact sums are.
        finest: the same times |W|.
    """

    number: int
    real: Kind
    spread: float
    margin: float
    chunk: int = 16
    extra: int = 10
    underflow: int = 4
    dot_extra: int = 24
    dot_spread: float = 4 * U
    pair_extra: int = 8
    pair_rounded: int = 12
    room: float = 2.0**52
    finest: float = 2.0**28

    def errors(self, rows: ProductRows, here: slice, of_product: Wide) -> npt.NDArray[np.float64]:
        """Return E of some rows. of_product: of f W of each of them."""
        rank, unit = rows.products.rank, UNIT_OF[self.real]
        roundings = min(rank, self.chunk) + -(-rank // self.chunk) + self.extra
        errors: npt.NDArray[np.float64] = (roundings * unit + of_product) * _sizes(rows, here)
        errors += self.least(rows, self.real)
        return errors

    def of_product(self, unknown: Wide) -> Wide:
        """Return the bounds of f W, in units of |f W|. unknown: rho of each row."""
        bounds: Wide = 2 * UNIT_OF[self.real] + unknown
        return bounds

    def factor_errors(self, factor: Factor, here: slice) -> Wide:
        """Return the bounds of the errors of f of some rows."""
        return np.ascontiguousarray(factor.error[here])

    def rooms(self, rows: ProductRows, here: slice) -> npt.NDArray[np.float64]:
        """Return what exact sums of some rows are less than; 0 if they may be inexact."""
        products = rows.products
        if self.number != FP32 or not products.binary:
            return np.zeros(here.stop - here.start)
        of_rows, of_columns = rows.lowest[here], _by_rows(products.lowest, np.min, rows)[here]
        known = np.minimum(of_rows, of_columns) > -EXPONENTS
        rooms: npt.NDArray[np.float64] = np.where(known, np.ldexp(self.room, (of_rows + of_columns).astype(np.intc)), 0)
        return rooms

    def least(self, rows: ProductRows, kind: Kind) -> float:
        """Return what underflows in a dot product at most."""
        least: float = self.underflow * rows.products.rank * LEAST_OF[kind] * max(1.0, rows.largest)
        return least

    def dot_unit(self, products: Products) -> float:
        """Return the bound of a dot product, in units of b a."""
        rank: int = products.rank
        return (rank + self.dot_extra) * U

    def pair_unit(self, products: Products) -> float:
        """Return the same of a dot product in pairs, if not all of its sums are exact."""
        rank, rounded = products.rank, 0 if has_exact_sides(products) else self.pair_rounded
        bound: float = ((2 * rank + self.pair_extra) * U) ** 2 + rounded * U
        return bound


def _sizes(rows: ProductRows, here: slice) -> npt.NDArray[np.float64]:
    """Return b times the largest a of some rows."""
    sizes: npt.NDArray[np.float64] = _by_rows(rows.products.column_norms, np.max, rows)[here] * rows.row_norms[here]
    return sizes


def _by_rows(columns: npt.NDArray[Any], most: Callable[..., Any], rows: ProductRows) -> npt.NDArray[Any]:
    """Return, for each row, the largest or least number of its matrix's columns."""
    matrices = rows.products.matrices
    found: npt.NDArray[Any] = np.repeat(most(columns.reshape(matrices, -1), axis=1), rows.shape[0] // matrices)
    return found


_SINGLE, _DOUBLE = UNIT_OF[np.float32], UNIT_OF[np.float64]
BOUNDS = {
    "BF16": PassBounds(0, np.float32, 1.0625 * 2 * _SINGLE, 16 * _SINGLE, extra=5),
    "F16": PassBounds(1, np.float64, 1.1875 * _SINGLE, 16 * _DOUBLE),
    "F32": PassBounds(FP32, np.float64, 1.0625 * 2 * _DOUBLE, 16 * _DOUBLE),
}


class _Block(ctypes.Structure):
    """`struct block` of kernel.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "kind source_kind back record matrices rows columns rank strip".split()),
        *((name, ctypes.c_void_p) for name in "source result left right panels errors sizes rooms".split()),
        ("finest", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("row_norms", "column_norms")),
        ("is_scaled", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("factors", "factor_errors")),
        *((name, ctypes.c_double) for name in "spread dot_unit dot_least dot_spread margin pair_unit".split()),
        ("is_exact", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in "scratch squares index count at".split()),
        *((name, ctypes.c_int64) for name in ("entries", "undecided")),
        ("sums", ctypes.c_void_p),
    ]


_SUMS = np.dtype(  # `struct sums` of kernel.c
    [
        *((name, np.int64) for name in ("changed", "not_finite", "entries")),
        *((name, np.float64) for name in ("base_squared", "kept", "squares")),
    ]
)


@dataclass(frozen=True)
class RunEntries:
    """The runs of more than one number in a block, in the order of its weights, and those that are not known.

    The arrays are a workspace's: the next pass with it overwrites them.

    Attributes:
        index: W's place in the run; its bits if `count` is EVERY; of a run that is not known its weight's position,
            except on the way back, where this is the place of the run's first number.
        count: how many numbers; EVERY, or UNKNOWN.
        at: the weights' positions, on the way back.
        width: bits of a number.
        ends: how many entries there are up to the end of each matrix.
    """

    index: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]
    at: npt.NDArray[np.int32] | None
    width: int
    ends: list[int]

    def unknown(self) -> Iterator[tuple[Positions, Positions]]:
        """Yield the entries that are not known, and the positions of their weights."""
        entries = np.flatnonzero(self.count == UNKNOWN)
        for start in range(0, len(entries), TOGETHER):
            some = entries[start : start + TOGETHER]
            yield some, (self.index if self.at is None else self.at).take(some).astype(np.intp)

    def pack(self) -> Iterator[bytes]:
        """Yield the bits of each matrix's places, as an undo record has them.

        All entries must be known; they are used up.
        """
        module, edges = _required(), list(pairwise([0, *self.ends]))
        longest = max(stop - start for start, stop in edges)
        data = np.empty(longest * (1 + self.width) // 8 + 16, np.uint8)
        index, count, to = _address(self.index), _address(self.count), _address(data)
        for start, stop in edges:
            skipped = start * self.index.itemsize
            used = module.pack_entries(index + skipped, count + skipped, stop - start, self.width, to)
            yield data[: (used + 7) // 8].tobytes()

    def put(self, data: bytes, out: Numbers) -> int:
        """Write the numbers W into `out`, by the bits of their places, and return how many bits these were.

        Raises:
            ValueError: the bits are too few.
        """
        assert self.at is not None
        module, index = _required(), np.empty(len(self.index) + 1, np.int32)
        bits, entries = np.frombuffer(data or b"\0", np.uint8), len(self.index)
        unread = np.empty(entries + 1, np.int32)
        read: int = module.unpack_entries(
            _address(bits), 8 * len(data), _address(index), _address(self.count), entries, self.width, _address(unread)
        )
        if read < 0:
            raise ValueError("ends too early")
        first, count, at = _address(self.index), _address(self.count), _address(self.at)
        module.put_entries(_address(out.bits), self.width, first, _address(index), count, at, entries)
        return read


@dataclass(frozen=True)
class PassedBlock:
    """What the passes left of a block.

    Attributes:
        undecided: the flat positions of weights that are not decided.
        entries: of the runs, if they were asked for.
        sums: fields of RoundingStats, as if the undecided weights were right.
    """

    undecided: Positions
    entries: RunEntries | None
    sums: dict[str, npt.NDArray[Any]]


@np.errstate(all="ignore")
def merge_block(x: Reals, base: Numbers, first: int, out: Numbers, work: Workspace, record: bool) -> PassedBlock | None:
    """Write W' of a block into `out` where the passes decide it.

    Args:
        base: (rows, n); its first row is row `first` of `x`.
        record: whether the runs are asked for.

    Returns:
        None if the block is to be done without the passes; `out` may have been written to.
    """
    prepared = _prepare(x, base, first, out, work, record=record)
    if prepared is None:
        return None
    block, (squares, errors, found) = prepared.run(), (prepared.arrays[name] for name in ("squares", "errors", "sums"))
    # else D is hardly more than its errors, or beyond the type of its squares: then the sums would not hold
    if not (((squares > prepared.least_squares) & (squares < np.inf)) | (errors < 0)).all():
        return None
    sums = {name: found[name] for name in ("base_squared", "kept", "changed", "not_finite")}
    sums["change_squared"] = squares.reshape(len(found), -1).sum(1)
    undecided = prepared.arrays["at"][: block.undecided].astype(np.intp)
    return PassedBlock(undecided, prepared.entries() if record else None, sums)


@np.errstate(all="ignore")
def restore_block(x: Reals, merged: Numbers, out: Numbers, work: Workspace) -> RunEntries | None:
    """Write into `out` each W that is the only number of its run, and return the other runs.

    Args:
        merged: (rows, n), the rows of `x`.

    Returns:
        None if the block is to be done without the passes.
    """
    prepared = _prepare(x, merged, 0, out, work, back=True)
    if prepared is None:
        return None
    prepared.run()
    return prepared.entries()


@dataclass(frozen=True)
class _Pass:
    """A pass over a block, and the arrays that its addresses are of."""

    module: ModuleType
    block: _Block
    arrays: dict[str, npt.NDArray[Any]]
    least_squares: npt.NDArray[np.float64]  # (rows,): <D, D> is not known of a row where it is not more
    width: int

    def run(self) -> _Block:
        self.module.run_pass(ctypes.addressof(self.block))
        return self.block

    def entries(self) -> RunEntries:
        """Return the runs after the pass."""
        index, count, at = (self.arrays[name][: self.block.entries] for name in _LISTS)
        ends = self.arrays["sums"]["entries"].tolist()
        return RunEntries(index, count, at if self.block.back else None, self.width, ends)


_LISTS = ("index", "count", "at")


def _prepare(
    x: Reals, source: Numbers, first: int, result: Numbers, work: Workspace, record: bool = True, back: bool = False
) -> _Pass | None:
    """Return the pass over a block; None if the block is to be done without it."""
    module = native()
    if module is None or not _takes(x, source, result, record or back):
        return None
    assert isinstance(x.delta, ProductRows)
    rows, products, bounds = x.delta, x.delta.products, BOUNDS[result.form.name]
    height, columns = len(source) // products.matrices, source.shape[1]
    here = slice(first, first + len(source))
    factors, factor_errors = np.ones(len(source)), np.zeros(len(source))
    unknown, of_product = 0.0, np.zeros(1)
    if isinstance(x.factor, Factor):
        factors = np.ascontiguousarray(x.factor.value[here])
        factor_errors = bounds.factor_errors(x.factor, here)
        relative = factor_errors / np.abs(factors)
        unknown = float(relative.max())
        if not ((np.maximum(np.abs(factors), 1 / np.abs(factors)) <= APART).all() and unknown <= UNSURE):
            return None
        of_product = bounds.of_product(relative)
    errors = bounds.errors(rows, here, of_product)
    if not errors.max(initial=0.0) < BEYOND:
        return None
    least_squares = np.square(errors) * (LOST**2 * columns) + LEAST_SQUARES[bounds.real]
    if bounds.number not in products.panels:
        right = np.ascontiguousarray(products.right)
        size = module.size_of_panels(bounds.number, columns, products.rank)
        panels = np.empty(products.matrices * size, np.uint8)
        shape = products.matrices, columns, products.rank
        module.fill_panels(bounds.number, _address(right), *shape, _address(panels))
        products.panels[bounds.number] = right, panels
    right, panels = products.panels[bounds.number]
    strip = -(-min(height, max(1, STRIP // columns)) // GROUP) * GROUP
    scratch = module.size_of_scratch(bounds.number, strip, columns, products.rank)
    arrays = {
        "left": np.ascontiguousarray(rows.left[here]),
        "right": right,
        "panels": panels,
        "errors": np.where(rows.live[here] | (x.factor is not None), 1.01 * errors, -1.0),
        "sizes": 1.01 * _sizes(rows, here),
        "rooms": np.zeros(len(source)) if x.factor else bounds.rooms(rows, here),
        "row_norms": np.ascontiguousarray(rows.row_norms[here]),
        "column_norms": products.column_norms,
        "scratch": work.take("pass", np.uint8, 1, scratch)[0],
        "squares": np.empty(len(source)),
        "sums": np.empty(products.matrices, _SUMS),
        "factors": factors,
        "factor_errors": factor_errors,
        **{name: work.take(f"pass {name}", np.int32, 1, source.size)[0] for name in _LISTS},
    }
    block = _Block(
        kind=bounds.number,
        source_kind=BOUNDS[source.form.name].number,
        back=back,
        record=record,
        matrices=products.matrices,
        rows=height,
        columns=columns,
        rank=products.rank,
        strip=strip,
        source=_address(source.bits),
        result=_address(result.bits),
        is_scaled=x.factor is not None,
        finest=bounds.finest,
        spread=bounds.spread + 1.0625 * float(of_product.max()),
        dot_unit=bounds.dot_unit(products),
        dot_least=bounds.least(rows, np.float64),
        dot_spread=bounds.dot_spread,
        margin=bounds.margin + unknown,
        pair_unit=bounds.pair_unit(products),
        is_exact=has_exact_sides(products),
        **{name: _address(array) for name, array in arrays.items()},
    )
    return _Pass(module, block, arrays, least_squares, 8 * source.form.itemsize)


def _takes(x: Reals, source: Numbers, result: Numbers, needs_runs: bool) -> bool:
    """Return whether a block is one of the passes': of types that they have, and W or f W with products added."""
    return (
        source.form.name in BOUNDS
        and result.form.name in BOUNDS
        and (source.form.name == result.form.name or not needs_runs)
        and not source.on_gpu
        and (x.factor is None or x.factor.axis == 0)
        and x.sign == 1
        and isinstance(x.delta, ProductRows)
        and x.delta.in_range
        and x.delta.products.rank > 0
        and x.delta.largest < LARGEST
        and 0 < source.size < 1 << 31
        and source.shape[1] <= WIDEST
        and all(t.bits.flags.c_contiguous and t.bits.flags.aligned for t in (source, result))
    )


def _required() -> ModuleType:
    module = native()
    assert module is not None
    return module


def _address(x: npt.NDArray[Any]) -> int:
    return int(x.ctypes.data)
