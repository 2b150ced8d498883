"""Merge into classes of transformers that split, join or rename what the file has, as PEFT does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reshaped_models import hold, transformers
from tiny import build, shrink


def deepseek_ocr2(config: Any) -> None:
    text = config.text_config
    text.mlp_layer_types, text.num_experts_per_tok = ["dense", "sparse"], 2


def dory(config: Any) -> None:
    config.n_input_layers = config.n_recurrent_layers = config.n_output_layers = 1
    config.num_hidden_layers, config.layer_types = 3, ["sliding_attention", "full_attention", "sliding_attention"]


def dots3_note_text(config: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "vocab_size": 320}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 24, "index_head_dim": 16}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "num_experts_per_tok": 2, "pad_token_id": 0}
    return type(config)(**sizes, **counts, **heads, **ranks)


def inkling2(config: Any) -> None:
    config.get_text_config().unpadded_vocab_size = 300


def minimax_m3_vl(config: Any) -> None:
    config.merged_hidden_size, config.projector_hidden_size = 64, 48
    config.text_config.mlp_layer_types = ["dense", "sparse"]


def step3p7(config: Any) -> None:
    config.vision_config.mlp_ratio = 1.5


def swiglu(config: Any) -> None:
    config.use_swiglu_ffn = True


Fix = Callable[[Any], Any]  # changes a config in place, or returns another

# model type -> table of classes or the class, what makes its config fit, the modules that get no factors
CASES: dict[str, tuple[str, Fix, str]] = {
    "blip": ("image", vars, "$^"),
    "deepseek_ocr2": ("DeepseekOcr2ForConditionalGeneration", deepseek_ocr2, "$^"),
    "dinov2": ("Dinov2Model", swiglu, "$^"),
    "dory": ("causal", dory, "$^"),
    "dots3_note_text": ("Dots3NoteForCausalLM", dots3_note_text, "$^"),
    "gte": ("GteModel", vars, "$^"),
    "hrm_text": ("causal", vars, "$^"),
    "inkling2": ("image", inkling2, r"experts\.gate_up_proj"),
    "inkling2_loop_text": ("causal", inkling2, r"experts\.gate_up_proj"),
    "inkling2_text": ("causal", inkling2, r"experts\.gate_up_proj"),
    "inkling_text": ("causal", vars, "$^"),
    "jina_embeddings_v3": ("JinaEmbeddingsV3Model", vars, "$^"),
    "kimi_k25": ("image", vars, r"vision_tower.*\.[qk]_proj"),
    "lara_mini": ("causal", vars, "$^"),
    "minimax_m3_vl": ("image", minimax_m3_vl, "$^"),
    "molmo2": ("Molmo2ForConditionalGeneration", vars, "$^"),
    "nomic_bert": ("NomicBertModel", vars, "$^"),
    "pi0": ("image", vars, "$^"),
    "qianfan_ocr": ("image", vars, "$^"),
    "radio": ("RadioModel", vars, "$^"),
    "sarvam_moe": ("causal", vars, "$^"),
    "step3p7": ("image", step3p7, r"vision_model.*\.[qk]_proj"),
    "unlimited_ocr": ("image", vars, "$^"),
}

# One of each mechanism: rows of a fused matrix, a matrix of several, and names that are only others
QUICK = {"sarvam_moe", "minimax_m3_vl", "gte", "dory"}


def make(model_type: str) -> tuple[Any, Any]:
    """Return (class, model) of a case, with random weights."""
    table, fix, _ = CASES[model_type]
    if table in ("causal", "image"):
        kind, model = build(table, model_type)
        config = model.config
    else:
        kind = getattr(transformers, table)
        config = kind.config_class()
        shrink(config)
    fixed = fix(config)
    config = fixed if isinstance(fixed, transformers.PreTrainedConfig) else config
    torch.manual_seed(0)
    return kind, kind._from_config(config).float()


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=[] if t in QUICK else pytest.mark.slow) for t in CASES])
def test_merge_is_pefts(model_type: str, tmp_path: Path) -> None:
    hold(*make(model_type), tmp_path, CASES[model_type][2])
