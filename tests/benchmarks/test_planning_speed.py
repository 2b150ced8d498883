"""Measure the cost of planning a merge a module, for mixtures of experts that consist of headers alone.

`test_the_work_is_linear` counts Python's own steps, which no other load on the machine changes; the times are reported,
and bounded generously, by the slow one: pytest -m slow -s tests/benchmarks/test_planning_speed.py
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
from benchmarks.steps import count_steps

import loratool

SIZES = {"BF16": 2, "F32": 4}
EXPERTS, PARTS = 64, ("gate_proj", "up_proj", "down_proj")
MILLISECONDS = 1.0  # a module, of one core's time, on whatever runs the tests; the aim is 0.1


def write_sparse(path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file of zeros that takes the disk no more than its header."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


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
    write_sparse(base / "model.safetensors", {f"{name}.weight": ("BF16", (8, 8)) for name in names})
    factors = {f"{n}.lora_A.weight": ("F32", (r, 8)) for n, r in ranks.items()}
    factors |= {f"{n}.lora_B.weight": ("F32", (8, r)) for n, r in ranks.items()}
    write_sparse(adapter / "adapter_model.safetensors", {f"base_model.model.{n}": s for n, s in factors.items()})
    (base / "config.json").write_text('{"model_type": "qwen3_moe"}')
    own = {name: rank for name, rank in ranks.items() if rank != 1}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": names, "rank_pattern": own}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def steps(folder: Path, count: int) -> int:
    """Count the bytecode instructions that planning takes."""
    base, adapter = write_mixture(folder / str(count), count)
    return count_steps(lambda: loratool.merge(base, adapter, folder / "out", dry_run=True))


def test_the_work_is_linear(tmp_path: Path) -> None:
    """Twice the modules are twice the steps: one scan of all for each would make the second half cost more."""
    steps(tmp_path, 2)  # imports, and what is computed once
    few, some, many = (steps(tmp_path, count) for count in (40, 80, 160))
    assert many - some < 2.1 * (some - few)


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
