"""Architectures with recurrent layers or convolutions beside attention.

Vectors and kernels of such layers change on the way to GGUF: their rows are for whole models alone.
"""

from __future__ import annotations

from dataclasses import replace

from .experts import (
    EXPERTS,
    GRANITE_EXPERTS,
    GRANITE_SHARED_EXPERT,
    LATENT_ATTENTION,
    SHARED_EXPERT,
    SHARED_EXPERTS,
)
from .llama import (
    ATTENTION,
    ENDS,
    LAYER,
    LINEAR_VECTORS,
    MIXTRAL_EXPERTS,
    MLP,
    NORMS,
    QWEN35_ENDS,
    QWEN35_MTP,
    QWEN35_NORMS,
    ROTARY_ATTENTION,
)
from .table import Architecture, Weight

QWEN3_NEXT = (
    Weight("blk.{n}.attn_qkv", f"{LAYER}.linear_attn.in_proj_qkvz", "linear groups"),
    Weight("blk.{n}.attn_gate", f"{LAYER}.linear_attn.in_proj_qkvz", "linear gates"),
    Weight("blk.{n}.ssm_ba", f"{LAYER}.linear_attn.in_proj_ba"),
    Weight("blk.{n}.ssm_out", f"{LAYER}.linear_attn.out_proj"),
    *(replace(each, rows="") for each in LINEAR_VECTORS),
)

LFM2 = (
    Weight("token_embd", "model.embed_tokens"),
    Weight("token_embd_norm", "model.embedding_norm"),
    Weight("output", "lm_head"),
    Weight("blk.{n}.attn_norm", f"{LAYER}.operator_norm"),
    Weight("blk.{n}.ffn_norm", f"{LAYER}.ffn_norm"),
    *ATTENTION[:3],
    Weight("blk.{n}.attn_output", f"{LAYER}.self_attn.out_proj"),
    Weight("blk.{n}.attn_q_norm", f"{LAYER}.self_attn.q_layernorm"),
    Weight("blk.{n}.attn_k_norm", f"{LAYER}.self_attn.k_layernorm"),
    Weight("blk.{n}.shortconv.in_proj", f"{LAYER}.conv.in_proj"),
    Weight("blk.{n}.shortconv.out_proj", f"{LAYER}.conv.out_proj"),
    Weight("blk.{n}.shortconv.conv", f"{LAYER}.conv.conv", shape="kernel"),
    Weight("blk.{n}.ffn_gate", f"{LAYER}.feed_forward.w1"),
    Weight("blk.{n}.ffn_up", f"{LAYER}.feed_forward.w3"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.feed_forward.w2"),
)

LFM2_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.feed_forward.gate"),
    Weight("blk.{n}.exp_probs_b.bias", f"{LAYER}.feed_forward.expert_bias", bare=True),
    Weight("blk.{n}.ffn_gate_exps", f"{LAYER}.feed_forward.experts.{{e}}.w1"),
    Weight("blk.{n}.ffn_up_exps", f"{LAYER}.feed_forward.experts.{{e}}.w3"),
    Weight("blk.{n}.ffn_down_exps", f"{LAYER}.feed_forward.experts.{{e}}.w2"),
)


def mamba2_vectors(mixer: str) -> tuple[Weight, ...]:
    """Return the rows of a mixer of Mamba 2 whose tensors are no matrices. mixer: its path in transformers."""
    return (
        Weight("blk.{n}.ssm_a", f"{mixer}.A_log", bare=True, change="minus exp", shape="vector"),
        Weight("blk.{n}.ssm_d", f"{mixer}.D", bare=True, shape="vector"),
        Weight("blk.{n}.ssm_dt.bias", f"{mixer}.dt_bias", bare=True),
        Weight("blk.{n}.ssm_norm", f"{mixer}.norm", shape="vector"),
        Weight("blk.{n}.ssm_conv1d", f"{mixer}.conv1d", shape="kernel"),
    )


def mamba_vectors(mixer: str) -> tuple[Weight, ...]:
    """Return the same rows of a mixer of Mamba."""
    return (
        Weight("blk.{n}.ssm_a", f"{mixer}.A_log", bare=True, change="minus exp"),
        Weight("blk.{n}.ssm_d", f"{mixer}.D", bare=True),
        Weight("blk.{n}.ssm_conv1d", f"{mixer}.conv1d", shape="kernel"),
    )


