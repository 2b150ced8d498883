"""Hold GPTQ and AWQ to their formulas in fractions, and to what they refuse."""

from __future__ import annotations

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

V1 = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False}

V2 = {**V1, "checkpoint_format": "gptq_v2"}

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}

OUT, IN, GROUPS = 64, 96, 3

Rows = list[list[int]]

NAN, INF = float("nan"), float("inf")

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of a word's nibbles in AWQ, from the lowest


def made(bits: int, index: list[int], seed: int = 1) -> tuple[Rows, Rows, Tensor, list[list[Fraction]]]:
    """Random codes (in, out), zero points and scales (groups, out), and the weight (out, in) in fractions."""
    draw = random.Random(seed)
    groups = max(index) + 1
    codes = [[draw.randrange(1 << bits) for _ in range(OUT)] for _ in index]
    zeros = [[draw.randrange(1, 1 << bits) for _ in range(OUT)] for _ in range(groups)]
    scales = torch.tensor([[draw.uniform(1e-4, 1e-2) for _ in range(OUT)] for _ in range(groups)]).half()
    exact = [[Fraction(scale) for scale in row] for row in scales.tolist()]
    weight = [[(codes[i][o] - zeros[group][o]) * exact[group][o] for i, group in enumerate(index)] for o in range(OUT)]
    return codes, zeros, scales, weight


