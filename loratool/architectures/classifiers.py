"""The classes of each family for a task, and the heads that turn a base into one of them.

Merging a head in an adapter's modules_to_save turns a base into such a class. Source:
`models/auto/modeling_auto.py` of transformers 5.24. `STEMS`, which names modules, omits families whose config nests
the text model's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# PEFT's task_type -> the suffix of transformers' class names for it.
TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}

# Modules that PEFT adds to modules_to_save for these tasks (peft_model.py)
PEFT_HEADS = ("classifier", "score")

# Possible names of a head's last layer, which has one row per label; the first one present counts
HEADS = (
    *("score.weight", "score.out_proj.weight"),
    *("classification_head.out_proj.weight", "classifier.out_proj.weight", "classifier.weight"),
    *("classifier.linear_out.weight", "classifier.linear.weight", "classifier.1.weight", "classifier.dense.weight"),
    *("qa_outputs.weight", "qa_outputs.out_proj.weight", "qa_classifier.qa_outputs.weight"),
    *("logits_proj.weight", "sequence_summary.summary.weight"),
)

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

# Families without classifiers in `classes`
_MORE_OF_BOTH = """axk1:AXK1 axk2:AXK2 esmc:Esmc gte:Gte jina_embeddings_v3:JinaEmbeddingsV3 ministral3:Ministral3
    mistral4:Mistral4 modernvbert:ModernVBert nomic_bert:NomicBert qwen3_5:Qwen3_5 t5gemma:T5Gemma t5gemma2:T5Gemma2
    ultrabert:Ultrabert ultravbert:UltraVBert"""
_MORE_SEQUENCES = """cohere_compass_text:CohereCompassText gemma3:Gemma3 minicpm3:MiniCPM3 perceiver:Perceiver
    qwen3_5_text:Qwen3_5Text tapas:Tapas"""
_MORE_TOKENS = "beam:Beam openai_privacy_filter:OpenAIPrivacyFilter qwen3_asr:Qwen3ASR"
_MORE_QUESTIONS = """jina_embeddings_v3:JinaEmbeddingsV3 led:LED lxmert:Lxmert ministral3:Ministral3 splinter:Splinter
    ultrabert:Ultrabert"""

# Families with a class for sequences but none for questions
_NO_QUESTIONS = frozenset(
    """biogpt ctrl deepseek_v2 deepseek_v3 doge esm eurobert gemma gemma2 gemma3_text glm glm4 gpt-sw3 gpt_bigcode
    gpt_oss helium hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe layoutlm modernbert-decoder olmo olmo2 olmo3 openai-gpt
    persimmon phi phi3 phimoe plbart stablelm starcoder2 zamba zamba2""".split()
)
_SIMPLE = ("flaubert", "xlm", "xlnet")  # their class for questions with an ordinary head is ...Simple

_CHOICES = """albert bert big_bird camembert canine convbert data2vec-text deberta-v2 distilbert electra ernie flaubert
    fnet funnel ibert longformer luke megatron-bert mobilebert modernbert mpnet mra nystromformer rembert roberta
    roberta-prelayernorm roc_bert roformer squeezebert xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso"""

_IMAGES = """beit:Beit bit:Bit clip:CLIP convnext:ConvNext convnextv2:ConvNextV2 cvt:Cvt
    data2vec-vision:Data2VecVision deit:DeiT dinat:Dinat dinov2:Dinov2 dinov2_with_registers:Dinov2WithRegisters
    donut-swin:DonutSwin efficientnet:EfficientNet focalnet:FocalNet hgnet_v2:HGNetV2 hiera:Hiera ijepa:IJepa
    imagegpt:ImageGPT levit:Levit metaclip_2:MetaClip2 mobilenet_v1:MobileNetV1 mobilenet_v2:MobileNetV2
    mobilevit:MobileViT mobilevitv2:MobileViTV2 poolformer:PoolFormer pp_lcnet:PPLCNet pvt:Pvt pvt_v2:PvtV2
    regnet:RegNet resnet:ResNet segformer:Segformer siglip:Siglip siglip2:Siglip2 swiftformer:SwiftFormer swin:Swin
    swinv2:Swinv2 textnet:TextNet vit:ViT vit_msn:ViTMSN"""
_SOUNDS = """data2vec-audio:Data2VecAudio hubert:Hubert sew:SEW sew-d:SEWD unispeech:UniSpeech
    unispeech-sat:UniSpeechSat wav2vec2:Wav2Vec2 wav2vec2-bert:Wav2Vec2Bert wav2vec2-conformer:Wav2Vec2Conformer
    wavlm:WavLM"""


def _classes(table: str, end: str) -> dict[str, str]:
    return {family: stem + end for family, stem in _stems(table).items()}


_QUESTIONS = {family: stem for family, stem in STEMS["SEQ_CLS"].items() if family not in _NO_QUESTIONS}
_MULTIPLE_CHOICE = {family: STEMS["SEQ_CLS"][family] for family in _CHOICES.split()}

# Task -> model type -> the class; the first three are PEFT's task types, PEFT does not know the others
CLASSES = {
    "SEQ_CLS": _classes(f"{_BOTH} {_SEQUENCES} {_MORE_OF_BOTH} {_MORE_SEQUENCES}", TASKS["SEQ_CLS"]),
    "TOKEN_CLS": _classes(f"{_BOTH} {_TOKENS} {_MORE_OF_BOTH} {_MORE_TOKENS}", TASKS["TOKEN_CLS"]),
    "QUESTION_ANS": {
        **{family: f"{stem}ForQuestionAnswering" for family, stem in _QUESTIONS.items()},
        **{family: f"{_QUESTIONS[family]}ForQuestionAnsweringSimple" for family in _SIMPLE},
        **_classes(_MORE_QUESTIONS, "ForQuestionAnswering"),
    },
    "images": _classes(_IMAGES, "ForImageClassification"),
    "sounds": {
        **_classes(_SOUNDS, TASKS["SEQ_CLS"]),
        **_classes("audio-spectrogram-transformer:AST whisper:Whisper", "ForAudioClassification"),
    },
    "choices": {family: f"{stem}ForMultipleChoice" for family, stem in _MULTIPLE_CHOICE.items()},
}

# Suffixes of the names of a task's classes
ENDS = {
    **{task: (end,) for task, end in TASKS.items()},
    "QUESTION_ANS": ("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
    "images": ("ForImageClassification", "ForImageClassificationWithTeacher"),
    "sounds": ("ForAudioClassification", TASKS["SEQ_CLS"]),
    "choices": ("ForMultipleChoice",),
}

# Names that only a head for questions has, and names that only a head for sequences has
_OF_QUESTIONS = re.compile(r"qa_outputs\.|qa_classifier\.")
_OF_SEQUENCES = re.compile(r"classification_head\.|pre_classifier\.|classifier\.(out_proj|linear_out)\.|logits_proj\.")

# (names of tensors beside the head in classes of a task, the families with such classes)
_BESIDE = {
    "SEQ_CLS": (
        (
            r"(.*\.)?pooler\.",
            """albert bert big_bird canine deberta deberta-v2 ernie fnet gte layoutlm luke markuplm
            megatron-bert mobilebert nomic_bert rembert roc_bert squeezebert tapas""",
        ),
        (r"pre_classifier\.", "distilbert"),
        (r"dense\.", "eurobert"),
        (r"head\.", "modernbert modernbert-decoder modernvbert"),
        (r"sequence_summary\.", "xlnet"),
    ),
    "TOKEN_CLS": ((r"head\.", "modernbert modernvbert"),),
    "QUESTION_ANS": (
        (r"head\.", "modernbert"),
        # their backbone has another name than the language model's `model.`
        (
            r"(transformer\.)?layers\.",
            """arcee diffllama exaone4 llama ministral nemotron qwen2 qwen3 qwen3_moe
            qwen3_next seed_oss smollm3""",
        ),
    ),
    "sounds": ((r"projector\.", f"{' '.join(_stems(_SOUNDS))} whisper"),),
}


def tasks_of_head(model_type: str | None, names: Collection[str]) -> list[str]:
    """Return the tasks (keys of CLASSES) that a family's head can be for, given the model's tensor names."""
    known = [task for task, classes in CLASSES.items() if model_type in classes and task != "choices"]
    for task, telling in (("QUESTION_ANS", _OF_QUESTIONS), ("SEQ_CLS", _OF_SEQUENCES)):
        if task in known and any(map(telling.match, names)):
            return [task]
    others = {"QUESTION_ANS"} | ({"sounds"} if absent_beside(model_type, "sounds", names) else set())
    return [task for task in known if task not in others]


def absent_beside(model_type: str | None, task: str, names: Iterable[str]) -> bool:
    """Return whether a family's class for a task has layers that `names` lacks, mostly a pooler under the head."""
    needed = next((layer for layer, families in _BESIDE.get(task, ()) if model_type in families.split()), None)
    return needed is not None and not any(re.match(needed, name) for name in names)


def classes_of_tasks(model_type: str | None) -> list[str]:
    """Return the names of a family's classes with a head for one of the tasks."""
    return [classes[model_type] for classes in CLASSES.values() if model_type in classes]


def classifier_class(model_type: str | None, declared: str, task: str) -> str | None:
    """Return the name of a family's class for `task`, a key of CLASSES; None if it is unknown.

    declared: the class that config.json names, or an empty string. If it is of another family, the result is None.
    """
    if declared.endswith(ENDS[task]):
        return declared
    name = CLASSES[task].get(model_type or "")
    stem = name.rpartition("For")[0].removesuffix("Text") if name else ""
    return name if name and (not declared or declared.startswith(stem)) else None
