"""Hold the product and the one rounding against extended precision, then their determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import bits, factors, weights
from reference import change_reference, round_reference, to_longdouble
from torch import Tensor

from loratool.adapters.updates import LowRank
from loratool.numerics.exact import TILE, ExactProduct, Factors, Workspace, apply_rounded, cast_rounded, round_once

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
        ),
    ],
)


def product(terms: list[Factors], rows: int | None = None) -> Tensor:
    """Return D, computed by blocks of `rows`."""
    made = ExactProduct(terms)
    out = torch.empty(made.shape, dtype=torch.float64, device=terms[0].right.device)
    step = rows or made.shape[0]
    for i in range(0, made.shape[0], step):
        block = out[i : i + step]
        made.multiply(made.left(i, i + len(block)), slice(None), block, torch.empty_like(block))
    return out


def rounded(base: Tensor, terms: list[Factors], rows: int, dtype: torch.dtype | None = None) -> Tensor:
    made, work = ExactProduct(terms), Workspace(base.device)
    out = torch.empty_like(base, dtype=dtype or base.dtype)
    for i in range(0, len(base), rows):
        block = base[i : i + rows]
        apply_rounded(block, made.fill(made.left(i, i + len(block))), out[i : i + rows], work)
    return out


@pytest.mark.parametrize("rank", [1, 5, 16, 64, 300, 1024, 2048])
def test_product_is_right_to_float64(rank: int) -> None:
    A, B = factors(60, 90, rank)
    expected = change_reference(A, B, 1.7)
    got = product(LowRank(A, B, 1.7).terms(1.0, False))
    error = np.abs(to_longdouble(got) - expected).max() / np.abs(expected).max()
    assert error < 1e-11 * rank / 2048 + 1e-14


def test_product_survives_scales_from_1e_minus_5_to_1e5_inside_one_adapter() -> None:
    """Without the balance of each rank the small factors fall below the grid of the large ones."""
    A, B = factors(60, 90, 16)
    spread = torch.logspace(-5, 5, 16)
    expected = change_reference(A * spread[:, None], B / spread, 1.0)
    got = product(LowRank(A * spread[:, None], B / spread, 1.0).terms(1.0, False))
    assert np.abs(to_longdouble(got) - expected).max() / np.abs(expected).max() < 1e-13


@devices
def test_product_bits_depend_on_no_order(device: str) -> None:
    A, B = factors(300, 500, 48)
    A, B = A * torch.logspace(-3, 3, 48)[:, None], B * torch.logspace(4, -4, 48)
    expected = product(LowRank(A, B, 0.3).terms(1.0, False))
    A, B, there = A.to(device), B.to(device), expected.to(device)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (1, 3, 7, 64, 300):
            assert torch.equal(product(LowRank(A, B, 0.3).terms(1.0, False), rows), there)
    torch.set_num_threads(before)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3)).to(device)
    assert torch.equal(product(LowRank(A[order], B[:, order], 0.3).terms(1.0, False)), there)
    halves = LowRank(A[20:], B[:, 20:], 0.3).terms(1.0, False) + LowRank(A[:20], B[:, :20], 0.3).terms(1.0, False)
    assert torch.equal(product(halves), there)


def test_transposed_layout_has_the_same_bits() -> None:
    A, B = factors(70, 50, 6)
    update = LowRank(A, B, 1.3)
    assert torch.equal(product(update.terms(0.7, True)), product(update.terms(0.7, False)).T)


def test_a_rank_that_is_zero_on_one_side_changes_nothing() -> None:
    A, B = factors(20, 30, 4)
    A2, B2 = torch.cat([A, torch.zeros(1, 30)]), torch.cat([B, torch.full((20, 1), 1e30)], 1)
    expected = product(LowRank(A, B, 1.0).terms(1.0, False))
    assert (product(LowRank(A2, B2, 1.0).terms(1.0, False)) - expected).abs().max() < 1e-15
    assert not product(LowRank(A, B * 0, 1.0).terms(1.0, False)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_once_is_one_rounding(dtype: torch.dtype) -> None:
    """Values near and on midpoints, subnormals, both ends of the range, against distances in extended precision."""
    g = torch.Generator().manual_seed(5)
    info = torch.finfo(dtype)
    grid = torch.randn(4000, generator=g).to(dtype)
    neighbour = torch.nextafter(grid, torch.full_like(grid, math.inf)).double()
    middle = (grid.double() + neighbour) / 2
    tiny = torch.randn(1000, generator=g, dtype=torch.float64) * info.smallest_normal
    x = torch.cat(
        [middle, middle * (1 + 2**-40), middle * (1 - 2**-40), torch.nextafter(middle, middle * 2), tiny, grid.double()]
        + [
            torch.randn(4000, generator=g, dtype=torch.float64),
            torch.tensor([0.0, 1e-300, -1e-300], dtype=torch.float64),
        ]
        + [torch.tensor([info.max, -info.max], dtype=torch.float64)]
    ).view(1, -1)
    out = torch.empty(x.shape, dtype=dtype)
    round_once(x, out, Workspace(CPU))
    assert torch.equal(out, round_reference(x.numpy().astype(np.longdouble), dtype))
    if dtype in (torch.bfloat16, torch.float16):
        assert not torch.equal(out, x.to(dtype)), "torch's own cast rounds twice: the test has no near-tie"


def test_round_once_in_fp16_subnormals() -> None:
    """Below 2**-14 fp16's grid is fixed, so its midpoints sit at other bits of a float32."""
    k = torch.arange(0, 2048, dtype=torch.float64)
    middle = (k + 0.5) * 2.0**-24
    x = torch.cat([middle, middle + 2**-60, middle - 2**-60, -middle - 2**-60]).view(1, -1)
    out = torch.empty(x.shape, dtype=torch.float16)
    round_once(x, out, Workspace(CPU))
    assert torch.equal(out, round_reference(x.numpy().astype(np.longdouble), torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_sum_equals_the_reference(dtype: torch.dtype, size: float) -> None:
    base = weights(120, 80, dtype=dtype)
    A, B = factors(120, 80, 8)
    expected = round_reference(to_longdouble(base) + change_reference(A, B, size), dtype)
    got = rounded(base, LowRank(A, B, size).terms(1.0, False), 50)
    wrong = (got != expected).double().mean().item()
    # a float64 sum itself is the product's 1e-14 from the truth: for fp64 the last bits are its own
    assert wrong == 0 if dtype != torch.float64 else (got - expected).abs().max() < 1e-15


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_bits_do_not_depend_on_blocks_or_device(dtype: torch.dtype, device: str) -> None:
    base = weights(257, 301, dtype=dtype)
    A, B = factors(257, 301, 12)
    expected = rounded(base, LowRank(A, B, 0.5).terms(1.0, False), 257)
    moved = LowRank(A.to(device), B.to(device), 0.5)
    for rows in (1, 5, 64, 257):
        assert torch.equal(bits(rounded(base.to(device), moved.terms(1.0, False), rows).cpu()), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_without_change_keeps_its_bits(dtype: torch.dtype) -> None:
    """-0.0, nan and inf included; the rows with a zero B change nothing."""
    base = weights(6, 8, dtype=dtype)
    base[0] = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0, torch.finfo(dtype).tiny])
    base[3] = base[0]
    A, B = factors(6, 8, 2)
    B[0] = 0
    work, made = Workspace(CPU), ExactProduct(LowRank(A, B, 1.0).terms(1.0, False))
    out = torch.empty_like(base)
    change = apply_rounded(base, made.fill(made.left(0, 6)), out, work)
    assert torch.equal(bits(out[0]), bits(base[0]))
    assert torch.equal(out[3].isfinite(), base[3].isfinite())
    assert torch.equal(bits(out[3, 2:5]), bits(base[3, 2:5]))
    assert (change.not_finite, change.overflowed) == (6, 0)
    assert math.isfinite(change.kept) and math.isfinite(change.base_squared)


def test_overflow_is_counted() -> None:
    base = torch.full((2, 3), 65504.0, dtype=torch.float16)
    A, B = torch.ones(1, 3), torch.tensor([[0.0], [100.0]])
    made = ExactProduct(LowRank(A, B, 1.0).terms(1.0, False))
    out = torch.empty_like(base)
    assert apply_rounded(base, made.fill(made.left(0, 2)), out, Workspace(CPU)).overflowed == 3
    assert cast_rounded(torch.tensor([[1e5, math.inf, 1.0]]), out[:1], Workspace(CPU)).overflowed == 1


def test_what_a_change_reports() -> None:
    """Against numpy on a case where rounding loses much: <W,W>, <D,D>, <W'-W,D>, and the count."""
    base = weights(64, 64, dtype=torch.bfloat16)
    A, B = factors(64, 64, 4)
    made = ExactProduct(LowRank(A, B, 0.02).terms(1.0, False))
    out = torch.empty_like(base)
    change = apply_rounded(base, made.fill(made.left(0, 64)), out, Workspace(CPU))
    D, W, M = change_reference(A, B, 0.02), to_longdouble(base), to_longdouble(out)
    assert change.changed == int((M != W).sum()) and 0 < change.changed < 64 * 64 * 0.7
    for got, expected in ((change.base_squared, W * W), (change.change_squared, D * D), (change.kept, (M - W) * D)):
        assert got == pytest.approx(float(expected.sum()), rel=1e-9)


def test_merging_into_another_dtype_rounds_the_sum_once() -> None:
    base = weights(40, 30, dtype=torch.bfloat16)
    A, B = factors(40, 30, 4)
    got = rounded(base, LowRank(A, B, 0.01).terms(1.0, False), 40, torch.float32)
    assert torch.equal(got, round_reference(to_longdouble(base) + change_reference(A, B, 0.01), torch.float32))


def test_a_row_longer_than_a_tile() -> None:
    columns = TILE + 7
    base = weights(3, columns, dtype=torch.bfloat16)
    A, B = factors(3, columns, 2)
    assert torch.equal(
        rounded(base, LowRank(A, B, 9.0).terms(1.0, False), 1), rounded(base, LowRank(A, B, 9.0).terms(1.0, False), 3)
    )
