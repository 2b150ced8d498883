"""Write the vectors of fixtures/coded as models, with plain tensors beside their codes, and adapters on them."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, weights, write_peft
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from loratool.files.checkpoint import open_checkpoint

CODED = FIXTURES / "coded"

VECTORS: dict[str, dict[str, Any]] = json.loads((CODED / "index.json").read_text())["vectors"]

# One of each shape of thing: layouts, packings, companions, markers; the others are slow
REPRESENTATIVES = (
    "fp8_blocks ct_fp8_tensor mxfp4_gpt_oss ct_nvfp4 comfy_nvfp4 comfy_scaled_fp8 comfy_float8_metadata bnb_nf4_nested "
    "bnb_int8 gptq_v1_4bit_act_order gptq_v1_3bit awq_gemm ct_pack3_group_asym ct_int8_channel_asym mlx_affine5_64 "
    "torchao_int8 fbgemm_fp8 bitnet hqq_4bit_axis0"
).split()

READ = [name for name in VECTORS if name != "gptq_v1_4bit_wrap"]  # that one is refused by name

EACH = [pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow) for name in READ]

RANK = 3

PLAIN = {"model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8), "model.norm.weight": (8,)}


def write_base(vector: str, folder: Path, **config: Any) -> Path:
    known = VECTORS[vector]
    folder.mkdir(parents=True)
    with safe_open(CODED / known["file"], "pt") as file:
        metadata = dict(file.metadata() or {})
    plain = {name: weights(*shape, seed=seed).bfloat16() for seed, (name, shape) in enumerate(PLAIN.items())}
    save_file(load_file(CODED / known["file"]) | plain, folder / "model.safetensors", metadata=metadata)
    content = {"model_type": "llama", "dtype": "bfloat16", **known["config"], **config}
    for name, side in {"config.json": content, **known.get("side_files", {})}.items():
        (folder / name).write_text(json.dumps(side))
    return folder


def numbers_of(folder: Path) -> dict[str, Tensor]:
    base = open_checkpoint(folder)
    try:
        return {name: base[name] for name in base.weights}
    finally:
        base.close()


Pairs = dict[str, tuple[Tensor, Tensor]]


def write_adapter(folder: Path, numbers: Mapping[str, Tensor], size: float = 0.1) -> tuple[Path, Pairs]:
    """Write a LoRA on each matrix, which adds 2 B A; return A and B of each."""
    made: Pairs = {}
    for seed, (name, W) in enumerate(numbers.items()):
        if W.dim() == 2:
            A, B = factors(*W.shape, RANK, seed=seed)
            scale = size * float(W.abs().median() + 1e-6)
            made[name.removesuffix(".weight")] = A * scale, B
    if not made:
        pytest.skip("all of its weights are stacks of experts, or beyond bfloat16: another test")
    write_peft(folder, made, lora_alpha=2 * RANK)
    return folder, {f"{module}.weight": pair for module, pair in made.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but Mistral's own config, which does not travel with a model."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "params.json"}


def sized(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices whose numbers bfloat16 holds: fixtures have extremes of each format."""
    return {n: W for n, W in numbers.items() if W.dim() == 2 and float(W.abs().max()) < 1e38}


def sources() -> dict[str, Tensor]:
    return load(lzma.decompress((CODED / "source.safetensors.xz").read_bytes()))


LIKE = (
    "fp8_blocks ct_fp8_tensor ct_mxfp4 ct_pack4_group_asym ct_int8_channel bnb_nf4_nested bnb_int8 mlx_affine5_64"
).split()

WRITTEN = ("fp8_blocks", "ct_fp8", "ct_mxfp4", "ct_pack", "ct_int8", "ct_naive", "bnb", "mlx_affine")

FRESH = [
    pytest.param(name, marks=() if name in LIKE else pytest.mark.slow)
    for name in READ
    if name.startswith(WRITTEN) and any("source" in weight for weight in VECTORS[name]["weights"].values())
]


def write_twins(vector: str, folder: Path) -> tuple[Path, Path, Path]:
    """Return an original in bf16, an adapter on it whose change is 0, and what the format's software made of it."""
    known = {name: weight for name, weight in VECTORS[vector]["weights"].items() if "source" in weight}
    quantized = write_base(vector, folder / "quantized")
    checkpoint = open_checkpoint(quantized)
    others = {tensor for name in checkpoint.weights.keys() - known for tensor in checkpoint.weights[name].tensors}
    file = quantized / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n not in others}, file, metadata={"format": "pt"})
    plain = {name: weights(*shape, seed=seed).bfloat16() for seed, (name, shape) in enumerate(PLAIN.items())}
    original = {name: sources()[weight["source"]].reshape(weight["shape"]) for name, weight in known.items()}
    (folder / "original").mkdir()
    save_file(original | plain, folder / "original" / "model.safetensors", metadata={"format": "pt"})
    (folder / "original" / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    made = {}
    for name, W in original.items():
        A, B = factors(*W.shape[-2:], RANK)
        made[name.removesuffix(".weight")] = A, torch.zeros_like(B)
    return folder / "original", write_peft(folder / "adapter", made), quantized
