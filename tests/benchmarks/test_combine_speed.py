"""Time combine of three adapters of Llama-2-7B's shapes: pytest -m slow -s tests/benchmarks/test_combine_speed.py.

The rival is peft's `ties_svd`, which forms the changes and runs a dense SVD. That takes hours, so its time is
extrapolated from one matrix, and said to be. mergekit merges whole models and has nothing for adapters. Seconds of CPU
are compared, on all cores together.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent))
from test_init_speed import LLAMA_7B
from test_merge_speed import COMMAND, cpu_of_children, fresh, measure, peak
from test_resize_speed import LAYERS, write

SAMPLE = 4096  # rows and columns of the matrix that peft combines


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    root = tmp_path_factory.mktemp("combine")
    yield [write(root / str(seed), 16, seed) for seed in range(3)]
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["cat", "tsv", "core-ties", "ties --rank 16"])
def test_three_adapters_of_a_7b_model(options: str, adapters: list[Path]) -> None:
    out = adapters[0].parent / "out"
    command = [*COMMAND, "combine", "-q", *adapters, "--method", *options.split(), "-o"]
    used = -cpu_of_children()
    seconds = measure([*command, fresh(out)])
    used += cpu_of_children()
    memory = peak([*command, fresh(out)])
    print(f"\ncombine of three 7B adapters, r 16, by {options}: {seconds:.1f} s, {used:.1f} s of CPU, {memory:.0f} MB")
    assert used < 15 and memory < 1000


@pytest.mark.slow
def test_against_pefts_ties_svd() -> None:
    model = get_peft_model(
        torch.nn.ModuleDict({"q": torch.nn.Linear(SAMPLE, SAMPLE, bias=False)}),
        LoraConfig(r=16, lora_alpha=16, target_modules=["q"], init_lora_weights=False),
        adapter_name="0",
    )
    for name in ("1", "2"):
        model.add_adapter(name, model.peft_config["0"])
    begin = time.process_time()
    model.add_weighted_adapter(["0", "1", "2"], [1.0] * 3, "ties", "ties_svd", svd_rank=48, density=0.5)
    seconds = time.process_time() - begin
    work = sum(out * inp * min(out, inp) for out, inp in LLAMA_7B.values()) / SAMPLE**3
    print(f"\npeft's ties_svd: {seconds:.0f} s of CPU a matrix, {seconds * work * LAYERS:.0f} s for 7B (extrapolated)")
