"""Time resize and diff of adapters of Llama-2-7B's shapes: pytest -m slow -s tests/benchmarks/test_resize_speed.py.

The rival forms B @ A and runs a dense SVD, as kohya's resize_lora.py and peft's convert_to_lora do; that takes hours,
so its time is extrapolated from one matrix of each shape, and said to be.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from test_init_speed import LLAMA_7B
from test_merge_speed import COMMAND, fresh, measure, peak

from loratool.numerics.factored_svd import factored_svd

LAYERS = 32


def write(folder: Path, rank: int, seed: int) -> Path:
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(LAYERS):
        for name, (out, inp) in LLAMA_7B.items():
            key = f"base_model.model.model.layers.{i}.{name}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(rank, inp, generator=g, dtype=torch.float32)
            tensors[f"{key}_B.weight"] = torch.randn(out, rank, generator=g) * torch.arange(1, rank + 1) ** -0.7
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in LLAMA_7B]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("resize")
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
def test_resize_against_the_dense_svd(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    ours = theirs = 0.0
    for out, inp in sorted(set(LLAMA_7B.values())):
        count = LAYERS * list(LLAMA_7B.values()).count((out, inp))
        B, A = torch.randn(out, 64, generator=g), torch.randn(64, inp, generator=g)
        begin = time.perf_counter()
        for _ in range(4):
            factored_svd(B, A).truncated(16)
        ours += (time.perf_counter() - begin) / 4 * count
        begin = time.perf_counter()
        torch.linalg.svd(B @ A, full_matrices=False)
        theirs += (time.perf_counter() - begin) * count
    command = [*COMMAND, "resize", "-q", write(folder / "r64", 64, 0), "--rank", "16", "-o"]
    seconds = measure([*command, fresh(folder / "out")])
    print(
        f"\nresize 7B r 64 -> 16, compute: {ours:.1f} s, dense SVD {theirs:.0f} s (extrapolated): {theirs / ours:.0f} x"
    )
    print(f"the whole command: {seconds:.1f} s, {peak([*command, fresh(folder / 'out')]):.0f} MB")
    assert theirs > 100 * ours


@pytest.mark.slow
def test_diff_of_two_adapters(folder: Path) -> None:
    command = [*COMMAND, "diff", "-q", write(folder / "a", 16, 0), write(folder / "b", 16, 1), "--json"]
    seconds, memory = measure(command), peak(command)
    print(f"\ndiff of two 7B adapters, r 16: {seconds:.1f} s, {memory:.0f} MB")
    assert seconds < 10 and memory < 1000
