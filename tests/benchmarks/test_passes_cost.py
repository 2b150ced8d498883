"""Measure what the compiled passes save: CPU a weight of a block, and CPU of whole commands, each in turns with a run
without them.

pytest -m slow -s tests/benchmarks/test_passes_cost.py
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import factors, needs_passes, weights

from loratool.numerics.arrays import Numbers
from loratool.numerics.decide import Reals
from loratool.numerics.merge import RowMerge
from loratool.numerics.norms import magnitude_ratio
from loratool.numerics.passes.native import NATIVE
from loratool.numerics.products import Products, Term
from loratool.numerics.tensors import numbers_of
from loratool.numerics.workspace import Workspace
from loratool.streaming.threads import one_thread
from loratool.undo.records import RecordedBlock, Recorder, Restorer

sys.path.insert(0, str(Path(__file__).parent))
from models import make
from test_merge_speed import cpu_of_children

pytestmark = [pytest.mark.slow, needs_passes]
SHAPE = (1024, 2048)
TURNS = 9
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def in_turns(work: Callable[[], object], patch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Return the least ns of CPU a weight without the passes, and with them."""
    found: dict[str, list[float]] = {"0": [], "1": []}
    with one_thread():
        for _ in range(TURNS):
            for native, times in found.items():
                patch.setenv(NATIVE, native)
                start = time.thread_time()
                work()
                times.append(time.thread_time() - start)
    without, with_passes = (min(times) / SHAPE[0] / SHAPE[1] * 1e9 for times in found.values())
    return without, with_passes


