"""Hold merges in the memory of a GPU to those on the CPU: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, weights, write_peft
from safetensors.torch import load_file, save_file

import loratool

pytestmark = pytest.mark.gpu

SHAPES = {"layers.0": (96, 64), "layers.1": (2100, 2048)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", ["sum", "sha256"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_the_cpu(dtype: torch.dtype, dora: bool, check: Any, tmp_path: Path) -> None:
    here = {f"{name}.weight": weights(*shape).to(dtype) for name, shape in SHAPES.items()}
    there = {name: x.cuda() for name, x in here.items()}
    before, places = {n: x.clone() for n, x in here.items()}, {n: x.data_ptr() for n, x in there.items()}
    folders = []
    for seed in range(2):
        modules = {name: factors(*shape, 4, seed=seed) for name, shape in SHAPES.items()}
        folders.append(write_peft(tmp_path / str(seed), modules, use_dora=dora))
        if dora:
            file = folders[-1] / "adapter_model.safetensors"
            prefix, own = "base_model.model.", load_file(file)
            for name in SHAPES:
                norms = before[f"{name}.weight"].float().norm(dim=1)
                own[f"{prefix}{name}.lora_magnitude_vector"] = norms * 1.1
            save_file(own, file)
    lives = [loratool.live.merge(model, folders[0], check=check) for model in (here, there)]
    assert all(torch.equal(there[n].cpu(), x) for n, x in here.items())
    for live in lives:
        live.swap(folders[1])
    assert all(torch.equal(there[n].cpu(), x) for n, x in here.items())
    for live in lives:
        live.unmerge()
    assert all(torch.equal(there[n].cpu(), x) and torch.equal(here[n], x) for n, x in before.items())
    assert places == {n: x.data_ptr() for n, x in there.items()}
