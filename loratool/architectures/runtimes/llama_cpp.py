"""List the weights with which llama.cpp's graphs compute directly: it loads their factors and never applies them.

Read in `src/models` of the tree inside llama-cpp-python 0.3.36: a graph applies an adapter where it calls
`build_lora_mm` or `build_lora_mm_id`. The names are those of GGUF without block and `.weight`.
"""

from __future__ import annotations

_MLA = ("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b")
_INDEXER = ("indexer.attn_k", "indexer.attn_q_b", "indexer.proj")


# general.architecture -> the ends of the names of the weights
NEVER_APPLIED: dict[str, tuple[str, ...]] = {
    "deepseek2": (*_MLA, "output"),
    **dict.fromkeys("deepseek32 glm-dsa dots3note hy-v4".split(), (*_MLA, *_INDEXER, "output")),
    "minicpm3": ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b"),
    "plm": ("attn_q", "attn_kv_a_mqa", "attn_kv_b"),
    **dict.fromkeys("kimi-linear glm5-next bailingmoe3 kimi-k3".split(), (*_MLA, "output")),
    "deepseek4": ("output", "attn_output_a"),
    "gemma3n": ("altup_proj", "altup_unembd_proj"),
}
