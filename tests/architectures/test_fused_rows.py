"""Hold the fused matrices against hand-counted rows; `test_merge_reshaped` holds them against transformers."""

from __future__ import annotations

import math

import pytest

from loratool.architectures.fused_rows import RowPart, row_parts
from loratool.errors import InputError

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 3,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 5,
}
CASES = [
    (
        ("sarvam_moe", "model.layers.0.attention.query_key_value.weight", HEADS, 64),
        [("self_attn.q_proj", 0, 32, 0, 32), ("self_attn.k_proj", 32, 48, 0, 16), ("self_attn.v_proj", 48, 64, 0, 16)],
    ),
    (
        ("sarvam_moe", "model.layers.0.attention.query_key_value.bias", HEADS, 16),
        [
            ("self_attn.q_proj.bias", 0, 8, 0, 8),
            ("self_attn.k_proj.bias", 8, 12, 0, 4),
            ("self_attn.v_proj.bias", 12, 16, 0, 4),
        ],
    ),
    (  # qkv has 6 + 6 + 20 rows
        ("lara_mini", "model.layers.0.linear_attn.in_proj", DELTA, 60),
        [
            ("linear_attn.in_proj_qkv", 0, 32, 0, 32),
            ("linear_attn.in_proj_z", 32, 52, 0, 20),
            ("linear_attn.in_proj_b", 52, 56, 0, 4),
            ("linear_attn.in_proj_a", 56, 60, 0, 4),
        ],
    ),
    (
        ("minimax_m3_vl", "language_model.model.layers.0.block_sparse_moe.shared_experts.up_proj.weight", {}, 24),
        [("mlp.shared_experts.gate_up_proj", 0, 24, 24, 48)],
    ),
]


@pytest.mark.parametrize(("case", "expected"), CASES)
def test_the_rows_of_each_module(case, expected):
    model_type, name, config, rows = case
    front = "model.language_model.layers.0." if name.startswith("language_model") else "model.layers.0."
    found = row_parts(name, (model_type,), {model_type: config}, rows)
    assert found == tuple(RowPart(front + module, *numbers) for module, *numbers in expected)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("sarvam_moe", "model.layers.0.attention.dense.weight"),
        ("sarvam_mla", "model.layers.0.attention.query_key_value.weight"),
        ("hrm_text", "model.layers.0.self_attn.gqkv_proj.weight"),
        ("minimax_m3_vl", "language_model.model.layers.0.block_sparse_moe.shared_experts.gate_up_proj.weight"),
    ],
)
def test_other_tensors_are_not_fused(model_type, name):
    assert row_parts(name, (model_type,), {}, 64) == ()


NO_COUNTS = (4.0, -1, 0, True, None, "2", [2], {}, math.nan, math.inf, 10**400, 2**63)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "does not tell"),
        ({**HEADS, "num_attention_heads": 7}, "64 rows"),
        *(({**HEADS, "num_key_value_heads": value}, "does not tell") for value in NO_COUNTS),
        ({"num_attention_heads": 10**400, "num_key_value_heads": 1.5}, "does not tell"),
    ],
)
def test_a_config_that_does_not_give_the_rows(config, said):
    with pytest.raises(InputError, match=said):
        row_parts("model.layers.0.attention.query_key_value.weight", ("sarvam_moe",), {"sarvam_moe": config}, 64)


def test_sizes_that_are_too_long_to_print_are_no_counts():
    config = dict.fromkeys(
        ("linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim", "linear_value_head_dim"), 10**4000
    )
    with pytest.raises(InputError, match="does not tell"):
        row_parts("model.layers.0.linear_attn.in_proj.weight", ("lara_mini",), {"lara_mini": config}, 64)


def test_rows_in_another_order_are_told():
    name = "vision_tower.encoder.blocks.0.wqkv.weight"
    assert [part.permuted for part in row_parts(name, ("kimi_k25",), {}, 96)] == [True, True, False]
