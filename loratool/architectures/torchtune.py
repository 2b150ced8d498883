"""The modules of torchtune's adapters under its names, and the models whose queries and keys it reorders.

Source: `torchtune/models/convert_weights.py`, `torchtune/models/{qwen2,gemma2,phi3}/_convert_weights.py` of 0.6.1.
"""

from __future__ import annotations

# A module in a layer -> its name in Llama; Phi's fused projections also bind by Llama's names
IN_LAYERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}

HEAD = "output"  # lm_head

# model_type -> whether the rows of q and k are interleaved in each head (x0, y0, x1, y1, ...) for the rotary embedding.
# In transformers they are halves (x0, x1, ..., y0, y1, ...).
INTERLEAVED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "phi3": False}

ROTATED = ("attn.q_proj", "attn.k_proj")  # the modules with interleaved rows
