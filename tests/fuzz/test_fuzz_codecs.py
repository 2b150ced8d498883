"""Hold every codec against configs and companions that lie: bits, groups, scales that are missing or no numbers.

The files are those of fixtures/coded, one of each layout, which the formats' own software wrote.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors
from damages import damaged_bytes
from fuzzing import Case, Fuzzer, Ran
from lies import lie
from safetensors import safe_open
from safetensors.torch import load_file, save

pytestmark = pytest.mark.fuzz

CODED = FIXTURES / "coded"

METHODS = "awq gptq fp8 bitsandbytes compressed-tensors mxfp4 nvfp4 nf4 fp4 affine sym group channel block".split()

WRONG: tuple[Any, ...] = (
    *(None, 0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 33, 64, 128, -1, -4, 0.5, 4.0, 1 << 31, 1 << 40, 1 << 63, 10**400),
    *(True, False, "", "4", "pack-quantized", "float-quantized", "\x1b[31m", "x" * 300, float("nan"), float("inf")),
    *([], [0, 0], [128], [128, 128], [-1, 1], [1 << 62, 1 << 62], [[]], {}, {"group_size": 64, "bits": 4}, *METHODS),
)

ODD = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 1e30, 3e38, 1e-45, 1e-30)

TYPES = ("F32", "F16", "BF16", "F64", "I32", "I64", "U8", "I8", "F8_E4M3", "F8_E5M2", "BOOL", "U32")

KINDS = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I32": torch.int32,
    "I64": torch.int64, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "U32": torch.uint32,
    "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
}  # fmt: skip


@cache
def vectors() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CODED / "index.json").read_text())["vectors"]
    return found


@cache
def stored(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = CODED / vectors()[name]["file"]
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return load_file(path), metadata


@cache
def adapter(name: str) -> dict[str, bytes]:
    """Return an adapter of the first weight that is a matrix."""
    weights = vectors()[name]["weights"]
    shapes = {key.removesuffix(".weight"): each["shape"] for key, each in weights.items() if len(each["shape"]) == 2}
    if not shapes:
        return {}
    module, (rows, columns) = next(iter(shapes.items()))
    A, B = factors(rows, columns, 2)
    tensors = {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    return {
        "adapter/adapter_model.safetensors": save(tensors, {"format": "pt"}),
        "adapter/adapter_config.json": json.dumps(config).encode(),
    }


def odd_number(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of floats with one number, or all, another."""
    found, value = tensor.clone().reshape(-1), rng.choice(ODD)
    made = torch.full_like(found, 1).double() * value if rng.random() < 0.2 else found.double()
    if len(made):
        made[rng.randrange(len(made))] = value
    return made.to(tensor.dtype).reshape(tensor.shape)


def misshapen(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of other rows, columns, dimensions or type."""
    flat, shape = tensor.reshape(-1), list(tensor.shape)
    match rng.randrange(7):
        case 0:
            return flat[: max(0, len(flat) - 1)]
        case 1:
            return flat
        case 2:
            return tensor.reshape(*shape[:-1], 1, *shape[-1:])
        case 3 if shape:
            return tensor[: shape[0] // 2]
        case 4 if shape and len(flat):
            return torch.cat([tensor.view(torch.uint8)] * 2).view(tensor.dtype)
        case 5 if len(shape) > 1:
            return tensor.transpose(0, 1).contiguous()
    size = tensor.numel() * tensor.dtype.itemsize
    kind = KINDS[rng.choice(TYPES)]
    return torch.zeros(size, dtype=torch.uint8)[: size - size % kind.itemsize].view(kind)


def damage_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    """Damage one of the stored tensors."""
    name = rng.choice([*tensors])
    tensor = tensors[name]
    match rng.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = misshapen(rng, tensor)
        case 2:
            other = rng.choice([*tensors])
            tensors[name], tensors[other] = tensors[other], tensors[name]
        case 3:
            tensors[name + rng.choice(("x", "_scale", ".scales", "_inv"))] = tensors.pop(name)
        case _:
            floats = [key for key, each in tensors.items() if each.dtype.is_floating_point and "scale" in key]
            if floats:
                name = rng.choice(floats)
                tensors[name] = odd_number(rng, tensors[name])
            else:
                raw = bytearray(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) or bytearray(1)
                raw[rng.randrange(len(raw))] = rng.randrange(256)
                made = torch.frombuffer(raw, dtype=torch.uint8)[: tensor.nbytes]
                tensors[name] = made.view(tensor.dtype).reshape(tensor.shape)


# Command -> what it writes
COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("inspect", "base"): (),
    ("merge", "base", "adapter", "-o", "out"): ("out",),
    ("merge", "base", "adapter", "-o", "out", "--quantized", "requantize"): ("out",),
    ("merge", "base", "adapter", "-o", "out", "--quantized", "dequantize", "--no-undo"): ("out",),
    ("convert", "base", "--dtype", "fp32", "-o", "out"): ("out",),
    ("convert", "base", "-o", "out"): ("out",),
    ("verify", "base", "adapter", "base"): (),
    ("diff", "base", "base"): (),
    ("extract", "base", "base", "--rank", "1", "-o", "out"): ("out",),
    ("count", "base"): (),
}


def make(rng: random.Random) -> Case:
    name = rng.choice([*vectors()])
    config = {"model_type": "llama", **vectors()[name]["config"]}
    tensors, metadata = stored(name)
    tensors, metadata = dict(tensors), dict(metadata)
    declared = {key: config[key] for key in config if key != "model_type"}
    which = rng.random()
    if declared and which < 0.5:
        for _ in range(rng.choice((1, 1, 2))):
            declared = lie(declared, rng, WRONG) or {"quantization_config": {}}
    elif which < 0.55 and metadata:
        key = rng.choice([*metadata])
        metadata[key] = damaged_bytes(rng, metadata[key].encode()).decode(errors="replace")
    else:
        damage_tensors(rng, tensors)
    if rng.random() < 0.1:
        damage_tensors(rng, tensors or {"x": torch.zeros(1)})
    commands = [each for each in COMMANDS.items() if adapter(name) or "adapter" not in each[0]]
    argv, outputs = rng.choice(commands)
    data = save({key: each.contiguous() for key, each in tensors.items()}, metadata)
    files = {"base/config.json": json.dumps({"model_type": "llama", **declared}).encode()}
    files["base/model.safetensors"] = damaged_bytes(rng, data) if rng.random() < 0.03 else data
    return Case({**files, **(adapter(name) if "adapter" in argv else {})}, argv, outputs)


def is_finite(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Tell of numbers that became nan though none of the stored ones is: a formula was taken that has no meaning."""
    if ran.code or "fp32" not in case.argv:
        return
    before = load_file(work / "base" / "model.safetensors")
    if any(each.dtype.is_floating_point and not each.double().isfinite().all() for each in before.values()):
        return
    for path in (work / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if tensor.isnan().any() and not (before.get(name, tensor).dtype == torch.uint8 and name in before):
                yield f"{name} has nan"


def test_codecs(fuzz: Fuzzer) -> None:
    fuzz(make, 6, is_finite)
