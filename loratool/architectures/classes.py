"""The classes that a base can be loaded with, and the module paths of each.

PEFT uses the paths of the class that it wraps. A class for images and text contains a language model with a separate
class (`LlamaForCausalLM` in llava's files). A model, its classifier and its bare backbone have different attributes for
the backbone. Source: `models/auto/modeling_auto.py` and `base_model_prefix` of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .backbones import BACKBONES, is_backbone
from .classifiers import STEMS, TASKS
from .config_tensors import declared_class
from .peft import ENCODER_DECODERS

# (prefix in the main class, prefix in another class or None for modules that it lacks); the first match counts
Moves = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class ModelClass:
    """A class of a model, with its module paths."""

    name: str
    model_type: str  # of its config
    moves: Moves

    def path(self, name: str) -> str:
        """Return the class's path for a path in the main class; empty if this class lacks the module or tensor."""
        ended = f"{name}."  # so that `lm_head` matches the prefix `lm_head.`
        start, to = next((move for move in self.moves if ended.startswith(move[0])), ("", None))
        return "" if to is None else (to + ended.removeprefix(start)).removesuffix(".")

    def in_main_class(self, path: str) -> str:
        """Return the path in the main class for a path in this class; unchanged if this class has no such path."""
        dotted = f"{path}."  # so that a head's module matches its prefix
        moves = ((start, to) for start, to in self.moves if to is not None and dotted.startswith(to))
        start, to = next(moves, ("", ""))
        return (start + dotted.removeprefix(to))[:-1]


# Ends of the names of classes with a language model's head
LM_ENDS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")

CLASSIFIERS = (*TASKS.values(), "ForQuestionAnswering")

