"""Write small GGUF models of transformers' tensors by the formulas of llama.cpp's converter, without its code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.files.gguf_bytes import Array, floats, write

LAYERS, HEADS, KV_HEADS, WIDTH, INNER, WORDS = 2, 4, 2, 32, 48, 40

LAYER = {
    "input_layernorm": ("attn_norm", (WIDTH,)),
    "post_attention_layernorm": ("ffn_norm", (WIDTH,)),
    "self_attn.q_proj": ("attn_q", (WIDTH, WIDTH)),
    "self_attn.k_proj": ("attn_k", (WIDTH // 2, WIDTH)),
    "self_attn.v_proj": ("attn_v", (WIDTH // 2, WIDTH)),
    "self_attn.o_proj": ("attn_output", (WIDTH, WIDTH)),
    "mlp.gate_proj": ("ffn_gate", (INNER, WIDTH)),
    "mlp.up_proj": ("ffn_up", (INNER, WIDTH)),
    "mlp.down_proj": ("ffn_down", (WIDTH, INNER)),
}

ENDS = {
    "model.embed_tokens": ("token_embd", (WORDS, WIDTH)),
    "model.norm": ("output_norm", (WIDTH,)),
    "lm_head": ("output", (WORDS, WIDTH)),
}


def names() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return each tensor of a small Llama with its name in GGUF and its shape."""
    found = {f"{hf}.weight": (f"{gguf}.weight", shape) for hf, (gguf, shape) in ENDS.items()}
    for i in range(LAYERS):
        for hf, (gguf, shape) in LAYER.items():
            found[f"model.layers.{i}.{hf}.weight"] = f"blk.{i}.{gguf}.weight", shape
    return found


def llama_weights(seed: int = 0) -> dict[str, Tensor]:
    """Return a small Llama's tensors under their names in transformers, all of them numbers of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return {hf: torch.randn(shape, generator=generator).bfloat16().float() for hf, (_, shape) in names().items()}


def interleaved(W: Array, heads: int) -> Array:
    """Return the rows of queries or keys in llama.cpp's order: the two halves of a head take turns."""
    out = np.empty_like(W)
    size = len(W) // heads
    for head in range(heads):
        for i in range(size // 2):
            for side in (0, 1):
                out[head * size + 2 * i + side] = W[head * size + side * (size // 2) + i]
    return out


def llama_fields(**changes: Any) -> dict[str, Any]:
    """Return the fields of a small Llama; a change to None takes one out."""
    fields: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(WORDS)],
        "tokenizer.ggml.eos_token_id": 2,
    }
    merged = fields | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in merged.items() if value is not None}


def llama_tensors(weights: Mapping[str, Tensor], dtype: str = "F32") -> dict[str, Any]:
    """Return the tensors of a small Llama as llama.cpp's converter writes them; vectors are F32."""
    tensors = {}
    for hf, (gguf, shape) in names().items():
        if hf not in weights:
            continue
        W = weights[hf].numpy()
        heads = HEADS if "q_proj" in hf else KV_HEADS if "k_proj" in hf else 0
        tensors[gguf] = floats(interleaved(W, heads) if heads else W, dtype if len(shape) > 1 else "F32")
    return tensors


def write_llama(path: Path, weights: Mapping[str, Tensor], dtype: str = "F32", **changes: Any) -> Path:
    return write(path, llama_fields(**changes), llama_tensors(weights, dtype))
