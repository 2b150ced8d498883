"""Merge into each format of codes in each way: the exact sum, rounded once; all else as it was; and undone.

The bases are the vectors of fixtures/coded, made by the formats' own software, with plain tensors beside them. The
numbers that codes mean are held to that software in tests/files/codecs/test_vectors.py; here they are the start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, bits, factors, load_model, weights, write_peft
from reference import change_reference, round_reference, to_longdouble
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.files.checkpoint import open_checkpoint
from loratool.files.codecs.codec import CodeFormat

CODED = FIXTURES / "coded"
VECTORS: dict[str, dict[str, Any]] = json.loads((CODED / "index.json").read_text())["vectors"]
# One of each shape of thing: layouts, packings, companions, markers; the others are slow
REPRESENTATIVES = (
    "fp8_blocks ct_fp8_tensor mxfp4_gpt_oss ct_nvfp4 comfy_nvfp4 comfy_scaled_fp8 comfy_float8_metadata bnb_nf4_nested "
    "bnb_int8 gptq_v1_4bit_act_order gptq_v1_3bit awq_gemm ct_pack3_group_asym ct_int8_channel_asym mlx_affine5_64 "
    "torchao_int8 fbgemm_fp8"
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


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x.reshape(-1)), bits(y.reshape(-1)))


def is_nearest(found: Tensor, W: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether bfloat16 numbers are the nearest to W + 2 B A; fractions decide what longdouble does not."""
    guess = round_reference(to_longdouble(W) + change_reference(A, B, 2.0), torch.bfloat16)
    for i, j in np.argwhere((found.view(torch.int16) != guess.view(torch.int16)).numpy()):
        pairs = zip(B[i].tolist(), A[:, j].tolist(), strict=True)
        exact = Fraction(float(W[i, j])) + 2 * sum(Fraction(b) * Fraction(a) for b, a in pairs)
        mine, other = (abs(Fraction(float(x[i, j])) - exact) for x in (found, guess))
        if not (mine < other or (mine == other and int(found.view(torch.int16)[i, j]) % 2 == 0)):
            return False
    return True


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sized(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices whose numbers bfloat16 holds: fixtures have extremes of each format."""
    return {n: W for n, W in numbers.items() if W.dim() == 2 and float(W.abs().max()) < 1e38}


@pytest.mark.parametrize("vector", EACH)
@pytest.mark.parametrize("way", ["mixed", "dequantize"])
def test_what_becomes_plain_is_the_exact_sum_rounded_once_and_comes_off(vector: str, way: str, tmp_path: Path) -> None:
    base = write_base(vector, tmp_path / "base")
    numbers = numbers_of(base)
    adapter, changes = write_adapter(tmp_path / "adapter", sized(numbers))
    loratool.merge(base, adapter, tmp_path / "out", quantized=way)
    out, stored = load_model(tmp_path / "out"), load_model(base)
    for name, pair in changes.items():
        assert out[name].dtype == torch.bfloat16 and is_nearest(out[name], numbers[name], *pair), name
    kept = out.keys() & stored.keys() - changes.keys() - PLAIN.keys()
    assert way == "dequantize" or all(same(out[name], stored[name]) for name in kept)
    if way == "dequantize":
        assert out.keys() - PLAIN.keys() >= numbers.keys()
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert not config.keys() & {"quantization_config", "quantization"}
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


@pytest.mark.parametrize("vector", EACH)
def test_requantized_codes_are_the_nearest_and_come_off(vector: str, tmp_path: Path) -> None:
    base = write_base(vector, tmp_path / "base")
    numbers = numbers_of(base)
    adapter, changes = write_adapter(tmp_path / "adapter", sized(numbers), 3.0)
    report = loratool.merge(base, adapter, tmp_path / "out", quantized="requantize", allow=["lossy"])
    assert files_of(tmp_path / "out").keys() - {"loratool.undo"} == files_of(base).keys()
    stored, out = load_model(base), load_model(tmp_path / "out")
    assert stored.keys() == out.keys()
    found = numbers_of(tmp_path / "out")
    checkpoint = open_checkpoint(base)
    codes = {checkpoint.weights[name].tensors[0] for name in changes}
    assert all(same(out[name], stored[name]) for name in stored.keys() - codes)
    for name, pair in changes.items():
        parts = checkpoint.parts_of(name)
        codec = parts.weight.codec
        assert isinstance(codec, CodeFormat)
        exact = to_longdouble(numbers[name]) + change_reference(*pair, 2.0)
        reached = all_numbers(codec, parts, len(exact))
        distance = np.abs(to_longdouble(found[name]) - exact)
        for numbers_of_a_code in reached:  # no code is nearer
            assert (distance <= np.abs(numbers_of_a_code - exact) * (1 + 1e-12)).all(), name
    checkpoint.close()
    assert {row.name for row in report.tensors} == set(changes) and all(row.kept is not None for row in report.tensors)
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def all_numbers(codec: CodeFormat, parts: Any, rows: int) -> list[np.ndarray]:
    """The numbers that all weights would have with each code in turn; nan is far from all."""
    bits_of_codes = parts.weight.detail.get("bits", codec.bits)
    found = []
    for code in range(1 << bits_of_codes):
        codes = np.full((rows, codec.width(parts)), code, np.uint8).view(codec.code)
        values = codec.values(parts, 0, codes).astype(np.longdouble)
        found.append(np.where(np.isnan(values), np.inf, values))
    return found
