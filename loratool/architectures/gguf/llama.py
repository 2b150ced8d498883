"""Architectures of plain decoders with Llama's names of layers."""

from __future__ import annotations

from dataclasses import replace

from .table import Architecture, Weight

LAYER = "model.layers.{n}"

ENDS = (
    Weight("token_embd", "model.embed_tokens"),
    Weight("output_norm", "model.norm"),
    Weight("output", "lm_head"),
)

NORMLESS_ENDS = (ENDS[0], ENDS[2])  # for models with norms without weights

NORMS = (
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm"),
    Weight("blk.{n}.ffn_norm", f"{LAYER}.post_attention_layernorm"),
)

VALUES = (
    Weight("blk.{n}.attn_v", f"{LAYER}.self_attn.v_proj"),
    Weight("blk.{n}.attn_output", f"{LAYER}.self_attn.o_proj"),
)

ATTENTION = (
    Weight("blk.{n}.attn_q", f"{LAYER}.self_attn.q_proj"),
    Weight("blk.{n}.attn_k", f"{LAYER}.self_attn.k_proj"),
    *VALUES,
)

# For architectures with a rotary embedding of neighbouring pairs
ROTARY_ATTENTION = (
    Weight("blk.{n}.attn_q", f"{LAYER}.self_attn.q_proj", "queries"),
    Weight("blk.{n}.attn_k", f"{LAYER}.self_attn.k_proj", "keys"),
    *VALUES,
)

QK_NORMS = (
    Weight("blk.{n}.attn_q_norm", f"{LAYER}.self_attn.q_norm"),
    Weight("blk.{n}.attn_k_norm", f"{LAYER}.self_attn.k_norm"),
)

MLP = (
    Weight("blk.{n}.ffn_gate", f"{LAYER}.mlp.gate_proj"),
    Weight("blk.{n}.ffn_up", f"{LAYER}.mlp.up_proj"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.mlp.down_proj"),
)

SINKS = Weight("blk.{n}.attn_sinks.weight", f"{LAYER}.self_attn.sinks", bare=True)

# Granite 4 without recurrent layers and without experts has the names of one with them
GRANITE_MLP = (
    *(replace(each, types=("granite",)) for each in MLP),
    Weight("blk.{n}.ffn_gate", f"{LAYER}.shared_mlp.input_linear", "first half", types=("granitemoehybrid",)),
    Weight("blk.{n}.ffn_up", f"{LAYER}.shared_mlp.input_linear", "second half", types=("granitemoehybrid",)),
    Weight("blk.{n}.ffn_down", f"{LAYER}.shared_mlp.output_linear", types=("granitemoehybrid",)),
)

MIXTRAL_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.block_sparse_moe.gate"),
    Weight("blk.{n}.ffn_gate_exps", f"{LAYER}.block_sparse_moe.experts.{{e}}.w1"),
    Weight("blk.{n}.ffn_up_exps", f"{LAYER}.block_sparse_moe.experts.{{e}}.w3"),
    Weight("blk.{n}.ffn_down_exps", f"{LAYER}.block_sparse_moe.experts.{{e}}.w2"),
)

POST_NORMS = (
    Weight("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm"),
    Weight("blk.{n}.post_ffw_norm", f"{LAYER}.post_feedforward_layernorm"),
)

NEMOTRON_NORMS = (
    Weight("output_norm", "model.norm", change="plus one"),
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", change="plus one"),
    Weight("blk.{n}.ffn_norm", f"{LAYER}.post_attention_layernorm", change="plus one"),
)

HUNYUAN_NORMS = (
    Weight("blk.{n}.attn_q_norm", f"{LAYER}.self_attn.query_layernorm"),
    Weight("blk.{n}.attn_k_norm", f"{LAYER}.self_attn.key_layernorm"),
)

APERTUS_NORMS = (
    Weight("blk.{n}.attn_norm", f"{LAYER}.attention_layernorm"),
    Weight("blk.{n}.ffn_norm", f"{LAYER}.feedforward_layernorm"),
)

