"""Time init against peft: pytest -m slow -s tests/benchmarks/test_init_speed.py.

PiSSA of random weights is the worst case for an iteration: their spectrum is flat. Our time is that of the whole
command, the residual base written and measured; peft's is its initialization alone, of layers that are in memory.
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
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from models import adapted, make
from test_merge_speed import COMMAND, fresh, measure, peak

from loratool.files.containers.safetensors_file import build_header
from loratool.files.dtypes import TensorSpec

RANK = 16
LLAMA_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("init")
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
def test_lora_for_a_7b_model_reads_headers_alone(folder: Path) -> None:
    specs = {
        f"model.layers.{i}.{name}.weight": TensorSpec("BF16", shape)
        for i in range(32)
        for name, shape in LLAMA_7B.items()
    }
    header, _ = build_header(specs, sorted(specs), {"format": "pt"})
    base = folder / "7b"
    base.mkdir()
    with open(base / "model.safetensors", "wb") as file:  # a file of holes
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    command = [*COMMAND, "init", "-q", base, "--rank", "16", "-o", fresh(folder / "adapter")]
    seconds, memory = measure(command), peak([*command[:-1], fresh(folder / "adapter")])
    print(f"\ninit lora, all linear layers of 7B, rank 16: {seconds:.1f} s, {memory:.0f} MB")
    assert seconds < 8 and memory < 400


@pytest.mark.slow
def test_pissa_against_peft(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    make(folder / "small", "small")
    base = folder / "small" / "base"
    weights = {n: t for file in sorted(base.glob("*.safetensors")) for n, t in load_file(file).items()}
    layers = torch.nn.ModuleDict()
    for name in adapted("small"):
        layer = torch.nn.Linear(*reversed(weights[name].shape), bias=False, dtype=torch.bfloat16, device="meta")
        layer.weight = torch.nn.Parameter(weights.pop(name), requires_grad=False)
        layers[name.removesuffix(".weight").replace(".", "_")] = layer
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="pissa", target_modules=list(layers))
    outputs = ["--residual", folder / "residual", "-o", folder / "pissa"]
    command = [*COMMAND, "init", "-q", base, "--method", "pissa", "--rank", str(RANK), *outputs]
    ours = []
    for _ in range(3):
        for output in outputs[1::2]:
            fresh(output)
        ours.append(measure(command))
    begin = time.perf_counter()
    wrapped = get_peft_model(layers, config)
    theirs = time.perf_counter() - begin
    found = load_file(folder / "pissa" / "adapter_model.safetensors")
    lost = []
    for name in adapted("small"):
        module = name.removesuffix(".weight")
        A, B = (found[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        layer = getattr(wrapped.base_model.model, module.replace(".", "_"))
        best = float((layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()).square().sum())
        lost.append(1 - float((B @ A).square().sum()) / best)
    print(f"\ninit pissa, 0.6 GB: {sorted(ours)[1]:.1f} s; peft: {theirs:.1f} s; energy lost {max(lost):.1e} at worst")
    assert sorted(ours)[1] * 5 < theirs and max(lost) < 1e-4
