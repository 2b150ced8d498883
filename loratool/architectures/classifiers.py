"""List the classification classes of each family.

A base becomes one when the head in an adapter's modules_to_save is merged into it. Source:
`models/auto/modeling_auto.py` of transformers 5.24, without the families whose config nests the text model's.
"""

from __future__ import annotations

# PEFT's task_type -> the suffix of transformers' class names for it.
TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


# The names that the last layer of such a head can have; it has one row per label.
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


# family:the stem of its class names, for both tasks, for sequences only, and for tokens only
_BOTH = """albert:Albert arcee:Arcee bert:Bert big_bird:BigBird biogpt:BioGpt bloom:Bloom camembert:Camembert
    canine:Canine convbert:ConvBert data2vec-text:Data2VecText deberta:Deberta deberta-v2:DebertaV2
    deepseek_v3:DeepseekV3 diffllama:DiffLlama distilbert:DistilBert electra:Electra ernie:Ernie esm:Esm
    eurobert:EuroBert exaone4:Exaone4 falcon:Falcon flaubert:Flaubert fnet:FNet funnel:Funnel gemma:Gemma gemma2:Gemma2
    glm:Glm glm4:Glm4 gpt-sw3:GPT2 gpt2:GPT2 gpt_bigcode:GPTBigCode gpt_neo:GPTNeo gpt_neox:GPTNeoX gpt_oss:GptOss
    helium:Helium ibert:IBert layoutlm:LayoutLM layoutlmv2:LayoutLMv2 layoutlmv3:LayoutLMv3 lilt:Lilt llama:Llama
    longformer:Longformer luke:Luke markuplm:MarkupLM megatron-bert:MegatronBert minimax:MiniMax ministral:Ministral
    mistral:Mistral mixtral:Mixtral mobilebert:MobileBert modernbert:ModernBert mpnet:MPNet mpt:Mpt mra:Mra mt5:MT5
    nemotron:Nemotron nystromformer:Nystromformer persimmon:Persimmon phi:Phi phi3:Phi3 qwen2:Qwen2 qwen2_moe:Qwen2Moe
    qwen3:Qwen3 qwen3_moe:Qwen3Moe qwen3_next:Qwen3Next rembert:RemBert roberta:Roberta
    roberta-prelayernorm:RobertaPreLayerNorm roc_bert:RoCBert roformer:RoFormer seed_oss:SeedOss smollm3:SmolLM3
    squeezebert:SqueezeBert stablelm:StableLm starcoder2:Starcoder2 t5:T5 umt5:UMT5 xlm:XLM xlm-roberta:XLMRoberta
    xlm-roberta-xl:XLMRobertaXL xlnet:XLNet xmod:Xmod yoso:Yoso"""


_SEQUENCES = """bart:Bart bigbird_pegasus:BigBirdPegasus ctrl:CTRL deepseek_v2:DeepseekV2 doge:Doge
    gemma3_text:Gemma3Text gptj:GPTJ hunyuan_v1_dense:HunYuanDenseV1 hunyuan_v1_moe:HunYuanMoEV1 jamba:Jamba
    jetmoe:JetMoe mbart:MBart modernbert-decoder:ModernBertDecoder mvp:Mvp olmo:Olmo olmo2:Olmo2 olmo3:Olmo3
    openai-gpt:OpenAIGPT opt:OPT phimoe:Phimoe plbart:PLBart reformer:Reformer zamba:Zamba zamba2:Zamba2"""


_TOKENS = "apertus:Apertus bros:Bros"


def _stems(table: str) -> dict[str, str]:
    return {family: stem for family, _, stem in (entry.partition(":") for entry in table.split())}


STEMS = {"SEQ_CLS": _stems(f"{_BOTH} {_SEQUENCES}"), "TOKEN_CLS": _stems(f"{_BOTH} {_TOKENS}")}


def classifier_class(model_type: str | None, declared: str, task: str) -> str | None:
    """Return the name of a family's class for `task`, a key of TASKS; None if it is not known.

    declared: the class that config.json names, or an empty string. None too if it is of another family.
    """
    stem = STEMS[task].get(model_type or "")
    if declared.endswith(TASKS[task]):
        return declared
    return f"{stem}{TASKS[task]}" if stem and (not declared or declared.startswith(stem.removesuffix("Text"))) else None