# type:the stem of its class names, for ...ForCausalLM, ...LMHeadModel and ...ForMaskedLM
_STEMS = {
    "ForCausalLM": """afmoe:Afmoe apertus:Apertus apertus1p5_text:Apertus1p5Text arcee:Arcee aria_text:AriaText
    axk1:AXK1 axk2:AXK2 bailing_hybrid:BailingHybrid bamba:Bamba beam:Beam big_bird:BigBird biogpt:BioGpt bitnet:BitNet
    bloom:Bloom blt:Blt camembert:Camembert codegen:CodeGen cohere2:Cohere2 cohere2_moe:Cohere2Moe cohere:Cohere
    cohere_compass_text:CohereCompass cpmant:CpmAnt cwm:Cwm data2vec-text:Data2VecText dbrx:Dbrx
    deepseek_v2:DeepseekV2 deepseek_v32:DeepseekV32 deepseek_v3:DeepseekV3 deepseek_v4:DeepseekV4 diffllama:DiffLlama
    doge:Doge dory:Dory dots1:Dots1 dots3_note_text:Dots3Note electra:Electra ernie4_5:Ernie4_5
    ernie4_5_moe:Ernie4_5_Moe ernie:Ernie exaone4:Exaone4 exaone:Llama exaone_moe:ExaoneMoe falcon:Falcon
    falcon_h1:FalconH1 falcon_mamba:FalconMamba flex_olmo:FlexOlmo flint:Flint gemma2:Gemma2 gemma3_text:Gemma3
    gemma3n_text:Gemma3n gemma4_text:Gemma4 gemma4_unified_text:Gemma4Unified gemma:Gemma git:Git glm4:Glm4
    glm4_moe:Glm4Moe glm4_moe_lite:Glm4MoeLite glm:Glm glm_moe_dsa:GlmMoeDsa gpt_bigcode:GPTBigCode gpt_neo:GPTNeo
    gpt_neox:GPTNeoX gpt_neox_japanese:GPTNeoXJapanese gpt_oss:GptOss gptj:GPTJ granite:Granite
    granite_swa:GraniteSWA granitemoe:GraniteMoe granitemoe_swa:GraniteMoeSWA granitemoehybrid:GraniteMoeHybrid
    granitemoeshared:GraniteMoeShared helium:Helium hrm_text:HrmText hunyuan_v1_dense:HunYuanDenseV1
    hunyuan_v1_moe:HunYuanMoEV1 hy_v3:HYV3 hy_v4:HYV4 hyperclovax:HyperCLOVAX inkling2_loop_text:Inkling2Loop
    inkling2_text:Inkling2 inkling_text:Inkling internlm3:Llama iquestcoder:Llama jais2:Jais2 jamba:Jamba jetmoe:JetMoe
    kimi_linear:KimiLinear kolibri1:Kolibri1 laguna:Laguna lara_mini:LaraMini lfm2:Lfm2 lfm2_moe:Lfm2Moe lfm3:Lfm3
    llama4_text:Llama4 llama:Llama longcat_flash:LongcatFlash mamba2:Mamba2 mamba:Mamba megatron-bert:MegatronBert
    mellum:Mellum mimo_v2_flash:MiMoV2Flash minicpm3:MiniCPM3 minimax:MiniMax minimax_m2:MiniMaxM2
    minimax_m3_vl_text:MiniMaxM3VL ministral3:Ministral3 ministral:Ministral mistral4:Mistral4 mistral:Mistral
    mixtral:Mixtral mllama_text_model:Mllama modernbert-decoder:ModernBertDecoder mpt:Mpt nanochat:NanoChat
    nemotron:Nemotron nemotron_h:NemotronH olmo2:Olmo2 olmo3:Olmo3 olmo:Olmo olmo_hybrid:OlmoHybrid olmoe:Olmoe opt:OPT
    persimmon:Persimmon phi3:Phi3 phi4_multimodal:Phi4Multimodal phi:Phi phimoe:Phimoe qwen2:Qwen2 qwen2_moe:Qwen2Moe
    qwen3:Qwen3 qwen3_5_moe_text:Qwen3_5Moe qwen3_5_text:Qwen3_5 qwen3_moe:Qwen3Moe qwen3_next:Qwen3Next
    qwen4_exp_text:Qwen4Exp recurrent_gemma:RecurrentGemma rembert:RemBert roberta-prelayernorm:RobertaPreLayerNorm
    roberta:Roberta roc_bert:RoCBert roformer:RoFormer rwkv:Rwkv sarvam_mla:DeepseekV3 sarvam_moe:Glm4Moe
    seed_oss:SeedOss smollm3:SmolLM3 solar_open:SolarOpen stablelm:StableLm starcoder2:Starcoder2 vaultgemma:VaultGemma
    xglm:XGLM xlm-roberta-xl:XLMRobertaXL xlm-roberta:XLMRoberta xlstm:xLSTM xmod:Xmod youtu:Youtu zamba2:Zamba2
    zamba:Zamba zaya:Zaya""",
    "LMHeadModel": "bert:Bert ctrl:CTRL gpt-sw3:GPT2 gpt2:GPT2 openai-gpt:OpenAIGPT xlnet:XLNet",
    "ForMaskedLM": """albert:Albert bert:Bert big_bird:BigBird camembert:Camembert convbert:ConvBert
    data2vec-text:Data2VecText deberta-v2:DebertaV2 deberta:Deberta distilbert:DistilBert electra:Electra ernie:Ernie
    eurobert:EuroBert fnet:FNet gte:Gte ibert:IBert jina_embeddings_v3:JinaEmbeddingsV3 layoutlm:LayoutLM
    longformer:Longformer megatron-bert:MegatronBert mobilebert:MobileBert modernbert:ModernBert mpnet:MPNet mra:Mra
    nomic_bert:NomicBert nystromformer:Nystromformer rembert:RemBert roberta-prelayernorm:RobertaPreLayerNorm
    roberta:Roberta roc_bert:RoCBert roformer:RoFormer squeezebert:SqueezeBert xlm-roberta-xl:XLMRobertaXL
    xlm-roberta:XLMRoberta xmod:Xmod yoso:Yoso""",
}

# type:the stem of its bare class, ...TextModel
_TEXT_MODELS = """aria_text:Aria apertus1p5_text:Apertus1p5 cohere_compass_text:CohereCompass
    cosmos3_edge_text:Cosmos3Edge data2vec-text:Data2Vec dots3_note_text:Dots3Note gemma3_text:Gemma3
    gemma3n_text:Gemma3n gemma4_text:Gemma4 gemma4_unified_text:Gemma4Unified glm4v_moe_text:Glm4vMoe glm4v_text:Glm4v
    glm5_next_text:Glm5Next glm_ocr_text:GlmOcr granite_docling_text:GraniteDocling hrm_text:Hrm
    hunyuan_vl_text:HunYuanVL hy_v4_vl_text:HYV4VL inkling2_loop_text:Inkling2Loop inkling2_text:Inkling2
    inkling_text:Inkling llama4_text:Llama4 minimax_m3_vl_text:MiniMaxM3VL mistral_large4_text:MistralLarge4
    mllama_text_model:Mllama molmo2_text:Molmo2 muse_glimmer_text:MuseGlimmer muse_spark_text:MuseSpark
    qwen2_5_omni_text:Qwen2_5OmniThinker qwen2_5_vl_text:Qwen2_5_VL qwen2_vl_text:Qwen2VL qwen3_5_moe_text:Qwen3_5Moe
    qwen3_5_text:Qwen3_5 qwen3_omni_moe_text:Qwen3OmniMoeThinker qwen3_vl_moe_text:Qwen3VLMoe qwen3_vl_text:Qwen3VL
    qwen4_exp_text:Qwen4Exp"""

