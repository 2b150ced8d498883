"""Architectures of plain decoders with other names of layers than Llama's."""

from __future__ import annotations

from .llama import ATTENTION, ENDS, LAYER, NORMS, VALUES
from .table import Architecture, Weight

BLOCK = "transformer.h.{n}"

FUSED_QKV = (
    Weight("blk.{n}.attn_qkv", f"{BLOCK}.self_attention.query_key_value", "qkv"),
    Weight("blk.{n}.attn_output", f"{BLOCK}.self_attention.dense"),
    Weight("blk.{n}.ffn_up", f"{BLOCK}.mlp.dense_h_to_4h"),
    Weight("blk.{n}.ffn_down", f"{BLOCK}.mlp.dense_4h_to_h"),
)

TRANSFORMER_ENDS = (
    Weight("token_embd", "transformer.word_embeddings"),
    Weight("output_norm", "transformer.ln_f"),
    Weight("output", "lm_head"),
)

BLOOM = (
    Weight("token_embd_norm", "transformer.word_embeddings_layernorm"),
    Weight("blk.{n}.attn_norm", f"{BLOCK}.input_layernorm"),
    Weight("blk.{n}.ffn_norm", f"{BLOCK}.post_attention_layernorm"),
)

FALCON_NORMS = (
    Weight("blk.{n}.attn_norm", f"{BLOCK}.input_layernorm"),
    Weight("blk.{n}.attn_norm", f"{BLOCK}.ln_mlp"),
    Weight("blk.{n}.attn_norm_2", f"{BLOCK}.ln_attn"),
)

STARCODER2 = (
    Weight("blk.{n}.ffn_up", f"{LAYER}.mlp.c_fc"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.mlp.c_proj"),
)

PHI2 = (
    Weight("token_embd", "model.embed_tokens"),
    Weight("output_norm", "model.final_layernorm"),
    Weight("output", "lm_head"),
    Weight("blk.{n}.attn_norm", f"{LAYER}.input_layernorm"),
    *ATTENTION[:3],
    Weight("blk.{n}.attn_output", f"{LAYER}.self_attn.dense"),
    Weight("blk.{n}.ffn_up", f"{LAYER}.mlp.fc1"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.mlp.fc2"),
)

# llama.cpp has M-RoPE, which the models with a tower have, only for rotation in halves
GLM4 = (
    Weight("blk.{n}.attn_q", f"{LAYER}.self_attn.q_proj", "halves if sections"),
    Weight("blk.{n}.attn_k", f"{LAYER}.self_attn.k_proj", "halves if sections"),
    *VALUES,
    Weight("blk.{n}.post_attention_norm", f"{LAYER}.post_self_attn_layernorm"),
    Weight("blk.{n}.post_ffw_norm", f"{LAYER}.post_mlp_layernorm"),
    Weight("blk.{n}.ffn_up", f"{LAYER}.mlp.gate_up_proj"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.mlp.down_proj"),
)

MPT = (
    Weight("token_embd", "transformer.wte"),
    Weight("output_norm", "transformer.norm_f"),
    Weight("output", "lm_head"),
    Weight("blk.{n}.attn_norm", "transformer.blocks.{n}.norm_1"),
    Weight("blk.{n}.ffn_norm", "transformer.blocks.{n}.norm_2"),
    Weight("blk.{n}.attn_qkv", "transformer.blocks.{n}.attn.Wqkv"),
    Weight("blk.{n}.attn_output", "transformer.blocks.{n}.attn.out_proj"),
    Weight("blk.{n}.ffn_up", "transformer.blocks.{n}.ffn.up_proj"),
    Weight("blk.{n}.ffn_down", "transformer.blocks.{n}.ffn.down_proj"),
)

T5_ATTENTION = tuple(
    Weight(f"{gguf}_{name}", f"{hf}.{name}")
    for gguf, hf in (
        ("enc.blk.{n}.attn", "encoder.block.{n}.layer.0.SelfAttention"),
        ("dec.blk.{n}.attn", "decoder.block.{n}.layer.0.SelfAttention"),
        ("dec.blk.{n}.cross_attn", "decoder.block.{n}.layer.1.EncDecAttention"),
    )
    for name in "qkvo"
)

# Of version 1.1: one name in GGUF would also be that of the first version's `wi`
T5_MLP = tuple(
    Weight(f"{gguf}.{name}", f"{hf}.DenseReluDense.{module}")
    for gguf, hf in (("enc.blk.{n}", "encoder.block.{n}.layer.1"), ("dec.blk.{n}", "decoder.block.{n}.layer.2"))
    for name, module in (("ffn_gate", "wi_0"), ("ffn_up", "wi_1"), ("ffn_down", "wo"))
)

T5_ENDS = (Weight("token_embd", "shared"), Weight("output", "lm_head"))

T5_ENCODER_NORMS = (
    Weight("enc.output_norm", "encoder.final_layer_norm"),
    Weight("enc.blk.{n}.attn_norm", "encoder.block.{n}.layer.0.layer_norm"),
    Weight("enc.blk.{n}.attn_rel_b", "encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias"),
    Weight("enc.blk.{n}.ffn_norm", "encoder.block.{n}.layer.1.layer_norm"),
)

T5_NORMS = (
    *T5_ENCODER_NORMS,
    Weight("dec.output_norm", "decoder.final_layer_norm"),
    Weight("dec.blk.{n}.attn_norm", "decoder.block.{n}.layer.0.layer_norm"),
    Weight("dec.blk.{n}.attn_rel_b", "decoder.block.{n}.layer.0.SelfAttention.relative_attention_bias"),
    Weight("dec.blk.{n}.cross_attn_norm", "decoder.block.{n}.layer.1.layer_norm"),
    Weight("dec.blk.{n}.cross_attn_rel_b", "decoder.block.{n}.layer.1.EncDecAttention.relative_attention_bias"),
    Weight("dec.blk.{n}.ffn_norm", "decoder.block.{n}.layer.2.layer_norm"),
)

OTHER_ARCHITECTURES = (
    Architecture("mpt", ("mpt",), MPT),
    Architecture("t5", ("t5", "mt5", "umt5"), (*T5_ENDS, *T5_NORMS, *T5_ATTENTION, *T5_MLP)),
    Architecture("t5encoder", ("t5",), (T5_ENDS[0], *T5_ENCODER_NORMS, *T5_ATTENTION[:4], *T5_MLP[:3])),
    Architecture("bloom", ("bloom",), (*TRANSFORMER_ENDS, *BLOOM, *FUSED_QKV)),
    Architecture("falcon", ("falcon",), (*TRANSFORMER_ENDS, *FALCON_NORMS, *FUSED_QKV)),
    Architecture("starcoder2", ("starcoder2",), (*ENDS, *NORMS, *ATTENTION, *STARCODER2)),
    Architecture("phi2", ("phi",), PHI2),
    Architecture("glm4", ("glm4",), (*ENDS, *NORMS, *GLM4), ("glm4v", "glm_ocr")),
)
