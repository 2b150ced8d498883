"""Hold the merge of rows to the definition, by fractions, on strange weights; then to itself under any tiles."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import bits, factors, weights
from lib.hostile.hostile_reals import form_of
from lib.hostile.strange_rows import STRANGE, product_of
from lib.oracles.fractions_oracle import Add, codes, low_rank, merge_codes
from lib.oracles.reference import change_reference, round_reference, to_longdouble
from torch import Tensor

from loratool.numerics import dense, forms
from loratool.numerics.arrays import Numbers
from loratool.numerics.decide import Factor, Reals, decide
from loratool.numerics.merge import RowMerge
from loratool.numerics.norms import magnitude_ratio
from loratool.numerics.products import Products, Term
from loratool.numerics.rounding_stats import RoundingStats, cast_rounded
from loratool.numerics.stored import Stored
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace
from loratool.streaming.threads import restore_threads, set_threads

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}
types = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
shorter = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=NAMES.get)


def merged(W: Tensor, x: Reals, out: torch.dtype | None = None, rows: int = 1 << 20) -> tuple[Tensor, RoundingStats]:
    """Return W' and the sums, from blocks of so many rows."""
    made, stats = torch.empty_like(W, dtype=out or W.dtype), []
    base, result = numbers_of(W), numbers_of(made)
    merge = RowMerge(x, base.form, result.form)
    for row in range(0, len(W), rows):
        stats.append(merge.apply(base[row : row + rows], row, result[row : row + rows], Workspace()))
    return made, RoundingStats.of(stats)


def plain(stats: RoundingStats) -> tuple[int, int, int]:
    return stats.changed, stats.not_finite, stats.overflowed


@pytest.mark.parametrize("size", [1e-30, 1e-3])
@pytest.mark.parametrize("strange", STRANGE)
@types
def test_strange_weights(dtype: torch.dtype, strange: str, size: float) -> None:
    W, (A, B) = STRANGE[strange](weights(4, 20, dtype=dtype)), factors(4, 20, 3)
    B[1] = 0
    out, stats = merged(W, product_of(A, B, size))
    finite = W.isfinite()
    lost = finite & ~out.isfinite()
    assert (stats.not_finite, stats.overflowed) == (int((~finite).sum()), int(lost.sum()))
    wanted = merge_codes(torch.where(lost, 0.0, W), dtype, [Add(low_rank(A, B, size))])
    assert wanted is not None
    keeps = ~lost.flatten().numpy()
    assert (np.array(codes(out), object)[keeps] == np.array(wanted, object)[keeps]).all()
    assert stats.changed == int((bits(out) != bits(W)).view(-1, dtype.itemsize).any(1).sum())