MAMBA2 = (
    Weight("blk.{n}.ssm_in", f"{LAYER}.mamba.in_proj"),
    Weight("blk.{n}.ssm_out", f"{LAYER}.mamba.out_proj"),
)

# What Bamba has where Granite has a shared expert
BAMBA = tuple(
    Weight(f"blk.{{n}}.ffn_{name}", f"{LAYER}.feed_forward.{name}_proj", types=("bamba",))
    for name in ("gate", "up", "down")
)

BACKBONE = "backbone.layers.{n}"

MAMBA = (
    Weight("token_embd", "backbone.embeddings"),
    Weight("output_norm", "backbone.norm_f"),
    Weight("output", "lm_head"),
    Weight("blk.{n}.attn_norm", f"{BACKBONE}.norm"),
    Weight("blk.{n}.ssm_in", f"{BACKBONE}.mixer.in_proj"),
    Weight("blk.{n}.ssm_out", f"{BACKBONE}.mixer.out_proj"),
)

NEMOTRON_H = (
    *MAMBA,
    *mamba2_vectors(f"{BACKBONE}.mixer"),
    Weight("blk.{n}.attn_q", f"{BACKBONE}.mixer.q_proj", "queries"),
    Weight("blk.{n}.attn_k", f"{BACKBONE}.mixer.k_proj", "keys"),
    Weight("blk.{n}.attn_v", f"{BACKBONE}.mixer.v_proj"),
    Weight("blk.{n}.attn_output", f"{BACKBONE}.mixer.o_proj"),
    Weight("blk.{n}.ffn_up", f"{BACKBONE}.mixer.up_proj"),
    Weight("blk.{n}.ffn_down", f"{BACKBONE}.mixer.down_proj"),
)

NEMOTRON_EXPERTS = (
    Weight("blk.{n}.exp_probs_b.bias", f"{BACKBONE}.mixer.gate.e_score_correction_bias", bare=True),
    Weight("blk.{n}.ffn_gate_inp", f"{BACKBONE}.mixer.gate"),
    Weight("blk.{n}.ffn_up_exps", f"{BACKBONE}.mixer.experts.{{e}}.up_proj"),
    Weight("blk.{n}.ffn_down_exps", f"{BACKBONE}.mixer.experts.{{e}}.down_proj"),
    Weight("blk.{n}.ffn_latent_down", f"{BACKBONE}.mixer.fc1_latent_proj"),
    Weight("blk.{n}.ffn_latent_up", f"{BACKBONE}.mixer.fc2_latent_proj"),
    Weight("blk.{n}.ffn_up_shexp", f"{BACKBONE}.mixer.shared_experts.up_proj"),
    Weight("blk.{n}.ffn_down_shexp", f"{BACKBONE}.mixer.shared_experts.down_proj"),
)

# The shared expert of a Granite without others is its feed-forward network
GRANITE_DENSE = tuple(
    replace(each, gguf=each.gguf.removesuffix("_shexp"), dense=True, types=("granitemoehybrid",))
    for each in GRANITE_SHARED_EXPERT
)

MAMBA1 = (
    Weight("blk.{n}.ssm_x", f"{BACKBONE}.mixer.x_proj"),
    Weight("blk.{n}.ssm_dt", f"{BACKBONE}.mixer.dt_proj"),
)

