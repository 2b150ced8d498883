"""Measure the cost of planning a merge a module, for mixtures of experts that consist of headers alone.

`test_the_work_is_linear` counts Python's own steps, which no other load on the machine changes; the times are reported,
and bounded generously, by the slow one: pytest -m slow -s tests/benchmarks/test_planning_speed.py
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from benchmarks.steps import count_steps
from benchmarks.trillion import MODELS, make_adapter, make_base, write_sparse
from conftest import MEASURED

import loratool
from loratool.files.dtypes import TensorSpec

EXPERTS, PARTS = 64, ("gate_proj", "up_proj", "down_proj")
MILLISECONDS = 1.0  # a module, of one core's time, on whatever runs the tests; the aim is 0.1
LARGEST = {"deepseek-v3": (8.0, 600), "kimi-k2": (12.0, 700)}  # seconds of the whole command, and MB at its peak


def modules() -> Iterator[str]:
    numbers = iter(range(10**6))
    for layer in numbers:
        for expert in range(EXPERTS):
            yield from (f"model.layers.{layer}.mlp.experts.{expert}.{part}" for part in PARTS)


def write_mixture(folder: Path, count: int) -> tuple[Path, Path]:
    """Write a base and a PEFT adapter of so many modules, a quarter of which have a rank of their own."""
    names = [name for name, _ in zip(modules(), range(count), strict=False)]
    base, adapter = folder / "base", folder / "adapter"
    for each in (base, adapter):
        each.mkdir(parents=True)
    ranks = {name: 2 if number % 4 == 0 else 1 for number, name in enumerate(names)}
    write_sparse(base / "model.safetensors", {f"{name}.weight": TensorSpec("BF16", (8, 8)) for name in names})
    factors = {f"{n}.lora_A.weight": TensorSpec("F32", (r, 8)) for n, r in ranks.items()}
    factors |= {f"{n}.lora_B.weight": TensorSpec("F32", (8, r)) for n, r in ranks.items()}
    write_sparse(adapter / "adapter_model.safetensors", {f"base_model.model.{n}": s for n, s in factors.items()})
    (base / "config.json").write_text('{"model_type": "qwen3_moe"}')
    own = {name: rank for name, rank in ranks.items() if rank != 1}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": names, "rank_pattern": own}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def plan(folder: Path, undo: bool = True) -> None:
    """Plan the merge of what is in a folder, and make its table."""
    report = loratool.merge(folder / "base", folder / "adapter", folder / "out", dry_run=True, undo=undo, workers=1)
    report.document()


def test_the_work_is_linear(tmp_path: Path) -> None:
    """Twice the modules are twice the steps: one scan of all for each would make the second half cost more."""

    def make(count: int) -> Path:
        write_mixture(tmp_path / str(count), count)
        return tmp_path / str(count)

    plan(make(2))  # imports, and what is computed once
    few, some, many = (count_steps(partial(plan, make(count))) for count in (40, 80, 160))
    assert many - some < 2.1 * (some - few)


@pytest.mark.slow
@pytest.mark.parametrize("undo", [True, False])
def test_the_work_is_linear_in_shards_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undo: bool) -> None:
    """Of DeepSeek-V3's layers: a look at all tensors for each shard, or at all shards for each tensor, would show."""

    def make(layers: int) -> Path:
        sizes = replace(MODELS["tiny"], num_hidden_layers=layers, shards=layers, n_routed_experts=2)
        monkeypatch.setitem(MODELS, "tiny", sizes)
        make_base(tmp_path / str(layers) / "base", "tiny")
        make_adapter(tmp_path / str(layers) / "adapter", "tiny")
        return tmp_path / str(layers)

    plan(make(1), undo)  # imports, and what is computed once
    few, some, many = (count_steps(partial(plan, make(layers), undo)) for layers in (3, 6, 12))
    assert many - some < 2.05 * (some - few)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2000, 10_000, 45_000])
def test_the_time_a_module(tmp_path: Path, count: int) -> None:
    base, adapter = write_mixture(tmp_path, count)
    write_mixture(tmp_path / "first", 2)
    loratool.merge(tmp_path / "first" / "base", tmp_path / "first" / "adapter", tmp_path / "out", dry_run=True)
    started = time.process_time()
    loratool.merge(base, adapter, tmp_path / "out", dry_run=True)
    spent = (time.process_time() - started) * 1000 / count
    print(f"{count} modules: {spent:.3f} ms each")
    assert spent < MILLISECONDS


@pytest.mark.slow
@pytest.mark.parametrize("model", LARGEST)
def test_a_dry_run_over_the_largest(tmp_path: Path, model: str) -> None:
    """All that a merge does before its first byte, on each linear layer; the best of three runs of the command."""
    make_base(tmp_path / "base", model)
    count = make_adapter(tmp_path / "adapter", model)
    call = [
        *MEASURED,
        "merge",
        tmp_path / "base",
        tmp_path / "adapter",
        "-o",
        tmp_path / "out",
        "--dry-run",
        "--no-undo",
    ]
    spent = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        spent.append(time.perf_counter() - started)
    peak = int(done.stderr.split()[-1]) / 1024
    print(f"{model}, {count} modules: {min(spent):.1f} s, {peak:.0f} MB")
    seconds, megabytes = LARGEST[model]
    assert min(spent) < seconds
    assert peak < megabytes
