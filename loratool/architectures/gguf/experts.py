"""List architectures with experts, which GGUF stacks: gate, up and down apart."""

from __future__ import annotations

from .llama import ATTENTION, ENDS, LAYER, MLP, NORMS, QK_NORMS
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

GPT_OSS = (
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm"),
    Weight("blk.{n}.post_attention_norm", f"{LAYER}.post_attention_layernorm"),
    Weight("blk.{n}.attn_sinks.weight", f"{LAYER}.self_attn.sinks", bare=True),
    Weight("blk.{n}.ffn_gate_inp", f"{LAYER}.mlp.router"),
    Weight("blk.{n}.ffn_gate_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", "even", turned=True, bare=True),
    Weight("blk.{n}.ffn_up_exps.weight", f"{LAYER}.mlp.experts.gate_up_proj", "odd", turned=True, bare=True),
    Weight("blk.{n}.ffn_down_exps.weight", f"{LAYER}.mlp.experts.down_proj", turned=True, bare=True),
    Weight("blk.{n}.ffn_gate_exps.bias", f"{LAYER}.mlp.experts.gate_up_proj_bias", "even", bare=True),
    Weight("blk.{n}.ffn_up_exps.bias", f"{LAYER}.mlp.experts.gate_up_proj_bias", "odd", bare=True),
    Weight("blk.{n}.ffn_down_exps.bias", f"{LAYER}.mlp.experts.down_proj_bias", bare=True),
)

EXPERT_ARCHITECTURES = (
    Architecture("qwen2moe", ("qwen2_moe",), (*ENDS, *NORMS, *ATTENTION, *MLP, *EXPERTS, *SHARED_EXPERT)),
    Architecture("qwen3moe", ("qwen3_moe",), (*ENDS, *NORMS, *ATTENTION, *QK_NORMS, *MLP, *EXPERTS)),
    Architecture("gpt-oss", ("gpt_oss",), (*ENDS, *ATTENTION, *GPT_OSS)),
)
