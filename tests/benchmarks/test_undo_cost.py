"""What undo costs: CPU a weight, hashing apart, and the size of the whole file. pytest -m slow -s tests/benchmarks"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import factors, weights, write_model, write_peft

import loratool
from loratool.numerics.exact import ExactProduct, Factors, Workspace, apply_rounded
from loratool.undo_records import CELL_COLUMNS, Recorder

CPU = torch.device("cpu")


def best_of(work: Callable[[], object], weights: int) -> float:
    """Nanoseconds of CPU a weight."""
    found = []
    for _ in range(9):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found) / weights * 1e9


@pytest.mark.slow
@pytest.mark.parametrize(("relative", "bound"), [(1e-2, 2.5), (1e-1, 5.0)])
def test_the_encoder(relative: float, bound: float) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    W, (A, B) = weights(512, 4096, dtype=torch.bfloat16), factors(512, 4096, 16)
    B = B * (relative * W.float().norm() / (B @ A).norm())
    product, work, out = ExactProduct([Factors(B, 1.0, A.double())]), Workspace(CPU), torch.empty_like(W)
    fill, recorder = product.fill(product.left(0, 512)), Recorder(W.dtype)

    def recorded() -> None:
        apply_rounded(W, fill, out, work, recorder.witness, CELL_COLUMNS)
        recorder._parts.clear()

    plain = best_of(lambda: apply_rounded(W, fill, out, work, None, CELL_COLUMNS), W.numel())
    undo = best_of(recorded, W.numel()) - plain
    torch.set_num_threads(threads)
    print(f"\n|D|/|W| {relative:g}: undo {undo:.1f} ns a weight (at most {bound}), the exact sum {plain:.1f}")
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
