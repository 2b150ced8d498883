"""Architectures with experts, which GGUF stacks, with gate, up and down separate."""

from __future__ import annotations

from .llama import (
    ATTENTION,
    ENDS,
    HUNYUAN_NORMS,
    LAYER,
    LINEAR_ATTENTION,
    LINEAR_VECTORS,
    MIXTRAL_EXPERTS,
    MLP,
    MTP,
    NORMS,
    QK_NORMS,
    QWEN35_ENDS,
    QWEN35_MTP,
    QWEN35_NORMS,
    ROTARY_ATTENTION,
    SINKS,
)
from .table import Architecture, Weight

EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.gate"),
    Weight("blk.{n}.ffn_gate_exps", f"{LAYER}.mlp.experts.{{e}}.gate_proj"),
    Weight("blk.{n}.ffn_up_exps", f"{LAYER}.mlp.experts.{{e}}.up_proj"),
    Weight("blk.{n}.ffn_down_exps", f"{LAYER}.mlp.experts.{{e}}.down_proj"),
)

SHARED_EXPERT = (
    Weight("blk.{n}.ffn_gate_inp_shexp", f"{LAYER}.mlp.shared_expert_gate"),
    Weight("blk.{n}.ffn_gate_shexp", f"{LAYER}.mlp.shared_expert.gate_proj"),
    Weight("blk.{n}.ffn_up_shexp", f"{LAYER}.mlp.shared_expert.up_proj"),
    Weight("blk.{n}.ffn_down_shexp", f"{LAYER}.mlp.shared_expert.down_proj"),
)

# As its class has them; its files on the Hub have (experts, in, out)
QWEN3_VL_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.gate"),
    Weight("blk.{n}.ffn_gate_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", "first half", bare=True),
    Weight("blk.{n}.ffn_up_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", "second half", bare=True),
    Weight("blk.{n}.ffn_down_exps.weight", f"{LAYER}.mlp.experts.down_proj", bare=True),
)

GPT_OSS = (
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm"),
    Weight("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm"),
    SINKS,
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.router"),
    Weight("blk.{n}.ffn_gate_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", "even", transposed=True, bare=True),
    Weight("blk.{n}.ffn_up_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", "odd", transposed=True, bare=True),
    Weight("blk.{n}.ffn_down_exps.weight", f"{LAYER}.mlp.experts.down_proj", transposed=True, bare=True),
    Weight("blk.{n}.ffn_gate_exps.bias", f"{LAYER}.mlp.experts.gate_up_proj_bias", "even", bare=True),
    Weight("blk.{n}.ffn_up_exps.bias", f"{LAYER}.mlp.experts.gate_up_proj_bias", "odd", bare=True),
    Weight("blk.{n}.ffn_down_exps.bias", f"{LAYER}.mlp.experts.down_proj_bias", bare=True),
)

GRANITE_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.block_sparse_moe.router.layer"),
    Weight("blk.{n}.ffn_gate_exps", f"{LAYER}.block_sparse_moe.input_linear", "first half"),
    Weight("blk.{n}.ffn_up_exps", f"{LAYER}.block_sparse_moe.input_linear", "second half"),
    Weight("blk.{n}.ffn_down_exps", f"{LAYER}.block_sparse_moe.output_linear"),
)

# Multi-head latent attention: llama.cpp multiplies the keys' half of kv_b into the queries
LATENT_ATTENTION = (
    Weight("blk.{n}.attn_q", f"{LAYER}.self_attn.q_proj"),
    Weight("blk.{n}.attn_q_a", f"{LAYER}.self_attn.q_a_proj"),
    Weight("blk.{n}.attn_q_a_norm", f"{LAYER}.self_attn.q_a_layernorm"),
    Weight("blk.{n}.attn_q_b", f"{LAYER}.self_attn.q_b_proj"),
    Weight("blk.{n}.attn_kv_a_mqa", f"{LAYER}.self_attn.kv_a_proj_with_mqa"),
    Weight("blk.{n}.attn_kv_a_norm", f"{LAYER}.self_attn.kv_a_layernorm"),
    Weight("blk.{n}.attn_k_b", f"{LAYER}.self_attn.kv_b_proj", "latent keys", heads=True, heads_transposed=True),
    Weight("blk.{n}.attn_v_b", f"{LAYER}.self_attn.kv_b_proj", "latent values", heads=True),
    Weight("blk.{n}.attn_output", f"{LAYER}.self_attn.o_proj"),
)