QWEN35_ENDS = (ENDS[0], Weight("output_norm", "model.norm", change="plus one"), ENDS[2])

# Only in MTP layers
MTP = (
    Weight("blk.{n}.nextn.eh_proj", f"{LAYER}.eh_proj"),
    Weight("blk.{n}.nextn.enorm", f"{LAYER}.enorm"),
    Weight("blk.{n}.nextn.hnorm", f"{LAYER}.hnorm"),
    Weight("blk.{n}.nextn.embed_tokens", f"{LAYER}.embed_tokens"),
    Weight("blk.{n}.nextn.shared_head_head", f"{LAYER}.shared_head.head"),
    Weight("blk.{n}.nextn.shared_head_norm", f"{LAYER}.shared_head.norm"),
)

QWEN35_MTP = tuple(replace(each, change="plus one" if each.gguf.endswith("norm") else "") for each in MTP)

QWEN35_NORMS = (
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm", change="plus one"),
    Weight("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm", change="plus one"),
    Weight("blk.{n}.attn_q_norm", f"{LAYER}.self_attn.q_norm", change="plus one"),
    Weight("blk.{n}.attn_k_norm", f"{LAYER}.self_attn.k_norm", change="plus one"),
)

LINEAR_ATTENTION = (
    Weight("blk.{n}.attn_qkv", f"{LAYER}.linear_attn.in_proj_qkv", "linear qkv"),
    Weight("blk.{n}.attn_gate", f"{LAYER}.linear_attn.in_proj_z", "linear values"),
    Weight("blk.{n}.ssm_alpha", f"{LAYER}.linear_attn.in_proj_a", "linear heads"),
    Weight("blk.{n}.ssm_beta", f"{LAYER}.linear_attn.in_proj_b", "linear heads"),
    Weight("blk.{n}.ssm_out", f"{LAYER}.linear_attn.out_proj", columns="linear values"),
)

LINEAR_VECTORS = (
    Weight("blk.{n}.ssm_a", f"{LAYER}.linear_attn.A_log", "linear heads", bare=True, change="minus exp"),
    Weight("blk.{n}.ssm_dt.bias", f"{LAYER}.linear_attn.dt_bias", "linear heads", bare=True),
    Weight("blk.{n}.ssm_conv1d", f"{LAYER}.linear_attn.conv1d", "linear qkv", shape="kernel"),
    Weight("blk.{n}.ssm_norm", f"{LAYER}.linear_attn.norm"),
)

