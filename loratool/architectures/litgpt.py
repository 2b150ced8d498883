"""Map linear layers of litgpt's models with Llama's structure to transformers' names.

Source: `copy_weights_hf_llama`, `_gemma_2`, `_qwen_2_5`, `_qwen_3`, `_olmo2` of litgpt 0.5.13
(`litgpt/scripts/convert_hf_checkpoint.py`), which differ in norms and biases only.
"""

from __future__ import annotations

# A module in a layer -> its name in Llama's layer, except the fused q, k and v
IN_LAYERS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}

FUSED = "attn.qkv"  # rows of q, then k, then v
# Until litgpt 0.5.4: its rows are interleaved by groups of heads. LoRA's rows of q, k and v are added to its first rows
# (if all three are adapted, and in the first versions of 2023) or to those of q, k and v (`zero_pad` of its `lora.py`).
FUSED_BEFORE = "attn.attn"

# values of `mlp_class_name` of models with these names; GPT-NeoX, Falcon and Phi 2 have others
MLPS = ("LLaMAMLP", "GemmaMLP")
