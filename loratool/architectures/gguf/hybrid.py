"""Architectures with recurrent layers or convolutions beside attention.

Only the matrices of such layers are here: their vectors and kernels change on the way to GGUF, and no LoRA is of them.
"""

from __future__ import annotations

from dataclasses import replace

from .experts import EXPERTS, GRANITE_EXPERTS, GRANITE_SHARED_EXPERT, SHARED_EXPERT
from .llama import ATTENTION, ENDS, LAYER, NORMS, QWEN35_ENDS, QWEN35_NORMS, ROTARY_ATTENTION
from .table import Architecture, Weight

QWEN3_NEXT = (
    Weight("blk.{n}.attn_qkv", f"{LAYER}.linear_attn.in_proj_qkvz", "linear groups"),
    Weight("blk.{n}.attn_gate", f"{LAYER}.linear_attn.in_proj_qkvz", "linear gates"),
    Weight("blk.{n}.ssm_ba", f"{LAYER}.linear_attn.in_proj_ba"),
    Weight("blk.{n}.ssm_out", f"{LAYER}.linear_attn.out_proj"),
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

MAMBA2 = (
    Weight("blk.{n}.ssm_in", f"{LAYER}.mamba.in_proj"),
    Weight("blk.{n}.ssm_out", f"{LAYER}.mamba.out_proj"),
)

# What Bamba has where Granite has a shared expert
BAMBA = tuple(
    Weight(f"blk.{{n}}.ffn_{name}", f"{LAYER}.feed_forward.{name}_proj", types=("bamba",))
    for name in ("gate", "up", "down")
)

NEMOTRON = "backbone.layers.{n}"

NEMOTRON_H = (
    Weight("token_embd", "backbone.embeddings"),
    Weight("output_norm", "backbone.norm_f"),
    Weight("output", "lm_head"),
    Weight("blk.{n}.attn_norm", f"{NEMOTRON}.norm"),
    Weight("blk.{n}.ssm_in", f"{NEMOTRON}.mixer.in_proj"),
    Weight("blk.{n}.ssm_out", f"{NEMOTRON}.mixer.out_proj"),
    Weight("blk.{n}.attn_q", f"{NEMOTRON}.mixer.q_proj", "queries"),
    Weight("blk.{n}.attn_k", f"{NEMOTRON}.mixer.k_proj", "keys"),
    Weight("blk.{n}.attn_v", f"{NEMOTRON}.mixer.v_proj"),
    Weight("blk.{n}.attn_output", f"{NEMOTRON}.mixer.o_proj"),
    Weight("blk.{n}.ffn_up", f"{NEMOTRON}.mixer.up_proj"),
    Weight("blk.{n}.ffn_down", f"{NEMOTRON}.mixer.down_proj"),
)

NEMOTRON_EXPERTS = (
    Weight("blk.{n}.ffn_gate_inp", f"{NEMOTRON}.mixer.gate"),
    Weight("blk.{n}.ffn_up_exps", f"{NEMOTRON}.mixer.experts.{{e}}.up_proj"),
    Weight("blk.{n}.ffn_down_exps", f"{NEMOTRON}.mixer.experts.{{e}}.down_proj"),
    Weight("blk.{n}.ffn_latent_down", f"{NEMOTRON}.mixer.fc1_latent_proj"),
    Weight("blk.{n}.ffn_latent_up", f"{NEMOTRON}.mixer.fc2_latent_proj"),
    Weight("blk.{n}.ffn_up_shexp", f"{NEMOTRON}.mixer.shared_experts.up_proj"),
    Weight("blk.{n}.ffn_down_shexp", f"{NEMOTRON}.mixer.shared_experts.down_proj"),
)

# The shared expert of a Granite without others is its feed-forward network
GRANITE_DENSE = tuple(
    replace(each, gguf=each.gguf.removesuffix("_shexp"), dense=True, types=("granitemoehybrid",))
    for each in GRANITE_SHARED_EXPERT
)

HYBRID_ARCHITECTURES = (
    Architecture(
        "qwen3next",
        ("qwen3_next",),
        (*QWEN35_ENDS, *QWEN35_NORMS, *ATTENTION, *QWEN3_NEXT, *EXPERTS, *SHARED_EXPERT),
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
            *GRANITE_EXPERTS,
            *(replace(each, dense=False) for each in GRANITE_SHARED_EXPERT),
            *GRANITE_DENSE,
            *BAMBA,
        ),
    ),
    Architecture("nemotron_h", ("nemotron_h",), NEMOTRON_H),
    Architecture("nemotron_h_moe", ("nemotron_h",), (*NEMOTRON_H, *NEMOTRON_EXPERTS)),
)
