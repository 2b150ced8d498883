"""Hold the fusion groups: what a runtime keeps as one matrix is rewritten as one, and nothing beside it."""

from __future__ import annotations

import time
from collections.abc import Collection
from itertools import product

import pytest

from loratool.architectures.fusion_groups import FUSED, close_under_fusion, experts_module, fused_paths


def within(block: str, names: str) -> list[str]:
    return [f"{block}.{name}" for name in names.split()]


ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
LLAMA = within(ATTENTION, "q_proj k_proj v_proj o_proj") + within(MLP, "gate_proj up_proj down_proj")
DEEPSEEK = within(ATTENTION, "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj")
QWEN35 = within("model.layers.1.linear_attn", "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj")
KIMI = within(ATTENTION, "q_proj k_proj v_proj b_proj f_a_proj f_b_proj o_proj")
MIXTRAL = [f"model.layers.1.block_sparse_moe.experts.{e}.w{i}" for e in range(4) for i in (1, 2, 3)]
STACKED = within("model.layers.1.mlp.experts", "gate_up_proj down_proj")
GRANITE = within("model.layers.1.block_sparse_moe", "input_linear output_linear")

# coded modules, the touched one, what else has to be rewritten: by vLLM's `packed_modules_mapping` of these models
CASES: list[tuple[list[str], str, list[str]]] = [
    (LLAMA, f"{ATTENTION}.k_proj", within(ATTENTION, "q_proj v_proj")),
    (LLAMA, f"{ATTENTION}.o_proj", []),
    (LLAMA, f"{MLP}.gate_proj", [f"{MLP}.up_proj"]),
    (LLAMA, f"{MLP}.down_proj", []),
    (DEEPSEEK, f"{ATTENTION}.q_a_proj", [f"{ATTENTION}.kv_a_proj_with_mqa"]),
    (DEEPSEEK, f"{ATTENTION}.q_b_proj", []),
    (QWEN35, "model.layers.1.linear_attn.in_proj_z", ["model.layers.1.linear_attn.in_proj_qkv"]),
    (QWEN35, "model.layers.1.linear_attn.in_proj_a", ["model.layers.1.linear_attn.in_proj_b"]),
    (KIMI, f"{ATTENTION}.f_a_proj", within(ATTENTION, "q_proj k_proj v_proj b_proj")),
    (MIXTRAL, MIXTRAL[4], [each for each in MIXTRAL if each != MIXTRAL[4]]),
    (STACKED, STACKED[0], STACKED[1:]),
    (GRANITE, GRANITE[1], GRANITE[:1]),
    (within("layers.0.feed_forward", "w1 w2 w3"), "layers.0.feed_forward.w3", ["layers.0.feed_forward.w1"]),
    (within("h.0.mlp", "c_fc_0 c_fc_1 c_proj"), "h.0.mlp.c_fc_1", ["h.0.mlp.c_fc_0"]),
    (within(MLP, "gate_up_proj down_proj"), f"{MLP}.gate_up_proj", []),
]


@pytest.mark.parametrize(("coded", "touched", "others"), CASES, ids=[f"{i}" for i in range(len(CASES))])
@pytest.mark.parametrize("prefix", ["", "text_encoder/"], ids=["model", "pipeline"])
def test_a_touched_module_asks_for_its_group(coded: list[str], touched: str, others: list[str], prefix: str) -> None:
    other_layers = [each.replace(".1.", ".11.").replace(".0.", ".10.") for each in coded]
    other_component = [f"text_encoder_2/{each}" for each in coded]
    every = [prefix + each for each in coded + other_layers] + other_component
    expected = {prefix + each: prefix + touched for each in others}
    assert close_under_fusion({prefix + touched}, every) == expected


def test_what_is_not_coded_is_not_rewritten_and_still_ties() -> None:
    coded = {f"{ATTENTION}.v_proj", f"{ATTENTION}.o_proj"}
    assert close_under_fusion({f"{ATTENTION}.q_proj"}, coded) == {f"{ATTENTION}.v_proj": f"{ATTENTION}.q_proj"}


def test_shared_experts_are_no_routed_experts() -> None:
    shared = within("model.layers.1.mlp.shared_experts", "gate_proj up_proj down_proj")
    routed = [f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(3)]
    assert close_under_fusion({shared[0]}, shared + routed) == {shared[1]: shared[0]}
    assert set(close_under_fusion({routed[0]}, shared + routed)) == set(routed[1:])


@pytest.mark.parametrize(("fused", "members"), FUSED, ids=[f"{name} {members[0]}" for name, members in FUSED])
def test_each_row_is_closed_and_closed_sets_stay(fused: str, members: Collection[str]) -> None:
    coded = within("block", " ".join(members))
    for touched in coded:
        closed = {touched, *close_under_fusion({touched}, coded)}
        assert closed == set(coded)
        assert close_under_fusion(closed, coded) == {}
    assert f"block.{fused}" in set(fused_paths(coded))


def test_fused_names_are_the_widest_of_complete_groups() -> None:
    assert list(fused_paths(LLAMA)) == [f"{ATTENTION}.qkv_proj", f"{MLP}.gate_up_proj"]
    assert list(fused_paths(within(ATTENTION, "k_proj v_proj"))) == [f"{ATTENTION}.kv_proj"]
    assert list(fused_paths(within(ATTENTION, "q_proj k_proj"))) == []
    assert set(fused_paths(["w1", "w3"])) == {"gate_up_proj", "w13"}


@pytest.mark.parametrize(
    ("module", "experts"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj", "model.layers.3.mlp.experts"),
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts"),
        ("model.layers.3.mlp.experts", "model.layers.3.mlp.experts"),
        ("experts.0.w1", "experts"),
        ("model.layers.3.mlp.shared_experts.gate_proj", None),
        ("model.layers.3.mlp.gate", None),
    ],
)
def test_experts_have_one_module_a_layer(module: str, experts: str | None) -> None:
    assert experts_module(module) == experts


def test_a_deepseek_takes_no_time() -> None:
    """58 layers of 256 experts: what is compared with each other must be one layer, not the model."""
    parts = ("gate_proj", "up_proj", "down_proj")
    coded = [f"model.layers.{i}.mlp.experts.{e}.{part}" for i, e, part in product(range(58), range(256), parts)]
    started = time.perf_counter()
    found = close_under_fusion({name for name in coded if ".experts.17." in name}, coded)
    assert len(found) == 58 * 255 * 3
    assert time.perf_counter() - started < 2