# Of sparse attention: it chooses the tokens
INDEXER = (
    Weight("blk.{n}.indexer.attn_q_b", f"{LAYER}.self_attn.indexer.wq_b"),
    Weight("blk.{n}.indexer.attn_k", f"{LAYER}.self_attn.indexer.wk"),
    Weight("blk.{n}.indexer.proj", f"{LAYER}.self_attn.indexer.weights_proj"),
    Weight("blk.{n}.indexer.k_norm", f"{LAYER}.self_attn.indexer.k_norm"),
)

SHARED_EXPERTS = (
    Weight("blk.{n}.exp_probs_b.bias", f"{LAYER}.mlp.gate.e_score_correction_bias", bare=True),
    Weight("blk.{n}.ffn_gate_shexp", f"{LAYER}.mlp.shared_experts.gate_proj"),
    Weight("blk.{n}.ffn_up_shexp", f"{LAYER}.mlp.shared_experts.up_proj"),
    Weight("blk.{n}.ffn_down_shexp", f"{LAYER}.mlp.shared_experts.down_proj"),
)

GRANITE_SHARED_EXPERT = (
    Weight("blk.{n}.ffn_gate_shexp", f"{LAYER}.shared_mlp.input_linear", "first half"),
    Weight("blk.{n}.ffn_up_shexp", f"{LAYER}.shared_mlp.input_linear", "second half"),
    Weight("blk.{n}.ffn_down_shexp", f"{LAYER}.shared_mlp.output_linear"),
)

GLM4_NORMS = (
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm"),
    Weight("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm"),
)

ERNIE_CORRECTION = Weight("blk.{n}.exp_probs_b.bias", f"{LAYER}.mlp.moe_statics.e_score_correction_bias", bare=True)

LLAMA4 = f"{LAYER}.feed_forward"

LLAMA4_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LLAMA4}.router"),
    Weight("blk.{n}.ffn_gate_exps.weight", f"{LLAMA4}.experts.gate_up_proj", "first half", transposed=True, bare=True),
    Weight("blk.{n}.ffn_up_exps.weight", f"{LLAMA4}.experts.gate_up_proj", "second half", transposed=True, bare=True),
    Weight("blk.{n}.ffn_down_exps.weight", f"{LLAMA4}.experts.down_proj", transposed=True, bare=True),
    Weight("blk.{n}.ffn_gate_shexp", f"{LLAMA4}.shared_expert.gate_proj"),
    Weight("blk.{n}.ffn_up_shexp", f"{LLAMA4}.shared_expert.up_proj"),
    Weight("blk.{n}.ffn_down_shexp", f"{LLAMA4}.shared_expert.down_proj"),
    Weight("blk.{n}.ffn_gate", f"{LLAMA4}.gate_proj"),
    Weight("blk.{n}.ffn_up", f"{LLAMA4}.up_proj"),
    Weight("blk.{n}.ffn_down", f"{LLAMA4}.down_proj"),
)

AFMOE = (
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm"),
    Weight("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm"),
    Weight("blk.{n}.ffn_norm", f"{LAYER}.pre_mlp_layernorm"),
    Weight("blk.{n}.post_ffw_norm", f"{LAYER}.post_mlp_layernorm"),
    Weight("blk.{n}.attn_gate", f"{LAYER}.self_attn.gate_proj"),
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.router.gate"),
    Weight("blk.{n}.exp_probs_b.bias", f"{LAYER}.mlp.expert_bias", bare=True),
)

EXAONE_CORRECTION = Weight("blk.{n}.exp_probs_b.bias", f"{LAYER}.mlp.e_score_correction_bias", bare=True)

