"""Read ComfyUI's quantized layers, by the tensor or the metadata that describes them, and refuse other formats."""

from __future__ import annotations

import json
import lzma
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, factors, few, write_peft
from safetensors.torch import load, save_file
from torch import Tensor

import loratool
from loratool import InputError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.codec import CodeFormat, Parts

E4M3 = torch.float8_e4m3fn
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # which an older torch does not have
CODED = FIXTURES / "coded"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
PREFIX = "model.diffusion_model.blocks.0"


def marker(**config: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)


def opened(folder: Path, tensors: dict[str, Tensor], layers: dict[str, Any] | None = None) -> Checkpoint:
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if layers else None
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return open_checkpoint(path)


def codec_of(parts: Parts) -> CodeFormat:
    assert isinstance(parts.weight.codec, CodeFormat)
    return parts.weight.codec


def tiled(grid: Tensor) -> Tensor:
    """A grid of scales as it is stored: the place of each by the formula of cuBLAS' documentation."""
    rows, columns = grid.shape
    across, padded = -(-columns // 4), -(-rows // 128) * 128
    flat = torch.zeros(padded * across * 4, dtype=grid.dtype)
    for r in range(rows):
        for c in range(columns):
            place = (r // 128 * across + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
            flat[place] = grid[r, c]
    return flat.reshape(padded, across * 4)


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(4), dtype=torch.int32).byte()


def no_nan(codes: Tensor) -> Tensor:
    return torch.where(codes % 128 == 127, codes - 1, codes)


def test_the_places_of_tiled_scales() -> None:
    grid = torch.arange(129 * 8, dtype=torch.int32).reshape(129, 8)
    flat = tiled(grid).flatten()
    known = {(0, 0): 0, (1, 0): 16, (32, 0): 4, (0, 4): 512, (127, 7): 1023, (128, 0): 1024}
    assert all(flat[place] == grid[cell] for cell, place in known.items())


def nvfp4(rows: int, columns: int) -> tuple[dict[str, Tensor], np.ndarray]:
    codes, scales = random_bytes(rows, columns // 2), no_nan(random_bytes(rows, columns // 16, low=1, high=127))
    whole = torch.tensor(0.0123)
    expected = np.empty((rows, columns))
    numbers = scales.view(E4M3).double()
    for i in range(rows):
        for j in range(columns):
            code = int(codes[i, j // 2]) >> (0 if j % 2 else 4) & 15
            size = Fraction(E2M1[code % 8]) * Fraction(float(numbers[i, j // 16])) * Fraction(float(whole))
            expected[i, j] = -size if code > 7 else size
    state = {"x.weight": codes, "x.weight_scale": tiled(scales), "x.weight_scale_2": whole}
    return state, expected


def mxfp8(rows: int, columns: int) -> tuple[dict[str, Tensor], np.ndarray]:
    codes, scales = no_nan(random_bytes(rows, columns)), random_bytes(rows, columns // 32, high=255)
    spread = 2.0 ** (scales.double() - 127).repeat_interleave(32, 1)
    return {"x.weight": codes.view(E4M3), "x.weight_scale": tiled(scales)}, (codes.view(E4M3).double() * spread).numpy()


TILED = {
    "nvfp4 of a row": ("nvfp4", nvfp4(1, 16), {"x.weight_scale": E4M3}),
    "nvfp4 of tiles": ("nvfp4", nvfp4(150, 144), {"x.weight_scale": E4M3, "x.weight_scale_2": torch.float32}),
    "nvfp4 with bytes": ("nvfp4", nvfp4(128, 64), {}),
    "mxfp8": ("mxfp8", mxfp8(300, 160), {"x.weight_scale": E8M0}),
    "mxfp8 with bytes": ("mxfp8", mxfp8(32, 32), {}),
}


@pytest.mark.parametrize("what", TILED)
def test_layers_with_tiled_scales(what: str, tmp_path: Path) -> None:
    kind, (state, expected), views = TILED[what]
    state = {name: tensor.view(views[name]) if name in views else tensor for name, tensor in state.items()}
    checkpoint = opened(tmp_path, {**state, "x.comfy_quant": marker(format=kind), "x.bias": torch.ones(3)})
    assert np.array_equal(checkpoint["x.weight"].numpy(), expected)
    assert checkpoint.specs.keys() == {"x.weight", "x.bias"} and not checkpoint.faults
    parts = checkpoint.parts_of("x.weight")
    codec, rows = codec_of(parts), len(expected)
    codec.check(parts)
    stored = state["x.weight"].view(torch.uint8).numpy().tobytes()
    for start, stop in np.sort(np.random.default_rng(5).integers(0, rows + 1, (8, 2))).tolist():
        if start < stop:
            codes = codec.codes(parts, start, stop)
            assert np.array_equal(codec.values(parts, start, codes), expected[start:stop])
            again = codec.nearest(parts, start, expected[start:stop])
            assert np.array_equal(codec.values(parts, start, again), expected[start:stop])
            assert ((again == codes) | (expected[start:stop] == 0)).all()
            for first, data in codec.places(parts, start, codes):
                assert stored[first : first + len(data)] == data


def test_the_metadata_describe_layers(tmp_path: Path) -> None:
    """They count before the tensor, as ComfyUI writes them over it."""
    state, expected = nvfp4(16, 32)
    state["x.weight_scale"] = state["x.weight_scale"].view(E4M3)
    for layers, beside in (
        ({"x": {"format": "nvfp4"}}, {}),
        ({"x": {"format": "nvfp4"}}, {"x.comfy_quant": marker(format="mxfp8")}),
        ({"y": {"format": "mxfp8"}}, {"x.comfy_quant": marker(format="nvfp4")}),
    ):
        assert np.array_equal(opened(tmp_path, {**state, **beside}, layers)["x.weight"].numpy(), expected)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([[0.25], [3.0], [7.0]])], ids=["one", "rows"])
def test_integers(scale: Tensor, tmp_path: Path) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16)[: 3 * 85].reshape(3, 85).to(torch.int8)
    state = {"x.weight": codes, "x.weight_scale": scale, "x.comfy_quant": marker(format="int8_tensorwise")}
    checkpoint = opened(tmp_path, state)
    assert torch.equal(checkpoint["x.weight"], codes.double() * scale.double())
    parts = checkpoint.parts_of("x.weight")
    assert np.array_equal(codec_of(parts).nearest(parts, 0, checkpoint["x.weight"].numpy()), codes.numpy())


def test_4_bits_with_scales_and_zero_points_of_groups(tmp_path: Path) -> None:
    """Stored (groups, rows); the first code is in the low nibble, and 8 is 0."""
    scale, zero = torch.tensor([[0.5, 2.0], [1.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    codes = torch.tensor([[0x98, 0x0F], [0x98, 0x0F]], dtype=torch.uint8)
    state = {"x.weight": codes.view(torch.int8), "x.weight_scale": scale, "x.weight_zeros": zero}
    checkpoint = opened(tmp_path, {**state, "x.comfy_quant": marker(format="awq_w4a16")})
    assert checkpoint["x.weight"].tolist() == [[1.0, 1.5, 7.0, -8.0], [0.0, 2.0, 27.0, -33.0]]
    assert checkpoint.weights["x.weight"].kind == "comfy-awq"
    for damage in ({"x.weight_zeros": zero[:1]}, {"x.weight_scale": scale.T[:1]}):
        assert "x.weight" in opened(tmp_path, {**state, **damage, "x.comfy_quant": marker(format="awq_w4a16")}).faults


@pytest.mark.parametrize("way", few(["mixed", "dequantize", "requantize"], "mixed"))
def test_4_bits_of_groups_are_merged_and_come_back(way: str, tmp_path: Path) -> None:
    """Codes are decoded, and the nearest code is chosen among all 16, here by the formula's own words."""
    codes, g = random_bytes(24, 64), torch.Generator().manual_seed(1)
    scale, zero = (torch.rand(2, 2, 24, generator=g) * 0.02 + 0.001).bfloat16()
    state = {"x.weight": codes.view(torch.int8), "x.weight_scale": scale, "x.weight_zeros": zero}
    state |= {"x.bias": torch.ones(24).bfloat16(), "x.comfy_quant": marker(format="awq_w4a16")}
    opened(tmp_path, state).close()
    base, A_and_B = tmp_path / "model.safetensors", factors(24, 128, 4)
    adapter = write_peft(tmp_path / "adapter", {"x": A_and_B})
    options: dict[str, Any] = {"quantized": way, "allow": ["lossy"] if way == "requantize" else []}
    loratool.merge(base, adapter, tmp_path / "out.safetensors", **options)
    nibbles = torch.stack([codes & 15, codes >> 4], 2).flatten(1).double()  # (24, 128)
    by, plus = (x.double().repeat_interleave(64, 0).T for x in (scale, zero))
    A, B = (x.double() for x in A_and_B)
    exact = (nibbles - 8) * by + plus + B @ A
    out = load((tmp_path / "out.safetensors").read_bytes())
    if way == "requantize":
        levels = (torch.arange(16) - 8) * by.unsqueeze(2) + plus.unsqueeze(2)
        nearest = (levels - exact.unsqueeze(2)).abs().argmin(2).byte()
        assert torch.equal(out["x.weight"].view(torch.uint8), nearest[:, ::2] | nearest[:, 1::2] << 4)
        assert all(torch.equal(out[name], state[name]) for name in state if name != "x.weight")
    else:
        assert torch.equal(out["x.weight"], exact.bfloat16()) and out.keys() == {"x.weight", "x.bias"}
    assert loratool.verify(base, adapter, tmp_path / "out.safetensors").ok
    loratool.unmerge(tmp_path / "out.safetensors", adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("kind", ["comfy_float8", "comfy_float8_metadata", "comfy_scaled_fp8"])
def test_float8_in_three_ways(kind: str) -> None:
    """By a tensor, by the metadata, and by the old names; the dummy scale of a 16-bit weight stays what it is."""
    checkpoint = open_checkpoint(CODED / f"{kind}.safetensors")
    expected = load(lzma.decompress((CODED / "expected.safetensors.xz").read_bytes()))
    names = [f"{PREFIX}.{layer}.weight" for layer in ("attn.q", "ffn", "out")]
    for name in names:
        assert np.allclose(checkpoint[name], expected[f"{kind}/{name}"].double(), rtol=2**-24, atol=0)
        assert checkpoint.weights[name].codec.key == "fp8"
    left = {name.rpartition(".")[2] for name in checkpoint.specs.keys() - set(names)}
    assert left == ({"scaled_fp8", "weight", "scale_weight"} if kind == "comfy_scaled_fp8" else set())


@pytest.mark.parametrize(
    ("kind", "layers"), [("comfy_nvfp4", "attn.q attn.k ffn by_hand"), ("comfy_mxfp8", "attn.k ffn")]
)
def test_padded_layers_are_what_the_software_reads_with_zeros_around(kind: str, layers: str) -> None:
    checkpoint = open_checkpoint(CODED / f"{kind}.safetensors")
    expected = load(lzma.decompress((CODED / "expected.safetensors.xz").read_bytes()))
    for layer in layers.split():
        name = f"{PREFIX}.{layer}.weight"
        found, known = checkpoint[name].numpy(), expected[f"{kind}/{name}"].double().numpy()
        rows, columns = known.shape
        assert np.allclose(found[:rows, :columns], known, rtol=3e-7, atol=1e-38)
        assert not found[rows:].any() and not found[:, columns:].any()


NVFP4 = nvfp4(16, 32)[0] | {"x.weight_scale": nvfp4(16, 32)[0]["x.weight_scale"].view(E4M3)}
MXFP8 = mxfp8(32, 32)[0]
INT8 = {"x.weight": torch.ones(4, 256, dtype=torch.int8), "x.weight_scale": torch.ones(4, 1)}

REFUSED = {
    "rotated in another way": (INT8, {"format": "asym_w4a8_int8", "convrot_groupsize": 256}),
    "rotated mxfp8": (MXFP8, {"format": "mxfp8", "convrot": True}),
    "no format": (INT8, {"convrot": False}),
    "another type": (INT8, {"format": "float8_e4m3fn"}),
    "float8 of another type": (MXFP8, {"format": "float8_e5m2"}),
    "a list": (INT8, {"format": ["int8_tensorwise"]}),
}


@pytest.mark.parametrize("listed", [False, True], ids=["tensor", "metadata"])
@pytest.mark.parametrize("what", REFUSED)
def test_other_formats_are_refused_by_name(what: str, listed: bool, tmp_path: Path) -> None:
    state, config = REFUSED[what]
    beside = {} if listed else {"x.comfy_quant": marker(**config)}
    checkpoint = opened(tmp_path, {**state, **beside}, {"x": config} if listed else None)
    assert "x.weight" not in checkpoint.weights and not checkpoint.faults
    assert "x.weight" in checkpoint.coded


def test_a_vector_is_no_layer(tmp_path: Path) -> None:
    state = {"x.weight": INT8["x.weight"][0], "x.comfy_quant": marker(format="int8_tensorwise")}
    checkpoint = opened(tmp_path, state)
    assert not checkpoint.weights and not checkpoint.faults and "x.weight" in checkpoint.coded


BROKEN = {
    "no scales": ({"x.weight": NVFP4["x.weight"]}, "nvfp4", "x.weight_scale is missing"),
    "no scale of all": ({k: v for k, v in NVFP4.items() if k[-1] != "2"}, "nvfp4", "x.weight_scale_2 is missing"),
    "scales in rows": (
        {**NVFP4, "x.weight_scale": torch.ones(16, 2).to(E4M3)},
        "nvfp4",
        "x.weight_scale has the shape",
    ),
    "scales of a type": ({**NVFP4, "x.weight_scale": torch.ones(128, 4)}, "nvfp4", "x.weight_scale is F32"),
    "parts of groups": ({**MXFP8, "x.weight": torch.ones(32, 48).to(E4M3)}, "mxfp8", "48 columns"),
    "a stack of nvfp4": ({**NVFP4, "x.weight": NVFP4["x.weight"][None]}, "nvfp4", "not that of a matrix"),
    "a stack": ({**MXFP8, "x.weight": torch.ones(2, 32, 32).to(E4M3)}, "mxfp8", "shape"),
    "integers": ({**INT8, "x.weight_scale": torch.ones(3)}, "int8_tensorwise", "x.weight_scale has the shape"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(what: str, tmp_path: Path) -> None:
    state, kind, message = BROKEN[what]
    checkpoint = opened(tmp_path, {**state, "x.comfy_quant": marker(format=kind)})
    assert "x.weight" not in checkpoint.weights and message in checkpoint.faults["x.weight"]


@pytest.mark.parametrize(
    ("kind", "state", "name", "bad"),
    [
        ("nvfp4", NVFP4, "x.weight_scale", torch.tensor(float("nan"))),
        ("nvfp4", {**NVFP4, "x.weight_scale": NVFP4["x.weight_scale"].view(torch.uint8)}, "x.weight_scale", 0x7F),
        ("nvfp4", NVFP4, "x.weight_scale_2", torch.tensor(float("inf"))),
        ("mxfp8", MXFP8, "x.weight_scale", 255),
        ("int8_tensorwise", INT8, "x.weight_scale", torch.tensor(float("nan"))),
    ],
)
def test_scales_without_a_number_are_refused(
    kind: str, state: dict[str, Tensor], name: str, bad: Any, tmp_path: Path
) -> None:
    damaged = state[name].clone()
    damaged.view(-1)[0] = bad
    parts = opened(tmp_path, {**state, name: damaged, "x.comfy_quant": marker(format=kind)}).parts_of("x.weight")
    with pytest.raises(InputError, match="nan or inf") as caught:
        codec_of(parts).check(parts)
    assert caught.value.culprit == name


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 128), (160, 272), (129, 72)], ids=str)
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "int8_tensorwise"])
def test_numbers_are_those_of_comfy_kitchen(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    ck = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed")
    from comfy_kitchen.tensor import TensorCoreMXFP8Layout, TensorCoreNVFP4Layout, TensorWiseINT8Layout

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.03
    with ck.registry.use_backend("eager"):
        if kind == "int8_tensorwise":
            made, params = TensorWiseINT8Layout.quantize(weight, per_channel=shape[0] == 160)
            back, beside = TensorWiseINT8Layout.dequantize(made, params), {"": made, "_scale": params.scale}
        else:
            layout = TensorCoreNVFP4Layout if kind == "nvfp4" else TensorCoreMXFP8Layout
            made, params = layout.quantize(weight)
            back, beside = layout.dequantize(made, params), layout.state_dict_tensors(made, params)
    state = {f"x.weight{end}": tensor for end, tensor in beside.items()}
    found = opened(tmp_path, {**state, "x.comfy_quant": marker(format=kind)})["x.weight"]
    assert torch.allclose(found, back.double(), rtol=3e-7, atol=0)
