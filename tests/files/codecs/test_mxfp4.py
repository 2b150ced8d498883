"""Hold mxfp4 against the definition in fractions, and its writer against compressed-tensors."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lib.files.one_weight import codec_of, numbers, only, random_bytes, raw, stored, written
from torch import Tensor

from loratool import InputError
from loratool.files.codecs.codec import Parts

E2M1 = [Fraction(x) for x in ("0", "0.5", "1", "1.5", "2", "3", "4", "6")]


def real(nibble: int, scale: int) -> Fraction:
    return (-1 if nibble & 8 else 1) * E2M1[nibble & 7] * Fraction(2) ** (scale - 127)


def packed(codes: Tensor, scales: Tensor, scale: str = "x.weight_scale") -> dict[str, Tensor]:
    return {"x.weight_packed": codes, scale: scales}


def test_low_nibble_is_first_and_the_scale_a_power_of_two(tmp_path: Path) -> None:
    codes = torch.zeros(3, 16, dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = 0x21, 0xF8
    scales = torch.tensor([[127], [0], [254]], dtype=torch.uint8)
    found = numbers(only(stored(tmp_path, packed(codes, scales))))
    assert found[0, :4].tolist() == [0.5, 1, 0, -6]
    assert np.signbit(found[0, 2])
    assert found[1, 3] == -6 * 2.0**-127
    assert found[2, 3] == -6 * 2.0**127


def gpt_oss(experts: int = 2, out: int = 5, groups: int = 3) -> dict[str, Tensor]:
    scales = random_bytes(experts, out, groups, seed=1).clamp(0, 254)
    return {"a.experts.up_proj_blocks": random_bytes(experts, out, groups, 16), "a.experts.up_proj_scales": scales}


def test_experts_of_gpt_oss_are_turned(tmp_path: Path) -> None:
    tensors = gpt_oss()
    checkpoint = stored(tmp_path, tensors)
    parts = only(checkpoint)
    assert checkpoint.specs["a.experts.up_proj"].shape == (2, 96, 5)
    blocks, scales = (tensor.tolist() for tensor in tensors.values())
    expected = [
        [float(real(blocks[e][o][i // 32][i % 32 // 2] >> 4 * (i % 2) & 15, scales[e][o][i // 32])) for o in range(5)]
        for e in range(2)
        for i in range(96)
    ]
    assert np.array_equal(numbers(parts), expected)
    for start, stop in ((0, 1), (1, 2), (31, 34), (95, 97), (90, 192), (191, 192)):
        assert np.array_equal(numbers(parts, start, stop), expected[start:stop])


def test_a_tie_goes_to_the_even_code_and_large_numbers_to_the_last(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, packed(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([[127]]).byte())))
    x = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, 7, -np.inf, np.nan, -0.0]
    found = codec_of(parts).nearest(parts, 0, np.array([x + [0.0] * 19]))[0, :13]
    assert found.tolist() == [0, 2, 2, 4, 4, 6, 6, 0, 10, 7, 15, 0, 0]


def test_a_column_of_gpt_oss_is_written_as_a_row_of_compressed_tensors(tmp_path: Path) -> None:
    for folder in ("turned", "rows"):
        (tmp_path / folder).mkdir()
    turned = only(stored(tmp_path / "turned", gpt_oss(2, 6, 2)))
    rows = only(stored(tmp_path / "rows", packed(random_bytes(12, 32), random_bytes(12, 2) // 2)))
    w = torch.randn(2, 64, 6, generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = written(rows, w.transpose(1, 2).reshape(12, 64))
    for step in (32, 64, 96):
        assert written(turned, w.reshape(128, 6), step) == expected


def refused(parts: Parts, culprit: str) -> None:
    with pytest.raises(InputError) as error:
        codec_of(parts).check(parts)
    assert error.value.culprit == culprit


def test_scale_255_is_no_number(tmp_path: Path) -> None:
    tensors = gpt_oss()
    tensors["a.experts.up_proj_scales"][1, 4, 2] = 255
    refused(only(stored(tmp_path, tensors)), "a.experts.up_proj_scales")


@pytest.mark.parametrize("scales", [None, torch.zeros(2, 5, 4).byte(), torch.zeros(2, 5, 3)])
def test_experts_without_their_scales_are_no_weight(tmp_path: Path, scales: Tensor | None) -> None:
    tensors = gpt_oss()
    del tensors["a.experts.up_proj_scales"]
    checkpoint = stored(tmp_path, tensors | ({} if scales is None else {"a.experts.up_proj_scales": scales}))
    assert not checkpoint.weights
    assert "a.experts.up_proj_scales" in checkpoint.faults["a.experts.up_proj_blocks"]


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (5, 3, 16)])
def test_blocks_of_another_shape_are_no_experts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"a.experts.up_proj_blocks": random_bytes(*shape), "b": torch.zeros(2)}
    checkpoint = stored(tmp_path, tensors)
    assert not checkpoint.weights and not checkpoint.faults and checkpoint.specs.keys() == tensors.keys()


@pytest.mark.parametrize("scales", [None, torch.zeros(3, 2).byte(), torch.zeros(3).byte()])
def test_packed_codes_without_their_scales_are_no_weight(tmp_path: Path, scales: Tensor | None) -> None:
    codes = {"x.weight_packed": random_bytes(3, 16)}
    checkpoint = stored(tmp_path, codes | ({} if scales is None else {"x.weight_scale": scales}))
    assert not checkpoint.weights
    assert "x.weight_scale" in checkpoint.faults["x.weight_packed"]


def test_a_zero_point_is_not_passed_over(tmp_path: Path) -> None:
    tensors = packed(random_bytes(3, 16), torch.zeros(3, 1).byte()) | {"x.weight_zero_point": torch.zeros(3, 1).byte()}
    assert "x.weight_zero_point" in stored(tmp_path, tensors).faults["x.weight_packed"]


def test_experts_of_deepseek_are_bytes_called_int8(tmp_path: Path) -> None:
    codes, scales = random_bytes(3, 32), random_bytes(3, 2, seed=1) // 2
    parts = only(stored(tmp_path, {"x.weight": codes.view(torch.int8), "x.scale": scales}))
    expected = [
        [float(real(int(codes[i, j // 2]) >> 4 * (j % 2) & 15, int(scales[i, j // 32]))) for j in range(64)]
        for i in range(3)
    ]
    assert np.array_equal(numbers(parts), expected)


def test_int8_beside_a_float_scale_is_not_deepseeks(tmp_path: Path) -> None:
    assert not stored(tmp_path, {"x.weight": random_bytes(3, 32).view(torch.int8), "x.scale": torch.ones(3, 2)}).weights


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_of_compressed_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="mxfp4-pack-quantized")
    seeded = torch.Generator().manual_seed(0)
    w = torch.randn(256, 512, generator=seeded) * 10.0 ** torch.randint(-6, 4, (256, 1), generator=seeded)
    w = w.to(dtype)
    w[3, :64], w[4, 32:64], w[5, :5] = 0, -0.0, w[5].abs().max() * 1.75
    parts = only(stored(tmp_path, packed(random_bytes(256, 256), random_bytes(256, 16) // 2)))
    groups = w.unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
    state = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
    assert written(parts, w, 64) == {"codes": raw(state["weight_packed"]), "scales": raw(state["weight_scale"])}


def quark(scale_format: str | None) -> dict[str, Any]:
    weight = {"dtype": "fp4", "group_size": 32, "scale_format": scale_format}
    layers = {"*q_proj": {"weight": [{"dtype": "fp8_e4m3"}, weight]}}
    return {"quantization_config": {"quant_method": "quark", "layer_quant_config": layers}}


@pytest.mark.parametrize("scale_format", ["e5m3", None])
def test_quarks_other_scales_are_refused(scale_format: str | None, tmp_path: Path) -> None:
    tensors = {"x.weight": random_bytes(4, 32), "x.weight_scale": torch.full((4, 2), 127, dtype=torch.uint8)}
    assert stored(tmp_path, tensors, quark("e8m0"))["x.weight"].shape == (4, 64)
    checkpoint = stored(tmp_path, tensors, quark(scale_format))
    assert f"whose scale_format is {scale_format}, not e8m0" in checkpoint.faults["x.weight"]


@pytest.mark.parametrize("name", ["x.input_rotation", "x.input_prescale", "model.shared_input_rotation_64"])
def test_quarks_rotated_layers_are_refused(name: str, tmp_path: Path) -> None:
    tensors = {"x.weight": random_bytes(4, 32), "x.weight_scale": torch.full((4, 2), 127, dtype=torch.uint8)}
    checkpoint = stored(tmp_path, {**tensors, name: torch.ones(64)}, quark("e8m0"))
    assert not checkpoint.weights and "input_" in checkpoint.faults["x.weight"]