HUNYUAN_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.gate.wg"),
    Weight("blk.{n}.ffn_gate_shexp", f"{LAYER}.mlp.shared_mlp.gate_proj"),
    Weight("blk.{n}.ffn_up_shexp", f"{LAYER}.mlp.shared_mlp.up_proj"),
    Weight("blk.{n}.ffn_down_shexp", f"{LAYER}.mlp.shared_mlp.down_proj"),
)

HY_V3_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.router.gate"),
    *HUNYUAN_EXPERTS[1:],
    Weight("blk.{n}.exp_probs_b", f"{LAYER}.mlp.expert_bias", bare=True),
)

MINIMAX_CORRECTION = Weight("blk.{n}.exp_probs_b.bias", f"{LAYER}.block_sparse_moe.e_score_correction_bias", bare=True)

MIMO_SINKS = Weight("blk.{n}.attn_sinks.weight", f"{LAYER}.self_attn.attention_sink_bias", bare=True)

MIMO_MTP = (*MTP, Weight("blk.{n}.layer_output_norm", f"{LAYER}.final_layernorm"))

# As its class has them; its files have gate and up in two stacks
STEP_EXPERTS = (
    Weight("blk.{n}.attn_gate", f"{LAYER}.self_attn.g_proj"),
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.gate"),
    Weight("blk.{n}.ffn_gate_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", "first half", bare=True),
    Weight("blk.{n}.ffn_up_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", "second half", bare=True),
    Weight("blk.{n}.ffn_down_exps.weight", f"{LAYER}.mlp.experts.down_proj", bare=True),
)

MISTRAL4_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.gate"),
    Weight("blk.{n}.ffn_gate_up_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", bare=True),
    Weight("blk.{n}.ffn_down_exps.weight", f"{LAYER}.mlp.experts.down_proj", bare=True),
)

DBRX = "transformer.blocks.{n}"

DBRX_WEIGHTS = (
    Weight("token_embd", "transformer.wte"),
    Weight("output_norm", "transformer.norm_f"),
    Weight("output", "lm_head"),
    Weight("blk.{n}.attn_norm", f"{DBRX}.norm_attn_norm.norm_1"),
    Weight("blk.{n}.attn_output_norm", f"{DBRX}.norm_attn_norm.norm_2"),
    Weight("blk.{n}.attn_qkv", f"{DBRX}.norm_attn_norm.attn.Wqkv"),
    Weight("blk.{n}.attn_output", f"{DBRX}.norm_attn_norm.attn.out_proj"),
    Weight("blk.{n}.ffn_gate_inp", f"{DBRX}.ffn.router.layer"),
    Weight("blk.{n}.ffn_gate_exps.weight", f"{DBRX}.ffn.experts.mlp.w1", bare=True, shape="experts"),
    Weight("blk.{n}.ffn_up_exps.weight", f"{DBRX}.ffn.experts.mlp.v1", bare=True, shape="experts"),
    Weight("blk.{n}.ffn_down_exps.weight", f"{DBRX}.ffn.experts.mlp.w2", transposed=True, bare=True, shape="experts"),
)

