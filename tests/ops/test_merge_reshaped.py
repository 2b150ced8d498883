"""Merge into classes of transformers that split, join or rename what the file has, as PEFT does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reshaped_models import hold
from tiny import build


def minimax_m3_vl(config: Any) -> None:
    config.merged_hidden_size, config.projector_hidden_size = 64, 48
    config.text_config.mlp_layer_types = ["dense", "sparse"]


def step3p7(config: Any) -> None:
    config.vision_config.mlp_ratio = 1.5


def dory(config: Any) -> None:
    config.num_hidden_layers = config.n_input_layers + config.n_recurrent_layers + config.n_output_layers


def dots3_note_text(config: Any) -> None:
    config.num_key_value_heads = config.num_attention_heads


def inkling2(config: Any) -> None:
    config.get_text_config().unpadded_vocab_size = 300


Case = tuple[str, Callable[[Any], None] | None, str]  # table, what changes the config, modules without factors

CASES: dict[str, Case] = {
    "blip": ("image", None, "$^"),
    "deepseek_ocr2": ("image", None, "$^"),
    "dory": ("causal", dory, "$^"),
    "dots3_note_text": ("causal", dots3_note_text, "$^"),
    "hrm_text": ("causal", None, "$^"),
    "inkling2": ("image", inkling2, "experts.gate_up_proj"),
    "inkling2_loop_text": ("causal", inkling2, "experts.gate_up_proj"),
    "inkling2_text": ("causal", inkling2, "experts.gate_up_proj"),
    "inkling_text": ("causal", None, "$^"),
    "kimi_k25": ("image", None, r"vision_tower.*\.[qk]_proj"),
    "lara_mini": ("causal", None, "$^"),
    "minimax_m3_vl": ("image", minimax_m3_vl, "$^"),
    "pi0": ("image", None, "$^"),
    "qianfan_ocr": ("image", None, "$^"),
    "sarvam_moe": ("causal", None, "$^"),
    "unlimited_ocr": ("image", None, "$^"),
    "step3p7": ("image", step3p7, r"vision_model.*\.[qk]_proj"),
}

# One of each mechanism
QUICK = {"sarvam_moe", "minimax_m3_vl"}


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=[] if t in QUICK else pytest.mark.slow) for t in CASES])
def test_merge_is_pefts(model_type: str, tmp_path: Path) -> None:
    table, fix, leave = CASES[model_type]
    kind, model = build(table, model_type)
    if fix:
        fix(model.config)
        model = kind._from_config(model.config).float()
    hold(kind, model, tmp_path, leave)