# Types whose classifier includes all of the model with its towers; `classifiers` has those of text only.
_CLASSIFIERS_WITH_TOWERS = {"gemma3": CLASSIFIERS[:1], "qwen3_5": CLASSIFIERS[:2]}

# Types without a bare class, or with one that is not the main class without its head, or has another stem
_NO_BARE = frozenset(
    """blip blip-2 diffusion_gemma encoder-decoder evolla flaubert instructblip instructblipvideo kosmos-2 kosmos-2.5
    llama4 minimax_m3_vl nemotron_h_omni perceiver pix2struct pp_chart2table pp_formulanet qwen2_5_omni qwen3_omni_moe
    seamless_m4t seamless_m4t_v2 shieldgemma2 speech-encoder-decoder trocr udop vision-encoder-decoder whisper
    xlm""".split()
)

# (type, task) of classifiers with only a part of the backbone
_PARTIAL = frozenset(
    [("funnel", "SEQ_CLS"), *((kind, "TOKEN_CLS") for kind in ("funnel", "luke", "markuplm", "mt5", "t5", "umt5"))]
)

# Types whose classifiers have the backbone under a name that their main class lacks: T5's has no backbone.
_ADD_BODY = {"mt5": "transformer.", "t5": "transformer.", "umt5": "transformer."}

# Encoders with a pooler in the bare class only, or in the bare class and the classifier of sequences
_POOLER_IF_BARE = frozenset(
    """camembert data2vec-text esm ibert jina_embeddings_v3 lilt longformer mpnet roberta roberta-prelayernorm
    xlm-roberta xlm-roberta-xl xmod""".split()
)
_POOLER_IF_SEQUENCES = frozenset("albert bert ernie gte megatron-bert mobilebert nomic_bert rembert roc_bert".split())

# Heads of a task beside the language model's, and heads that only ...ForPreTraining has
_TASK_HEADS = "score classifier pre_classifier classification_head qa_outputs".split()
_PRETRAINING = ("cls.seq_relationship.", "sop_classifier.")

# Type -> (path of the text model, path of the head); all others are as in _INSIDE
_INSIDE = ("model.language_model.", "lm_head.")
_TEXT_MODEL = ("model.text_model.", "lm_head.")
_WITH_HEAD = ("language_model.model.", "language_model.lm_head.")
_THINKER = ("thinker.model.language_model.", "thinker.lm_head.")
_TEXT_AT = {
    "modernvbert": ("model.text_model.", ""),  # its head has other layers than the text class's
    **dict.fromkeys("emu3 granite_docling idefics2 idefics3 smolvlm".split(), _TEXT_MODEL),
    **dict.fromkeys("blip-2 instructblip instructblipvideo llama4 nemotron_h_omni".split(), _WITH_HEAD),
    **dict.fromkeys("qwen2_5_omni qwen3_omni_moe".split(), _THINKER),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), ("model.", "lm_head.")),
    "shieldgemma2": ("model.model.language_model.", "model.lm_head."),
}

# Type -> the text model's type, for old config.json files without text_config or without a type in it
_FLAT = {
    "fuyu": "persimmon",
    "gemma3": "gemma3_text",
    "llava": "llama",
    "llava_next": "llama",
    "mllama": "mllama_text_model",
    "paligemma": "gemma",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
}

# Type -> (class, type, prefix of the paths) of a part that is a separate model for images, sound and text
_PARTS = {
    "qwen2_5_omni": ("Qwen2_5OmniThinkerForConditionalGeneration", "qwen2_5_omni_thinker", "thinker."),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerForConditionalGeneration", "qwen3_omni_moe_thinker", "thinker."),
}


def _read(table: str) -> dict[str, str]:
    return {kind: stem for kind, _, stem in (entry.partition(":") for entry in table.split())}


_LM_STEMS = {end: _read(table) for end, table in _STEMS.items()}
_TEXT_STEMS = _read(_TEXT_MODELS)