GLM = (
    Weight("blk.{n}.ffn_up", f"{LAYER}.mlp.gate_up_proj"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.mlp.down_proj"),
)

# Multi-head latent attention with the keys and values of all heads in one matrix
MINICPM3 = (
    Weight("blk.{n}.attn_q_a", f"{LAYER}.self_attn.q_a_proj"),
    Weight("blk.{n}.attn_q_a_norm", f"{LAYER}.self_attn.q_a_layernorm"),
    Weight("blk.{n}.attn_q_b", f"{LAYER}.self_attn.q_b_proj"),
    Weight("blk.{n}.attn_kv_a_mqa", f"{LAYER}.self_attn.kv_a_proj_with_mqa"),
    Weight("blk.{n}.attn_kv_a_norm", f"{LAYER}.self_attn.kv_a_layernorm"),
    Weight("blk.{n}.attn_kv_b", f"{LAYER}.self_attn.kv_b_proj"),
    Weight("blk.{n}.attn_output", f"{LAYER}.self_attn.o_proj"),
)

LLAMA_ARCHITECTURES = (
    Architecture(
        "qwen35",
        ("qwen3_5_text",),
        (*QWEN35_ENDS, *QWEN35_NORMS, *ATTENTION, *LINEAR_ATTENTION, *LINEAR_VECTORS, *MLP, *QWEN35_MTP),
        ("qwen3_5",),
    ),
    Architecture(
        "llama",
        ("llama", "mistral", "mixtral", "exaone"),
        (*ENDS, *NORMS, *ROTARY_ATTENTION, *MLP, *MIXTRAL_EXPERTS),
        ("llava", "janus", "voxtral"),
    ),
    Architecture("mistral3", ("ministral3",), (*ENDS, *NORMS, *ROTARY_ATTENTION, *MLP), ("mistral3",)),
    Architecture("arcee", ("arcee",), (*ENDS, *NORMS, *ROTARY_ATTENTION, *MLP[1:])),
    Architecture("nemotron", ("nemotron",), (*ENDS[::2], *NEMOTRON_NORMS, *ATTENTION, *MLP[1:])),
    Architecture("ernie4_5", ("ernie4_5",), (*ENDS, *NORMS, *ATTENTION, *MLP)),
    Architecture("exaone4", ("exaone4",), (*ENDS, *POST_NORMS, *ATTENTION, *QK_NORMS, *MLP), ("exaone4_5",)),
    Architecture("seed_oss", ("seed_oss",), (*ENDS, NORMS[0], POST_NORMS[0], *ATTENTION, *MLP)),
    Architecture("hunyuan-dense", ("hunyuan_v1_dense",), (*ENDS, *NORMS, *ATTENTION, *HUNYUAN_NORMS, *MLP)),
    Architecture("apertus", ("apertus",), (*ENDS, *APERTUS_NORMS, *ATTENTION, *QK_NORMS, *MLP[1:])),
    Architecture("qwen2vl", (), (*ENDS, *NORMS, *ATTENTION, *MLP), ("qwen2_vl", "qwen2_5_vl")),
    Architecture("qwen3vl", (), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP), ("qwen3_vl", "qwen3_asr")),
    Architecture("qwen2", ("qwen2",), (*ENDS, *NORMS, *ATTENTION, *MLP), ("qwen2_audio", "audioflamingo3")),
    Architecture("qwen3", ("qwen3",), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP)),
    Architecture("smollm3", ("smollm3",), (*ENDS, *NORMS, *ROTARY_ATTENTION, *MLP)),
    Architecture("granite", ("granite", "granitemoehybrid"), (*ENDS, *NORMS, *ROTARY_ATTENTION, *GRANITE_MLP)),
    Architecture("granite_swa", ("granite_swa",), (*ENDS, *NORMS, *ROTARY_ATTENTION, SINKS, *MLP)),
    Architecture("olmo", ("olmo",), (*NORMLESS_ENDS, *ROTARY_ATTENTION, *MLP)),
    Architecture("olmo2", ("olmo2", "olmo3"), (*ENDS, *POST_NORMS, *ATTENTION, *QK_NORMS, *MLP)),
    Architecture("stablelm", ("stablelm",), (*ENDS, *NORMS, *ATTENTION, *MLP)),
    Architecture("chatglm", ("glm",), (*ENDS, *NORMS, *ATTENTION, *GLM)),
    Architecture("minicpm3", ("minicpm3",), (*ENDS, *NORMS, *MINICPM3, *MLP)),
    Architecture("jais2", ("jais2",), (*ENDS, *NORMS, *ATTENTION, *MLP[1:])),
    Architecture("eurobert", ("eurobert",), (*ENDS, *NORMS, *ATTENTION, *MLP)),
    Architecture("chameleon", ("chameleon",), (*ENDS, *NORMS, *ROTARY_ATTENTION, *MLP)),
    Architecture("hunyuan_vl", (), (*ENDS, *NORMS, *ATTENTION, *HUNYUAN_NORMS, *MLP), ("hunyuan_vl",)),
    Architecture("paddleocr", (), (*ENDS, *NORMS, *ATTENTION, *MLP), ("paddleocr_vl",)),
    Architecture("command-r", ("cohere",), (*ENDS, NORMS[0], *ATTENTION, *MLP)),
    Architecture("cohere2", ("cohere2",), (*ENDS, NORMS[0], *ATTENTION, *MLP)),
)
