"""Read ComfyUI's rotated layers by a Hadamard matrix in whole numbers and by comfy-kitchen, merge and restore them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import factors, write_peft
from lib.files.one_weight import codec_of, random_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag
from loratool.files.checkpoint import Checkpoint, open_checkpoint

FOUR = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

Rows = list[list[int]]


def hadamard(size: int) -> Rows:
    """Kronecker products of the matrix of 4."""
    matrix = [[1]]
    while len(matrix) < size:
        matrix = [[a * b for a in above for b in inner] for above in matrix for inner in FOUR]
    return matrix


def marker(**config: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)


def opened(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Checkpoint:
    save_file({**tensors, "x.comfy_quant": marker(**config)}, folder / "base.safetensors")
    return open_checkpoint(folder / "base.safetensors")


def layer(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[dict[str, Tensor], Rows, dict[str, Any]]:
    """The tensors, the codes, and the description of a layer."""
    scale = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4
    if kind == "int8":
        codes = random_bytes(rows, columns, seed=seed).view(torch.int8)
        config = {"format": "int8_tensorwise", "convrot": True, "per_row": True}
        return {"x.weight": codes, "x.weight_scale": scale}, codes.tolist(), config
    codes = random_bytes(rows, columns // 2, seed=seed)
    nibbles = [[each - 16 * (each > 7) for byte in row for each in (byte & 15, byte >> 4)] for row in codes.tolist()]
    config = {"format": "convrot_w4a4", "quant_group_size": 64}
    return {"x.weight": codes.view(torch.int8), "x.weight_scale": scale[:, 0].contiguous()}, nibbles, config


def turned(codes: Rows, scale: Tensor, size: int) -> list[list[float]]:
    matrix, root = hadamard(size), int(size**0.5)
    exact = [Fraction(each) / root for each in scale.flatten().tolist()]
    blocks = [[row[first : first + size] for first in range(0, len(row), size)] for row in codes]
    return [
        [float(by * sum(a * b for a, b in zip(line, block, strict=True))) for block in row for line in matrix]
        for row, by in zip(blocks, exact, strict=True)
    ]


@pytest.mark.parametrize("size", [4, 16, 64, 256])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_numbers_are_exact(kind: str, size: int, tmp_path: Path) -> None:
    tensors, codes, config = layer(kind, 3, 256)
    checkpoint = opened(tmp_path, tensors, **config, convrot_groupsize=size)
    expected = turned(codes, tensors["x.weight_scale"], size)
    assert checkpoint["x.weight"].tolist() == expected
    parts = checkpoint.parts_of("x.weight")
    codec = codec_of(parts)
    codec.check(parts)
    stored = codec.codes(parts, 1, 3)
    assert codec.values(parts, 1, stored).tolist() == expected[1:]
    assert np.array_equal(codec.nearest(parts, 1, np.array(expected[1:])), stored)
    data = tensors["x.weight"].numpy().tobytes()
    for first, piece in codec.places(parts, 1, stored):
        assert data[first : first + len(piece)] == piece


def test_one_scale_and_256_columns_by_default(tmp_path: Path) -> None:
    tensors, codes, config = layer("int8", 2, 512)
    tensors["x.weight_scale"] = torch.tensor(0.5)
    within = {"format": "int8_tensorwise", "params": {"convrot": True}}
    for each in (config, within):
        found = opened(tmp_path, tensors, **each)["x.weight"].tolist()
        assert found == turned(codes, torch.tensor([0.5, 0.5]), 256)


@pytest.mark.parametrize("size", [0, 2, 8, 128, 1024, "256", None, True])
def test_a_rotation_that_does_not_exist_is_refused(size: Any, tmp_path: Path) -> None:
    tensors, _, config = layer("int8", 2, 256)
    checkpoint = opened(tmp_path, tensors, **config, convrot_groupsize=size)
    assert "are rotated together" in checkpoint.faults["x.weight"]


def test_scales_of_other_shapes_are_refused(tmp_path: Path) -> None:
    for kind, scale in (("int8", torch.ones(2, 16)), ("int4", torch.ones(3)), ("int4", torch.ones(2, 4))):
        tensors, _, config = layer(kind, 2, 256)
        assert "x.weight_scale" in opened(tmp_path, {**tensors, "x.weight_scale": scale}, **config).faults["x.weight"]


def write_model(folder: Path, kind: str) -> tuple[Path, Path]:
    tensors, codes, config = layer(kind, 24, 256)
    tensors |= {"y.weight": torch.zeros(8, 256).bfloat16(), "x.bias": torch.ones(24).bfloat16()}
    opened(folder, tensors, **config).close()
    A, B = factors(24, 256, 4)
    size = 0.05 * float(np.abs(turned(codes, tensors["x.weight_scale"], 256)).mean())
    adapter = write_peft(folder / "adapter", {"x": (A * size, B)})
    return folder / "base.safetensors", adapter


@pytest.mark.parametrize("way", ["mixed", "dequantize"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_merge_is_the_exact_sum_rounded_once_and_comes_off(kind: str, way: str, tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path, kind)
    loratool.merge(base, adapter, tmp_path / "out.safetensors", quantized=way)
    pair = load_file(adapter / "adapter_model.safetensors")
    A, B = (next(x for name, x in pair.items() if f"lora_{each}" in name).double() for each in "AB")
    config = json.loads((adapter / "adapter_config.json").read_text())
    W = open_checkpoint(base)["x.weight"]
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["x.weight"], (W + config["lora_alpha"] / config["r"] * B @ A).bfloat16())
    assert out.keys() == {"x.weight", "x.bias", "y.weight"}
    assert loratool.verify(base, adapter, tmp_path / "out.safetensors").status == "proven"
    loratool.unmerge(tmp_path / "out.safetensors", adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_no_number_can_be_rounded_alone(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path, "int8")
    with pytest.raises(InputError, match="runs of numbers"):
        loratool.merge(base, adapter, tmp_path / "out.safetensors", quantized="requantize", allow=["lossy"])


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path, "int4")
    tensors = load_file(base)
    tensors["x.weight_scale"][3] = torch.nan
    save_file(tensors, base)
    with pytest.raises((InputError, NeedsFlag), match="nan or inf"):
        loratool.merge(base, adapter, tmp_path / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64, 256])
def test_numbers_are_those_of_comfy_kitchen(size: int, tmp_path: Path) -> None:
    """int8 in float64, int4 with scales of powers of two, since comfy-kitchen rotates it in float32: both are exact."""
    ck = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    from comfy_kitchen.backends.eager.convrot_w4a4 import dequantize_convrot_w4a4_weight
    from comfy_kitchen.backends.eager.quantization import dequantize_int8_convrot_weight
    from comfy_kitchen.tensor import TensorCoreConvRotW4A4Layout, TensorWiseINT8Layout

    W = torch.randn(40, 512, generator=torch.Generator().manual_seed(2)) * 0.03
    with ck.registry.use_backend("eager"):
        codes, params = TensorWiseINT8Layout.quantize(W, per_channel=True, convrot=True, convrot_groupsize=size)
        state = {f"x.weight{end}": x for end, x in TensorWiseINT8Layout.state_dict_tensors(codes, params).items()}
        config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        known = dequantize_int8_convrot_weight(codes, params.scale.double(), size)
        assert torch.equal(opened(tmp_path, state, **config)["x.weight"], known)
        codes, params = TensorCoreConvRotW4A4Layout.quantize(W, convrot_groupsize=size)
        scale = torch.exp2(torch.log2(params.scale).round())
        known = dequantize_convrot_w4a4_weight(codes, scale, size, output_dtype=torch.float64)
        state = {"x.weight": codes, "x.weight_scale": scale}
        found = opened(tmp_path, state, format="convrot_w4a4", convrot_groupsize=size)["x.weight"]
        assert torch.equal(found, known)


@pytest.mark.slow
def test_4_bits_of_groups_are_those_of_comfy_kitchen(tmp_path: Path) -> None:
    pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    from comfy_kitchen.tensor.awq_w4a16 import TensorCoreAWQW4A16Layout

    codes = random_bytes(24, 64).view(torch.int8)
    scale, zero = (torch.rand(2, 24, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    params = TensorCoreAWQW4A16Layout.Params(
        scale=scale.double(), orig_dtype=torch.float64, orig_shape=(24, 128), zeros=zero.double(), group_size=64
    )
    state = {"x.weight": codes, "x.weight_scale": scale, "x.weight_zeros": zero}
    found = opened(tmp_path, state, format="awq_w4a16")["x.weight"]
    assert torch.equal(found, TensorCoreAWQW4A16Layout.dequantize(codes, params))
