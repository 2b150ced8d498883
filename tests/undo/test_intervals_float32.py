"""Hold the float32 way to the record that the exact way writes, byte for byte."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bits, factors, weights, write_model, write_peft
from filtered_rows import STRANGE, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import loratool
from loratool.numerics import filtered
from loratool.numerics.exact import ExactProduct, Factors, RoundingStats, Workspace, apply_rounded
from loratool.numerics.filtered import FORMS
from loratool.undo.intervals_float32 import Flags
from loratool.undo.records import CELL_COLUMNS, RecordedBlock, Recorder, Restorer, cell_rows

CPU = torch.device("cpu")


class Settling(Recorder):
    """A count of the blocks that float32 could tell."""

    settled = 0

    def settle(self, told: filtered.Told) -> None:
        self.settled += 1
        super().settle(told)


def exactly(W: Tensor, product: ExactProduct, out: Tensor, recorder: Recorder) -> RoundingStats:
    """Run the exact way, row by row of cells."""
    change = RoundingStats()
    for start in range(0, len(W), cell_rows(W.shape[1])):
        rows = slice(start, min(start + cell_rows(W.shape[1]), len(W)))
        fill = product.fill(product.left(rows.start, rows.stop))
        change += apply_rounded(W[rows], fill, out[rows], Workspace(CPU), recorder.witness, CELL_COLUMNS)
    return change


def both(W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[RecordedBlock, RecordedBlock, int]:
    """Return the filter's record, the exact way's, and the number of blocks that the filter could tell."""
    product, work = ExactProduct([Factors(B, scale, A.double())]), Workspace(CPU)
    found, expected = torch.empty_like(W), torch.empty_like(W)
    ours, theirs = Settling(W.dtype), Recorder(W.dtype)
    change = rows_of(product, len(W), even=True).apply(W, 0, found, work, ours)
    if change is None:
        change = exactly(W, product, found, ours)
    exact = exactly(W, product, expected, theirs)
    assert torch.equal(bits(found), bits(expected))
    one, two = ours.take(change, W, found), theirs.take(exact, W, expected)
    if not change.overflowed:  # which a merge refuses
        restorer, back = Restorer("x", W.dtype, one.payload, one.sha256), torch.empty_like(W)
        for start in range(0, len(W), cell_rows(W.shape[1])):
            rows = slice(start, min(start + cell_rows(W.shape[1]), len(W)))
            restorer.block(found[rows], product.fill(product.left(rows.start, rows.stop)), back[rows], work)
        restorer.check(back, found, True)
    return one, two, ours.settled


@pytest.mark.parametrize("relative", [1e-5, 1e-3, 1e-2, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(128, 1024), (128, 2500), (7, 300), (1, 5000), (1500, 1), (300, 1100), (400, 700)])
@pytest.mark.parametrize("dtype", FORMS)
def test_the_record_is_the_exact_ways(
    relative: float, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtered, "TILE", 1 << 14)  # several a block
    W, (A, B) = weights(*shape, dtype=dtype), factors(*shape, 4)
    scale = relative * float(W.float().norm() / (B @ A).norm())
    one, two, settled = both(W, A, B, scale)
    assert one.payload == two.payload and one.sha256 == two.sha256
    assert settled == 1 or (dtype == torch.float16 and relative >= 0.1) or W.numel() < 3000


@pytest.mark.parametrize("relative", [1e-3, 0.03, 0.3])
@pytest.mark.parametrize("std", [1e-6, 1e-5, 3e-5, 6e-5, 1e-4, 1.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", FORMS)
def test_the_record_of_weights_of_any_size(relative: float, std: float, dtype: torch.dtype) -> None:
    """Below 6.1e-5 float16 has one ulp for all numbers, above 32768 it ends."""
    W, (A, B) = (weights(128, 1024).double() * (std / 0.02)).to(dtype), factors(128, 1024, 4)
    one, two, _ = both(W, A, B, relative * std / float((B @ A).std()))
    assert one.payload == two.payload


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", FORMS)
def test_the_record_of_strange_weights(strange: str, size: float, dtype: torch.dtype) -> None:
    W, (A, B) = STRANGE[strange](weights(64, 256, dtype=dtype)), factors(64, 256, 8)
    B[::2] = 0
    one, two, _ = both(W, A, B, size)
    assert one.payload == two.payload


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("hair", [0.0, 1e-13, -1e-13, 1e-9, -1e-9])
def test_the_record_of_sums_on_midpoints(dtype: torch.dtype, hair: float) -> None:
    """W + D is in the middle between two numbers, or beside it by less than float64's own rounding: W can be either."""
    W = torch.arange(1, 32 * 64 + 1).float().reshape(32, 64).to(dtype)
    digits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    half = (W.float().abs().log2().floor() - digits).exp2()
    A = torch.zeros(2, 64, dtype=torch.float64)
    A[0, ::16], A[1, 8::16] = half[3, ::16].double() * (1 + hair), -half[5, 8::16].double() * (1 + hair)
    one, two, settled = both(W, A, torch.ones(32, 2), 1.0)
    assert one.payload == two.payload and settled


