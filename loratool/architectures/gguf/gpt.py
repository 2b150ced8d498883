"""The architectures of GPT-2, GPT-NeoX and Phi-3, which fuse queries, keys and values."""

from __future__ import annotations

from .llama import ENDS, LAYER, NORMS
from .table import Architecture, Weight

BLOCK, NEOX = "transformer.h.{n}", "gpt_neox.layers.{n}"

# Its layers store (in, out)
GPT2 = (
    Weight("token_embd", "transformer.wte"),
    Weight("position_embd", "transformer.wpe"),
    Weight("output_norm", "transformer.ln_f"),
    Weight("output", "lm_head"),
    Weight("blk.{n}.attn_norm", f"{BLOCK}.ln_1"),
    Weight("blk.{n}.ffn_norm", f"{BLOCK}.ln_2"),
    Weight("blk.{n}.attn_qkv", f"{BLOCK}.attn.c_attn", transposed=True),
    Weight("blk.{n}.attn_output", f"{BLOCK}.attn.c_proj", transposed=True),
    Weight("blk.{n}.ffn_up", f"{BLOCK}.mlp.c_fc", transposed=True),
    Weight("blk.{n}.ffn_down", f"{BLOCK}.mlp.c_proj", transposed=True),
)

STARCODER = tuple(Weight(each.gguf, each.hf) for each in GPT2)

# GPT-NeoX fuses q, k and v head by head; GGUF has all q, then k, then v
GPTNEOX = (
    Weight("token_embd", "gpt_neox.embed_in"),
    Weight("output_norm", "gpt_neox.final_layer_norm"),
    Weight("output", "embed_out"),
    Weight("blk.{n}.attn_norm", f"{NEOX}.input_layernorm"),
    Weight("blk.{n}.ffn_norm", f"{NEOX}.post_attention_layernorm"),
    Weight("blk.{n}.attn_qkv", f"{NEOX}.attention.query_key_value", "qkv"),
    Weight("blk.{n}.attn_output", f"{NEOX}.attention.dense"),
    Weight("blk.{n}.ffn_up", f"{NEOX}.mlp.dense_h_to_4h"),
    Weight("blk.{n}.ffn_down", f"{NEOX}.mlp.dense_4h_to_h"),
)

PHI3 = (
    Weight("blk.{n}.attn_qkv", f"{LAYER}.self_attn.qkv_proj"),
    Weight("blk.{n}.attn_output", f"{LAYER}.self_attn.o_proj"),
    Weight("blk.{n}.ffn_up", f"{LAYER}.mlp.gate_up_proj"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.mlp.down_proj"),
)

GPT_ARCHITECTURES = (
    Architecture("gpt2", ("gpt2",), GPT2),
    Architecture("starcoder", ("gpt_bigcode",), STARCODER),
    Architecture("gptneox", ("gpt_neox",), GPTNEOX),
    Architecture("phi3", ("phi3",), (*ENDS, *NORMS, *PHI3)),
)
