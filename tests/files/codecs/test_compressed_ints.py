"""Hold integers of compressed-tensors to their formula in fractions, to what they refuse, and to the package."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lib.files.words import coded, damaged, opened, signed, words
from torch import Tensor

from loratool import InputError
from loratool.files.checkpoint import Checkpoint
from loratool.files.codecs.codec import CodeFormat, Parts
from loratool.numerics.tensors import numbers_of

NAN, INF = float("nan"), float("inf")


def config(bits: int, group: int | None = None, form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    args = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def signed_codes(draw: random.Random, rows: int, columns: int, bits: int) -> list[list[int]]:
    half = 1 << (bits - 1)
    return [[draw.randrange(-half, half) for _ in range(columns)] for _ in range(rows)]


def packed(rows: list[list[int]], bits: int) -> Tensor:
    return words([[code + (1 << (bits - 1)) for code in row] for row in rows], bits)


def turned(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def pack(
    bits: int, shape: tuple[int, int], index: list[int], asymmetric: bool, seed: int = 7
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """A packed weight, and its numbers by fractions; index: the group of each column."""
    draw, (rows, columns), groups = random.Random(seed), shape, max(index) + 1
    codes = signed_codes(draw, rows, columns, bits)
    scales = torch.tensor([[draw.uniform(-0.01, 0.01) for _ in range(groups)] for _ in range(rows)]).bfloat16()
    zeros = signed_codes(draw, rows, groups, bits) if asymmetric else [[0] * groups] * rows
    exact = [[Fraction(scale) for scale in row] for row in scales.tolist()]
    weight = [
        [float((code - zeros[row][group]) * exact[row][group]) for code, group in zip(codes[row], index, strict=True)]
        for row in range(rows)
    ]
    tensors = {
        "x.weight_packed": packed(codes, bits),
        "x.weight_scale": scales,
        "x.weight_shape": torch.tensor(shape),
    }
    if asymmetric:
        tensors["x.weight_zero_point"] = packed(turned(zeros), bits).T.contiguous()
    return tensors, weight


def holds(checkpoint: Checkpoint, weight: list[list[float]]) -> None:
    """The numbers are these, in any run of rows, and give the codes and the bytes."""
    assert checkpoint["x.weight"].view(len(weight), -1).tolist() == weight
    codec, parts = coded(checkpoint, "x.weight")
    codec.check(parts)
    codes = codec.codes(parts, 0, len(weight))
    draw = random.Random(1)
    for _ in range(6):
        start, stop = sorted(draw.sample(range(len(weight) + 1), 2))
        values = codec.values(parts, start, codes[start:stop])
        assert values.tolist() == weight[start:stop]
        assert np.array_equal(codec.nearest(parts, start, values), codes[start:stop, : values.shape[1]])
    stored = bytearray(parts["codes"].spec.nbytes)
    for first, data in codec.places(parts, 0, codes):
        stored[first : first + len(data)] = data
    name = parts["codes"].name
    assert bytes(stored) == bytes(checkpoint.shard_of[name].read(name))


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_integers_read_their_formula(tmp_path: Path, bits: int, asymmetric: bool) -> None:
    tensors, weight = pack(bits, (37, 96), [at // 32 for at in range(96)], asymmetric)
    holds(opened(tmp_path / "groups", tensors, config(bits, 32)), weight)
    tensors, weight = pack(bits, (37, 45), [0] * 45, asymmetric)  # words padded in both directions
    holds(opened(tmp_path / "rows", tensors, config(bits)), weight)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_bits_of_a_padded_row_come_back(tmp_path: Path, bits: int) -> None:
    """Also those that are left of its last word, which no code of the weight has."""
    tensors, _ = pack(bits, (5, 45), [0] * 45, False)
    packed = tensors["x.weight_packed"]
    packed.copy_(torch.randint(-(2**31), 2**31, packed.shape, generator=torch.Generator().manual_seed(0)))
    codec, parts = coded(opened(tmp_path, tensors, config(bits)), "x.weight")
    ((first, data),) = codec.places(parts, 1, codec.codes(parts, 1, 5))
    assert (first, data) == (packed[0].nbytes, packed[1:].numpy().tobytes())


def test_packed_integers_by_hand(tmp_path: Path) -> None:
    """Three bits: -4 to 3, four times over in three words."""
    tensors = {
        "x.weight_packed": torch.tensor([[signed(0x88FAC688), signed(0xC688FAC6), signed(0xFAC688FA)]]).int(),
        "x.weight_scale": torch.tensor([[0.25]]).bfloat16(),
        "x.weight_shape": torch.tensor([1, 32]),
    }
    holds(opened(tmp_path, tensors, config(3)), [[code / 4 for code in range(-4, 4)] * 4])


def test_columns_in_groups_of_any_order(tmp_path: Path) -> None:
    index = random.Random(2).sample([at // 16 for at in range(64)], 64)
    tensors, weight = pack(4, (8, 64), index, True)
    tensors["x.weight_g_idx"] = torch.tensor(index, dtype=torch.int32)
    holds(opened(tmp_path / "any", tensors, config(4, 16)), weight)
    tensors, weight = pack(4, (8, 64), sorted(index), True)
    tensors["x.weight_g_idx"] = torch.tensor(sorted(index), dtype=torch.int32)
    holds(opened(tmp_path / "rising", tensors, config(4, 16)), weight)
    uneven = [at // 20 for at in range(64)]  # the last of four groups is shorter than the config's sixteen
    tensors, weight = pack(4, (8, 64), uneven, True)
    tensors["x.weight_g_idx"] = torch.tensor(uneven, dtype=torch.int32)
    holds(opened(tmp_path / "uneven", tensors, config(4, 16)), weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_stacks_are_their_matrices(tmp_path: Path, bits: int) -> None:
    each = [pack(bits, (20, 64), [at // 32 for at in range(64)], True, seed) for seed in (1, 2, 3)]
    tensors = {name: torch.stack([one[0][name] for one in each]) for name in each[0][0]}
    tensors["x.weight_shape"] = torch.tensor([3, 20, 64])
    holds(opened(tmp_path, tensors, config(bits, 32)), [row for _, weight in each for row in weight])


def plain(scales: Tensor, zeros: Tensor | None, bits: int = 8) -> tuple[dict[str, Tensor], list[list[float]]]:
    """A (6, 8) weight of a byte a code; scales and zero points that broadcast once repeated over their groups."""
    codes = signed_codes(random.Random(4), 6, 8, bits)
    tensors = {"x.weight": torch.tensor(codes, dtype=torch.int8), "x.weight_scale": scales}
    tensors |= {} if zeros is None else {"x.weight_zero_point": zeros}

    def spread(numbers: Tensor) -> list[list[Fraction]]:
        grid = numbers.double().reshape(numbers.shape if numbers.dim() == 2 else (-1, 1))
        high, wide = (-(-size // blocks) for size, blocks in zip((6, 8), grid.shape, strict=True))
        full = grid.repeat_interleave(high, 0)[:6].repeat_interleave(wide, 1)[:, :8]
        return [[Fraction(number) for number in row] for row in full.tolist()]

    scale, zero = spread(scales), spread(torch.zeros(1) if zeros is None else zeros)
    return tensors, [[float((codes[r][c] - zero[r][c]) * scale[r][c]) for c in range(8)] for r in range(6)]


SCALES = {
    "one": torch.tensor([0.3]),
    "scalar": torch.tensor(0.3),
    "rows": torch.linspace(0.1, 2, 6).reshape(6, 1),
    "modelopt": torch.linspace(0.1, 2, 6),
    "groups": torch.linspace(-1, 2, 24).reshape(6, 4).bfloat16(),
    "blocks": torch.linspace(0.1, 2, 6).reshape(3, 2).half(),
    "ragged": torch.linspace(0.1, 2, 4).reshape(2, 2),
}


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("scales", SCALES)
def test_plain_integers_read_their_formula(tmp_path: Path, scales: str, asymmetric: bool) -> None:
    zeros = torch.arange(SCALES[scales].numel(), dtype=torch.int8).reshape(SCALES[scales].shape) * 5 - 60
    tensors, weight = plain(SCALES[scales], zeros if asymmetric else None)
    more = {"ragged": {"block_structure": [3, 4]}, "blocks": {"block_structure": [2, 4]}}.get(scales, {})
    tensors |= {"x.input_scale": torch.ones(1), "x.bias": torch.ones(6)}
    group = 2 if scales == "groups" else None
    checkpoint = opened(tmp_path, tensors, config(8, group, form="int-quantized", **more))
    holds(checkpoint, weight)
    assert set(checkpoint.weights["x.weight"].tensors) == tensors.keys() - {"x.bias"}


def test_blocks_that_only_the_config_can_tell(tmp_path: Path) -> None:
    tensors, _ = plain(SCALES["ragged"], None)
    checkpoint = opened(tmp_path, tensors, config(8, form="int-quantized"))
    assert "x.weight_scale" in checkpoint.faults["x.weight"]


def test_fewer_bits_in_a_byte_stop_at_their_last_code(tmp_path: Path) -> None:
    tensors, _ = plain(SCALES["rows"], None, bits=4)
    codec, parts = coded(opened(tmp_path / "four", tensors, config(4, form="naive-quantized")), "x.weight")
    ends = np.full((6, 8), 1e9) * np.array([1, -1] * 4)
    assert codec.nearest(parts, 0, ends)[0].tolist() == [7, -8] * 4
    codec, parts = coded(opened(tmp_path / "eight", tensors, config(4)), "x.weight")  # its four bits are others'
    assert codec.nearest(parts, 0, ends)[0].tolist() == [127, -128] * 4


PACKED = pack(4, (16, 64), [at // 32 for at in range(64)], True)[0] | {
    "x.weight_g_idx": torch.tensor([0, 1] * 32, dtype=torch.int32)
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x.weight_scale", None),
        ("x.weight_shape", None),
        ("x.weight_scale", torch.ones(16, 2, dtype=torch.int8)),
        ("x.weight_scale", torch.ones(16, 3)),
        ("x.weight_scale", torch.ones(15, 2)),
        ("x.weight_shape", torch.tensor([16, 640])),
        ("x.weight_shape", torch.tensor([16, -64])),
        ("x.weight_shape", torch.tensor([8, 64])),
        ("x.weight_shape", torch.tensor([16, 64, 1])),
        ("x.weight_shape", torch.ones(2)),
        ("x.weight_zero_point", torch.zeros(3, 2, dtype=torch.int32)),
        ("x.weight_zero_point", torch.zeros(15, 2, dtype=torch.int8)),
        ("x.weight_g_idx", torch.zeros(63, dtype=torch.int32)),
        ("x.weight_g_idx", torch.zeros(64)),
    ],
)
def test_packed_integers_with_a_bad_companion_are_at_fault(tmp_path: Path, name: str, change: Any) -> None:
    checkpoint = opened(tmp_path, damaged(PACKED, name, change), config(4, 32))
    assert "x.weight" not in checkpoint.weights
    assert name in checkpoint.faults["x.weight_packed"]


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("x.weight_g_idx", (5, 2), "names a group that is not among"),
        ("x.weight_g_idx", (5, -1), "names a group that is not among"),
        ("x.weight_scale", (7, NAN), "nan or inf"),
        ("x.weight_scale", (7, -INF), "nan or inf"),
    ],
)
def test_a_number_that_none_writes_is_refused(tmp_path: Path, name: str, change: Any, what: str) -> None:
    checkpoint = opened(tmp_path, damaged(PACKED, name, change), config(4, 32))
    codec, parts = coded(checkpoint, "x.weight")
    with pytest.raises(InputError, match=what) as caught:
        codec.check(parts)
    assert name in str(caught.value)
    if name == "x.weight_g_idx":
        with pytest.raises(InputError, match=what):
            checkpoint["x.weight"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x.weight_scale", torch.ones(5, 1)),
        ("x.weight_scale", torch.ones(6, 1, dtype=torch.int32)),
        ("x.weight_zero_point", torch.zeros(6, 2, dtype=torch.int8)),
        ("x.weight_zero_point", torch.zeros(6, 1)),
        ("x.pre_quant_scale", torch.ones(8)),
    ],
)
def test_plain_integers_with_a_bad_companion_are_at_fault(tmp_path: Path, name: str, change: Any) -> None:
    tensors = plain(SCALES["rows"], None)[0] | {name: change}
    checkpoint = opened(tmp_path, tensors, config(8, form="int-quantized"))
    assert name in checkpoint.faults["x.weight"]


@pytest.mark.parametrize("other", ["bitmask", "compressed", "comfy_quant", "SCB"])
def test_the_codes_of_others_are_left_to_them(tmp_path: Path, other: str) -> None:
    tensors = plain(SCALES["rows"], None)[0] | {f"x.{other}": torch.zeros(1, dtype=torch.uint8)}
    checkpoint = opened(tmp_path, tensors, None)
    assert all(weight.codec.key != "int-quantized" for weight in checkpoint.weights.values())


def test_an_order_of_groups_beside_one_scale_of_all(tmp_path: Path) -> None:
    tensors = damaged(damaged(PACKED, "x.weight_zero_point", None), "x.weight_scale", torch.ones(1))
    fault = opened(tmp_path, tensors, config(4, 32)).faults["x.weight_packed"]
    assert fault == "x.weight_g_idx is beside x.weight_scale of (1,), which has no groups"


@pytest.mark.parametrize("other", ["bitmask", "scale_packed"])
def test_packed_codes_of_others_are_left_to_them(tmp_path: Path, other: str) -> None:
    checkpoint = opened(tmp_path, PACKED | {f"x.{other}": torch.zeros(1, dtype=torch.uint8)}, config(4, 32))
    assert not checkpoint.weights and not checkpoint.faults and list(checkpoint.coded) == ["x.weight"]


@pytest.mark.parametrize("odd", [{"num_bits": None}, {"num_bits": 16}, {"type": "float"}])
def test_groups_of_a_config_that_are_no_integers(tmp_path: Path, odd: dict[str, Any]) -> None:
    """They say nothing of integers, and the others do."""
    declared = config(4, 32)
    declared["config_groups"] = {"group_1": {"weights": {"num_bits": 8, **odd}}, **declared["config_groups"]}
    assert opened(tmp_path, PACKED, declared).weights["x.weight"].note == ""


def test_bits_of_tensors_win_over_the_config(tmp_path: Path) -> None:
    weight = opened(tmp_path, PACKED, config(8, 32)).weights["x.weight"]
    assert (weight.detail["bits"], weight.note) == (4, "the config says 8 bits, the tensors have 4")


def test_rotated_weights_are_at_fault(tmp_path: Path) -> None:
    rotated = {**config(4, 32), "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}
    assert "transform_config" in opened(tmp_path / "some", PACKED, rotated).faults["x.weight_packed"]
    assert not opened(tmp_path / "none", PACKED, {**rotated, "transform_config": {}}).faults


def written(codec: CodeFormat, parts: Parts, matrix: Tensor, step: int) -> dict[str, bytes]:
    """What the quantizer writes, tensor by tensor, `step` runs of its rows at a time."""
    quantizer = codec.quantizer(parts)
    assert quantizer is not None
    if quantizer.sees_all:
        for row in matrix:
            quantizer.see(numbers_of(row[None]))
    found = {role: bytearray(spec.nbytes) for role, spec in quantizer.specs().items()}
    each = step * int(np.lcm(quantizer.together, codec.row_multiple(parts)))
    for start in range(0, len(matrix), each):
        codes, pieces = quantizer.rows(start, numbers_of(matrix[start : start + each]))
        for role, first, data in pieces + [("codes", *place) for place in codec.places(parts, start, codes)]:
            found[role][first : first + len(data)] = data
    return {role: bytes(data) for role, data in found.items()}


@pytest.mark.parametrize("rows", [20, 64])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_stack_is_written_as_its_matrices_are(tmp_path: Path, bits: int, rows: int) -> None:
    each = [pack(bits, (rows, 64), [at // 32 for at in range(64)], True, seed) for seed in (1, 2, 3)]
    stack = {name: torch.stack([one[0][name] for one in each]) for name in each[0][0]}
    stack["x.weight_shape"] = torch.tensor([3, rows, 64])
    numbers = torch.randn(3 * rows, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = written(*coded(opened(tmp_path / "stack", stack, config(bits, 32)), "x.weight"), numbers, 1)
    parts = coded(opened(tmp_path / "one", each[0][0], config(bits, 32)), "x.weight")
    alone = [written(*parts, numbers[at * rows : (at + 1) * rows], 2) for at in range(3)]
    for role in ("codes", "scales", "zeros"):
        assert found[role] == b"".join(one[role] for one in alone)


def test_numbers_beyond_the_scales_are_refused(tmp_path: Path) -> None:
    tensors, _ = plain(SCALES["rows"].half(), None)
    codec, parts = coded(opened(tmp_path, tensors, config(8, form="int-quantized")), "x.weight")
    for number in (1e30, NAN, INF):
        with pytest.raises(InputError, match=r"x\.weight"):
            written(codec, parts, torch.full((6, 8), number), 1)


def numbers_of_all_sizes(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers, among them zeros, a row and a group of them, outliers and the least ones."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=draw) * torch.exp2(torch.randint(-12, 3, (rows, 1), generator=draw))
    found[3], found[5, :32], found[7, ::50] = 0, 0, 100
    found[9], found[11, 32:64], found[13] = found[9].abs() + 1, -0.0, -found[13].abs()
    found[15] *= 2.0**-130
    return found.to(dtype)


CASES = [("pack-quantized", strategy, bits) for strategy in ("group", "channel", "tensor") for bits in range(1, 9)]

CASES += [("int-quantized", strategy, 8) for strategy in ("group", "channel", "tensor", "block")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("form", "strategy", "bits"), CASES)
def test_the_package_writes_the_same_bytes_and_reads_the_same_numbers(
    tmp_path: Path, form: str, strategy: str, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    size = {"group": {"group_size": 32}, "block": {"block_structure": [16, 32]}}.get(strategy, {})
    args = QuantizationArgs(num_bits=bits, strategy=strategy, symmetric=symmetric, **size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    weight = numbers_of_all_sizes(80, 192, dtype, bits)
    high, wide = {"group": (1, 32), "block": (16, 32)}.get(strategy, (1, 192))
    tiles = weight.reshape(80 // high, high, 192 // wide, wide)
    bounds = (tiles.amin((1, 3)), tiles.amax((1, 3))) if strategy != "tensor" else (weight.amin(), weight.amax())
    scale, zero = calculate_qparams(*bounds, args)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    tensors = {f"x.{name}": tensor.contiguous() for name, tensor in state.items()}
    group = json.loads(scheme.model_dump_json())
    checkpoint = opened(
        tmp_path,
        tensors,
        {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}},
    )
    read = compressor.decompress({**state, "weight_scale": scale.double()}, scheme)["weight"]
    assert torch.equal(checkpoint["x.weight"], read)
    codec, parts = coded(checkpoint, "x.weight")
    stored = {role: bytes(checkpoint.shard_of[each.name].read(each.name)) for role, each in parts.tensors.items()}
    assert written(codec, parts, weight, 1) == stored