@pytest.mark.parametrize("relative", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("rank", [16, 300])
@types
def test_against_extended_precision(dtype: torch.dtype, rank: int, relative: float) -> None:
    """What 64 bits of mantissa tell, on more weights than fractions can; a float64's last bits they do not."""
    W, (A, B) = weights(20, 200, dtype=dtype), factors(20, 200, rank)
    scale = relative * float(W.double().norm() / (B @ A).norm())
    out, stats = merged(W, product_of(A, B, scale))
    D, base = change_reference(A, B, scale), to_longdouble(W)
    expected = round_reference(base + D, dtype)
    if dtype == FP64:
        assert (out - expected).abs().max() <= 2.0**-52
    else:
        assert torch.equal(bits(out), bits(expected))
        assert stats.changed == int((expected != W).sum())
    moved = to_longdouble(out) - base
    sums = (stats.base_squared, base * base), (stats.change_squared, D * D), (stats.kept, moved * D)
    for got, summed in sums:
        assert got == pytest.approx(float(summed.sum()), rel=1e-3, abs=2e-3 * float((D * D).sum()))


@shorter
def test_any_rows_tiles_threads_and_order_of_ranks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    W, (A, B) = weights(33, 257, dtype=dtype), factors(33, 257, 12)
    A, B = A * torch.logspace(-3, 3, 12)[:, None], B * torch.logspace(4, -4, 12)
    expected, stats = merged(W, product_of(A, B, 1 / 3))
    threads, order = set_threads(1), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    try:
        for rows, tile, count in ((1, 100, 1), (5, 1, 2), (32, 1 << 12, 2)):
            monkeypatch.setattr(dense, "TILE", {np.float32: tile, np.float64: tile})
            set_threads(count)
            out, other = merged(W, product_of(A[order], B[:, order], 1 / 3), rows=rows)
            assert torch.equal(bits(out), bits(expected)) and plain(other) == plain(stats)
            assert other.kept == pytest.approx(stats.kept, rel=1e-5)
    finally:
        restore_threads(threads)


@types
def test_another_type_of_the_output(dtype: torch.dtype) -> None:
    """The same X, rounded once; torch's casts by way of float32 differ in ties."""
    W, (A, B) = weights(5, 40, dtype=dtype), factors(5, 40, 3)
    for out in (BF16, FP16, FP32):
        wanted = merge_codes(W, out, [Add(low_rank(A, B, 0.3))])
        assert codes(merged(W, product_of(A, B, 0.3), out)[0]) == wanted


@pytest.mark.parametrize("tiny", [1, 2.0**-20])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=NAMES.get)
def test_sums_on_midpoints_and_a_hair_beside_them(dtype: torch.dtype, tiny: float) -> None:
    """So near that float64 cannot tell, and in float16 among the subnormal numbers, where all steps are one."""
    W = (torch.arange(1, 33).float().reshape(2, 16) * tiny).to(dtype)
    half = (W.float().abs().log2().floor() - {BF16: 8, FP16: 11}[dtype]).exp2()[:1].double()
    half = half.clamp(min=2.0**-25) if dtype == FP16 else half
    for hair in (0.0, 2.0**-20, -(2.0**-40), 2.0**-52, -(2.0**-52)):
        A = half * (1 + hair)
        for right, left in ((A, torch.ones(2, 1)), (torch.cat([half, half * hair]), torch.ones(2, 2))):
            wanted = merge_codes(W, dtype, [Add(low_rank(right, left, 1.0))])
            assert codes(merged(W, product_of(right, left))[0]) == wanted


@shorter
def test_terms_that_cancel(dtype: torch.dtype) -> None:
    """What is left of D is below the rounding of its terms, or nothing; -0.0 stays where it is nothing."""
    W, (A, B) = weights(4, 30, dtype=dtype), factors(4, 30, 2)
    W[0] = -0.0
    A, B = torch.cat([A, A * (1 + 2.0**-20)]), torch.cat([B, -B], 1)
    for right in (A, torch.cat([A[:2], A[:2]])):
        wanted = merge_codes(W, dtype, [Add(low_rank(right, B, 1e3))])
        out, stats = merged(W, product_of(right, B, 1e3))
        assert codes(out) == wanted
    assert stats.change_squared == 0 and stats.changed == 0


