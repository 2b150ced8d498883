"""Hold the filter to the bits of the exact way, where float32 can tell and where it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import bits, factors, weights
from filtered_rows import STRANGE, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import change_reference, round_reference, to_longdouble
from torch import Tensor

from loratool.adapters.updates import LowRank
from loratool.numerics import filtered
from loratool.numerics.exact import ExactProduct, Factors, RoundingStats, Workspace, apply_rounded
from loratool.numerics.filtered import FORMS

CPU = torch.device("cpu")


def both(
    W: Tensor, A: Tensor, B: Tensor, scale: float = 1.0
) -> tuple[tuple[Tensor, RoundingStats], tuple[Tensor, RoundingStats]]:
    product = ExactProduct(LowRank(A, B, scale).terms(1.0, False))
    left = product.left(0, len(W))
    found, expected = torch.empty_like(W), torch.empty_like(W)
    change = rows_of(product, len(W)).apply(W, 0, found, Workspace(CPU))
    if change is None:
        change = apply_rounded(W, product.fill(left), found, Workspace(CPU))
    exact = apply_rounded(W, product.fill(left), expected, Workspace(CPU))
    return (found, change), (expected, exact)


@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("rank", [1, 16, 300])
@pytest.mark.parametrize("dtype", FORMS)
def test_bits_are_those_of_the_exact_way_and_of_the_reference(relative: float, rank: int, dtype: torch.dtype) -> None:
    W, (A, B) = weights(128, 700, dtype=dtype), factors(128, 700, rank)
    scale = relative * float(W.float().norm() / (B @ A).norm())
    (found, change), (expected, exact) = both(W, A, B, scale)
    assert torch.equal(bits(found), bits(expected))
    assert torch.equal(bits(found), bits(round_reference(to_longdouble(W) + change_reference(A, B, scale), W.dtype)))
    assert change.changed == exact.changed
    assert change.base_squared == pytest.approx(exact.base_squared, rel=1e-4)
    assert change.change_squared == pytest.approx(exact.change_squared, rel=1e-4)
    assert change.kept == pytest.approx(exact.kept, rel=1e-3, abs=1e-4 * exact.change_squared)


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("size", [1.0, 2.0**-20])
def test_sums_that_lie_on_midpoints_or_a_hair_beside_them(dtype: torch.dtype, size: float) -> None:
    """W + D is a midpoint plus a millionth of an ulp, so that float32 can tell no weight or nearly none.

    In float16, the smaller size is also below its normal numbers, where all ulps are one.
    """
    W = (torch.arange(1, 1025).float().reshape(8, 128) * size).to(dtype)
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    half = (W.float().abs().log2().floor() - digits).exp2()
    half = half.clamp(min=2.0**-25) if dtype == torch.float16 else half
    for hair in (0.0, 1e-6, -1e-6, 1e-9, -1e-9, 1e-12, -1e-12):
        (found, _), (expected, _) = both(W, half[0:1] * (1 + hair), torch.ones(8, 1))
        assert torch.equal(bits(found), bits(expected))
        A = torch.zeros(3, 128)
        A[0, ::2], A[1, 1::2], A[2] = half[0, ::2], half[0, 1::2] * (1 + hair), 1e-7
        (found, _), (expected, _) = both(W, A, torch.ones(8, 3))
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("dtype", FORMS)
def test_sums_a_float32_step_or_two_beside_midpoints(dtype: torch.dtype, even: bool) -> None:
    """One in a hundred, of any size and both signs, just where what float32 rounds decides."""
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        W = (weights(1, 200000, seed=seed) * torch.exp2(-seed * torch.rand(200000, generator=g))).to(dtype)
        step = (W.double().abs().log2().floor() - digits + 1).exp2()
        fine = (W.double().abs().log2().floor() - 23).exp2()  # float32's
        few, beside = torch.rand(W.shape, generator=g) < 0.01, torch.randint(-8, 9, W.shape, generator=g) / 4
        D = torch.where(few, 0.5 * step + beside * fine, step * torch.rand(W.shape, generator=g, dtype=torch.float64))
        product = ExactProduct([Factors(torch.ones(1, 1), 1.0, D)])
        found, expected = torch.empty_like(W), torch.empty_like(W)
        assert rows_of(product, 1, even).apply(W, 0, found, Workspace(CPU)) is not None
        apply_rounded(W, product.fill(product.left(0, 1)), expected, Workspace(CPU))
        assert torch.equal(bits(found), bits(expected))


def test_weights_far_larger_than_all_others() -> None:
    """A curved bound folds back at the size where its curve takes all of a total away: about -650 beside 1e-4."""
    A, B = factors(8, 1024, 4)
    for size in torch.linspace(1e-4, 1.1e-4, 60).tolist():
        W = torch.full((8, 1024), size).half()
        W[:, 1::32] = -torch.linspace(600, 800, 256).half().reshape(8, 32)
        (found, _), (expected, _) = both(W, A, B, 1e-6)
        assert torch.equal(bits(found), bits(expected))


ODD: dict[str, Callable[[], Tensor]] = {
    "a column that every sample would take": lambda: weights(2048, 512) * (torch.arange(512) > 0),
    "wide": lambda: weights(64, 100000),
    "a large column": lambda: weights(1024, 1024) * (1 + 199 * (torch.arange(1024) == 3)),
    "rows of many sizes": lambda: weights(1024, 1024) * torch.exp2(-5 * torch.linspace(0, 1, 1024))[:, None],
}


@pytest.mark.parametrize(
    ("odd", "dtype"),  # bfloat16 is bounded by the largest weight
    [(odd, dtype) for odd in ODD for dtype in FORMS if dtype == torch.float16 or odd != "a large column"],
)
def test_weights_of_odd_measures_are_told_by_float32(odd: str, dtype: torch.dtype) -> None:
    """Else a merge takes three times as long."""
    W = ODD[odd]().to(dtype)
    A, B = factors(*W.shape, 16)
    B = B * (1e-3 * W.float().norm() / (B @ A).norm())
    product = ExactProduct([Factors(B, 1.0, A.double())])
    found, expected = torch.empty_like(W), torch.empty_like(W)
    even = dtype == torch.bfloat16
    assert rows_of(product, len(W), even).apply(W, 0, found, Workspace(CPU)) is not None
    apply_rounded(W, product.fill(product.left(0, len(W))), expected, Workspace(CPU))
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_what_is_kept_of_a_change_of_one_sign(size: float, dtype: torch.dtype) -> None:
    """Ones do not change at first; what float32 is increased by must not look like a part of the delta."""
    for W in (torch.ones(256, 1024), weights(256, 1024)):
        g = torch.Generator().manual_seed(3)
        A, B = torch.rand(8, 1024, generator=g), torch.rand(256, 8, generator=g) * size
        (_, change), (_, exact) = both(W.to(dtype), A, B)
        assert abs(change.kept - exact.kept) < 1e-3 * exact.change_squared and change.changed == exact.changed


@pytest.mark.parametrize("rank", [16, 65, 300, 1024])
def test_many_ranks_just_off_their_grids(rank: int) -> None:
    """The product of the low slices, which the exact D leaves out, is more than float64 rounds."""
    low = 0.49 * 2.0 ** (1 - (53 - math.ceil(math.log2(2 * rank))) // 2)
    A, B = torch.full((rank, 4096), low, dtype=torch.float64), torch.full((64, rank), low, dtype=torch.float64)
    A[1] = A[0, -1] = 1.0  # no rank is balanced away
    B[:, 0] = B[-1, 1] = 1.0
    W = weights(64, 4096).abs() + 0.5
    tiny = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < 1 / 64
    W = torch.where(tiny, weights(64, 4096, seed=1) * 2.0**-14, W).bfloat16()
    (found, _), (expected, _) = both(W, A, B)
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize(("large", "small"), [(127, 134), (127, 144), (100, 140)])
def test_rows_too_small_for_float32_beside_a_large_right_side(large: int, small: int) -> None:
    """Another row, where two ranks cancel, keeps them from being balanced."""
    A = (weights(1, 512).abs() + 0.5).double()
    A = torch.cat([A, -A]) * 2.0**large
    B = torch.zeros(65, 2, dtype=torch.float64)
    B[:-1, 0] = (weights(64).abs().double() + 1) * 2.0**-small
    B[-1] = 2.0**large
    W = (weights(64, 512).float() * 2.0 ** (large - small + 13)).bfloat16()
    product, found, expected = ExactProduct([Factors(B, 1.0, A)]), torch.empty_like(W), torch.empty_like(W)
    left = product.left(0, 65)
    apply_rounded(W, product.fill(left[:64]), expected, Workspace(CPU))
    if rows_of(product, 65).apply(W, 0, found, Workspace(CPU)) is not None:
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e-3, 1e4, 1e30])
@pytest.mark.parametrize("dtype", FORMS)
def test_strange_weights(strange: str, size: float, dtype: torch.dtype) -> None:
    W, (A, B) = STRANGE[strange](weights(64, 256, dtype=dtype)), factors(64, 256, 8)
    B[::2] = 0
    (found, change), (expected, exact) = both(W, A, B, size)
    assert torch.equal(bits(found), bits(expected))
    assert (change.not_finite, change.overflowed) == (exact.not_finite, exact.overflowed)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 12),
    size=st.floats(-9, 3),
    rank=st.sampled_from([1, 2, 7, 64]),
    dtype=st.sampled_from(list(FORMS)),
)
def test_any_bits_under_any_scales(seed: int, spread: float, size: float, rank: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    W = torch.randint(-(2**15), 2**15, (32, 96), generator=g, dtype=torch.int16).view(dtype)
    W = torch.where(W.float().abs() < 1e6, W, torch.ones_like(W))
    A, B = factors(32, 96, rank, seed)
    ranks = torch.logspace(0, spread, rank)
    (found, _), (expected, _) = both(W, A * ranks[:, None], B / ranks, 10.0**size)
    assert torch.equal(bits(found), bits(expected))


def test_rows_of_a_block_are_the_products_own() -> None:
    W, (A, B) = weights(96, 256, dtype=torch.bfloat16), factors(96, 256, 16)
    product = ExactProduct(LowRank(A, B, 1.0).terms(1.0, False))
    rows, work = rows_of(product, 96), Workspace(CPU)
    out = torch.empty_like(W)
    for start in (0, 32, 64):
        rows.apply(W[start : start + 32], start, out[start : start + 32], work)
    assert torch.equal(bits(out), bits(both(W, A, B)[1][0]))


def test_a_float32_of_fewer_bits_is_not_trusted() -> None:
    W, (A, B) = weights(256, 512, dtype=torch.bfloat16), factors(256, 512, 64)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not filtered._float32_is_whole()
        (found, _), (expected, _) = both(W, A, B)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert filtered._float32_is_whole()
    assert torch.equal(bits(found), bits(expected))
