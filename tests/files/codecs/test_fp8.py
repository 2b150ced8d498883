"""Read float8 with scales in all layouts, against numbers worked out here from the bits; write it anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool import InputError
from loratool.files.checkpoint import Checkpoint, open_checkpoint
from loratool.files.codecs.codec import CodeFormat, Parts
from loratool.files.codecs.quantized import stated_blocks
from loratool.numerics.tensors import numbers_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)  # which an older torch does not have


def opened(folder: Path, tensors: Mapping[str, Tensor], declared: Mapping[str, Any] | None = None) -> Checkpoint:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared} if declared else {}))
    return open_checkpoint(folder)


def codec_of(parts: Parts) -> CodeFormat:
    assert isinstance(parts.weight.codec, CodeFormat)
    return parts.weight.codec


def every_code(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    """All codes but those of nan and inf, from a random one on."""
    count = int(np.prod(shape))
    codes = torch.from_numpy((np.arange(count) * 7 + 3) % 256).to(torch.uint8)
    codes = torch.where(codes % 128 >= (127 if dtype == E4M3 else 124), codes - 8, codes)
    return codes.reshape(shape).view(dtype)


def exact(code: int, mantissa: int) -> Fraction:
    """The number of a code: sign, exponent, mantissa."""
    bias = 7 if mantissa == 3 else 15
    exponent, fraction = code % 128 >> mantissa, code % (1 << mantissa)
    size = (Fraction(exponent > 0) + Fraction(fraction, 1 << mantissa)) * Fraction(2) ** (max(exponent, 1) - bias)
    return -size if code > 127 else size


Where = Callable[[int, int, int], int]  # expert, row, column -> the place of the scale among all

# What it is: shape of the weight, end of the scale's name, its type and shape, the config, and which number has which
LAYOUTS: dict[str, tuple[tuple[int, ...], str, torch.dtype, tuple[int, ...], dict[str, Any], Where]] = {
    "192 rows of blocks": ((192, 70), ".weight_scale_inv", torch.float32, (2, 1), {}, lambda e, i, j: i // 128),
    "320 rows of blocks": ((320, 3), ".weight_scale_inv", torch.bfloat16, (3, 1), {}, lambda e, i, j: i // 128),
    "576 rows of blocks": ((576, 2), ".weight_scale_inv", torch.float32, (5, 1), {}, lambda e, i, j: i // 128),
    "ragged both ways": ((140, 150), ".scale", E8M0, (2, 2), {}, lambda e, i, j: i // 128 * 2 + j // 128),
    "a stated block": (
        (192, 20),
        ".weight_scale",
        torch.float32,
        (2, 2),
        {"weight_block_size": [96, 10]},
        lambda e, i, j: i // 96 * 2 + j // 10,
    ),
    "compressed-tensors' blocks": (
        (30, 60),
        ".weight_scale",
        torch.bfloat16,
        (2, 3),
        {"config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [20, 24]}}}},
        lambda e, i, j: i // 20 * 3 + j // 24,
    ),
    "channels": ((5, 70), ".weight_scale", torch.bfloat16, (5, 1), {}, lambda e, i, j: i),
    "channels, flat": ((5, 70), ".weight_scale", torch.float16, (5,), {}, lambda e, i, j: i),
    "one scale": ((5, 70), ".weight_scale", torch.float32, (), {}, lambda e, i, j: 0),
    "one scale of one": ((5, 70), ".weight_scale", torch.float32, (1,), {}, lambda e, i, j: 0),
    "Mistral": ((5, 70), ".qscale_weight", torch.bfloat16, (), {}, lambda e, i, j: 0),
    "ComfyUI, old": ((5, 70), ".scale_weight", torch.float32, (1,), {}, lambda e, i, j: 0),
    "groups of powers of two": ((3, 80), ".weight_scale", torch.uint8, (3, 3), {}, lambda e, i, j: i * 3 + j // 32),
    "modelopt's blocks": (
        (192, 130),
        ".weight_scale",
        torch.float32,
        (2, 1, 2, 1),
        {},
        lambda e, i, j: i // 128 * 2 + j // 128,
    ),
    "a convolution": ((4, 3, 2, 2), ".weight_scale", torch.float32, (1,), {}, lambda e, i, j: 0),
    "experts of blocks": (
        (3, 40, 24),
        "_scale_inv",
        torch.float32,
        (3, 3, 2),
        {},
        lambda e, i, j: e * 6 + i // 16 * 2 + j // 16,
    ),
    "experts": ((3, 40, 24), "_scale_inv", torch.float32, (3, 1, 1), {}, lambda e, i, j: e),
    "experts, flat": ((3, 40, 24), "_scale", torch.float32, (3,), {}, lambda e, i, j: e),
    "experts, one scale": ((3, 40, 24), "_scale", torch.float32, (), {}, lambda e, i, j: 0),
    "gate and up of experts": (
        (3, 40, 24),
        "_scale_inv",
        torch.float32,
        (3, 2, 1),
        {"weight_block_size": None},
        lambda e, i, j: e * 2 + i // 20,
    ),
    "rows of experts": ((3, 40, 24), "_scale", torch.float32, (3, 40, 1), {}, lambda e, i, j: e * 40 + i),
    "Llama-4 of modelopt": ((3, 40, 24), "_weight_scale", torch.float32, (1,), {}, lambda e, i, j: 0),
    "columns of experts": ((3, 40, 24), "_scale", torch.float32, (3, 1, 24), {}, lambda e, i, j: e * 24 + j),
    "columns of experts, turned": ((3, 40, 24), "_scale", torch.float32, (3, 24, 1), {}, lambda e, i, j: e * 24 + j),
    "square experts": ((3, 24, 24), "_scale", torch.float32, (3, 24, 1), {}, lambda e, i, j: e * 24 + i),
    "square experts of fbgemm": (
        (3, 24, 24),
        "_scale",
        torch.float32,
        (3, 24, 1),
        {"quant_method": "fbgemm_fp8"},
        lambda e, i, j: e * 24 + j,
    ),
}


def some_scales(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = int(np.prod(shape))
    if dtype in (E8M0, torch.uint8):
        return (torch.arange(count) * 3 % 250 + 2).to(torch.uint8).reshape(shape).view(dtype)
    return (torch.rand(count, generator=torch.Generator().manual_seed(3)) + 0.01).to(dtype).reshape(shape)


def exact_scales(scales: Tensor) -> list[Fraction]:
    if scales.dtype in (E8M0, torch.uint8):
        return [Fraction(2) ** (code - 127) for code in scales.view(torch.uint8).flatten().tolist()]
    return [Fraction(x) for x in scales.double().flatten().tolist()]


@pytest.fixture
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> SimpleNamespace:
    shape, end, dtype, scale_shape, declared, where = LAYOUTS[request.param]
    path = "experts.gate_up_proj" if end[0] == "_" else "x"
    name = path if end[0] == "_" else f"{path}.weight"
    codes, scales = every_code(*shape), some_scales(scale_shape, dtype)
    checkpoint = opened(tmp_path, {name: codes, path + end: scales, "plain.weight": torch.ones(2, 2)}, declared)
    levels = [exact(code, 3) for code in range(256)]
    cells = codes.view(torch.uint8).reshape(-1, *shape[-2:]).tolist()
    numbers = exact_scales(scales)
    expected = [
        [float(levels[code] * numbers[where(e, i, j)]) for j, code in enumerate(row)]
        for e, matrix in enumerate(cells)
        for i, row in enumerate(matrix)
    ]
    return SimpleNamespace(checkpoint=checkpoint, name=name, expected=np.array(expected), codes=codes)


each_layout = pytest.mark.parametrize("layout", LAYOUTS, indirect=True)


@each_layout
def test_numbers_of_a_layout(layout: SimpleNamespace) -> None:
    found = layout.checkpoint[layout.name]
    assert found.shape == layout.codes.shape and not layout.checkpoint.faults
    assert np.array_equal(found.reshape(layout.expected.shape).numpy(), layout.expected)
    assert layout.checkpoint.specs.keys() == {layout.name, "plain.weight"}


@each_layout
def test_rows_and_codes_of_a_layout(layout: SimpleNamespace) -> None:
    parts = layout.checkpoint.parts_of(layout.name)
    codec, count = codec_of(parts), len(layout.expected)
    stored = layout.codes.view(torch.uint8).numpy().reshape(count, -1)
    codec.check(parts)
    for start, stop in np.sort(np.random.default_rng(5).integers(0, count + 1, (6, 2))).tolist():
        if start < stop:
            codes = codec.codes(parts, start, stop)
            assert np.array_equal(codes, stored[start:stop])
            assert np.array_equal(codec.values(parts, start, codes), layout.expected[start:stop])
            again = codec.nearest(parts, start, layout.expected[start:stop])
            assert np.array_equal(again, np.where(codes == 0x80, 0, codes))
            ((first, data),) = codec.places(parts, start, codes)
            assert stored.tobytes()[first : first + len(data)] == data == codes.tobytes()


def test_e5m2_and_zero_points(tmp_path: Path) -> None:
    codes, zeros = every_code(4, 64, dtype=E5M2), torch.tensor([[1.0], [0], [-2], [0.5]]).to(E5M2)
    state = {"x.weight": codes, "x.weight_scale": torch.tensor([[0.3], [2.0], [1e-3], [7.0]]), "y.bias": torch.ones(3)}
    checkpoint = opened(tmp_path, {**state, "x.weight_zero_point": zeros, "x.input_scale": torch.ones(1)})
    scales, offsets = exact_scales(state["x.weight_scale"]), [Fraction(x) for x in zeros.double().flatten().tolist()]
    rows = codes.view(torch.uint8).tolist()
    expected = [[float((exact(c, 2) - offsets[i]) * scales[i]) for c in row] for i, row in enumerate(rows)]
    assert checkpoint["x.weight"].tolist() == expected
    assert checkpoint.specs.keys() == {"x.weight", "y.bias"}


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_infinities_times_zero_are_read_without_a_word(tmp_path: Path) -> None:
    state = {"x.weight": torch.full((2, 2), float("inf")).to(E5M2), "x.weight_scale": torch.zeros(2, 1)}
    assert opened(tmp_path, state)["x.weight"].isnan().all()


def test_nearest_is_that_of_exact_arithmetic(tmp_path: Path) -> None:
    scale = torch.tensor(0.037)
    checkpoint = opened(tmp_path, {"x.weight": every_code(2, 40), "x.weight_scale": scale})
    parts, exact_scale = checkpoint.parts_of("x.weight"), Fraction(float(scale))
    numbers = np.random.default_rng(3).normal(0, 3, (2, 40))
    numbers[0, :4] = 1e9, -1e9, 1e-9, -1e-9
    levels = {code: exact(code, 3) * exact_scale for code in range(256) if code % 128 != 127}
    for x, code in zip(numbers.flat, codec_of(parts).nearest(parts, 0, numbers).flat, strict=True):
        assert abs(levels[int(code)] - Fraction(x)) == min(abs(level - Fraction(x)) for level in levels.values())
    assert codec_of(parts).nearest(parts, 0, np.array([[0.0, -0.0, np.nan, -1e-9] * 10])).max() == 0


W, ONES = every_code(64, 64), torch.ones

BROKEN = {
    "a grid of no blocks": ({"x.weight_scale_inv": ONES(7, 2)}, "x.weight_scale_inv has the shape"),
    "columns": ({"x.weight_scale": ONES(3)}, "x.weight_scale has the shape"),
    "one a column of a square": ({"x.weight_scale": ONES(1, 64)}, "x.weight_scale has the shape"),
    "integers": ({"x.weight_scale": torch.ones(64, 1, dtype=torch.int32)}, "x.weight_scale is I32"),
    "two scales": ({"x.weight_scale": ONES(1), "x.weight_scale_inv": ONES(1)}, "x.weight_scale"),
    "scales of columns": ({"x.weight_scale": ONES(1), "x.pre_quant_scale": ONES(64)}, "x.pre_quant_scale"),
    "zero points": ({"x.weight_scale": ONES(1), "x.weight_zero_point": ONES(64)}, "x.weight_zero_point"),
    "ComfyUI without a scale": (
        {"x.comfy_quant": torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)},
        "x.weight_scale is missing",
    ),
    "ComfyUI with a list": (
        {"x.comfy_quant": torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8), "x.weight_scale": ONES(1)},
        "x.comfy_quant holds no JSON object",
    ),
    "ComfyUI cut off": (
        {
            "x.comfy_quant": torch.frombuffer(bytearray(b'{"format": "float8_e4'), dtype=torch.uint8),
            "x.weight_scale": ONES(1),
        },
        "x.comfy_quant holds no JSON",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named(what: str, tmp_path: Path) -> None:
    beside, message = BROKEN[what]
    checkpoint = opened(tmp_path, {"x.weight": W, **beside})
    assert "x.weight" not in checkpoint.weights and message in checkpoint.faults["x.weight"]


def test_one_scale_of_the_blocks_that_a_config_names(tmp_path: Path) -> None:
    """It is what is left of a grid that was cut off; of a matrix of one block it is the grid."""
    state = {"x.weight": W, "x.weight_scale_inv": ONES(1, 1), "y.weight": W, "y.weight_scale_inv": ONES(2, 2)}
    checkpoint = opened(tmp_path, state, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    assert list(checkpoint.weights) == ["y.weight"]
    assert "(1, 1), but the config's blocks make a grid of (2, 2)" in checkpoint.faults["x.weight"]
    checkpoint = opened(tmp_path, state, {"quant_method": "fp8", "weight_block_size": [64, 64]})
    assert "x.weight" in checkpoint.weights


@pytest.mark.parametrize("bad", [torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor(255)])
def test_scales_without_a_number_are_refused(bad: Tensor, tmp_path: Path) -> None:
    scale = torch.full((64, 2), 120, dtype=torch.uint8) if bad.dtype == torch.int64 else torch.ones(64, 1)
    scale[40, 0] = bad
    parts = opened(tmp_path, {"x.weight": W, "x.weight_scale": scale}).parts_of("x.weight")
    with pytest.raises(InputError, match="nan or inf") as caught:
        codec_of(parts).check(parts)
    assert caught.value.culprit == "x.weight_scale"


def test_a_scale_of_zero_means_zeros(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {"x.weight": W, "x.weight_scale": torch.zeros(1)})
    parts = checkpoint.parts_of("x.weight")
    codec_of(parts).check(parts)
    assert not checkpoint["x.weight"].any()
    assert not codec_of(parts).nearest(parts, 0, np.zeros((64, 64))).any()


def test_tensors_win_over_the_config(tmp_path: Path) -> None:
    stated = {"weight_block_size": [128, 128]}
    state = {"x.weight": every_code(256, 256), "x.weight_scale": torch.rand(256, 1) + 0.5}
    weight = opened(tmp_path, state, stated).weights["x.weight"]
    assert "1 x all" in weight.note and "128 x 128" in weight.note
    assert not opened(tmp_path, {**state, "x.weight_scale": torch.ones(2, 2)}, stated).weights["x.weight"].note
    assert not opened(tmp_path, {"x.weight": W, "x.weight_scale": torch.ones(1)}, stated).weights["x.weight"].note


def test_a_block_that_no_integer_holds_counts_as_none(tmp_path: Path) -> None:
    state = {"x.weight": W, "x.weight_scale": torch.full((1,), 0.5)}
    for stated in ([1 << 70, 1 << 70], [128, 1 << 40]):
        checkpoint = opened(tmp_path, state, {"weight_block_size": stated})
        assert "the quantization config says" in checkpoint.weights["x.weight"].note
        assert torch.equal(checkpoint["x.weight"], W.double() / 2)


@pytest.mark.parametrize(
    ("declared", "blocks"),
    [
        ({}, []),
        ({"weight_block_size": [64, 32]}, [(64, 32)]),
        ({"weight_block_size": "64x32", "config_groups": []}, []),
        ({"weight_block_size": [-1, 32], "config_groups": {"a": None, "b": {"weights": 3}}}, []),
        ({"weight_block_size": [1.5, True]}, []),
        ({"config_groups": {"a": {"weights": {"strategy": "channel", "group_size": None}}}}, [(1, 0)]),
        (
            {"config_groups": {"a": {"weights": {"strategy": "tensor"}}, "b": {"weights": {"group_size": 32}}}},
            [(0, 0), (1, 32)],
        ),
    ],
)
def test_blocks_of_a_config(declared: dict[str, Any], blocks: list[tuple[int, int]]) -> None:
    assert [*stated_blocks(declared)] == blocks


def test_what_goes_with_experts(tmp_path: Path) -> None:
    inputs = torch.full((3,), 0.5)
    state = {"e.up": every_code(3, 8, 8), "e.up_scale_inv": torch.ones(3, 1, 1), "e.up_activation_scale": inputs}
    weight = opened(tmp_path, {**state, "e.up_bias": torch.ones(3, 8)}).weights["e.up"]
    assert weight.tensors == tuple(state) and weight.roles == ("codes", "scales", "activation_scale")


def test_a_description_of_megabytes_is_not_read(tmp_path: Path) -> None:
    state = {"x.weight": W, "x.weight_scale": torch.ones(1), "x.comfy_quant": torch.zeros(1 << 20, dtype=torch.uint8)}
    assert "x.comfy_quant has 1048576 bytes" in opened(tmp_path, state).faults["x.weight"]


def test_what_is_no_weight_with_a_scale(tmp_path: Path) -> None:
    state = {
        "plain.weight": W,  # a cast
        "norm.weight": every_code(8),
        "norm.weight_scale": torch.ones(1),
        "dummy.weight": torch.ones(3, 3),
        "dummy.scale_weight": torch.ones(1),
        "fnuz.weight": W.view(torch.uint8).view(torch.float8_e4m3fnuz),
        "fnuz.weight_scale": torch.ones(1),
        "scaled_fp8": torch.zeros(2).to(E4M3),
    }
    checkpoint = opened(tmp_path, state)
    assert not checkpoint.weights and not checkpoint.faults
    assert checkpoint.specs == checkpoint.stored


# --- written anew ---


def written(parts: Parts, weight: Tensor) -> dict[str, bytes]:
    """The bytes of all tensors of a weight, written in runs of the least rows."""
    quantizer = codec_of(parts).quantizer(parts)
    assert quantizer is not None
    rows = weight.reshape(-1, weight.shape[-1])
    step = quantizer.together
    if quantizer.sees_all:
        for start in range(0, len(rows), 7):
            quantizer.see(numbers_of(rows[start : start + 7]))
    found = {role: bytearray(spec.nbytes) for role, spec in quantizer.specs().items()}
    for start in reversed(range(0, len(rows), step)):
        codes, pieces = quantizer.rows(start, numbers_of(rows[start : start + step]))
        places = codec_of(parts).places(parts, start, codes)
        for role, first, data in [*pieces, *(("codes", first, data) for first, data in places)]:
            found[role][first : first + len(data)] = data
    return {role: bytes(data) for role, data in found.items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def some_weights(*shape: int, dtype: torch.dtype) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(8)) * 0.02
    made[..., : min(shape[-2], 40), : min(shape[-1], 40)] *= 1e-3
    made[..., -1, :] = 0
    return made.to(dtype)


@pytest.mark.parametrize("end", [".weight_scale_inv", ".weight_scale"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (192, 140), (320, 300)], ids=str)
def test_numbers_written_anew_are_half_a_step_off(
    shape: tuple[int, int], dtype: torch.dtype, stored: torch.dtype, end: str, tmp_path: Path
) -> None:
    """And the largest of each block has the last code, but for the rounding of the scale."""
    weight, grid = some_weights(*shape, dtype=dtype), (-(-shape[0] // 128), -(-shape[1] // 128))
    state = {"x.weight": every_code(*shape), f"x{end}": torch.ones(grid, dtype=stored)}
    found = written(opened(tmp_path, state).parts_of("x.weight"), weight)
    codes = torch.frombuffer(bytearray(found["codes"]), dtype=E4M3).reshape(shape)
    scales = torch.frombuffer(bytearray(found["scales"]), dtype=stored).reshape(grid)
    back = opened(tmp_path, {"x.weight": codes, f"x{end}": scales})["x.weight"]
    spread = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    most = torch.maximum(weight.double().abs() * 2**-4, spread * 2**-10)
    rounding = 2**-8 if torch.bfloat16 in (dtype, stored) else 1e-6
    assert bool(((back - weight.double()).abs() <= most * (1 + 16 * rounding)).all())
    for i in range(grid[0]):
        for j in range(grid[1]):
            box = weight.double()[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].abs().max()
            assert abs(float(scales[i, j]) * 448 / float(box) - 1) < rounding


@pytest.mark.parametrize("end", [".weight_scale_inv", ".weight_scale"])
def test_blocks_without_a_scale_are_zeros(end: str, tmp_path: Path) -> None:
    """Of zeros, and of numbers that are too small to have a scale."""
    state = {"x.weight": every_code(2, 256), f"x{end}": torch.ones(1, 2)}
    parts = opened(tmp_path, state, {"weight_block_size": [128, 128]}).parts_of("x.weight")
    weight = torch.zeros(2, 256)
    weight[0, 0], weight[:, 128:] = 1e-44, -0.25
    found = written(parts, weight)
    codes = np.frombuffer(found["codes"], np.uint8).reshape(2, 256)
    assert not codes[:, :128].any() and (codes[:, 128:] == 0xFE).all()
    assert np.isfinite(np.frombuffer(found["scales"], np.float32)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [torch.ones(2, 1), torch.full((2, 1), 120, dtype=torch.uint8).view(E8M0)], ids=str)
def test_numbers_without_a_code_are_refused(bad: float, scale: Tensor, tmp_path: Path) -> None:
    parts = opened(tmp_path, {"x.weight": every_code(2, 8), "x.weight_scale_inv": scale}).parts_of("x.weight")
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(InputError, match="does not have") as caught:
        written(parts, weight)
    assert caught.value.culprit == "x.weight"


@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (40, 1), (3, 2)], ids=str)
def test_experts_are_written_anew_as_single_matrices(grid: tuple[int, int], end: str, tmp_path: Path) -> None:
    """With one scale each, two, one a row, and ragged blocks of 16."""
    weight = some_weights(3, 40, 24, dtype=torch.bfloat16)
    state = {"e.up": every_code(3, 40, 24), f"e.up{end}": torch.ones(3, *grid)}
    found = written(opened(tmp_path, state).parts_of("e.up"), weight)
    declared = {"weight_block_size": [20, 24]} if grid == (2, 1) else {}
    apart = []
    for expert in weight:
        state = {"x.weight": every_code(40, 24), f"x.weight{end}": torch.ones(grid)}
        apart.append(written(opened(tmp_path, state, declared).parts_of("x.weight"), expert))
    assert found == {role: b"".join(each[role] for each in apart) for role in found}


@pytest.mark.parametrize("shape", [(3, 1, 24), (3, 24, 1)], ids=str)
def test_columns_are_written_anew_as_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = some_weights(3, 40, 24, dtype=torch.bfloat16)
    state = {"e.up": every_code(3, 40, 24), "e.up_scale": torch.ones(shape)}
    found = written(opened(tmp_path, state).parts_of("e.up"), weight)
    turned = {"e.up": every_code(3, 24, 40), "e.up_scale": torch.ones(3, 24, 1)}
    known = written(opened(tmp_path, turned).parts_of("e.up"), weight.mT.contiguous())
    codes = torch.frombuffer(bytearray(known["codes"]), dtype=torch.uint8).reshape(3, 24, 40)
    assert found == {"codes": raw(codes.mT), "scales": known["scales"]}


def test_one_scale_of_all_experts(tmp_path: Path) -> None:
    weight = some_weights(3, 40, 24, dtype=torch.bfloat16)
    stacked = opened(tmp_path, {"e.up": every_code(3, 40, 24), "e.up_scale": torch.ones(())})
    found = written(stacked.parts_of("e.up"), weight)
    flat = opened(tmp_path, {"x.weight": every_code(120, 24), "x.weight_scale": torch.ones(())})
    assert found == written(flat.parts_of("x.weight"), weight.reshape(120, 24))


def test_inputs_scales_are_taken_over(tmp_path: Path) -> None:
    state = {"x.weight": W, "x.weight_scale": torch.ones(64, 1), "x.input_scale": torch.tensor([0.25])}
    parts = opened(tmp_path, state).parts_of("x.weight")
    assert written(parts, torch.randn(64, 64))["input_scale"] == raw(state["x.input_scale"])


def test_what_is_not_written_anew(tmp_path: Path) -> None:
    zero = {"x.weight": W, "x.weight_scale": torch.ones(1), "x.weight_zero_point": torch.zeros(1)}
    groups = {"y.weight": W, "y.weight_scale": torch.full((64, 2), 120, dtype=torch.uint8)}
    checkpoint = opened(tmp_path, {**zero, **groups, "z.weight": W.view(E5M2), "z.weight_scale": torch.ones(1)})
    for name in checkpoint.weights:
        assert codec_of(checkpoint.parts_of(name)).quantizer(checkpoint.parts_of(name)) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
@pytest.mark.parametrize("shape", [(64, 96), (130, 75), (192, 260)], ids=str)
def test_written_anew_as_compressed_tensors_does(
    shape: tuple[int, int], strategy: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant

    more = {"block_structure": [64, 32]} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, dynamic=False, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="float-quantized")
    weight = some_weights(*shape, dtype=dtype)
    if strategy == "block":
        padded = maybe_pad_tensor_for_block_quant(weight, (64, 32))
        boxes = padded.reshape(padded.shape[0] // 64, 64, padded.shape[1] // 32, 32)
        least, most = boxes.amin((1, 3)), boxes.amax((1, 3))
    else:
        least = weight.amin(1, keepdim=True) if strategy == "channel" else weight.amin()
        most = weight.amax(1, keepdim=True) if strategy == "channel" else weight.amax()
    scale, zero = calculate_qparams(least, most, args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    made = BaseCompressor.get_value_from_registry("float-quantized").compress(state, scheme)
    declared = {"config_groups": {"group_0": {"weights": more}}}
    model = {f"x.{key}": tensor.contiguous() for key, tensor in made.items()}
    found = written(opened(tmp_path, model, declared).parts_of("x.weight"), weight)
    assert found == {"codes": raw(made["weight"]), "scales": raw(made["weight_scale"])}


@pytest.mark.slow
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=str)
def test_written_anew_as_transformers_does(
    shape: tuple[int, ...], dtype: torch.dtype, scale_fmt: str | None, tmp_path: Path
) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="transformers is not installed")
    config = {"weight_block_size": [128, 128], "scale_fmt": scale_fmt}
    weight = some_weights(*shape, dtype=dtype)
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(**config))
    made = fp8.Fp8Quantize(quantizer).convert({"x.weight": weight})
    found = written(opened(tmp_path, made, config).parts_of("x.weight"), weight)
    assert found == {"codes": raw(made["x.weight"]), "scales": raw(made["x.weight_scale_inv"])}
