"""BERT's architectures: GGUF has the encoder of the first, but neither its pooler nor its head."""

from __future__ import annotations

from .table import Architecture, Weight

LAYER = "encoder.layer.{n}"

BERT = (
    Weight("token_embd", "embeddings.word_embeddings"),
    Weight("position_embd", "embeddings.position_embeddings"),
    Weight("token_types", "embeddings.token_type_embeddings"),
    Weight("token_embd_norm", "embeddings.LayerNorm"),
    Weight("blk.{n}.attn_q", f"{LAYER}.attention.self.query"),
    Weight("blk.{n}.attn_k", f"{LAYER}.attention.self.key"),
    Weight("blk.{n}.attn_v", f"{LAYER}.attention.self.value"),
    Weight("blk.{n}.attn_output", f"{LAYER}.attention.output.dense"),
    Weight("blk.{n}.attn_output_norm", f"{LAYER}.attention.output.LayerNorm"),
    Weight("blk.{n}.ffn_up", f"{LAYER}.intermediate.dense"),
    Weight("blk.{n}.ffn_down", f"{LAYER}.output.dense"),
    Weight("blk.{n}.layer_output_norm", f"{LAYER}.output.LayerNorm"),
)

MODERN = "model.layers.{n}"

MODERN_BERT = (
    Weight("token_embd", "model.embeddings.tok_embeddings"),
    Weight("token_embd_norm", "model.embeddings.norm"),
    Weight("output_norm", "model.final_norm"),
    Weight("cls", "head.dense"),
    Weight("cls.norm", "head.norm"),
    Weight("blk.{n}.attn_norm", f"{MODERN}.attn_norm"),
    Weight("blk.{n}.ffn_norm", f"{MODERN}.mlp_norm"),
    Weight("blk.{n}.attn_qkv", f"{MODERN}.attn.Wqkv"),
    Weight("blk.{n}.attn_output", f"{MODERN}.attn.Wo"),
    Weight("blk.{n}.ffn_up", f"{MODERN}.mlp.Wi"),
    Weight("blk.{n}.ffn_down", f"{MODERN}.mlp.Wo"),
)

BERT_ARCHITECTURES = (
    Architecture("bert", ("bert",), BERT),
    Architecture("modern-bert", ("modernbert",), MODERN_BERT),
)
