"""Measure the cost of exact rounding and of undo: CPU a weight, hashing apart, and the undo file's size.

pytest -m slow -s tests/benchmarks/test_arithmetic_cost.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import factors, weights, write_model, write_peft

import loratool
from loratool.numerics.decide import Reals
from loratool.numerics.merge import RowMerge
from loratool.numerics.products import Products, Term
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace
from loratool.undo.checks import record_rows
from loratool.undo.records import Recorder

SHAPE = (2048, 5632)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def best_of(works: list[Callable[[], object]], weights: int) -> list[float]:
    """Return the nanoseconds of CPU a weight of each, in turns."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(7):
        for work, times in zip(works, found, strict=True):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return [min(times) / weights * 1e9 for times in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "stored", "scale", "rank", "relative", "merge", "undo"),
    [
        (BF16, FP32, 1.0, 16, 1e-2, 4.5, 4.0),
        (BF16, FP32, 1.0, 64, 1e-2, 3.5, 4.0),
        (BF16, FP32, 1.0, 16, 1e-1, 4.5, 7.5),
        (FP16, FP32, 1.0, 16, 1e-2, 5.0, 5.0),
        (FP32, FP32, 1.0, 16, 1e-2, 8.0, 4.5),
        (FP32, BF16, 1.0, 16, 1e-2, 9.0, 11.0),
        (FP32, BF16, 1 / 3, 16, 1e-2, 13.0, 8.0),
    ],
)
def test_a_merge_beside_a_plain_one(
    base: torch.dtype, stored: torch.dtype, scale: float, rank: int, relative: float, merge: float, undo: float
) -> None:
    """At most `merge` times the CPU of a float32 sum in torch, and `undo` ns a weight more with a record."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    W, (A, B) = weights(*SHAPE, dtype=base), factors(*SHAPE, rank)
    B, A = (B * (relative * W.float().norm() / (B @ A).norm())).to(stored), A.to(stored)
    work, out, step = Workspace(), torch.empty_like(W), record_rows(SHAPE[1])
    before, after = numbers_of(W), numbers_of(out)

    def plain() -> None:
        for row in range(0, len(W), 64):
            here = slice(row, row + 64)
            out[here] = W[here].float().add_(B[here].float() @ A.float(), alpha=scale)

    def merged(record: bool) -> None:
        products = Products([Term(B, A, Fraction(scale))])
        for row in range(0, len(W), step):
            here = slice(row, min(row + step, len(W)))
            rows = RowMerge(Reals(products.rows(here.start, here.stop)), before.form, before.form)
            rows.apply(before[here], 0, after[here], work, Recorder(before.form) if record else None)

    by_torch, ours, recorded = best_of([plain, lambda: merged(False), lambda: merged(True)], W.numel())
    torch.set_num_threads(threads)
    print(
        f"\n{base} base, {stored} factors of rank {rank}, scale {scale:.3g}, |D|/|W| {relative:g}, ns a weight: "
        f"torch {by_torch:.1f}, exact {ours:.1f}, with undo {recorded:.1f}"
    )
    assert ours <= merge * by_torch and recorded - ours <= undo


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
