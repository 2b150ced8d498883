"""Hold bitsandbytes' formats against their formulas in fractions, and their writers against bitsandbytes."""

from __future__ import annotations

import json
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

# Sixteen numbers of float32 in an order of their own, one of them twice, as zero is in fp4
TABLE = torch.tensor([0, 0.1, 0.7, 1, 0.3, 0.5, 0.2, 0.25, 0, -0.1, -0.7, -1, -0.3, -0.5, -0.2, -0.25])


def bytes_of(state: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def four_bits(*shape: int, block: int = 64, kind: str = "nf4", **more: Any) -> dict[str, Tensor]:
    size = math.prod(shape)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape), **more}
    return {
        "x.weight": random_bytes(size // 2, 1),
        "x.weight.absmax": torch.rand(-(-size // block), generator=torch.Generator().manual_seed(1)),
        "x.weight.quant_map": TABLE,
        f"x.weight.quant_state.bitsandbytes__{kind}": bytes_of(state),
    }


def nested(*shape: int, offset: float = 0.3, block: int = 64) -> dict[str, Tensor]:
    blocks = -(-math.prod(shape) // block)
    more = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    seeded = torch.Generator().manual_seed(2)
    return four_bits(*shape, block=block, **more) | {
        "x.weight.absmax": random_bytes(blocks, seed=3),
        "x.weight.nested_absmax": torch.rand(-(-blocks // 256), generator=seeded),
        "x.weight.nested_quant_map": torch.rand(256, generator=seeded).sort().values * 2 - 1,
    }


def expected(tensors: dict[str, Tensor], absmax: list[float], rows: int, columns: int, block: int) -> list[list[float]]:
    flat = [n for byte in tensors["x.weight"].flatten().tolist() for n in (byte >> 4, byte & 15)]
    table = TABLE.tolist()
    reals = [float(Fraction(table[n]) * Fraction(absmax[i // block])) for i, n in enumerate(flat)]
    return [reals[row * columns : (row + 1) * columns] for row in range(rows)]


@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(4, 64, 64), (3, 40, 64), (6, 33, 64), (2, 256, 64), (5, 8, 32)]
)
def test_blocks_are_flat_and_cross_rows(tmp_path: Path, rows: int, columns: int, block: int) -> None:
    tensors = four_bits(rows, columns, block=block)
    parts = only(stored(tmp_path, tensors))
    all_rows = expected(tensors, tensors["x.weight.absmax"].tolist(), rows, columns, block)
    assert np.array_equal(numbers(parts), all_rows)
    for start in range(rows):
        for stop in range(start + 1, rows + 1):
            assert np.array_equal(numbers(parts, start, stop), all_rows[start:stop])
    codec = codec_of(parts)
    step, data = codec.row_multiple(parts), bytearray(raw(tensors["x.weight"]))
    for start in range(0, rows, step):
        for first, part in codec.places(parts, start, codec.codes(parts, start, start + step)):
            assert data[first : first + len(part)] == part
            data[first : first + len(part)] = bytes(len(part))
    assert not any(data)


def test_nested_absmax_is_rounded_to_float32_twice(tmp_path: Path) -> None:
    tensors = nested(20, 1000)
    table, outer = (tensors[f"x.weight.nested_{end}"].tolist() for end in ("quant_map", "absmax"))
    # products and sums of two numbers of float32 are exact in float64, or rounded there harmlessly
    product = [float(np.float32(table[n] * outer[j // 256])) for j, n in enumerate(tensors["x.weight.absmax"].tolist())]
    absmax = [float(np.float32(x + float(np.float32(0.3)))) for x in product]
    parts = only(stored(tmp_path, tensors))
    all_rows = expected(tensors, absmax, 20, 1000, 64)
    assert np.array_equal(numbers(parts), all_rows)
    assert np.array_equal(numbers(parts, 17, 18), all_rows[17:18])
    assert set(parts.weight.tensors) == set(tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_may_be_called_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = four_bits(4, 64)
    plain = tensors["x.weight"]
    parts = only(stored(tmp_path, tensors | {"x.weight": plain.flatten().view(dtype)[:, None]}))
    assert np.array_equal(numbers(parts), expected(tensors, tensors["x.weight.absmax"].tolist(), 4, 64, 64))


STATE = "x.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (STATE, None),
        (STATE, bytes_of({"quant_type": "nf4", "blocksize": 64, "shape": [20, 1000]})[:-9]),
        (STATE, bytes_of({"blocksize": 64})),
        (STATE, bytes_of({"blocksize": 64, "shape": [20, 999]})),
        (STATE, bytes_of({"blocksize": 0, "shape": [20, 1000]})),
        (STATE, bytes_of({"blocksize": 1 << 60, "shape": [20, 1000]})),
        (STATE, bytes_of({"blocksize": 64, "shape": [20, 1000], "padding": " " * (1 << 16)})),
        (STATE, bytes_of({"blocksize": 64, "shape": [20, 1000], "nested_blocksize": 256})),
        (STATE, bytes_of({"blocksize": 64, "shape": [20, 1000], "nested_blocksize": 256, "nested_offset": math.nan})),
        (STATE, bytes_of({"blocksize": 64, "shape": [20, 1000], "nested_blocksize": 256, "nested_offset": 10**400})),
        ("x.weight.absmax", None),
        ("x.weight.absmax", torch.zeros(312).byte()),
        ("x.weight.absmax", torch.zeros(313)),
        ("x.weight.quant_map", None),
        ("x.weight.quant_map", torch.zeros(15)),
        ("x.weight.nested_absmax", None),
        ("x.weight.nested_absmax", torch.zeros(1)),
        ("x.weight.nested_quant_map", None),
        ("x.weight.nested_quant_map", torch.zeros(255)),
    ],
)
def test_a_wrong_companion_makes_no_weight(tmp_path: Path, name: str, other: Tensor | None) -> None:
    tensors = nested(20, 1000)
    del tensors[name]
    checkpoint = stored(tmp_path, tensors | ({} if other is None else {name: other}))
    assert not checkpoint.weights
    assert name in checkpoint.faults["x.weight"]


@pytest.mark.parametrize("name", ["x.weight.nested_absmax", "x.weight.nested_quant_map", "x.weight.quant_map"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_scales_must_be_finite(tmp_path: Path, name: str, wrong: float) -> None:
    tensors = nested(20, 1000)
    tensors[name] = tensors[name].clone()
    tensors[name][1] = wrong
    parts = only(stored(tmp_path, tensors))
    with pytest.raises(InputError) as error:
        codec_of(parts).check(parts)
    assert error.value.culprit == name


def int8(rows: int = 3, columns: int = 8) -> dict[str, Tensor]:
    scb = torch.rand(rows, generator=torch.Generator().manual_seed(1))
    codes = random_bytes(rows, columns).view(torch.int8)
    return {"x.weight": codes, "x.SCB": scb, "x.weight_format": torch.tensor(0).byte()}


def test_int8_is_the_product_divided_by_127(tmp_path: Path) -> None:
    tensors = int8()
    scb = tensors["x.SCB"].tolist()
    reals = [[float(q * Fraction(scb[i]) / 127) for q in row] for i, row in enumerate(tensors["x.weight"].tolist())]
    assert np.array_equal(numbers(only(stored(tmp_path, tensors))), reals)


@pytest.mark.parametrize(
    ("name", "other"),
    [("x.SCB", None), ("x.SCB", torch.ones(4)), ("x.weight_format", torch.tensor(1).byte())],
)
def test_wrong_int8_makes_no_weight(tmp_path: Path, name: str, other: Tensor | None) -> None:
    tensors = int8()
    del tensors[name]
    checkpoint = stored(tmp_path, tensors | ({} if other is None else {name: other}))
    assert not checkpoint.weights
    assert name in checkpoint.faults["x.weight"]


def test_scb_must_be_finite(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, int8() | {"x.SCB": torch.tensor([1, math.inf, 1])}))
    with pytest.raises(InputError) as error:
        codec_of(parts).check(parts)
    assert error.value.culprit == "x.SCB"


def test_weights_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, int8()))
    with pytest.raises(InputError, match="float16"):
        written(parts, torch.full((3, 8), 1e5))


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (10, 40), (16, 33)])
@pytest.mark.parametrize("make", [four_bits, nested])
def test_bytes_do_not_depend_on_the_rows_of_a_call(tmp_path: Path, make: Any, rows: int, columns: int) -> None:
    parts = only(stored(tmp_path, make(rows, columns)))
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).bfloat16()
    together = math.lcm(64, columns) // columns
    for step in range(together, rows + 1, together):
        assert written(parts, w, step) == written(parts, w)


def test_a_nested_state_has_one_length_for_every_offset(tmp_path: Path) -> None:
    parts = only(stored(tmp_path, nested(8, 64)))
    states = []
    for size in (0.0, 1.0, 1e-38, 1.1754943508222875e-38, 3.4e38, 0.1):
        found = written(parts, torch.full((8, 64), size))["quant_state"]
        assert json.loads(found)["nested_offset"] == float(np.float32(size))
        states.append(found)
    assert len({len(each) for each in states}) == 1


def bitsandbytes() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes import functional

    return functional


def hard_weights(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    seeded = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=seeded) * 10.0 ** torch.randint(-4, 3, (rows, 1), generator=seeded)
    w[0], w[1, ::2], w[2, ::3] = 0, 0, -0.0
    w[3] = torch.linspace(-1, 1, columns)
    return w.to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(600, 576), (50, 40), (50, 33)])
def test_bytes_of_4_bits_are_those_of_bitsandbytes(
    tmp_path: Path, rows: int, columns: int, compress: bool, kind: str, dtype: torch.dtype
) -> None:
    functional = bitsandbytes()
    w = hard_weights(rows, columns, dtype)
    codes, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=compress, quant_type=kind)
    companions = state.as_dict(packed=True)
    parts = only(stored(tmp_path, {"x.weight": codes, **{f"x.weight.{k}": v for k, v in companions.items()}}))
    plain = functional.quantize_4bit(w, blocksize=64, quant_type=kind)[1].absmax.double()
    found = written(parts, w)
    back = functional.QuantState.from_dict(
        {
            **{k: v for k, v in companions.items() if "quant_state" not in k},
            f"quant_state.bitsandbytes__{kind}": torch.tensor(list(found["quant_state"]), dtype=torch.uint8),
        },
        torch.device("cpu"),
    )
    assert back.shape == state.shape
    expected = {role: raw(state_tensor) for role, state_tensor in companions.items() if "quant_state" not in role}
    if compress:  # the exact mean, of which bitsandbytes' own is a rounding
        offset = np.float32(math.fsum(plain.tolist()) / len(plain))
        assert float(back.offset) == float(offset)
        assert abs(float(state.offset) - float(offset)) <= 1e-6 * float(offset)
        inner, outer = functional.quantize_blockwise(plain.float() - torch.tensor(offset), blocksize=256)
        expected |= {"absmax": raw(inner), "nested_absmax": raw(outer.absmax)}
    del found["quant_state"]
    assert found == expected | {"codes": raw(codes)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_of_int8_are_those_of_bitsandbytes(tmp_path: Path, dtype: torch.dtype) -> None:
    functional = bitsandbytes()
    w = hard_weights(600, 576, dtype)
    codes, scb, _ = functional.int8_vectorwise_quant(w.half())
    parts = only(stored(tmp_path, {"x.weight": codes, "x.SCB": scb, "x.weight_format": torch.tensor(0).byte()}))
    assert written(parts, w, 100) == {"codes": raw(codes), "scales": raw(scb), "weight_format": b"\0"}


@pytest.mark.slow
def test_every_step_of_nested_absmax_is_that_of_bitsandbytes(tmp_path: Path) -> None:
    functional = bitsandbytes()
    from loratool.files.codecs.bitsandbytes import NestedQuantizer

    values = torch.linspace(-1, 1, 3 * 65536 + 7)
    padded = torch.nn.functional.pad(values, (0, -len(values) % 255)).reshape(-1, 255)
    blocks = torch.cat((torch.ones(len(padded), 1), padded), dim=1)  # the first is the absmax of each
    codes, state = functional.quantize_blockwise(blocks.flatten(), blocksize=256)
    parts = only(stored(tmp_path, nested(8, 64) | {"x.weight.nested_quant_map": state.code}))
    quantizer = codec_of(parts).quantizer(parts)
    assert isinstance(quantizer, NestedQuantizer)
    found = quantizer.encoded_absmax(blocks.flatten().numpy())
    assert np.array_equal(found[0], codes.numpy())
    assert np.array_equal(found[1], state.absmax.numpy())
