"""Name the linear layers of litgpt's models of Llama's shape as transformers does.

Source: `copy_weights_hf_llama`, `_gemma_2`, `_qwen_2_5`, `_qwen_3`, `_olmo2` of litgpt 0.5.13
(`litgpt/scripts/convert_hf_checkpoint.py`), which differ in norms and biases only.
"""

from __future__ import annotations

# A module in a layer -> its name in Llama's; but for q, k and v, which are one
IN_LAYERS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}

FUSED = "attn.qkv"  # rows of q, then k, then v

# `mlp_class_name` of the models with these names; those of GPT-NeoX, Falcon and Phi 2 have others
MLPS = ("LLaMAMLP", "GemmaMLP")
