"""The weights whose factors llama.cpp loads and never applies, because its graphs use the weights directly.

`tests/served/llama_cpp_graphs.py` finds them in the tree inside llama-cpp-python 0.3.36: a graph applies an adapter in
`build_lora_mm` and `build_lora_mm_id`, and to the input embedding. The names are those of GGUF without block and
`.weight`. A weight is listed if any of a model's graphs or kinds of layers does not apply its factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# general.architecture -> names of weights
_ROWS = (
    (
        "bailingmoe3",
        """attn_gate attn_k_b attn_kv_a_mqa attn_output attn_q attn_q_a attn_q_b output ssm_beta ssm_conv1d_k
        ssm_conv1d_q ssm_conv1d_v ssm_f_a ssm_g_a token_embd""",
    ),
    ("bert gpt2 jina-bert-v2 jina-bert-v3 mpt nomic-bert nomic-bert-moe starcoder", "position_embd"),
    ("deepseek2 deepseek2-ocr mistral4", "attn_k_b attn_kv_a_mqa attn_kv_b attn_q attn_q_a attn_q_b output"),
    (
        "deepseek32 glm-dsa",
        "attn_k_b attn_kv_a_mqa attn_q_a attn_q_b indexer.attn_k indexer.attn_q_b indexer.proj output",
    ),
    (
        "deepseek4",
        """attn_compressor_ape attn_output_a ffn_gate_tid2eid hc_attn_fn hc_ffn_fn indexer_compressor_ape output
        output_hc_fn""",
    ),
    (
        "dots3note",
        "attn_k_b attn_kv_a_mqa attn_q_a attn_q_b indexer.attn_k indexer.attn_q_b indexer.proj output token_embd",
    ),
    ("falcon-h1 granitehybrid jamba mamba mamba2 plamo2 qwen35 qwen35moe qwen3next", "ssm_conv1d"),
    ("gemma3n", "altup_proj altup_router altup_unembd_proj per_layer_model_proj per_layer_token_embd"),
    ("gemma4", "per_layer_model_proj per_layer_token_embd"),
    (
        "glm5-next",
        """attn_k_b attn_kv_a_mqa attn_output attn_q_a attn_q_b attn_v_b hc_attn_fn hc_ffn_fn indexer.attn_k
        indexer.attn_q_b indexer.proj indexer_compressor_gate output ssm_beta ssm_f_a ssm_f_b ssm_g_a ssm_g_b""",
    ),
    ("graniteswitch", "attn_qkv token_embd"),
    (
        "hy_v4",
        """attn_gate attn_k_b attn_kv_a_mqa attn_q_a attn_q_b hc_attn_fn hc_ffn_fn indexer.attn_k indexer.attn_q_b
        indexer.proj output output_hc_fn""",
    ),
    (
        "kimi-k3",
        """attn_gate attn_k_b attn_kv_a_mqa attn_kv_b attn_output attn_q attn_q_a attn_q_b ffn_down ffn_down_shexp
        ffn_gate ffn_gate_inp ffn_gate_shexp ffn_routed_down ffn_routed_up ffn_up ffn_up_shexp output ssm_beta
        ssm_f_a ssm_f_b ssm_g""",
    ),
    (
        "kimi-linear",
        """attn_k_b attn_kv_a_mqa attn_kv_b attn_output attn_q output ssm_beta ssm_conv1d_k ssm_conv1d_q ssm_conv1d_v
        ssm_f_a ssm_f_b ssm_g_a ssm_g_b""",
    ),
    ("lfm2 lfm2moe", "shortconv.conv"),
    ("minicpm3", "attn_kv_a_mqa attn_kv_b attn_q_a attn_q_b"),
    ("nemotron_h nemotron_h_moe", "ffn_latent_down ffn_latent_up ssm_conv1d"),
    ("plm", "attn_kv_a_mqa attn_kv_b attn_q"),
    (
        "qwen4exp",
        """hc_attn_down hc_attn_inject hc_attn_norm hc_attn_up hc_ffn_down hc_ffn_inject hc_ffn_norm hc_ffn_up
        output_hc_down output_hc_norm output_hc_up per_layer_token_embd ple_conv1d ssm_conv1d""",
    ),
)

NEVER_APPLIED = {key: frozenset(names.split()) for keys, names in _ROWS for key in keys.split()}


def never_applied(architecture: str, paths: Iterable[str]) -> list[str]:
    """Return the modules (paths in GGUF) whose factors llama.cpp never applies."""
    ends = NEVER_APPLIED.get(architecture, frozenset())
    return [path for path in paths if re.sub(r"^blk\.\d+\.", "", path) in ends]