def classes_of(config: Mapping[str, Any]) -> dict[str, ModelClass]:
    """Return the classes that can load a model of this config.json, by name, the declared class first.

    There are none for a model without config.json, an image model, and a model made of two models.
    """
    declared, kind = declared_class(config), config.get("model_type")
    kind = kind if isinstance(kind, str) else ""
    if kind in ENCODER_DECODERS:
        return {}
    names = dict.fromkeys([*([declared] if declared else []), *_names(kind, declared)])
    text = _text_type(config, kind)
    if text and declared.endswith("Model") and kind not in _NO_BARE:
        names[f"{declared.removesuffix('Model')}ForConditionalGeneration"] = None
    classes = {name: ModelClass(name, kind, _moves_of_whole(name, kind, declared)) for name in names}
    if kind in _PARTS:
        name, part, start = _PARTS[kind]
        classes[name] = ModelClass(name, part, ((start, ""),))
    body, head = _TEXT_AT.get(kind, _INSIDE)
    for name in _names(text, "") if text and text != kind else ():
        if head or not name.endswith(LM_ENDS):
            classes.setdefault(name, ModelClass(name, text, _moves_of_text(name, text, body, head)))
    return classes


def text_model_at(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the path prefixes of the language model inside a model for images or sound; empty for other models."""
    kind = config.get("model_type")
    kind = kind if isinstance(kind, str) else ""
    text = _text_type(config, kind)
    declared = declared_class(config)
    if not text or text == kind or any(declared == name for name in _names(text, "")):
        return ()
    return tuple(filter(None, _TEXT_AT.get(kind, _INSIDE)))


def _text_type(config: Mapping[str, Any], kind: str) -> str:
    """Return the type of the language model inside a model for images or sound; empty for other models."""
    part = config.get("thinker_config", config)
    text = part.get("text_config") if isinstance(part, Mapping) else None
    named = text.get("model_type") if isinstance(text, Mapping) else None
    return named if isinstance(named, str) else _FLAT.get(kind, "")


def _names(kind: str, declared: str) -> Iterator[str]:
    """Yield the names of the classes of a type; a type in no table has the stem of `declared`."""
    named = [stems[kind] for stems in _LM_STEMS.values() if kind in stems]
    declared_stems = [declared.removesuffix(end) for end in (*LM_ENDS, *CLASSIFIERS) if declared.endswith(end)]
    yield from (stems[kind] + end for end, stems in _LM_STEMS.items() if kind in stems)
    if kind in _TEXT_STEMS:
        yield f"{_TEXT_STEMS[kind]}TextModel"
    elif kind not in _NO_BARE:
        yield from (f"{stem}Model" for stem in (named or declared_stems)[:1])
    for task, end in TASKS.items():
        if kind in STEMS[task] and (kind, task) not in _PARTIAL:
            yield STEMS[task][kind] + end
    yield from (stem + end for end in _CLASSIFIERS_WITH_TOWERS.get(kind, ()) for stem in declared_stems)


def _moves_of_whole(name: str, kind: str, declared: str) -> Moves:
    """Return the moves from a type's main class, with its backbone under `BACKBONES`, to another class."""
    prefix = BACKBONES.get(kind, "model")
    body = f"{prefix}." if prefix else ""
    if is_backbone(name) and name == declared and kind not in BACKBONES:  # its own files may have its names
        return ((body, ""), ("", ""))
    if is_backbone(name):
        plain: Moves = (("lm_head.", None), ("", ""))
        unknown = name == declared and kind not in BACKBONES  # its files may lack the prefix `model.`
        return ((body, ""), *(plain if unknown else ())) if body else plain
    absent = [f"{body}pooler."] if _lacks_pooler(name, kind) else []
    if name == declared:
        rest: Moves = (("", ""),)
    elif name.endswith(CLASSIFIERS):
        absent += [] if body else ["lm_head."]
        rest = ((body, _ADD_BODY.get(kind, body)),)
    else:
        absent += [f"{head}." for head in _TASK_HEADS]
        rest = (("", ""),)
    absent += _PRETRAINING if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")) else ()
    return (*((start, None) for start in absent), *rest)


def _lacks_pooler(name: str, kind: str) -> bool:
    sequences = name.endswith(TASKS["SEQ_CLS"])
    of_others = name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", *CLASSIFIERS))
    return of_others and (kind in _POOLER_IF_BARE or (kind in _POOLER_IF_SEQUENCES and not sequences))


def _moves_of_text(name: str, kind: str, body: str, head: str) -> Moves:
    """Return the moves from a model for images or sound, with the text backbone at `body`, to the text class."""
    if is_backbone(name):
        return ((body, ""),)
    prefix = f"{BACKBONES.get(kind, 'model')}."
    return ((body, prefix), (head, "lm_head.")) if name.endswith(LM_ENDS) else ((body, prefix),)