EXPERT_ARCHITECTURES = (
    Architecture(
        "qwen35moe",
        ("qwen3_5_moe_text",),
        (
            *QWEN35_ENDS,
            *QWEN35_NORMS,
            *ATTENTION,
            *LINEAR_ATTENTION,
            *LINEAR_VECTORS,
            *EXPERTS,
            *SHARED_EXPERT,
            *QWEN35_MTP,
        ),
        ("qwen3_5_moe",),
    ),
    Architecture("llama4", ("llama4_text",), (*ENDS, *NORMS, *ATTENTION, *LLAMA4_EXPERTS), ("llama4",)),
    Architecture(
        "glm4moe",
        ("glm4_moe", "solar_open"),
        (*ENDS, *GLM4_NORMS, *ATTENTION, *MLP, *EXPERTS, *SHARED_EXPERTS, *MTP),
        ("glm4v_moe",),
    ),
    Architecture("dots1", ("dots1",), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP, *EXPERTS, *SHARED_EXPERTS)),
    Architecture(
        "ernie4_5-moe",
        ("ernie4_5_moe",),
        (*ENDS, *NORMS, *ATTENTION, *MLP, *EXPERTS, ERNIE_CORRECTION, *SHARED_EXPERTS[1:]),
    ),
    Architecture("qwen2moe", ("qwen2_moe",), (*ENDS, *NORMS, *ATTENTION, *MLP, *EXPERTS, *SHARED_EXPERT)),
    Architecture("qwen3moe", ("qwen3_moe",), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP, *EXPERTS)),
    Architecture("olmoe", ("olmoe",), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *EXPERTS)),
    Architecture(
        "granitemoe",
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        (*ENDS, *NORMS, *ROTARY_ATTENTION, *GRANITE_EXPERTS, *GRANITE_SHARED_EXPERT),
    ),
    Architecture("gpt-oss", ("gpt_oss",), (*ENDS, *ATTENTION, *GPT_OSS)),
    Architecture(
        "deepseek2",
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"),
        (*ENDS, *NORMS, *LATENT_ATTENTION, *MLP, *EXPERTS, *SHARED_EXPERTS, *MTP),
    ),
    Architecture(
        "deepseek32",
        ("deepseek_v32",),
        (*ENDS, *NORMS, *LATENT_ATTENTION, *INDEXER, *MLP, *EXPERTS, *SHARED_EXPERTS, *MTP),
    ),
    Architecture(
        "glm-dsa",
        ("glm_moe_dsa",),
        (*ENDS, *NORMS, *LATENT_ATTENTION, *INDEXER, *MLP, *EXPERTS, *SHARED_EXPERTS, *MTP),
    ),
    Architecture(
        "mistral4", ("mistral4",), (*ENDS, *NORMS, *LATENT_ATTENTION, *MLP, *MISTRAL4_EXPERTS, *SHARED_EXPERTS)
    ),
    Architecture("afmoe", ("afmoe",), (*ENDS, *ATTENTION, *QK_NORMS, *AFMOE, *MLP, *EXPERTS[1:], *SHARED_EXPERTS[1:])),
    Architecture(
        "exaone-moe",
        ("exaone_moe",),
        (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP, *EXPERTS, EXAONE_CORRECTION, *SHARED_EXPERTS[1:], *MTP),
    ),
    Architecture(
        "hunyuan-moe",
        ("hunyuan_v1_moe",),
        (*ENDS, *NORMS, *ATTENTION, *HUNYUAN_NORMS, *EXPERTS[1:], *HUNYUAN_EXPERTS),
    ),
    Architecture(
        "minimax-m2", ("minimax_m2",), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MIXTRAL_EXPERTS, MINIMAX_CORRECTION)
    ),
    Architecture(
        "hy_v3",
        ("hy_v3",),
        (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP, *EXPERTS[1:], *HY_V3_EXPERTS, *MTP),
    ),
    Architecture("mellum", ("mellum",), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *EXPERTS)),
    Architecture(
        "cohere2moe", ("cohere2_moe",), (*ENDS, NORMS[0], *ATTENTION, *MLP, *EXPERTS, *SHARED_EXPERTS[1:], *MTP)
    ),
    Architecture("phimoe", ("phimoe",), (*ENDS, *NORMS, *ATTENTION, *MIXTRAL_EXPERTS)),
    Architecture(
        "mimo2",
        ("mimo_v2_flash",),
        (*ENDS, *NORMS, *ATTENTION, MIMO_SINKS, *MLP, *EXPERTS, SHARED_EXPERTS[0], *MIMO_MTP),
    ),
    Architecture(
        "step35",
        (),
        (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP, *STEP_EXPERTS, *SHARED_EXPERTS[1:]),
        ("step3p7",),
    ),
    Architecture("dbrx", ("dbrx",), DBRX_WEIGHTS),
    Architecture("qwen3vlmoe", (), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP, *QWEN3_VL_EXPERTS), ("qwen3_vl_moe",)),
)
