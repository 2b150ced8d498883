"""The attribute under which each family's task models have their backbone.

It is the prefix of names when a file of a bare backbone (`h.0.attn` of the hub's gpt2) is loaded into a task model.
Source: `base_model_prefix` of transformers 5.24.
"""

from __future__ import annotations

_TYPES = {
    "model": """cohere cohere2 deepseek_v2 deepseek_v3 gemma gemma2 gemma3_text glm glm4 gpt_oss granite llama mistral
        mixtral olmo olmo2 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm
        starcoder2""",
    "transformer": """bloom codegen ctrl dbrx falcon flaubert gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj imagegpt mpt
        openai-gpt squeezebert xlm xlnet""",
    "roberta": "camembert jina_embeddings_v3 roberta xlm-roberta xlm-roberta-xl xmod",
    "bert": "bert big_bird megatron-bert",
    "backbone": "falcon_mamba mamba mamba2 xlstm",
    "deberta": "deberta deberta-v2",
    "data2vec_text": "data2vec-text",
    "roberta_prelayernorm": "roberta-prelayernorm",
    **{
        name: name
        for name in """albert biogpt bros canine convbert cpmant distilbert electra ernie esm esmc fnet funnel
        git gpt_neox gpt_neox_japanese gte ibert layoutlm layoutlmv2 layoutlmv3 led lilt longformer luke
        markuplm mobilebert mpnet mra nomic_bert nystromformer prophetnet reformer rembert roc_bert roformer
        rwkv tapas vit yoso""".split()
    },
    # their task models have the backbone's parts at the top, in spite of `base_model_prefix`
    "": "dinov3_convnext dinov3_vit longt5 mt5 sapiens2 switch_transformers t5 umt5",
}

BACKBONES = {model_type: prefix for prefix, types in _TYPES.items() for model_type in types.split()}

# The children of a task model beside its backbone.
BESIDE = frozenset(
    """classifier cls embed_out generator_lm_head generator_predictions head lm_head lm_loss output pred_layer
    predictions qa_outputs score vocab_layer_norm vocab_projector vocab_transform""".split()
)


def is_backbone(class_name: str) -> bool:
    return class_name.endswith("Model") and "Head" not in class_name and class_name != "MarianMTModel"


def in_task_model(module: str, model_type: str | None) -> str:
    """Return a backbone's module path as a task model has it; unchanged if the family is unknown."""
    prefix = BACKBONES.get(model_type or "", "")
    return module if not prefix or module.partition(".")[0] in {prefix, *BESIDE} else f"{prefix}.{module}"