@pytest.mark.parametrize(("large", "small"), [(59, 80), (127, 134), (100, 140)])
def test_factors_that_float32_cannot_hold_together(large: int, small: int) -> None:
    A = (weights(1, 50).abs() + 0.5).double()
    A = torch.cat([A, -A]) * 2.0**large
    B = torch.zeros(5, 2, dtype=FP64)
    B[:-1, 0] = (weights(4).abs().double() + 1) * 2.0**-small
    B[-1] = 2.0**large
    W = (weights(5, 50).float() * 2.0 ** (large - small + 13)).bfloat16()
    assert codes(merged(W, product_of(A, B))[0]) == merge_codes(W, BF16, [Add(low_rank(A, B, 1.0))])


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(
    ("left", "right", "scale", "dtype"),
    [
        ([2.0**-100, -(2.0**-100)], 2.0**-100, Fraction(1, 1 << 2100), BF16),
        ([2.0**500, 2.0**-1000], 2.0**-500, Fraction(1), FP64),
        ([2.0**-1060, -(2.0**-1060)], 2.0**1000, Fraction(3 << 36), FP64),
    ],
)
def test_factors_that_would_be_lost_when_balanced(
    left: list[float], right: float, scale: Fraction, dtype: torch.dtype, flush: bool
) -> None:
    """Such products are left to the integers: W is a tie, and -0.0, that the least of them decides."""
    A, B = torch.tensor([[right, 0.0]], dtype=dtype), torch.tensor(left, dtype=dtype)[:, None]
    W = torch.tensor([[1 + 2.0**-8, -0.0], [-0.0, 1 + 2.0**-8]])
    torch.set_flush_denormal(flush)
    out, _ = merged(W, Reals(Products([Term(B, A, scale)]).rows(0, 2)), BF16)
    torch.set_flush_denormal(False)
    assert codes(out) == merge_codes(W, BF16, [Add([scale * d for d in low_rank(A, B, 1.0)])])


def test_weights_far_larger_than_all_others() -> None:
    """A bound that follows the size of the sums must hold where a few are 10**6 times the usual."""
    A, B = factors(2, 96, 4)
    for size in (1e-4, 1.05e-4, 1.1e-4):
        W = torch.full((2, 96), size).half()
        W[:, 1::32] = -torch.linspace(600, 800, 6).half().reshape(2, 3)
        assert codes(merged(W, product_of(A, B, 1e-6))[0]) == merge_codes(W, FP16, [Add(low_rank(A, B, 1e-6))])


@pytest.mark.parametrize("a", [(1e-30, 1e26), (2.0**-140 * 1.37, 1e-20), (1e-40, -1e30), (0.0, 2.0**127)])
def test_factors_of_w_beyond_float32(a: tuple[float, float]) -> None:
    """Rows of DoRA; a bound that float32 cannot hold decides nothing, and a factor that it flushes has one."""
    W = torch.cat([weights(1, 40) * 1e38, weights(1, 40) * 1e-12]).bfloat16()
    D = weights(2, 40, seed=2).double() * torch.tensor([[1e-9], [1e12]])
    x = Reals(Stored(D, 1.0), Factor.of_rows([Fraction(each) for each in a]))
    i, j = (at.reshape(-1) for at in np.indices(W.shape))
    wanted = decide(x, numbers_of(W).bits.reshape(-1), forms.BF16, i, j, forms.BF16)
    assert (numbers_of(merged(W, x)[0]).bits.reshape(-1) == wanted).all()


def test_a_float32_of_fewer_bits_is_not_trusted() -> None:
    W, (A, B) = weights(64, 100, dtype=BF16), factors(64, 100, 64)
    expected, _ = merged(W, product_of(A, B))
    torch.set_float32_matmul_precision("medium")
    try:
        assert not dense.float32_is_whole(W)
        assert torch.equal(bits(merged(W, product_of(A, B))[0]), bits(expected))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert dense.float32_is_whole(W)


def test_a_row_longer_than_a_tile() -> None:
    columns = dense.TILE[np.float32] + 7
    W, (A, B) = weights(2, columns, dtype=BF16), factors(2, columns, 2)
    one, _ = merged(W, product_of(A, B, 9.0), rows=1)
    assert torch.equal(bits(one), bits(merged(W, product_of(A, B, 9.0))[0]))
    assert torch.equal(one, round_reference(to_longdouble(W) + change_reference(A, B, 9.0), BF16))


