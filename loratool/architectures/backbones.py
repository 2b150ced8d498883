"""List the attribute under which each family's task models hold their backbone.

Files of a bare backbone (`h.0.attn` of the hub's gpt2) are loaded into a task model with this prefix before their
names. Source: `base_model_prefix` of transformers 5.24.
"""

from __future__ import annotations

_TYPES = {
    "model": """cohere cohere2 deepseek_v2 deepseek_v3 gemma gemma2 gemma3_text glm glm4 gpt_oss granite llama mistral
        mixtral olmo olmo2 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm
        starcoder2""",
    "transformer": "bloom codegen ctrl falcon gpt2 gpt_bigcode gpt_neo gptj imagegpt mpt openai-gpt xlm xlnet",
    "roberta": "camembert roberta xlm-roberta xlm-roberta-xl",
    "bert": "bert big_bird megatron-bert",
    "backbone": "falcon_mamba mamba mamba2",
    "deberta": "deberta deberta-v2",
    **{name: name for name in ("albert", "distilbert", "electra", "gpt_neox", "mpnet", "vit")},
}


BACKBONES = {model_type: prefix for prefix, types in _TYPES.items() for model_type in types.split()}


# The children of a task model beside its backbone.
BESIDE = frozenset("lm_head embed_out score classifier qa_outputs cls".split())


def is_backbone(class_name: str) -> bool:
    return class_name.endswith("Model") and "Head" not in class_name


def in_task_model(module: str, model_type: str | None, class_name: str) -> str:
    """Return a backbone's module path as a task model of class `class_name` has it.

    The path is unchanged if the class is the backbone's own, or the family is not known.
    """
    prefix = BACKBONES.get(model_type or "", "")
    if not prefix or not class_name or is_backbone(class_name) or module.partition(".")[0] in {prefix, *BESIDE}:
        return module
    return f"{prefix}.{module}"