JAMBA = (
    Weight("token_embd", "model.embed_tokens"),
    Weight("output_norm", "model.final_layernorm"),
    Weight("output", "lm_head"),
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm"),
    Weight("blk.{n}.ffn_norm", f"{LAYER}.pre_ff_layernorm"),
    *MAMBA2,
    Weight("blk.{n}.ssm_x", f"{LAYER}.mamba.x_proj"),
    Weight("blk.{n}.ssm_dt", f"{LAYER}.mamba.dt_proj"),
    Weight("blk.{n}.ssm_dt_norm", f"{LAYER}.mamba.dt_layernorm"),
    Weight("blk.{n}.ssm_b_norm", f"{LAYER}.mamba.b_layernorm"),
    Weight("blk.{n}.ssm_c_norm", f"{LAYER}.mamba.c_layernorm"),
    *mamba_vectors(f"{LAYER}.mamba"),
    Weight("blk.{n}.ffn_gate", f"{LAYER}.feed_forward.gate_proj"),
    Weight("blk.{n}.ffn_up", f"{LAYER}.feed_forward.up_proj"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.feed_forward.down_proj"),
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.feed_forward.router"),
    Weight("blk.{n}.ffn_gate_exps", f"{LAYER}.feed_forward.experts.{{e}}.gate_proj"),
    Weight("blk.{n}.ffn_up_exps", f"{LAYER}.feed_forward.experts.{{e}}.up_proj"),
    Weight("blk.{n}.ffn_down_exps", f"{LAYER}.feed_forward.experts.{{e}}.down_proj"),
)

# Kimi's delta attention; the class has those of the forget gate in a module of their own
KIMI = (
    Weight("blk.{n}.ssm_f_a", f"{LAYER}.self_attn.f_a_proj"),
    Weight("blk.{n}.ssm_f_b", f"{LAYER}.self_attn.f_b_proj"),
    Weight("blk.{n}.ssm_beta", f"{LAYER}.self_attn.b_proj"),
    Weight("blk.{n}.ssm_g_a", f"{LAYER}.self_attn.g_a_proj"),
    Weight("blk.{n}.ssm_g_b", f"{LAYER}.self_attn.g_b_proj"),
    Weight("blk.{n}.ssm_a", f"{LAYER}.self_attn.A_log", bare=True, change="minus exp", shape="heads"),
    Weight("blk.{n}.ssm_dt.bias", f"{LAYER}.self_attn.dt_bias", bare=True),
    Weight("blk.{n}.ssm_norm", f"{LAYER}.self_attn.o_norm"),
    *(Weight(f"blk.{{n}}.ssm_conv1d_{name}", f"{LAYER}.self_attn.{name}_conv1d", shape="kernel") for name in "qkv"),
    *ATTENTION[1:3],
)

KIMI_EXPERTS = (
    *MIXTRAL_EXPERTS,
    *(replace(each, hf=each.hf.replace(".mlp.", ".block_sparse_moe.")) for each in SHARED_EXPERTS),
)

HYBRID_ARCHITECTURES = (
    Architecture(
        "qwen3next",
        ("qwen3_next",),
        (*QWEN35_ENDS, *QWEN35_NORMS, *ATTENTION, *QWEN3_NEXT, *EXPERTS, *SHARED_EXPERT, *QWEN35_MTP),
    ),
    Architecture("lfm2", ("lfm2",), LFM2),
    Architecture("lfm2moe", ("lfm2_moe",), (*LFM2, *LFM2_EXPERTS)),
    Architecture(
        "granitehybrid",
        ("granitemoehybrid", "bamba"),
        (
            *ENDS,
            *NORMS,
            *ROTARY_ATTENTION,
            *MAMBA2,
            *mamba2_vectors(f"{LAYER}.mamba"),
            *GRANITE_EXPERTS,
            *(replace(each, dense=False) for each in GRANITE_SHARED_EXPERT),
            *GRANITE_DENSE,
            *BAMBA,
        ),
    ),
    Architecture("mamba", ("mamba", "falcon_mamba"), (*MAMBA, *MAMBA1, *mamba_vectors(f"{BACKBONE}.mixer"))),
    Architecture("mamba2", ("mamba2",), (*MAMBA, *mamba2_vectors(f"{BACKBONE}.mixer"))),
    Architecture("jamba", ("jamba",), (*JAMBA, *ATTENTION)),
    Architecture("kimi-linear", ("kimi_linear",), (*ENDS, *NORMS, *LATENT_ATTENTION, *KIMI, *MLP, *KIMI_EXPERTS)),
    Architecture("nemotron_h", ("nemotron_h",), NEMOTRON_H),
    Architecture("nemotron_h_moe", ("nemotron_h",), (*NEMOTRON_H, *NEMOTRON_EXPERTS)),
)