@types
def test_what_would_be_infinite_is_counted(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    W = torch.full((2, 3), top, dtype=dtype)
    out, stats = merged(W, product_of(torch.ones(1, 3, dtype=FP64), torch.tensor([[0.0], [top / 9]], dtype=FP64)))
    assert plain(stats) == (3, 0, 3) and math.isfinite(stats.kept) and torch.equal(out[0], W[0])
    short, x = Numbers.empty(forms.F16, 1, 3), torch.tensor([[1e5, math.inf, 1.0]])
    assert cast_rounded(numbers_of(x), short, Workspace()).overflowed == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    W, (A, B) = weights(*shape, dtype=FP16), factors(*shape, 1)
    assert codes(merged(W, product_of(A, B))[0]) == merge_codes(W, FP16, [Add(low_rank(A, B, 1.0))])
    values = weights(*shape, seed=3)
    out, _ = merged(W, Reals(Stored(values, 0.5)))
    assert torch.equal(out, (W.double() + 0.5 * values.double()).half())


@pytest.mark.parametrize("to", [BF16, FP16, FP32], ids=NAMES.get)
@shorter
def test_nan_in_another_type_is_the_quiet_one(dtype: torch.dtype, to: torch.dtype) -> None:
    """Whichever it was: processors differ in what a cast leaves of sign and payload."""
    W, (A, B) = weights(2, 40, dtype=dtype), factors(2, 40, 2)
    inf = form_of(dtype).inf
    numbers_of(W).bits[:, ::7] = [inf + 1, inf | 5, -1, -3, inf | inf >> 1, -2]
    made, cast = merged(W, product_of(A, B), to)[0], torch.empty_like(W, dtype=to)
    cast_rounded(numbers_of(W), numbers_of(cast), Workspace())
    quiet = {BF16: 0x7FC0, FP16: 0x7E00, FP32: 0x7FC00000}[to]
    for out in (made, cast):
        where = W.isnan().numpy()
        if dtype == to:
            assert (numbers_of(out).bits[where] == numbers_of(W).bits[where]).all()
        else:
            assert (numbers_of(out).bits[where] == quiet).all()


def test_a_ratio_below_float64_beside_factors_that_make_it_count() -> None:
    """m / n of 2^-1080 is no float64; times the factors it is 0.0013."""
    m = torch.tensor([1.3 * 2.0**-1000], dtype=FP64)
    ratio, _ = magnitude_ratio(m, np.array([2.0**80]), 1.0, 0)
    left, right = torch.tensor([[2.0**500]], dtype=FP64), torch.tensor([[2.0**480, 2.0**400]], dtype=FP64)
    delta = Products([Term(left, right, Fraction(2) ** 90, by_rows=True)]).rows(0, 1, ratio)
    wanted = [Fraction(float(m)) / 2**80 * 2**90 * 2**500 * 2**power for power in (480, 400)]
    W = torch.ones(1, 2)
    assert codes(merged(W, Reals(delta))[0]) == merge_codes(W, FP32, [Add(wanted)])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_cast_of_float64_keeps_the_sign_of_zero(dtype: torch.dtype) -> None:
    x, out = torch.tensor([[-0.0, 0.0, -1e-320, 1e-320]], dtype=torch.float64), torch.empty(1, 4, dtype=dtype)
    cast_rounded(numbers_of(x), numbers_of(out), Workspace())
    assert not out.any() and torch.signbit(out).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_cast_of_float64_rounds_once(dtype: torch.dtype) -> None:
    """Halfway between all neighbors, and the next float64 on both sides of that, where float32 has but one number."""
    numbers = torch.arange(form_of(dtype).inf, dtype=torch.int16).view(
        dtype
    )  # rising from 0, the last bit even and odd
    low, high = numbers[:-1], numbers[1:]
    middle = (low.double() + high.double()) / 2
    even = torch.where(torch.arange(len(low)) % 2 == 0, low, high)
    above, below = (middle.nextafter(torch.tensor(end, dtype=FP64)) for end in (math.inf, -math.inf))
    for x, wanted in ((middle, even), (above, high), (below, low), (-above, -high), (-below, -low)):
        out = torch.empty(1, len(x), dtype=dtype)
        cast_rounded(numbers_of(x[None]), numbers_of(out), Workspace())
        assert torch.equal(out[0], wanted)
