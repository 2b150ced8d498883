"""Read torchao's int8 and float8 tensors, which the file's metadata describe; refuse its other classes."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool import InputError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.codec import CodeFormat, Parts

E4M3 = torch.float8_e4m3fn
INTS = torch.arange(-128, 127, dtype=torch.int16).to(torch.int8).reshape(3, 85)
FLOATS = (torch.arange(256) % 127).to(torch.uint8).view(E4M3).reshape(4, 64)


def described(kind: str, block: list[int] | None, *names: str) -> str:
    return json.dumps({"_type": kind, "_data": {"block_size": block}, "_tensor_data_names": names})


def opened(folder: Path, tensors: dict[str, Tensor], **descriptions: str) -> Checkpoint:
    """descriptions: by the module of a weight; `X.weight` has that of X."""
    metadata = {f"{module}.weight": text for module, text in descriptions.items()}
    path = folder / "model.safetensors"
    names = {"tensor_names": json.dumps(list(metadata))}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {**metadata, **names})
    return open_checkpoint(path)


def codec_of(parts: Parts) -> CodeFormat:
    assert isinstance(parts.weight.codec, CodeFormat)
    return parts.weight.codec


LAYOUTS: dict[str, tuple[str, Tensor, Tensor, Tensor | None, list[int], Any]] = {
    "int8 rows": ("Int8Tensor", INTS, torch.tensor([[0.3], [1e-3], [7]]), None, [1, 85], lambda i, j: i),
    "int8 zero points": (
        "Int8Tensor",
        INTS,
        torch.tensor([[0.3], [1e-3], [7]]),
        torch.tensor([[3], [-128], [127]], dtype=torch.int8),
        [1, 85],
        lambda i, j: i,
    ),
    "int8 one scale": ("Int8Tensor", INTS, torch.tensor([[0.1]]), None, [3, 85], lambda i, j: 0),
    "int8 groups": ("Int8Tensor", INTS, torch.rand(3, 5) + 0.1, None, [1, 17], lambda i, j: i * 5 + j // 17),
    "float8 rows": ("Float8Tensor", FLOATS, torch.rand(4, 1) + 0.1, None, [1, 64], lambda i, j: i),
    "float8 blocks": ("Float8Tensor", FLOATS, torch.rand(2, 4), None, [2, 16], lambda i, j: i // 2 * 4 + j // 16),
    "float8 one scale": ("Float8Tensor", FLOATS, torch.tensor([[0.7]]), None, [4, 64], lambda i, j: 0),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_numbers_of_a_layout(what: str, tmp_path: Path) -> None:
    kind, codes, scale, zeros, block, where = LAYOUTS[what]
    state = {"x._weight_qdata": codes, "x._weight_scale": scale, "x.bias": torch.ones(2)}
    if zeros is not None:
        state["x._weight_zero_point"] = zeros
    state["x._weight_act_quant_scale"] = torch.ones(1)
    checkpoint = opened(tmp_path, state, x=described(kind, block, "qdata", "scale"))
    found, levels, scales = checkpoint["x.weight"], codes.double().tolist(), scale.double().flatten().tolist()
    offsets = zeros.flatten().tolist() if zeros is not None else [0] * scale.numel()
    for i, row in enumerate(levels):
        for j, level in enumerate(row):
            at = where(i, j)
            assert float(found[i, j]) == float((Fraction(level) - offsets[at]) * Fraction(scales[at]))
    assert checkpoint.specs.keys() == {"x.weight", "x.bias"} and not checkpoint.faults
    parts = checkpoint.parts_of("x.weight")
    codec = codec_of(parts)
    codec.check(parts)
    stored = codec.codes(parts, 0, len(codes))
    assert np.array_equal(codec.nearest(parts, 0, found.numpy()), stored)
    assert np.array_equal(codec.codes(parts, 1, 2), stored[1:2])
    assert b"".join(data for _, data in codec.places(parts, 0, stored)) == codes.view(torch.uint8).numpy().tobytes()
    assert codec.quantizer(parts) is None


def test_a_parameter_that_is_no_weight(tmp_path: Path) -> None:
    """`experts._gate_up_proj_qdata` is the parameter `experts.gate_up_proj`."""
    codes, scale = INTS.reshape(1, 3, 85).repeat(2, 1, 1), torch.rand(2, 3, 1)
    path = tmp_path / "model.safetensors"
    state = {"experts._gate_up_proj_qdata": codes, "experts._gate_up_proj_scale": scale}
    save_file(state, path, {"experts.gate_up_proj": described("Int8Tensor", [1, 1, 85])})
    assert torch.equal(open_checkpoint(path)["experts.gate_up_proj"], codes.double() * scale.double())


@pytest.mark.parametrize("name", ["x.weight_qdata", "x._weight_qdata"])
def test_what_ends_like_codes_and_is_no_matrix(name: str, tmp_path: Path) -> None:
    codes = INTS[0] if "._" in name else INTS
    checkpoint = opened(tmp_path, {name: codes, name.replace("qdata", "scale"): torch.ones(3, 1)}, x="{}")
    assert not checkpoint.weights and not checkpoint.faults and checkpoint.specs.keys() == checkpoint.stored.keys()


@pytest.mark.parametrize("kind", ["IntxUnpackedToInt8Tensor", "Int4Tensor", "Tensor", ["Int8Tensor"]])
def test_other_classes_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    state = {"x._weight_qdata": INTS, "x._weight_scale": torch.ones(3, 1)}
    checkpoint = opened(tmp_path, state, x=described(kind, [1, 85]))
    assert not checkpoint.weights and not checkpoint.faults and "torchao" in checkpoint.coded["x.weight"].format


RIGHT = {"x._weight_qdata": INTS, "x._weight_scale": torch.ones(3, 1)}

BROKEN = {
    "not described": (RIGHT, {}, "metadata do not say"),
    "cut off": (RIGHT, {"x": described("Int8Tensor", [1, 85])[:-4]}, "metadata do not say"),
    "no scale": ({"x._weight_qdata": INTS}, {"x": described("Int8Tensor", [1, 85])}, "x._weight_scale is missing"),
    "a grid of no blocks": (
        {**RIGHT, "x._weight_scale": torch.ones(2, 7)},
        {"x": described("Int8Tensor", [1, 85])},
        "x._weight_scale has the shape",
    ),
    "zero points": (
        {**RIGHT, "x._weight_zero_point": torch.ones(1, 3, dtype=torch.int8)},
        {"x": described("Int8Tensor", [1, 85])},
        "x._weight_zero_point has the shape",
    ),
    "scales of columns": (
        {**RIGHT, "x._weight_act_pre_scale": torch.ones(85)},
        {"x": described("Int8Tensor", [1, 85])},
        "x._weight_act_pre_scale",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(what: str, tmp_path: Path) -> None:
    state, descriptions, message = BROKEN[what]
    checkpoint = opened(tmp_path, state, **descriptions)
    assert not checkpoint.weights and message in checkpoint.faults["x._weight_qdata"]


def test_scales_without_a_number_are_refused(tmp_path: Path) -> None:
    state = {**RIGHT, "x._weight_scale": torch.tensor([[1.0], [float("nan")], [1]])}
    parts = opened(tmp_path, state, x=described("Int8Tensor", [1, 85])).parts_of("x.weight")
    with pytest.raises(InputError, match="nan or inf") as caught:
        codec_of(parts).check(parts)
    assert caught.value.culprit == "x._weight_scale"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_numbers_are_those_of_torchao(config: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = torch.nn.Sequential(torch.nn.Linear(96, 40, dtype=torch.bfloat16), torch.nn.Linear(40, 8))
    quantization.quantize_(model, getattr(quantization, config)())
    tensors, metadata = flatten_tensor_state_dict({n: p.data for n, p in model.state_dict().items()})
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.specs.keys() == model.state_dict().keys()
    for name in ("0.weight", "1.weight"):
        known = model.state_dict()[name].dequantize(torch.float32).double()
        assert torch.allclose(checkpoint[name], known, rtol=2**-24, atol=0)