def turned(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def gptq(bits: int, index: list[int], less: int) -> tuple[dict[str, Tensor], list[list[Fraction]]]:
    codes, zeros, scales, weight = made(bits, index)
    tensors = {
        "x.qweight": words(turned(codes), bits).T.contiguous(),
        "x.qzeros": words([[zero - less for zero in row] for row in zeros], bits),
        "x.scales": scales,
        "x.g_idx": torch.tensor(index, dtype=torch.int32),
    }
    return tensors, weight


IN_ORDER = [at * GROUPS // IN for at in range(IN)]

SHUFFLED = random.Random(3).sample(IN_ORDER, IN)


@pytest.mark.parametrize("index", [IN_ORDER, SHUFFLED, [0] * 40 + [1] * 24 + [2] * 32], ids=["order", "act", "uneven"])
@pytest.mark.parametrize(("config", "less"), [(V1, 1), (V2, 0)], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_reads_its_formula(tmp_path: Path, bits: int, config: dict[str, Any], less: int, index: list[int]) -> None:
    tensors, weight = gptq(bits, index, less)
    checkpoint = opened(tmp_path, tensors, {**config, "bits": bits})
    assert checkpoint["x.weight"].tolist() == [[float(number) for number in row] for row in weight]
    codec, parts = coded(checkpoint, "x.weight")
    codec.check(parts)
    assert parts.weight.note == ""
    for start, stop in ((0, 7), (31, 33), (32, 64), (5, 61)):
        codes = codec.codes(parts, start, stop)
        values = codec.values(parts, start, codes)
        assert values.tolist() == [[float(number) for number in row] for row in weight[start:stop]]
        assert np.array_equal(codec.nearest(parts, start, values), codes)


def test_gptq_without_g_idx_has_groups_in_order(tmp_path: Path) -> None:
    tensors, weight = gptq(4, IN_ORDER, 1)
    del tensors["x.g_idx"]
    found = opened(tmp_path, tensors, {**V1, "group_size": 32})["x.weight"]
    assert found.tolist() == [[float(number) for number in row] for row in weight]


def test_groups_in_order_that_no_size_makes(tmp_path: Path) -> None:
    tensors, _ = gptq(4, IN_ORDER, 1)
    rows = {"x.scales": torch.ones(5, OUT), "x.qzeros": torch.zeros(5, OUT // 8, dtype=torch.int32)}
    checkpoint = opened(tmp_path, {"x.qweight": tensors["x.qweight"], **rows}, {**V1, "group_size": 32})
    assert checkpoint.faults["x.qweight"] == f"x.scales has 5 groups, for a weight of {IN} columns"


def test_gptq_by_hand(tmp_path: Path) -> None:
    """Eight columns with the codes 0 to 7 in one word of each row, the zero point 5, stored as 4."""
    tensors = {
        "x.qweight": torch.full((1, 8), 0x76543210, dtype=torch.int32),
        "x.qzeros": torch.tensor([[0x44444444]], dtype=torch.int32),
        "x.scales": torch.full((1, 8), 0.5).half(),
        "x.g_idx": torch.zeros(8, dtype=torch.int32),
    }
    found = opened(tmp_path, tensors, {**V1, "group_size": -1})["x.weight"]
    assert found.tolist() == [[-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0]] * 8


def test_values_between_codes_go_to_even_codes_and_stop_at_the_last(tmp_path: Path) -> None:
    tensors = {
        "x.qweight": torch.zeros(1, 8, dtype=torch.int32),
        "x.qzeros": torch.full((1, 1), signed(0x88888888), dtype=torch.int32),
        "x.scales": torch.full((1, 8), 0.5).half(),
        "x.g_idx": torch.zeros(8, dtype=torch.int32),
    }
    codec, parts = coded(opened(tmp_path, tensors, V2), "x.weight")
    numbers = np.array([[0.0, 0.25, 0.75, -0.25, 99.0, -99.0, 0.26, NAN]])
    assert codec.nearest(parts, 0, numbers).tolist() == [[8, 8, 10, 8, 15, 0, 9, 8]]


GPTQ_TENSORS = gptq(4, SHUFFLED, 1)[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x.scales", None),
        ("x.qzeros", None),
        ("x.scales", torch.ones(GROUPS, OUT, dtype=torch.int32)),
        ("x.scales", torch.ones(GROUPS, OUT - 1)),
        ("x.scales", torch.ones(OUT)),
        ("x.qzeros", torch.zeros(GROUPS - 1, OUT // 8, dtype=torch.int32)),
        ("x.qzeros", torch.zeros(GROUPS, OUT // 8)),
        ("x.qzeros", torch.zeros(GROUPS, OUT // 8 - 1, dtype=torch.int32)),
        ("x.g_idx", torch.zeros(IN - 1, dtype=torch.int32)),
        ("x.g_idx", torch.zeros(IN)),
    ],
)
def test_gptq_with_a_companion_missing_or_misshapen_is_at_fault(tmp_path: Path, name: str, change: Any) -> None:
    checkpoint = opened(tmp_path, damaged(GPTQ_TENSORS, name, change), V1)
    assert "x.weight" not in checkpoint.weights
    assert name in checkpoint.faults["x.qweight"]


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("x.g_idx", (5, GROUPS), "names a group that is not among"),
        ("x.g_idx", (5, -1), "names a group that is not among"),
        ("x.qzeros", (2, -1), "programs read it as 0 or as 16"),
        ("x.scales", (7, NAN), "nan or inf"),
        ("x.scales", (7, INF), "nan or inf"),
    ],
)
def test_gptq_with_a_number_that_none_writes_is_refused(tmp_path: Path, name: str, change: Any, what: str) -> None:
    checkpoint = opened(tmp_path, damaged(GPTQ_TENSORS, name, change), V1)
    codec, parts = coded(checkpoint, "x.weight")
    with pytest.raises(InputError, match=what) as caught:
        codec.check(parts)
    assert name in str(caught.value)
    if name != "x.scales":
        with pytest.raises(InputError, match=what):
            checkpoint["x.weight"]


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (None, "no quantization config says"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:new"}, "'auto_round:new'"),
        ({"quant_method": "auto-round", "packing_format": 2}, "packing_format 2"),
        ({**V1, "checkpoint_format": "marlin"}, "'marlin'"),
    ],
)
def test_zero_points_of_an_unknown_format_are_not_guessed(tmp_path: Path, config: Any, what: str) -> None:
    checkpoint = opened(tmp_path, GPTQ_TENSORS, config)
    assert what in checkpoint.faults["x.qweight"]


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "intel/auto-round"])
@pytest.mark.parametrize("packing", [None, "auto", "auto_round:gptq", "auto_round:auto_gptq", "auto_round"])
def test_auto_round_says_how_zero_points_are_stored(tmp_path: Path, method: str, packing: str | None) -> None:
    tensors, weight = gptq(4, SHUFFLED, int(packing != "auto_round"))
    said = {"packing_format": packing} if packing else {}
    found = opened(tmp_path, tensors, {"quant_method": method, "bits": 4, **said})
    assert found["x.weight"].tolist() == [[float(number) for number in row] for row in weight]
    assert not found.weights["x.weight"].note


@pytest.mark.parametrize("key", ["rotation_config", "spinquant_config"])
def test_auto_rounds_rotated_weights_are_refused(tmp_path: Path, key: str) -> None:
    tensors, _ = gptq(4, SHUFFLED, 1)
    config = {"quant_method": "auto-round", "bits": 4, key: {"hadamard_type": "hadamard"}}
    assert f"the config's {key} says that it is rotated" in opened(tmp_path, tensors, config).faults["x.qweight"]


@pytest.mark.parametrize("packing", ["auto_round:awq", "auto_round:auto_awq"])
def test_auto_round_in_awqs_order(tmp_path: Path, packing: str) -> None:
    tensors, weight = awq()
    checkpoint = opened(tmp_path, tensors, {"quant_method": "auto-round", "bits": 4, "packing_format": packing})
    assert checkpoint["x.weight"].tolist() == [[float(number) for number in row] for row in weight]
    assert not checkpoint.weights["x.weight"].note


def test_tensors_win_over_the_config(tmp_path: Path) -> None:
    stated = opened(tmp_path / "bits", GPTQ_TENSORS, {**V1, "bits": 8}).weights["x.weight"]
    assert stated.detail["bits"] == 4
    assert stated.note == "the config says 8 bits, the tensors have 4"
    dynamic = {**V1, "bits": 8, "dynamic": {"+:x": {"bits": 4}}}
    assert opened(tmp_path / "dynamic", GPTQ_TENSORS, dynamic).weights["x.weight"].note == ""
    stated = opened(tmp_path / "awq", awq()[0], V1).weights["x.weight"]
    assert (stated.codec.key, stated.note) == ("awq", "the config says gptq, the tensors are AWQ's")


def awq() -> tuple[dict[str, Tensor], list[list[Fraction]]]:
    codes, zeros, scales, weight = made(4, IN_ORDER)

    def octets(rows: Rows) -> Tensor:
        return words([[row[8 * (at // 8) + PLACES[at % 8]] for at in range(OUT)] for row in rows], 4)

    return {"x.qweight": octets(codes), "x.qzeros": octets(zeros), "x.scales": scales}, weight


@pytest.mark.parametrize("config", [AWQ, {**AWQ, "version": "GEMM"}, None], ids=["gemm", "GEMM", "none"])
def test_awq_reads_its_formula(tmp_path: Path, config: Any) -> None:
    tensors, weight = awq()
    checkpoint = opened(tmp_path, tensors, config and {**config, "group_size": 32})
    assert checkpoint["x.weight"].tolist() == [[float(number) for number in row] for row in weight]
    codec, parts = coded(checkpoint, "x.weight")
    codec.check(parts)
    for start, stop in ((0, 7), (8, 16), (5, 61)):
        codes = codec.codes(parts, start, stop)
        values = codec.values(parts, start, codes)
        assert values.tolist() == [[float(number) for number in row] for row in weight[start:stop]]
        assert np.array_equal(codec.nearest(parts, start, values), codes)


def test_awq_by_hand(tmp_path: Path) -> None:
    """The codes 0 to 7 of eight rows in one word, zero points of 3."""
    tensors = {
        "x.qweight": torch.full((2, 1), 0x75316420, dtype=torch.int32),
        "x.qzeros": torch.full((1, 1), 0x33333333, dtype=torch.int32),
        "x.scales": torch.full((1, 8), 0.5).half(),
    }
    found = opened(tmp_path, tensors, AWQ)["x.weight"]
    assert found.tolist() == [[each / 2, each / 2] for each in range(-3, 5)]


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "llm-awq"])
def test_other_versions_of_awq_are_not_read(tmp_path: Path, version: str) -> None:
    for which, tensors in (("awq", awq()[0]), ("gptq", GPTQ_TENSORS)):
        checkpoint = opened(tmp_path / which, tensors, {**AWQ, "version": version})
        assert "x.weight" not in checkpoint.weights
        assert checkpoint.coded.keys() == {"x.weight"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x.scales", None),
        ("x.qzeros", None),
        ("x.scales", torch.ones(GROUPS, OUT // 2)),
        ("x.qzeros", torch.zeros(GROUPS + 1, OUT // 8, dtype=torch.int32)),
        ("x.qzeros", torch.zeros(GROUPS, OUT // 8)),
    ],
)
def test_awq_with_a_companion_missing_or_misshapen_is_at_fault(tmp_path: Path, name: str, change: Any) -> None:
    checkpoint = opened(tmp_path, damaged(awq()[0], name, change), AWQ)
    assert "x.weight" not in checkpoint.weights
    assert name in checkpoint.faults["x.qweight"]


def test_awq_with_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    codec, parts = coded(opened(tmp_path, damaged(awq()[0], "x.scales", (9, NAN)), AWQ), "x.weight")
    with pytest.raises(InputError, match=r"x\.scales"):
        codec.check(parts)
