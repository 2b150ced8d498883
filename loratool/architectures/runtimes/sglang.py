"""Tell the modules of which SGLang applies LoRA: it looks for their last names, in a layer, and no prefix counts.

Read in `sglang/srt/lora/utils.py` and `lora.py` of 0.5.23.
"""

from __future__ import annotations

# Last names in a layer; q, k, v and gate, up are one matrix there, and so are q_a and kv_a
_IN_LAYERS = """q_proj k_proj v_proj qkv_proj o_proj out_proj in_proj in_proj_qkvz in_proj_q in_proj_k in_proj_v
    in_proj_z gate_proj up_proj gate_up_proj down_proj w1 w2 w3 q_a_proj kv_a_proj_with_mqa fused_qkv_a_proj_with_mqa
    q_b_proj kv_b_proj fc1_latent_proj fc2_latent_proj""".split()

# The whole path of a module
MODULES = rf"(?:.*\.)?layers\.\d+\.(?:.*\.)?(?:{'|'.join(_IN_LAYERS)})|(?:.*\.)?(?:embed_tokens|lm_head)"
