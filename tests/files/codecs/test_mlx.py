"""Hold MLX's formats against their formulas in fractions, and the writer against mlx."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lib.files.one_weight import codec_of, numbers, only, random_bytes, raw, stored, written
from torch import Tensor

from loratool import InputError
from loratool.numerics.tensors import numbers_of

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def config(bits: int, group: int, mode: str = "affine", **layers: Any) -> dict[str, Any]:
    return {"quantization": {"group_size": group, "bits": bits, "mode": mode, **layers}}


def words(*shape: int, seed: int = 0) -> Tensor:
    return random_bytes(*shape[:-1], shape[-1] * 4, seed=seed).view(torch.uint32)


def affine(*rows: int, groups: int = 2, bits: int = 4, group: int = 64, dtype: torch.dtype = torch.bfloat16) -> Any:
    seeded = torch.Generator().manual_seed(1)
    return {
        "m.x.weight": words(*rows, groups * group * bits // 32),
        "m.x.scales": torch.randn(*rows, groups, generator=seeded).to(dtype),
        "m.x.biases": torch.randn(*rows, groups, generator=seeded).to(dtype),
    }


def stream(row: Tensor, bits: int) -> list[int]:
    """The codes of a row of words: its bits from the lowest on."""
    whole = int.from_bytes(raw(row), "little")
    return [whole >> at & (1 << bits) - 1 for at in range(0, len(row) * 32, bits)]


# Of codes that count up, as mlx packs them
@pytest.mark.parametrize(
    ("bits", "packed"),
    [
        (3, (0x88FAC688, 0xC688FAC6, 0xFAC688FA)),
        (5, (0x8A418820, 0xC5A92839, 0xCA307B9A, 0x38BDAB49, 0xFFBBCDEB)),
        (6, (0x440C2040, 0xA2481C61, 0x3CE34C2C, 0x544D2450, 0xA6585D65, 0x7DE75C6D)),
    ],
)
def test_codes_cross_words(tmp_path: Path, bits: int, packed: tuple[int, ...]) -> None:
    tensors = affine(1, groups=1, bits=bits, group=32)
    tensors["m.x.weight"] = torch.from_numpy(np.array([packed], np.uint32))
    parts = only(stored(tmp_path, tensors, config(bits, 32)))
    count = np.arange(32)
    assert codec_of(parts).codes(parts, 0, 1)[0].tolist() == (count % (1 << bits)).tolist()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_affine_is_a_product_and_then_a_sum(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    tensors = affine(2, 3, bits=bits, dtype=dtype)
    checkpoint = stored(tmp_path, tensors, config(bits, 64))
    parts = only(checkpoint)
    assert checkpoint.specs["m.x.weight"].shape == (2, 3, 128)
    codes, scales, biases = (tensor.reshape(6, -1) for tensor in tensors.values())
    expected = [
        [  # the product is exact in float64, the sum is rounded once
            float(q * Fraction(float(scales[i, j // 64])) + Fraction(float(biases[i, j // 64])))
            for j, q in enumerate(stream(codes[i], bits))
        ]
        for i in range(6)
    ]
    assert np.array_equal(numbers(parts), expected)
    assert np.array_equal(numbers(parts, 2, 5), expected[2:5])
    assert parts.weight.note == ""


def test_a_negative_scale_orders_codes_the_other_way(tmp_path: Path) -> None:
    tensors = affine(1, groups=1)
    tensors["m.x.scales"], tensors["m.x.biases"] = torch.tensor([[-0.5]]), torch.tensor([[3.0]])
    parts = only(stored(tmp_path, tensors, config(4, 64)))
    x = np.array([[3.0, 2.5, 2.75, 2.25, -4.5, -100, 100, np.nan] + [0.0] * 56])
    assert codec_of(parts).nearest(parts, 0, x)[0, :9].tolist() == [0, 1, 0, 2, 15, 15, 0, 0, 6]


def test_a_module_may_have_a_config_of_its_own(tmp_path: Path) -> None:
    tensors = affine(3, bits=8, group=32)
    for own in ({"bits": 8, "group_size": 32}, {"bits": 8, "group_size": 32, "mode": "affine"}):
        parts = only(stored(tmp_path, tensors, config(4, 64, **{"m.x": own})))
        assert parts.weight.spec.shape == (3, 64)
        assert parts.weight.note == ""
        assert parts.detail("bits") == 8


def test_shapes_win_over_a_config_and_that_is_said(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, affine(3, bits=5, group=128), config(4, 64)))  # 640 bits a group are 5 of 128 alone
    assert parts.weight.spec.shape == (3, 256)
    assert "m.x is stored with 5 bits in groups of 128" in parts.weight.note


def test_what_shapes_and_config_leave_open_is_no_weight(tmp_path: Path) -> None:
    for stated in ({}, config(3, 64), config(4, 128)):  # 256 bits a group: 2 of 128, 4 of 64, 8 of 32
        checkpoint = stored(tmp_path, affine(3), stated)
        assert not checkpoint.weights
        assert "m.x.scales" in checkpoint.faults["m.x.weight"]
        assert "2 bits in groups of 128 or 4 bits in groups of 64" in checkpoint.faults["m.x.weight"]


def test_bits_that_mlx_does_not_have_are_not_read_as_others(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, affine(3, bits=5, group=128), config(10, 64))  # 640 bits a group too
    assert "(10, 64)" in checkpoint.faults["m.x.weight"]


def test_a_module_that_the_config_leaves_out_is_read_if_it_is_coded(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, affine(3), config(4, 64, **{"m.x": False})))
    assert parts.weight.spec.shape == (3, 128)
    assert "m.x" in parts.weight.note


def float_mode(mode: str, *rows: int) -> dict[str, Tensor]:
    bits, group = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    codes = words(*rows, 64 * bits // 32)
    if mode == "mxfp8":  # without nan
        codes = (random_bytes(*rows, 64) & 0xF7).view(torch.uint32)
    return {"m.x.weight": codes, "m.x.scales": random_bytes(*rows, 64 // group, seed=1) & 0x7E}


def real(mode: str, code: int, scale: int) -> Fraction:
    eight = Fraction(float(torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).double()))
    level = eight if mode == "mxfp8" else Fraction(E2M1[code % 16])
    if mode == "nvfp4":
        return level * Fraction(float(torch.tensor([scale], dtype=torch.uint8).view(torch.float8_e4m3fn).double()))
    return level * Fraction(2) ** (scale - 127)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_float_modes_have_scales_alone(tmp_path: Path, mode: str) -> None:
    tensors = float_mode(mode, 2, 3)
    bits, group = (8, 32) if mode == "mxfp8" else (4, 32 if mode == "mxfp4" else 16)
    parts = only(stored(tmp_path, tensors, config(bits, group, mode)))
    codes, scales = (tensor.reshape(6, -1) for tensor in tensors.values())
    expected = [
        [float(real(mode, code, int(scales[i, j // group]))) for j, code in enumerate(stream(codes[i], bits))]
        for i in range(6)
    ]
    assert np.array_equal(numbers(parts), expected)
    assert parts.weight.note == ""
    assert "says affine" in only(stored(tmp_path, tensors, config(bits, group))).weight.note


def test_a_global_scale_is_of_each_matrix(tmp_path: Path) -> None:
    tensors = float_mode("nvfp4", 2, 3)
    whole = torch.tensor([3.7, 0.01])
    found = numbers(only(stored(tmp_path, tensors | {"m.x.global_scale": whole}, config(4, 16, "nvfp4"))))
    codes, scales = (tensor.reshape(6, -1) for tensor in tensors.values())
    for i in range(6):
        factor = Fraction(float(whole[i // 3]))
        products = [real("nvfp4", c, int(scales[i, j // 16])) * factor for j, c in enumerate(stream(codes[i], 4))]
        assert found[i].tolist() == [float(x) / 2688 for x in products]  # a product of 30 bits, and one division


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("m.x.scales", None),
        ("m.x.scales", torch.ones(2, 2)),
        ("m.x.scales", torch.ones(3, 2).byte()),
        ("m.x.biases", None),
        ("m.x.biases", torch.ones(3, 1)),
        ("m.x.biases", torch.ones(3, 2).byte()),
    ],
)
def test_a_wrong_companion_makes_no_weight(tmp_path: Path, name: str, other: Tensor | None) -> None:
    tensors = affine(3)
    del tensors[name]
    checkpoint = stored(tmp_path, tensors | ({} if other is None else {name: other}), config(4, 64))
    assert not checkpoint.weights
    assert name in checkpoint.faults["m.x.weight"]


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_global_scales_of_no_matrices_make_no_weight(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = float_mode("nvfp4", 2, 3) | {"m.x.global_scale": torch.ones(shape)}
    assert "m.x.global_scale" in stored(tmp_path, tensors).faults["m.x.weight"]


@pytest.mark.parametrize("name", ["m.x.scales", "m.x.biases"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_scales_must_be_finite(tmp_path: Path, name: str, wrong: float) -> None:
    tensors = affine(3)
    tensors[name][2, 1] = wrong
    damaged(tmp_path, tensors, config(4, 64), name)


@pytest.mark.parametrize(("mode", "code"), [("mxfp4", 0xFF), ("mxfp8", 0xFF), ("nvfp4", 0x7F)])
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, mode: str, code: int) -> None:
    tensors = float_mode(mode, 3)
    tensors["m.x.scales"][2, 1] = code
    damaged(tmp_path, tensors, config(4, 32, mode), "m.x.scales")


def damaged(folder: Path, tensors: dict[str, Tensor], stated: dict[str, Any], name: str) -> None:
    parts = only(stored(folder, tensors, stated))
    with pytest.raises(InputError) as error:
        codec_of(parts).check(parts)
    assert error.value.culprit == name


def test_weights_too_large_for_the_scales_are_refused(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, affine(8, dtype=torch.float16), config(4, 64)))
    with pytest.raises(InputError, match="float16"):
        written(parts, torch.full((8, 128), 1e5))


def test_one_bit_is_the_least_or_the_most_of_a_group(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, affine(8, bits=1, dtype=torch.float32), config(1, 64)))
    w = torch.where(torch.arange(8 * 128).view(8, 128) * 7 % 5 < 2, -0.75, 0.5)
    found = written(parts, w, 3)
    assert np.frombuffer(found["scales"], "<f4").tolist() == [1.25] * 16
    assert np.frombuffer(found["biases"], "<f4").tolist() == [-0.75] * 16
    taken = np.unpackbits(np.frombuffer(found["codes"], np.uint8), bitorder="little").reshape(8, 128)
    assert np.array_equal(taken == 1, (w == 0.5).numpy())


def test_what_does_not_look_first_is_not_shown(tmp_path: Path) -> None:
    quantizer = codec_of(parts := only(stored(tmp_path, affine(8), config(4, 64)))).quantizer(parts)
    assert quantizer is not None and not quantizer.sees_all
    with pytest.raises(TypeError):
        quantizer.see(numbers_of(torch.zeros(8, 128)))


def test_weights_are_encoded_in_the_type_of_the_scales(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, affine(8), config(4, 64)))
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    assert written(parts, w, 3) == written(parts, w.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_bytes_are_those_of_mlx(tmp_path: Path, bits: int, group: int, dtype: torch.dtype) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    seeded = torch.Generator().manual_seed(bits)
    w = torch.randn(256, 512, generator=seeded) * 10.0 ** torch.randint(-4, 3, (256, 1), generator=seeded)
    w[0], w[1, ::2], w[2, ::3], w[3], w[4] = 0, 0, -0.0, w[3].abs(), -w[4].abs()
    w[5] = torch.linspace(-1, 1, 512)
    w = w.to(dtype)
    kinds = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16, torch.float32: mx.float32}
    arrays = mx.quantize(mx.array(w.float().numpy()).astype(kinds[dtype]), group_size=group, bits=bits)
    # as float32, which holds every bfloat16, since numpy has none
    codes, scales, biases = (np.array(each if at == 0 else each.astype(mx.float32)) for at, each in enumerate(arrays))
    tensors = {
        "m.x.weight": torch.from_numpy(codes),
        "m.x.scales": torch.from_numpy(scales).to(dtype),
        "m.x.biases": torch.from_numpy(biases).to(dtype),
    }
    parts = only(stored(tmp_path, tensors, config(bits, group)))
    expected = dict(zip(("codes", "scales", "biases"), map(raw, tensors.values()), strict=True))
    assert written(parts, w, 100) == expected