@pytest.mark.parametrize(
    ("dtype", "rank", "plain", "undo"),
    [
        (BF16, 16, 0.6, 0.52),
        (BF16, 64, 0.62, 0.52),
        (FP16, 16, 0.6, 0.6),
        (FP16, 64, 0.5, 0.32),
        (FP32, 16, 0.6, 0.58),
        (FP32, 64, 0.66, 0.66),
    ],
)
def test_blocks(dtype: torch.dtype, rank: int, plain: float, undo: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of W's type, |D| about a tenth of |W|; their preparation and sums are included."""
    W, (A, B) = weights(*SHAPE, dtype=dtype), factors(*SHAPE, rank)
    B, A = (B * (0.09 * W.float().norm() / (B @ A).norm())).to(dtype), A.to(dtype)
    work, base = Workspace(), numbers_of(W)
    form = base.form
    out, back = Numbers.empty(form, *SHAPE), Numbers.empty(form, *SHAPE)

    def merged(record: bool) -> RecordedBlock | None:
        x = Reals(Products([Term(B, A, Fraction(1))]).rows(0, len(W)))
        recorder = Recorder(form) if record else None
        stats = RowMerge(x, form, form).apply(base, 0, out, work, recorder)
        return recorder.result(stats, out) if recorder else None

    record = merged(True)
    assert record
    payload = record.payload
    assert isinstance(payload, bytes)

    def restored() -> None:
        restorer = Restorer("x", form, payload, record.sum)
        restorer.block(out, Reals(Products([Term(B, A, Fraction(1))]).rows(0, len(W))), back, work)
        restorer.check(out)

    lines = []
    for name, limit, call in (
        ("merge", plain, lambda: merged(False)),
        ("merge with undo", undo, lambda: merged(True)),
        ("restore", 0.66, restored),
    ):
        without, with_passes = in_turns(call, monkeypatch)
        lines.append((name, without, with_passes, with_passes / without, limit))
    for name, without, with_passes, ratio, limit in lines:
        print(
            f"\n{dtype} rank {rank}, {name}: {without:.2f} -> {with_passes:.2f} ns, {ratio:.2f} (at most {limit})",
            end="",
        )
    assert np.array_equal(back.bits, base.bits)
    assert all(ratio <= limit for *_, ratio, limit in lines)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize(("base", "to"), [*permutations((BF16, FP16, FP32), 2)])
def test_casts(base: torch.dtype, to: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of factors of W's type, those in bf16 and fp16 have exact sums in float64, and many ties."""
    W, (A, B) = weights(*SHAPE, dtype=base), factors(*SHAPE, rank)
    B, A = (B * (0.09 * W.float().norm() / (B @ A).norm())).to(base), A.to(base)
    work, start, out = Workspace(), numbers_of(W), numbers_of(torch.empty_like(W, dtype=to))

    def merged() -> None:
        x = Reals(Products([Term(B, A, Fraction(1))]).rows(0, len(W)))
        RowMerge(x, start.form, out.form).apply(start, 0, out, work)

    without, with_passes = in_turns(merged, monkeypatch)
    print(f"\n{base} to {to} rank {rank}: {without:.2f} -> {with_passes:.2f} ns, {with_passes / without:.2f}", end="")
    assert with_passes <= 0.66 * without


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("is_dora", [True, False])
def test_dora_and_small_modules(is_dora: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block under DoRA, its norms known, and 512 modules of 64 x 64 in one block."""
    matrices, rows, n = (1, *SHAPE) if is_dora else (512, 512 * 64, 64)
    W, (A, B) = weights(rows, n, dtype=dtype), factors(rows, n * matrices, 8)
    term = Term(B.to(dtype), A.to(dtype), Fraction(1, 20), by_rows=is_dora)
    norms = np.linspace(1.0, 1.1, rows)
    ratio, factor = magnitude_ratio(torch.ones(rows), norms, 1.0, 0) if is_dora else (None, None)
    work, base = Workspace(), numbers_of(W)
    out = Numbers.empty(base.form, *base.shape)

    def merged(record: bool) -> None:
        x = Reals(Products([term], matrices).rows(0, rows, ratio), factor)
        recorder = Recorder(base.form, matrices=matrices) if record else None
        stats = RowMerge(x, base.form, base.form).apply_each(base, 0, out, work, recorder)
        if recorder:
            recorder.results(stats, out)

    ratios = []
    for name, record in (("merge", False), ("merge with undo", True)):
        without, with_passes = in_turns(partial(merged, record), monkeypatch)
        ratios.append(with_passes / without)
        kind = "DoRA" if is_dora else "small modules"
        print(f"\n{dtype} {kind}, {name}: {without:.2f} -> {with_passes:.2f} ns, {ratios[-1]:.2f}", end="")
    assert max(ratios) <= 0.66


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("models")
    make(root / "small", "small")
    yield root
    shutil.rmtree(root)


def cpu_of(native: str, *arguments: object) -> float:
    """Return the CPU seconds of a command."""

    before = cpu_of_children()
    command = [sys.executable, "-c", "from loratool.cli import main; main()", *map(str, arguments), "-q"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, NATIVE: native})
    return cpu_of_children() - before


def test_whole_commands(models: Path) -> None:
    """0.6 GB in bf16; of each CPU the start is taken off, which is what a plan costs. Outputs are new each time."""
    base, adapter = models / "small" / "base", models / "small" / "adapter"
    out, back, plain = models / "out", models / "back", models / "plain"
    start = min(cpu_of("1", "merge", base, adapter, "-o", out, "--dry-run") for _ in range(3))
    calls: dict[str, tuple[float, Path | None, tuple[object, ...]]] = {
        "merge": (0.56, out, ("merge", base, adapter, "-o", out)),
        "unmerge": (0.56, back, ("unmerge", out, adapter, "-o", back)),
        "verify": (0.7, None, ("verify", base, adapter, out)),
        "merge --no-undo": (0.65, plain, ("merge", base, adapter, "-o", plain, "--no-undo")),
    }
    over = []
    for name, (limit, made, call) in calls.items():

        def cpu(native: str, made: Path | None = made, call: tuple[object, ...] = call) -> float:
            if made:
                shutil.rmtree(made, ignore_errors=True)
            return cpu_of(native, *call) - start

        pairs = [(cpu("0"), cpu("1")) for _ in range(5)]
        ratio = statistics.median(with_passes / without for without, with_passes in pairs)
        without, with_passes = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"\n{name}: {start:.2f} s and {without:.2f} -> {with_passes:.2f} s, {ratio:.2f} (at most {limit})", end=""
        )
        over.append(ratio - limit)
    assert max(over) <= 0
