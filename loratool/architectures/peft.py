"""The models and modules of transformers 5.24 that PEFT 0.21 refuses or handles wrongly.

Checked by loading an adapter of every weight of each type, or read in the file that a table names.
"""

from __future__ import annotations

from .experts import EXPERTS

# Type -> last names of layers where LoRA has no effect before it is merged, because the class (dt_proj) or a kernel
# uses the weight directly. PEFT refuses the latter (`_check_lora_target_modules_mamba`).
_MAMBA = frozenset({"out_proj", "conv1d"})

BYPASSED = {
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h"), _MAMBA),
    **dict.fromkeys(("falcon_mamba", "mamba"), _MAMBA | {"dt_proj"}),
    "jamba": frozenset({"dt_proj"}),
}

# Type -> last names of embeddings that look up other rows than their input (positions after an offset, or counted from
# the input's shape), normalize their output, or read a second table for some rows. PEFT looks up its factors with the
# module's input and adds them to its output (`tuners/lora/layer.py`).
OTHER_LOOKUPS = {
    **dict.fromkeys(
        """autoformer bart bigbird_pegasus biogpt blenderbot blenderbot-small fsmt informer led marian mbart mvp opt
        pegasus plbart pp_formulanet roformer time_series_transformer trocr whisper""".split(),
        frozenset({"embed_positions"}),
    ),
    **dict.fromkeys(
        "idefics inkling_text inkling2_text inkling2_loop_text muse_glimmer_text muse_spark_text".split(),
        frozenset({"embed_tokens"}),
    ),
    "ovis2": frozenset({"visual_embeddings_table"}),
    "perceiver": frozenset({"embeddings"}),  # the decoder multiplies by its weight, without a separate head
    "prophetnet": frozenset({"ngram_embeddings", "position_embeddings"}),  # of the first only the weight is read
    "udop": frozenset({"relative_attention_bias"}),  # the class reads its size, which PEFT's layer lacks
}

# Type -> last names of grouped convolutions; PEFT needs a rank that the number of groups divides.
GROUPED_CONVS = {
    "omniasr_audio": frozenset({"conv"}),
    "squeezebert": frozenset({"conv1d", "key", "query", "value"}),
    "zaya": frozenset({"conv_qk_grouped"}),
}

# Type -> last names of linear layers with inputs of other shapes than a linear layer's; PEFT applies LoRA correctly if
# they are listed as parameters.
GROUPED_LINEAR = {"deepseek_v4": frozenset({"o_a_proj"})}

_GATED = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})
_NUMBERED = frozenset({"gate", "w1", "w2", "w3"})

# Types for which PEFT stacks the factors of separate experts -> last names that it always takes for experts or routers,
# so that no other module of these names gets factors (`utils/transformers_weight_conversion.py`).
STACKED_BY_PEFT = {
    **dict.fromkeys("minimax minimax_m2 mixtral".split(), _NUMBERED),
    **dict.fromkeys(
        """afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
        glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next
        qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker sarvam_mla solar_open""".split(),
        _GATED,
    ),
}

# Types whose routers, like their experts, are bare parameters of modules other than linear layers, or are linear layers
# that return a tuple, which PEFT's wrapper cannot run (llama4, phimoe).
BARE_ROUTERS = frozenset(EXPERTS) | frozenset(
    """aria aria_text dots3_note dots3_note_text gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared
    hy_v4 hy_v4_vl hy_v4_vl_text inkling_text lara_mini llama4 llama4_text minimax_m3_vl_text mistral4 muse_spark
    qwen3_5_moe qwen3_vl_moe qwen3_vl_moe_text step3p5 step3p7""".split()
)

# Types whose routers are linear layers; PEFT's all-linear includes them.
LINEAR_ROUTERS = frozenset("hunyuan_v1_moe llama4 llama4_text longcat_flash phimoe".split())

# Types of mixtures of experts whose files do not show what PEFT's all-linear includes: the class splits or fuses other
# layers than experts, or has a tower that PEFT handles differently, or layers that PEFT refuses.
UNCOUNTED_MIXTURES = frozenset(
    """aria deepseek_ocr2 deepseek_v4 glm4v_moe jamba kimi_k25 laguna lara_mini minimax_m3_vl nemotron_h
    qwen3_omni_moe qwen3_omni_moe_thinker sarvam_moe step3p5 step3p7 unlimited_ocr""".split()
)

# Type -> last names of its modules whose weight is a stack of experts, (expert, out, in).
STACKED_MODULES = {"jetmoe": frozenset({"input_linear", "output_linear"})}

# Types with weights that have no module of their name, or another kind of layer, because the class splits, fuses or
# moves them on loading; or with keys that PEFT renames twice, since it renames keys as transformers does (laguna's
# shared experts, the tower of a bare paddleocr_vl) -> an expression for the canonical paths of such weights
# (`renames.canonical`).
RESHAPED = {
    "cohere_asr": r"\bpos_emb$",
    "ctrl": r"^(transformer\.)?w$",  # its embedding; no other type has this name
    "deepseek_ocr2": r"\blanguage_model\.",
    "ernie4_5_vl_moe": r"\bmlp\.(gate|moe_statics|experts)\b",
    **dict.fromkeys(  # the class omits the last tokens of the head
        "inkling2 inkling2_loop inkling2_loop_text inkling2_text".split(),
        r"^lm_head$|\b(sconv|convolution)\.weight_proj$|\bembeddings\.position_embedding$",
    ),
    "laguna": r"\bshared_experts\.",
    "minimax_m3_vl": r"^multi_modal_projector\.linear_",
    "mistral_large4_text": r"\bmlp\.(gate|experts|shared_experts)\b",
    "mobilebert": r"^cls\.predictions\.dense$",  # the class multiplies by its weight without calling it
    "neomme": r"\bembedding_projection$",  # tied to a layer whose weight is used without a call
    "molmo2": r"\blanguage_model\..*\b(att_proj|ff_proj|wte)$",
    "molmo2_text": r"\bwte$",
    "nemotron_h_omni": r"\bvision_model\..*\bqkv$",
    "paddleocr_vl": r"^visual\.",
    "pi0": r"^embed_action_time\.",
    "shieldgemma2": r"^model\.lm_head$",
    "step3p7": r"^vision_model\.",
    "tipsv2": r"\btoken_embedding$",
    "unlimited_ocr": r"\blanguage_model\.",
}

# Types for which no adapter loads -> the reason.
REFUSED = {
    **dict.fromkeys(
        """colqwen2 d_fine deformable_detr gradium_phonon_tts jev lw_detr maskformer nemo_speechlm pp_doclayout_v4
        rt_detr sam3_tracker tipsv2_dpt""".split(),
        "transformers renames its weights while it loads them, and its modules' names are not known here",
    ),
    "ibert": "PEFT refuses its QuantLinear layers",
    "pp_formulanet": "PEFT finds no input embeddings in it",
}

# Types made of two models, with their names under `encoder.` and `decoder.`.
ENCODER_DECODERS = frozenset("encoder-decoder speech-encoder-decoder vision-encoder-decoder".split())
