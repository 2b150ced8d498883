"""Measure the cost of undo: CPU a weight, hashing apart, and the file's size. pytest -m slow -s tests/benchmarks"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import factors, weights, write_model, write_peft

import loratool
from loratool.numerics.exact import ExactProduct, Factors, Workspace
from loratool.numerics.filtered import FilteredProduct, FilteredRows
from loratool.streaming.apply import FILTERED_BLOCK
from loratool.undo.records import Recorder

CPU = torch.device("cpu")


def best_of(works: list[Callable[[], object]], weights: int) -> list[float]:
    """Return the nanoseconds of CPU a weight of each, in turns."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(15):
        for work, times in zip(works, found, strict=True):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return [min(times) / weights * 1e9 for times in found]


@pytest.mark.slow
@pytest.mark.parametrize(("relative", "bound"), [(1e-2, 2.5), (1e-1, 5.0)])
def test_the_encoder(relative: float, bound: float) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    W, (A, B) = weights(512, 4096, dtype=torch.bfloat16), factors(512, 4096, 16)
    B = B * (relative * W.float().norm() / (B @ A).norm())
    product, work, out = ExactProduct([Factors(B, 1.0, A.double())]), Workspace(CPU), torch.empty_like(W)
    rows, step = FilteredRows(FilteredProduct(product, even=True), product.balanced(0, 512)), FILTERED_BLOCK // 4096

    def merged(recorder: Recorder | None) -> None:
        for row in range(0, 512, step):
            done = rows.apply(W[row : row + step], row, out[row : row + step], work, recorder)
            assert done is not None  # else nothing was measured

    plain, recorded = best_of([lambda: merged(None), lambda: merged(Recorder(W.dtype))], W.numel())
    undo = recorded - plain
    torch.set_num_threads(threads)
    print(f"\n|D|/|W| {relative:g}: undo {undo:.1f} ns a weight (at most {bound}), the sum alone {plain:.1f}")
    assert undo <= bound


@pytest.mark.slow
@pytest.mark.parametrize(("relative", "bits"), [(1e-3, 0.006), (1e-2, 0.04), (1e-1, 0.22)])
def test_the_whole_file_of_16_million_weights(tmp_path: Path, relative: float, bits: float) -> None:
    W, (A, B) = weights(4096, 4096, dtype=torch.bfloat16), factors(4096, 4096, 16)
    B = B * (relative * W.float().norm() / (B @ A).norm())
    base = write_model(tmp_path / "base", {"x.weight": W}, {"model_type": "llama"})
    loratool.merge(base, write_peft(tmp_path / "adapter", {"x": (A, B)}), tmp_path / "out")
    found = 8 * (tmp_path / "out" / "loratool.undo").stat().st_size / W.numel()
    print(f"\n|D|/|W| {relative:g}: {found:.4f} bits a weight, container included (at most {bits})")
    assert found <= bits
