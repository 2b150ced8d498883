"""List the models and modules of transformers 5.24 that PEFT 0.21 refuses or mistakes.

Seen by loading an adapter of every weight of each type, or read in the file that a table names.
"""

from __future__ import annotations

from .experts import EXPERTS

# Type -> last names of layers on which LoRA has no effect before it is merged, since the class multiplies by the weight
# itself (dt_proj) or a kernel does. PEFT refuses the latter (`_check_lora_target_modules_mamba`).
_MAMBA = frozenset({"out_proj", "conv1d"})

BYPASSED = {
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h"), _MAMBA),
    **dict.fromkeys(("falcon_mamba", "mamba"), _MAMBA | {"dt_proj"}),
    "jamba": frozenset({"dt_proj"}),
}

# Type -> last names of embeddings that look up other rows than they are asked for (positions after an offset, or
# counted from the shape of what they are given), normalize what they find, or read a second table for some. PEFT looks
# up its factors by what the module is given, and adds them to what it returns (`tuners/lora/layer.py`).
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
    "perceiver": frozenset({"embeddings"}),  # whose weight the decoder multiplies by, without a head of its own
    "prophetnet": frozenset({"ngram_embeddings", "position_embeddings"}),  # the first is read by its weight alone
    "udop": frozenset({"relative_attention_bias"}),  # it is asked for its size, which PEFT's layer does not have
}

# Type -> last names of convolutions of some groups, of which PEFT wants a rank that the groups divide.
GROUPED_CONVS = {
    "omniasr_audio": frozenset({"conv"}),
    "squeezebert": frozenset({"conv1d", "key", "query", "value"}),
    "zaya": frozenset({"conv_qk_grouped"}),
}

# Type -> last names of linear layers that multiply other shapes than a linear layer does; told of as parameters, they
# are right.
GROUPED_LINEAR = {"deepseek_v4": frozenset({"o_a_proj"})}

_GATED = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})
_NUMBERED = frozenset({"gate", "w1", "w2", "w3"})

# Types for which PEFT stacks the factors of single experts -> last names that it takes for experts or routers wherever
# they are, so that no other module of these names gets factors (`utils/transformers_weight_conversion.py`).
STACKED_BY_PEFT = {
    **dict.fromkeys("minimax minimax_m2 mixtral".split(), _NUMBERED),
    **dict.fromkeys(
        """afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
        glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next
        qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker sarvam_mla solar_open""".split(),
        _GATED,
    ),
}

# Types whose routers, like their experts, are bare parameters of modules that are not linear layers, or linear layers
# that return a tuple, which PEFT's wrapper cannot run (llama4, phimoe).
BARE_ROUTERS = frozenset(EXPERTS) | frozenset(
    """aria aria_text dots3_note dots3_note_text gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared
    hy_v4 hy_v4_vl hy_v4_vl_text inkling_text lara_mini llama4 llama4_text minimax_m3_vl_text mistral4 muse_spark
    qwen3_5_moe qwen3_vl_moe qwen3_vl_moe_text step3p5 step3p7""".split()
)

# Types whose routers are linear layers, which PEFT's all-linear takes.
LINEAR_ROUTERS = frozenset("hunyuan_v1_moe llama4 llama4_text longcat_flash phimoe".split())

# Types of mixtures of experts whose files tell too little of what PEFT's all-linear takes: the class splits or fuses
# other layers than experts, has a tower that PEFT takes otherwise, or layers that PEFT refuses.
UNCOUNTED_MIXTURES = frozenset(
    """aria deepseek_ocr2 deepseek_v4 glm4v_moe jamba kimi_k25 laguna lara_mini minimax_m3_vl nemotron_h
    qwen3_omni_moe qwen3_omni_moe_thinker sarvam_moe step3p5 step3p7 unlimited_ocr""".split()
)

# Type -> last names of its modules whose weight is a stack of experts, (expert, out, in).
STACKED_MODULES = {"jetmoe": frozenset({"input_linear", "output_linear"})}

# Types whose class splits, fuses or moves weights of the file while it loads them, so that no module has that name or
# it is another kind of layer, or whose keys PEFT, which renames them as transformers does a file's, renames twice
# (laguna's shared experts, the tower of a bare paddleocr_vl) -> an expression for their canonical paths
# (`renames.canonical`).
RESHAPED = {
    "cohere_asr": r"\bpos_emb$",
    "ctrl": r"^(transformer\.)?w$",  # its embedding; no other type has this name
    "deepseek_ocr2": r"\blanguage_model\.",
    "ernie4_5_vl_moe": r"\bmlp\.(gate|moe_statics|experts)\b",
    **dict.fromkeys(  # which leaves out the last tokens of the head
        "inkling2 inkling2_loop inkling2_loop_text inkling2_text".split(),
        r"^lm_head$|\b(sconv|convolution)\.weight_proj$|\bembeddings\.position_embedding$",
    ),
    "laguna": r"\bshared_experts\.",
    "minimax_m3_vl": r"^multi_modal_projector\.linear_",
    "mistral_large4_text": r"\bmlp\.(gate|experts|shared_experts)\b",
    "mobilebert": r"^cls\.predictions\.dense$",  # multiplied by without a call
    "neomme": r"\bembedding_projection$",  # tied to a layer that is multiplied by without a call
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

# Types for which no adapter would load -> the reason.
REFUSED = {
    **dict.fromkeys(
        """colqwen2 d_fine deformable_detr gradium_phonon_tts jev lw_detr maskformer nemo_speechlm pp_doclayout_v4
        rt_detr sam3_tracker tipsv2_dpt""".split(),
        "transformers renames its weights while it loads them, and its modules' names are not known here",
    ),
    "ibert": "PEFT refuses its QuantLinear layers",
    "pp_formulanet": "PEFT finds no input embeddings in it",
}

# Types made of two models, whose names they have under `encoder.` and `decoder.`.
ENCODER_DECODERS = frozenset("encoder-decoder speech-encoder-decoder vision-encoder-decoder".split())
