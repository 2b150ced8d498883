"""Measure a merge's cost a small module, its plan apart: pytest -m slow -s tests/benchmarks/test_small_modules.py"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratool

COUNT, SIZE, RANK = 2000, 64, 4
MILLISECONDS = 0.5  # a module, of one core's time
PARTS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def write_model(folder: Path) -> tuple[Path, Path]:
    """Write a bf16 base of small matrices, and an adapter of all."""
    g = torch.Generator().manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    names = [f"model.layers.{k // len(PARTS)}.{PARTS[k % len(PARTS)]}" for k in range(COUNT)]
    weights = {f"{n}.weight": (torch.randn(SIZE, SIZE, generator=g) * 0.05).bfloat16() for n in names}
    sides = {"A": (RANK, SIZE), "B": (SIZE, RANK)}
    factors = {
        f"base_model.model.{n}.lora_{side}.weight": (torch.randn(*shape, generator=g) * 0.1).bfloat16()
        for n in names
        for side, shape in sides.items()
    }
    for path in (base, adapter):
        path.mkdir(parents=True)
    save_file(weights, base / "model.safetensors")
    save_file(factors, adapter / "adapter_model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [p.split(".")[1] for p in PARTS]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


@pytest.mark.slow
def test_the_time_a_module(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path)
    for undo in (False, True):
        for workers in (1, None):
            spent = []
            for _ in range(4):
                times = [time.process_time()]
                for options in ({"dry_run": True, "undo": False}, {"undo": undo}):  # a dry run sizes the undo file
                    loratool.merge(base, adapter, tmp_path / "out", workers=workers, force=True, **options)
                    times.append(time.process_time())
                plan, whole = times[1] - times[0], times[2] - times[1]
                spent.append((whole - plan) * 1000 / COUNT)
            print(f"undo {undo}, workers {workers or 'all'}: {min(spent):.3f} ms a module of {SIZE} x {SIZE}")
            assert min(spent) <= MILLISECONDS
