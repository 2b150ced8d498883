"""Measure what reads headers alone, on checkpoints of the largest models' shapes.

`test_the_work_is_linear` counts Python's own steps; the slow one measures the whole command, Python's start included:
pytest -m slow -s tests/benchmarks/test_header_speed.py
"""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.steps import count_steps
from benchmarks.trillion import MODELS, make_adapter, make_base
from conftest import MEASURED

import loratool

SECONDS = {"deepseek-v3": 2.0, "kimi-k2": 3.0}  # of processor time, for 91,991 and 139,583 tensors
MEGABYTES = 250  # resident at the peak
SMALL = MODELS["tiny"]


def dry_convert(folder: Path) -> object:
    return loratool.convert_model(folder / "base", folder / "converted", dtype="fp32", dry_run=True)


def dry_unmerge(folder: Path) -> object:
    return loratool.unmerge(folder / "merged", folder / "adapter", folder / "unmerged", dry_run=True)


WORK: dict[str, Callable[[Path], object]] = {
    "inspect": lambda folder: loratool.inspect(folder / "base").document(True),
    "convert": dry_convert,
    "unmerge": dry_unmerge,
}


@pytest.mark.parametrize("work", WORK)
def test_the_work_is_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """Twice the layers and shards are twice the steps: a look at all shards or tensors for each would show."""

    def steps(layers: int) -> int:
        folder = tmp_path / str(layers)
        monkeypatch.setitem(MODELS, "tiny", replace(SMALL, num_hidden_layers=layers, shards=layers, n_routed_experts=2))
        make_base(folder / "base", "tiny", "BF16" if work == "unmerge" else "F8_E4M3")
        if work == "unmerge":
            make_adapter(folder / "adapter", "tiny")
            loratool.merge(folder / "base", folder / "adapter", folder / "merged", workers=1)
        return count_steps(lambda: WORK[work](folder))

    steps(1)  # imports, and what is computed once
    few, some, many = (steps(layers) for layers in (3, 6, 12))
    assert many - some < 2.1 * (some - few)


@pytest.mark.slow
@pytest.mark.parametrize("model", SECONDS)
def test_inspecting_the_largest(tmp_path: Path, model: str) -> None:
    make_base(tmp_path / "base", model)
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*MEASURED, "inspect", tmp_path / "base"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    peak = int(done.stderr.split()[-1]) / 1024
    print(f"{model}: {min(spent):.2f} s, {peak:.0f} MB")
    assert min(spent) < SECONDS[model]
    assert peak < MEGABYTES
