"""List the families whose linear layers are transformers' `Conv1D`, which stores a weight as (in, out).

The other layers of these models, such as the head, are `nn.Linear`, so the table goes by the last part of a module's
name. Source: the uses of `pytorch_utils.Conv1D` in transformers 5.24. mlx-lm turns GPT-2's when it loads them, and
saves a folder of its own with them as (out, in), under a prefix that no other file of the family has.
"""

from __future__ import annotations

from collections.abc import Collection

CONV1D_MODULES = {
    "clvp": {"c_fc", "c_proj"},
    "clvp_decoder": {"c_fc", "c_proj"},
    "decision_transformer": {"c_attn", "q_attn", "c_fc", "c_proj"},
    "gpt2": {"c_attn", "q_attn", "c_fc", "c_proj"},
    "imagegpt": {"c_attn", "q_attn", "c_fc", "c_proj"},
    "openai-gpt": {"c_attn", "c_fc", "c_proj"},
}


MLX_PREFIXES = {"gpt2": "model.h."}


# Families that have no `Conv1D`: a square matrix, whose shape does not tell its layout, is (out, in) there.
LINEAR_MODEL_TYPES = frozenset(
    """albert bart bert bloom cohere cohere2 deepseek_v2 deepseek_v3 distilbert electra falcon gemma gemma2 gemma3
    gemma3_text gemma4 gemma4_text glm glm4 glm4_moe gpt_bigcode gpt_neo gpt_neox gptj gpt_oss granite internlm2 jamba
    llama llama4 llama4_text mamba mamba2 mistral mistral3 mixtral modernbert mpt olmo olmo2 olmoe opt persimmon phi
    phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_text qwen3_moe qwen3_next qwen3_vl roberta
    smollm3 stablelm starcoder2 t5 vit xlm-roberta""".split()
)


def stores_transposed(model_types: Collection[str], module: str) -> bool | None:
    """Return whether `module` stores its weight as (in, out); None if a component of the model is of no known family.

    model_types: those of config.json, nested configs included.
    """
    for model_type in model_types:
        if model_type in CONV1D_MODULES:
            is_turned = module.startswith(MLX_PREFIXES.get(model_type, "."))
            return module.rpartition(".")[2] in CONV1D_MODULES[model_type] and not is_turned
    return False if model_types and LINEAR_MODEL_TYPES.issuperset(model_types) else None