def test_the_record_where_the_normal_numbers_end() -> None:
    """Below the least of them, the ulp is as large as above."""
    W, (A, B) = weights(64, 300, dtype=torch.float16), factors(64, 300, 4)
    W[::8, ::12], W[1::8, ::12] = 2.0**-14, -(2.0**-14)
    one, two, settled = both(W, A, B, 2.0**-26 / float((B @ A).std()))
    assert one.payload == two.payload and settled


def test_the_record_where_the_last_binade_begins() -> None:
    """No interval is made there of W'."""
    W, (A, B) = weights(64, 300, dtype=torch.float16), factors(64, 300, 4)
    W = (W.float() * 2e4 + 10000).half()
    W[::4, ::10] = torch.linspace(32000, 32767, 30).half()
    one, two, settled = both(W, A, B, 500 / float((B @ A).std()))
    assert one.payload == two.payload and settled


@settings(max_examples=150)
@given(seed=st.integers(0, 2**31), size=st.floats(-6, 3), odd=st.floats(0, 0.03), dtype=st.sampled_from(list(FORMS)))
def test_the_record_with_any_bits_among_the_weights(seed: int, size: float, odd: float, dtype: torch.dtype) -> None:
    """Some weights of any bit pattern: zeros of both signs, subnormals, powers of two, far outliers."""
    g = torch.Generator().manual_seed(seed)
    W, (A, B) = weights(64, 1500, seed=seed, dtype=dtype), factors(64, 1500, 3, seed)
    any_bits = torch.randint(-(2**15), 2**15, W.shape, generator=g, dtype=torch.int16).view(dtype)
    powers = torch.exp2(torch.randint(-14, 3, W.shape, generator=g).float()).to(dtype)
    any_bits = torch.where(any_bits.float().abs() < 8, any_bits, powers)
    W = torch.where(torch.rand(W.shape, generator=g) < odd, any_bits, W)
    one, two, _ = both(W, A, B, 10.0**size * 1e-2)
    assert one.payload == two.payload


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("dtype", FORMS)
def test_a_merge_whose_blocks_hold_several_rows_of_cells(tmp_path: Path, pruned: bool, dtype: torch.dtype) -> None:
    """Half of the weights 0: float32 tells too little, and the block is done anew by the cells that unmerge reads."""
    W, (A, B) = weights(700, 1200, dtype=dtype), factors(700, 1200, 4)
    W = torch.where(W > 0, W, torch.zeros_like(W)) if pruned else W
    B = B * (1e-2 * W.float().norm() / (B @ A).norm())
    base = write_model(tmp_path / "base", {"x.weight": W}, {"model_type": "llama"})
    adapter = write_peft(tmp_path / "adapter", {"x": (A, B)})
    loratool.merge(base, adapter, tmp_path / "out")
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    for file in base.iterdir():
        assert filecmp.cmp(file, tmp_path / "back" / file.name, shallow=False)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.03, 0.09, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (13,), (3, 1000), (2, 3, 4096)])
def test_positions_of_flags_are_numpys(share: float, shape: tuple[int, ...]) -> None:
    hit = (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < share).numpy()
    flags = Flags(shape)
    flags.values[:] = hit
    assert flags.positions().tolist() == np.flatnonzero(hit).tolist()
