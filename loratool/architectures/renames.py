"""Map the names that transformers 4, transformers 5 and model files use to the one that version 5 uses.

Version 5 renames and fuses weights while it loads and reverses that in `save_pretrained`: files keep their
historical names, and an adapter has the module names of the version it was trained with. `canonical` maps all
three to the module name of version 5 and leaves a name that is canonical already unchanged, so that an adapter
can be matched with a file. The tables only say that two names are one weight of one layout. A weight that is
stacked, split or permuted while loading has no row, except experts, whose stacking `expert_part` describes.

Source: `transformers.conversion_mapping` of 5.24, its rows rewritten to be idempotent and to match a module's
path as well as a tensor's name. A row may reach further than its part of the model: both sides then get it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

RenameRules = tuple[tuple[str, str], ...]  # (regular expression, replacement), applied in order


# For every type: TensorFlow's names of LayerNorm, and weight norm before torch 2.
LEGACY: RenameRules = (
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
    (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)


# An adapter of the language model alone (`...ForCausalLM`) on a file of the multimodal model.
_TEXT: RenameRules = ((r"^model\.(?=(?:layers|embed_tokens|norm)(?:\.|$))", "model.language_model."),)


# Until 4.51 the language model was a causal LM with its head inside, beside the tower: neither had `model.`.
_LANGUAGE: RenameRules = (
    (r"^(?:model\.)?language_model\.lm_head(?=\.|$)", "lm_head"),
    (r"^(?:model\.)?language_model(?:\.model)?(?=\.|$)", "model.language_model"),
    *_TEXT,
)


_LLAVA: RenameRules = (
    *_LANGUAGE,
    (r"^(?=(?:vision_tower|multi_modal_projector|image_newline)(?:\.|$))", "model."),
)


_QWEN_VL: RenameRules = (
    (r"^(?=(?:visual|language_model)(?:\.|$))", "model."),
    *_TEXT,
)


_AUDIO: RenameRules = (
    *_LANGUAGE,
    (r"^(?=(?:audio_tower|multi_modal_projector)(?:\.|$))", "model."),
)


_GRANITE_SPEECH: RenameRules = (
    *_LANGUAGE,
    (r"^(?=(?:encoder|projector)(?:\.|$))", "model."),
)


# The files hold thinker and talker; an adapter of the thinker's class has no `thinker.`
_OMNI: RenameRules = (
    (r"^(?=(?:model|visual|audio_tower|lm_head)(?:\.|$))", "thinker."),
    (r"^thinker\.(?=(?:visual|audio_tower)(?:\.|$))", "thinker.model."),
    (r"^thinker\.model\.(?=(?:layers|embed_tokens|norm)(?:\.|$))", "thinker.model.language_model."),
)


_THINKER: RenameRules = (
    (r"^(?=(?:visual|audio_tower|language_model)(?:\.|$))", "model."),
    *_TEXT,
)


# A CLIP-like tower inside another model: its class had the transformer as a child of its own name.
_TOWER: RenameRules = ((r"\b((?:vision|image|video)_tower|vision_model)\.vision_model(?=\.|$)", r"\1"),)


_TOWER_TEXT: RenameRules = ((r"\btext_model\.text_model(?=\.|$)", "text_model"),)


_VIT: RenameRules = (
    (r"\bencoder\.layer(?=\.|$)", "layers"),
    (r"\battention\.attention\.query(?=\.|$)", "attention.q_proj"),
    (r"\battention\.attention\.key(?=\.|$)", "attention.k_proj"),
    (r"\battention\.attention\.value(?=\.|$)", "attention.v_proj"),
    (r"\battention\.output\.dense(?=\.|$)", "attention.o_proj"),
    (r"\bintermediate\.dense(?=\.|$)", "mlp.fc1"),
    (r"\boutput\.dense(?=\.|$)", "mlp.fc2"),
)


_DINOV2: RenameRules = (
    (r"\battention\.attention\.query(?=\.|$)", "attention.q_proj"),
    (r"\battention\.attention\.key(?=\.|$)", "attention.k_proj"),
    (r"\battention\.attention\.value(?=\.|$)", "attention.v_proj"),
    (r"\battention\.output\.dense(?=\.|$)", "attention.o_proj"),
    (r"\bmlp\.weights_out(?=\.|$)", "mlp.down_proj"),
)


_MIXTRAL: RenameRules = ((r"\bblock_sparse_moe(?=\.|$)", "mlp"),)


_GRANITE_MOE: RenameRules = (
    (r"\bblock_sparse_moe\.input_linear(?:\.weight)?(?=\.|$)", "block_sparse_moe.experts.gate_up_proj"),
    (r"\bblock_sparse_moe\.output_linear(?:\.weight)?(?=\.|$)", "block_sparse_moe.experts.down_proj"),
    (r"\bblock_sparse_moe\.router\.layer(?=\.|$)", "block_sparse_moe.router"),
)


_FORGET_GATE: RenameRules = (
    (r"\bself_attn\.(?=(?:f_proj|f_a_proj|f_b_proj|dt_bias|A_log)(?:\.|$))", "self_attn.forget_gate."),
)


_HYPER_CONNECTIONS: RenameRules = (
    (r"\bhc_attn_(?=(?:fn|base|scale)(?:\.|$))", "attn_hc."),
    (r"\bhc_ffn_(?=(?:fn|base|scale)(?:\.|$))", "ffn_hc."),
)


_HY_V4: RenameRules = (
    (r"\bhc_pre\.(?=hc_)", ""),
    (r"\blearnable_sink_param$", "sinks"),
    (r"\blinear_gate(?=\.|$)", "gate_proj"),
    (r"\bhc_attn_layer\.hc_(?=(?:fn|base|scale)$)", "attn_hc."),
    (r"\bhc_mlp_layer\.hc_(?=(?:fn|base|scale)$)", "ffn_hc."),
    (r"\bhc_head_(?=(?:fn|base|scale)$)", "hc_"),
)


_TO_QKVO: RenameRules = (
    (r"\bself_attn\.to_([qkv])(?=\.|$)", r"self_attn.\1_proj"),
    (r"\bself_attn\.to_out(?=\.|$)", "self_attn.o_proj"),
)


_HUNYUAN_VISION: RenameRules = (
    (r"\bmlp\.dense_h_to_4h(?=\.|$)", "mlp.fc1"),
    (r"\bmlp\.dense_4h_to_h(?=\.|$)", "mlp.fc2"),
    (r"\bvit\.layers\.(\d+)\.input_layernorm(?=\.|$)", r"vit.layers.\1.layer_norm1"),
    (r"\bvit\.layers\.(\d+)\.post_attention_layernorm(?=\.|$)", r"vit.layers.\1.layer_norm2"),
    (r"\bperceive\.proj\.0(?=\.|$)", "perceive.proj_conv"),
    (r"\bperceive\.proj\.2(?=\.|$)", "perceive.proj_out"),
    (r"\bperceive(?=\.|$)", "patch_merger"),
    (r"^(?:model\.)?vit(?=\.|$)", "model.vision_tower"),
    *_TEXT,
)


# model_type, of config.json or of a config nested in it -> its rules
RENAMES: dict[str, RenameRules] = {
    # language models
    "aria_text": (
        (r"\bmlp\.experts\.fc1(?:\.weight)?(?=\.|$)", "mlp.experts.gate_up_proj"),
        (r"\bmlp\.experts\.fc2(?:\.weight)?(?=\.|$)", "mlp.experts.down_proj"),
    ),
    "axk1": ((r"(?<!mlp\.)\bpost_mlp_layernorm(?=\.|$)", "mlp.post_mlp_layernorm"),),
    "axk2": (
        (r"\bW_down(?=\.|$)", "mlp.fc1"),
        (r"\bW_up(?=\.|$)", "mlp.fc2"),
        (r"\bself_attn\.q_b_proj(?=\.|$)", "self_attn.q_gate_proj"),
    ),
    "bailing_hybrid": (
        (r"\bword_embeddings(?=\.|$)", "embed_tokens"),
        (r"\battention(?=\.|$)", "self_attn"),
        (r"\bself_attn\.dense(?=\.|$)", "self_attn.o_proj"),
        (r"\bmlp\.gate\.expert_bias$", "mlp.gate.e_score_correction_bias"),
        *_FORGET_GATE,
    ),
    "deepseek_v4": (
        (r"^embed(?=\.|$)", "embed_tokens"),
        (r"^head(?=\.|$)", "lm_head"),
        (r"\bhc_head_(?=(?:fn|base|scale)$)", "hc_head.hc_"),
        (r"\battn(?=\.|$)", "self_attn"),
        (r"\bffn(?=\.|$)", "mlp"),
        (r"\bindexer\.compressor(?=\.|$)", "compressor.indexer"),
        (r"(?<!compressor\.)\bindexer\.weights_proj(?=\.|$)", "compressor.indexer.scorer.weights_proj"),
        (r"(?<!compressor\.)\bindexer\.wq_b(?=\.|$)", "compressor.indexer.q_b_proj"),
        (r"\battn_norm(?=\.|$)", "input_layernorm"),
        (r"\bffn_norm(?=\.|$)", "post_attention_layernorm"),
        (r"\b(self_attn|compressor|indexer)\.norm(?=\.|$)", r"\1.kv_norm"),
        (r"\battn_sink$", "sinks"),
        (r"\bape$", "position_bias"),
        (r"\bself_attn\.wq_b(?=\.|$)", "self_attn.q_b_proj"),
        (r"\bwq_a(?=\.|$)", "q_a_proj"),
        (r"\bwkv(?=\.|$)", "kv_proj"),
        (r"\bwgate(?=\.|$)", "gate_proj"),
        (r"\bwo_([ab])(?=\.|$)", r"o_\1_proj"),
        (r"\bq_norm(?=\.|$)", "q_a_norm"),
        (r"\bgate\.bias$", "gate.e_score_correction_bias"),
        (r"\bshared_experts\.w1(?=\.|$)", "shared_experts.gate_proj"),
        (r"\bshared_experts\.w2(?=\.|$)", "shared_experts.down_proj"),
        (r"\bshared_experts\.w3(?=\.|$)", "shared_experts.up_proj"),
        *_HYPER_CONNECTIONS,
    ),
    "ernie4_5_moe": ((r"\bmlp\.moe_statics\.", "mlp.gate.moe_statics."),),
    "exaone": (
        (r"^transformer\.wte(?=\.|$)", "model.embed_tokens"),
        (r"^transformer\.h(?=\.|$)", "model.layers"),
        (r"^transformer\.ln_f(?=\.|$)", "model.norm"),
        (r"\battn\.attention(?=\.|$)", "self_attn"),
        (r"\bself_attn\.out_proj(?=\.|$)", "self_attn.o_proj"),
        (r"\bln_1(?=\.|$)", "input_layernorm"),
        (r"\bln_2(?=\.|$)", "post_attention_layernorm"),
        (r"\bmlp\.c_fc_0(?=\.|$)", "mlp.gate_proj"),
        (r"\bmlp\.c_fc_1(?=\.|$)", "mlp.up_proj"),
        (r"\bmlp\.c_proj(?=\.|$)", "mlp.down_proj"),
    ),
    "exaone_moe": ((r"\bmlp\.e_score_correction_bias$", "mlp.gate.e_score_correction_bias"),),
    "flint": ((r"\bself_attn\.softmax_offset$", "self_attn.sinks"),),
    "glm5_next": (*_FORGET_GATE, *_HYPER_CONNECTIONS),
    "glm5_next_text": (*_FORGET_GATE, *_HYPER_CONNECTIONS),
    "gpt_neox": ((r"^embed_out(?=\.|$)", "lm_head"),),
    "granitemoe": _GRANITE_MOE,
    "granitemoehybrid": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "hrm_text": ((r"\battn\.o_proj(?=\.|$)", "self_attn.o_proj"),),
    "hy_v3": (
        (r"\bmlp\.router\.gate(?=\.|$)", "mlp.gate"),
        (r"\bmlp\.expert_bias$", "mlp.e_score_correction_bias"),
        (r"\bmlp\.shared_mlp(?=\.|$)", "mlp.shared_experts"),
    ),
    "hy_v4": _HY_V4,
    "hy_v4_vl_text": _HY_V4,
    "kimi_linear": (*_MIXTRAL, *_FORGET_GATE),
    "kolibri1": (
        (r"\bmoe\.router\.expert_bias$", "mlp.gate.e_score_correction_bias"),
        (r"\bpost_attn_norm(?=\.|$)", "post_self_attn_layernorm"),
        (r"\bpost_ffn_norm(?=\.|$)", "post_mlp_layernorm"),
    ),
    "laguna": (
        (r"\bmlp\.experts\.e_score_correction_bias$", "mlp.gate.e_score_correction_bias"),
        (r"\bmlp\.shared_expert(?=\.|$)", "mlp.shared_experts"),
    ),
    "lara_mini": ((r"\blinear_attn\.out_norm(?=\.|$)", "linear_attn.norm"),),
    "lfm3": ((r"\bself_attn\.gate_proj(?=\.|$)", "self_attn.g_proj"),),
    "mimo_v2_flash": ((r"\bself_attn\.attention_sink_bias$", "self_attn.sinks"),),
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "mixtral": _MIXTRAL,
    "nemotron_h": ((r"\bbackbone(?=\.|$)", "model"),),
    "olmo_hybrid": (
        (r"\battention_layer_norm(?=\.|$)", "input_layernorm"),
        (r"\bfeedforward_layer_norm(?=\.|$)", "post_attention_layernorm"),
    ),
    "phimoe": (*_MIXTRAL, (r"\bmlp\.gate(?=\.|$)", "mlp.router")),
    "sarvam_moe": (
        (r"\bword_embeddings(?=\.|$)", "embed_tokens"),
        (r"\battention(?=\.|$)", "self_attn"),
        (r"\bself_attn\.dense(?=\.|$)", "self_attn.o_proj"),
        (r"\bself_attn\.query_layernorm(?=\.|$)", "self_attn.q_norm"),
        (r"\bself_attn\.key_layernorm(?=\.|$)", "self_attn.k_norm"),
        (r"\bmlp\.gate\.expert_bias$", "mlp.gate.e_score_correction_bias"),
    ),
    # text encoders
    "altclip": ((r"\blayer(?=\.|$)", "layers"), *_TOWER),
    "gte": (
        (r"^new\.", ""),
        (r"\bencoder\.layer(?=\.|$)", "layers"),
        (r"\battention\.o_proj(?=\.|$)", "self_attn.o_proj"),
        (r"\battn_ln(?=\.|$)", "post_attention_layernorm"),
        (r"\bmlp_ln(?=\.|$)", "post_mlp_layernorm"),
        (r"\blm_head\.norm(?=\.|$)", "lm_head.layer_norm"),
    ),
    "jina_embeddings_v3": (
        (r"\bemb_ln(?=\.|$)", "embeddings.LayerNorm"),
        (r"\bencoder\.layers(?=\.|$)", "layers"),
        (r"\bmixer\.out_proj(?=\.|$)", "self_attn.o_proj"),
        (r"\bnorm1(?=\.|$)", "post_attention_layernorm"),
        (r"\bnorm2(?=\.|$)", "post_mlp_layernorm"),
    ),
    "nomic_bert": (
        (r"\bemb_ln(?=\.|$)", "embeddings.LayerNorm"),
        (r"\bencoder\.layers(?=\.|$)", "layers"),
        (r"(?<!self_)\battn\.out_proj(?=\.|$)", "self_attn.o_proj"),
        (r"\bfc11(?=\.|$)", "up_proj"),
        (r"\bfc12(?=\.|$)", "gate_proj"),
        (r"\bfc2(?=\.|$)", "down_proj"),
        (r"\bnorm1(?=\.|$)", "post_attention_layernorm"),
        (r"\bnorm2(?=\.|$)", "post_mlp_layernorm"),
    ),
    # image encoders
    "audio-spectrogram-transformer": _VIT,
    "beit": (
        (r"\bencoder\.relative_position_bias(?=\.|$)", "shared_position_bias"),
        (r"\battention\.attention\.relative_position_bias(?=\.|$)", "attention.relative_position_bias"),
        *_VIT,
    ),
    "chinese_clip_vision_model": _TOWER,
    "clip_text_model": _TOWER_TEXT,
    "clip_vision_model": _TOWER,
    "clipseg_text_model": _TOWER_TEXT,
    "clipseg_vision_model": _TOWER,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_convnext": ((r"(?<!model\.)\bstages(?=\.|$)", "model.stages"),),
    "dinov3_vit": ((r"(?<!model\.)\blayer(?=\.|$)", "model.layer"),),
    "ijepa": _VIT,
    "lfm3_vl_vision": (
        (r"\bpatchifier(?=\.|$)", "patch_embed"),
        (r"\b([qk])_layernorm(?=\.|$)", r"\1_norm"),
    ),
    "metaclip_2_text_model": _TOWER_TEXT,
    "metaclip_2_vision_model": _TOWER,
    "mlcd": _TOWER,
    "mlcd_vision_model": _TOWER,
    "pixio": (
        *_VIT,
        (r"\bnorm1(?=\.|$)", "layernorm_before"),
        (r"\bnorm2(?=\.|$)", "layernorm_after"),
    ),
    "radio": (
        (r"\bradio_model\.model\.patch_generator\.video_embedder(?=\.|$)", "embeddings.video_patch_projection"),
        (r"\bradio_model\.model\.patch_generator\.embedder(?=\.|$)", "embeddings.patch_projection"),
        (r"\bradio_model\.model\.patch_generator\.pos_embed$", "embeddings.position_embedding"),
        (r"\bradio_model\.model\.patch_generator\.cls_token\.token$", "embeddings.cls_register_token"),
        (r"\bradio_model\.model\.blocks(?=\.|$)", "encoder.layer"),
        (r"\bencoder\.layer\.(\d+)\.attn\.proj(?=\.|$)", r"encoder.layer.\1.attention.o_proj"),
        (r"\bradio_model\.(?=(?:input_conditioner|summary_idxs)(?:\.|$))", ""),
    ),
    "segformer": (
        (r"\bencoder\.patch_embeddings\.(\d+)(?=\.|$)", r"stages.\1.patch_embeddings"),
        (r"\bencoder\.block\.(\d+)(?=\.|$)", r"stages.\1.blocks"),
        (r"\bencoder\.layer_norm\.(\d+)(?=\.|$)", r"stages.\1.layer_norm"),
        (r"\battention\.self\.query(?=\.|$)", "attention.q_proj"),
        (r"\battention\.self\.key(?=\.|$)", "attention.k_proj"),
        (r"\battention\.self\.value(?=\.|$)", "attention.v_proj"),
        (r"\battention\.self\.sr(?=\.|$)", "attention.sequence_reduction.sequence_reduction"),
        (r"\battention\.self\.layer_norm(?=\.|$)", "attention.sequence_reduction.layer_norm"),
        (r"\battention\.output\.dense(?=\.|$)", "attention.o_proj"),
        (r"\bmlp\.dense([12])(?=\.|$)", r"mlp.fc\1"),
        (r"\blayer_norm_1(?=\.|$)", "layernorm_before"),
        (r"\blayer_norm_2(?=\.|$)", "layernorm_after"),
        (r"\bdecode_head\.linear_c(?=\.|$)", "decode_head.linear_projections"),
    ),
    "siglip2_text_model": _TOWER_TEXT,
    "siglip2_vision_model": _TOWER,
    "siglip_text_model": _TOWER_TEXT,
    "siglip_vision_model": _TOWER,
    "swin": (
        (r"\battention\.self\.query(?=\.|$)", "attention.q_proj"),
        (r"\battention\.self\.key(?=\.|$)", "attention.k_proj"),
        (r"\battention\.self\.value(?=\.|$)", "attention.v_proj"),
        (
            r"\battention\.self\.relative_position_bias_table$",
            "attention.relative_position_bias.relative_position_bias_table",
        ),
        (r"\battention\.output\.dense(?=\.|$)", "attention.o_proj"),
        (r"\bintermediate\.dense(?=\.|$)", "mlp.fc1"),
        (r"\boutput\.dense(?=\.|$)", "mlp.fc2"),
    ),
    "videomae": (
        (r"\battention\.attention\.q_bias$", "attention.attention.query.bias"),
        (r"\battention\.attention\.v_bias$", "attention.attention.value.bias"),
    ),
    "vit": _VIT,
    "vit_mae": _VIT,
    "vit_msn": _VIT,
    "vivit": _VIT,
    "xclip_text_model": _TOWER_TEXT,
    "xclip_vision_model": _TOWER,
    # images, video and sound to text
    "apertus1p5": _TEXT,
    "aria": _LLAVA,
    "audioflamingo3": _AUDIO,
    "aya_vision": _LLAVA,
    "cosmos3_edge": (
        (r"^(?=(?:layers|embed_tokens|norm)(?:\.|$))", "model.language_model."),
        *_TO_QKVO,
        (r"\bmlp\.up_proj(?=\.|$)", "mlp.fc1"),
        (r"\bmlp\.down_proj(?=\.|$)", "mlp.fc2"),
    ),
    "cosmos3_omni": (
        (r"^(?=(?:layers|embed_tokens|norm)(?:\.|$))", "model.language_model."),
        (r"^(?=(?:blocks|merger|patch_embed|pos_embed|deepstack_merger_list)(?:\.|$))", "model.visual."),
        *_TO_QKVO,
        (r"\bself_attn\.norm_([qk])(?=\.|$)", r"self_attn.\1_norm"),
    ),
    "emu3": (
        (r"^(?:model\.)?text_model\.lm_head(?=\.|$)", "lm_head"),
        (r"^(?:model\.)?text_model(?:\.model)?(?=\.|$)", "model.text_model"),
        (r"^vqmodel(?=\.|$)", "model.vqmodel"),
    ),
    "fuyu": (*_LANGUAGE, (r"^vision_embed_tokens(?=\.|$)", "model.vision_embed_tokens")),
    "gemma3": _LLAVA,
    "gemma3n": _TEXT,
    "gemma4": _TEXT,
    "gemma4_unified": (
        *_TEXT,
        (r"\bvision_embedder(?=\.(?:patch_ln1|patch_dense|patch_ln2|pos_embedding|pos_norm)(?:\.|$))", "embed_vision"),
        (r"\bembed_vision\.embedding_projection(?=\.|$)", "embed_vision.multimodal_embedder.embedding_projection"),
    ),
    "glmasr": _AUDIO,
    "got_ocr2": _LLAVA,
    "granite_speech": _GRANITE_SPEECH,
    "granite_speech_plus": _GRANITE_SPEECH,
    "hunyuan_vl": _HUNYUAN_VISION,
    "hy_v4_vl": (
        (r"\b(perceive|patch_merger)\.norm(?=\.|$)", r"\1.before_rms"),
        *_HUNYUAN_VISION,
        (r"^model\.(?=hc_head(?:\.|$))", "model.language_model."),
    ),
    "hyperclovax_vision_v2": (
        *_LANGUAGE,
        (r"^(?:model\.)?vision_projector(?=\.|$)", "model.projector"),
    ),
    "internvl": _LLAVA,
    "kimi_k25": (
        *_LANGUAGE,
        (r"\bvision_tower\.encoder\.blocks\.(\d+)\.norm1(?=\.|$)", r"vision_tower.encoder.blocks.\1.norm2"),
        (r"\bvision_tower\.encoder\.blocks\.(\d+)\.norm0(?=\.|$)", r"vision_tower.encoder.blocks.\1.norm1"),
        (r"\bvision_tower\.encoder\.blocks\.(\d+)\.mlp\.fc1(?=\.|$)", r"vision_tower.encoder.blocks.\1.mlp.fc2"),
        (r"\bvision_tower\.encoder\.blocks\.(\d+)\.mlp\.fc0(?=\.|$)", r"vision_tower.encoder.blocks.\1.mlp.fc1"),
        (r"\bvision_tower\.encoder\.blocks\.(\d+)\.wo(?=\.|$)", r"vision_tower.encoder.blocks.\1.attn.proj"),
        (r"\bvision_tower\.encoder(?=\.|$)", "vision_tower"),
        (r"\bblocks(?=\.|$)", "layers"),  # transformers writes `blocks` into the language model as well
        (r"\bvision_tower\.patch_embed\.pos_emb\.weight$", "vision_tower.patch_embed.pos_emb.position_embeddings"),
        (r"\bmm_projector\.proj\.0(?=\.|$)", "mm_projector.in_proj"),
        (r"\bmm_projector\.proj\.2(?=\.|$)", "mm_projector.out_proj"),
        (r"^(?=(?:vision_tower|mm_projector)(?:\.|$))", "model."),
    ),
    "llama4": ((r"^(?=(?:model\.(?:layers|embed_tokens|norm)|lm_head)(?:\.|$))", "language_model."),),
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_next_video": _LLAVA,
    "llava_onevision": _LLAVA,
    "minimax_m3_vl": (
        *_LLAVA,
        (r"\bvision_tower\.vision_model\.embeddings\.patch_embedding(?=\.|$)", "vision_tower.embeddings.proj"),
        (r"\bvision_tower\.vision_model\.encoder\.layers(?=\.|$)", "vision_tower.layers"),
        (r"\bvision_tower\.vision_model\.pre_layrnorm(?=\.|$)", "vision_tower.pre_layrnorm"),
        (r"^patch_merge_mlp\.linear_([12])(?=\.|$)", r"model.multi_modal_projector.merge_linear_\1"),
        (r"\bblock_sparse_moe\.e_score_correction_bias$", "mlp.gate.e_score_correction_bias"),
        *_MIXTRAL,
        (r"\bself_attn\.index_([qk]_(?:proj|norm))(?=\.|$)", r"self_attn.indexer.\1"),
    ),
    "mistral3": _LLAVA,
    "mistral_large4": (
        (r"^vision_encoder(?=\.|$)", "model.vision_tower"),
        (r"^tok_embeddings(?=\.|$)", "model.language_model.embed_tokens"),
        (r"^(?=(?:layers|norm)(?:\.|$))", "model.language_model."),
        (r"^lerope\.alpha$", "model.language_model.rotary_emb.alpha"),
        (r"^output(?=\.|$)", "lm_head"),
        (r"^pre_mm_projector_norm(?=\.|$)", "model.multi_modal_projector.norm"),
        (r"^patch_merger(?=\.|$)", "model.multi_modal_projector.patch_merger"),
        (r"^vision_language_adapter\.w_in(?=\.|$)", "model.multi_modal_projector.linear_1"),
        (r"^vision_language_adapter\.w_out(?=\.|$)", "model.multi_modal_projector.linear_2"),
        (r"\bw([vo])(?=\.|$)", r"\1_proj"),
        (r"\b(feed_forward|shared_experts)\.w1(?=\.|$)", r"\1.gate_proj"),
        (r"\b(feed_forward|shared_experts)\.w2(?=\.|$)", r"\1.down_proj"),
        (r"\b(feed_forward|shared_experts)\.w3(?=\.|$)", r"\1.up_proj"),
    ),
    "mistral_large4_text": (  # the tower's attention and feed_forward keep their names
        (r"^(?!.*vision_)(.*)\battention(?=\.|$)", r"\1self_attn"),
        (r"^(?!.*vision_)(.*)\bfeed_forward(?=\.|$)", r"\1mlp"),
        (r"^(?!.*vision_)(.*)\bwq(?=\.|$)", r"\1q_proj"),
        (r"\bwkv_a_with_mqa(?=\.|$)", "kv_a_proj_with_mqa"),
        (r"\bwkv_b(?=\.|$)", "kv_b_proj"),
        (r"^(?!.*vision_)(.*)\battention_norm(?=\.|$)", r"\1input_layernorm"),
        (r"^(?!.*vision_)(.*)\bffn_norm(?=\.|$)", r"\1post_attention_layernorm"),
        (r"\bkv_a_norm(?=\.|$)", "kv_a_layernorm"),
        (r"(?<!mlp)\.(gate|experts|shared_experts)(?=\.|$)", r".mlp.\1"),
        (r"\bssmax_scaling\.s$", "softmax_scaling.scale"),
        (r"\bssmax_scaling\.b$", "softmax_scaling.bias"),
    ),
    "mllama": (*_LLAVA, (r"^vision_model(?=\.|$)", "model.vision_model")),
    "molmo2": (
        (r"\bvision_backbone\.image_vit\.transformer\.resblocks(?=\.|$)", "vision_tower.layers"),
        (r"\bvision_backbone\.image_vit(?=\.|$)", "vision_tower"),
        (r"\bvision_backbone\.(?=(?:image_pooling_2d|image_projector)(?:\.|$))", "multi_modal_projector."),
        (r"\btransformer\.ln_f(?=\.|$)", "language_model.norm"),
        (r"\btransformer\.blocks(?=\.|$)", "language_model.layers"),
        (r"\btransformer(?=\.|$)", "language_model"),
        (r"\battention\.w([qkvo])(?=\.|$)", r"self_attn.\1_proj"),
        (r"\bfeed_forward\.w([12])(?=\.|$)", r"mlp.fc\1"),
        (r"\battention_norm(?=\.|$)", "layer_norm1"),
        (r"\bffn_norm(?=\.|$)", "layer_norm2"),
        (r"\bimage_pooling_2d\.w([qkvo])(?=\.|$)", r"image_pooling_2d.\1_proj"),
        (r"\bimage_projector\.w1(?=\.|$)", "image_projector.gate_proj"),
        (r"\bimage_projector\.w2(?=\.|$)", "image_projector.down_proj"),
        (r"\bimage_projector\.w3(?=\.|$)", "image_projector.up_proj"),
    ),
    "molmo2_text": (
        (r"\battn_norm(?=\.|$)", "input_layernorm"),
        (r"\bff_norm(?=\.|$)", "post_attention_layernorm"),
        (r"\bself_attn\.attn_out(?=\.|$)", "self_attn.o_proj"),
        (r"\bmlp\.ff_out(?=\.|$)", "mlp.down_proj"),
    ),
    "musicflamingo": _AUDIO,
    "nemotron_h_omni": (
        (r"^mlp1\.0(?=\.|$)", "multi_modal_projector.layer_norm"),
        (r"^mlp1\.1(?=\.|$)", "multi_modal_projector.linear_1"),
        (r"^mlp1\.3(?=\.|$)", "multi_modal_projector.linear_2"),
        (r"^vision_projector\.vision_final_layernorm(?=\.|$)", "vision_final_layernorm"),
        (r"^sound_encoder\.encoder(?=\.|$)", "audio_tower"),
        (r"^sound_projection\.norm(?=\.|$)", "embed_audio.layer_norm"),
        (r"^sound_projection\.linear([12])(?=\.|$)", r"embed_audio.linear_\1"),
    ),
    "paddleocr_vl": ((r"^mlp_AR(?=\.|$)", "model.projector"), *_QWEN_VL),
    "paligemma": _LLAVA,
    "pp_chart2table": _LLAVA,
    "qianfan_ocr": (
        *_LANGUAGE,
        (r"^vision_model(?=\.|$)", "model.vision_tower"),
        (r"\bencoder\.layers(?=\.|$)", "layers"),
        (r"\bls([12])$", r"lambda_\1"),
        (r"\b(layers\.\d+)\.attn\.proj(?=\.|$)", r"\1.attention.projection_layer"),
        (r"\bnorm1(?=\.|$)", "layernorm_before"),
        (r"\bnorm2(?=\.|$)", "layernorm_after"),
        (r"\bembeddings\.class_embedding$", "embeddings.cls_token"),
        (r"\bembeddings\.position_embedding$", "embeddings.position_embeddings"),
        (r"\bembeddings\.patch_embedding(?=\.|$)", "embeddings.patch_embeddings.projection"),
        (r"^mlp1\.0(?=\.|$)", "model.multi_modal_projector.layer_norm"),
        (r"^mlp1\.1(?=\.|$)", "model.multi_modal_projector.linear_1"),
        (r"^mlp1\.3(?=\.|$)", "model.multi_modal_projector.linear_2"),
    ),
    "qwen2_5_omni": _OMNI,
    "qwen2_5_omni_thinker": _THINKER,
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_audio": _AUDIO,
    "qwen2_vl": _QWEN_VL,
    "qwen3_5": _TEXT,
    "qwen3_5_moe": _TEXT,
    "qwen3_omni_moe": _OMNI,
    "qwen3_omni_moe_thinker": _THINKER,
    "qwen4_exp": _TEXT,
    "shieldgemma2": (  # gemma3 is a child of the classifier
        (r"^(?:model\.){0,2}language_model\.lm_head(?=\.|$)", "model.lm_head"),
        (r"^(?:model\.){0,2}language_model(?:\.model)?(?=\.|$)", "model.model.language_model"),
        (r"^(?:model\.){0,2}(vision_tower|multi_modal_projector)(?=\.|$)", r"model.model.\1"),
    ),
    "step3p7": (
        (r"^vision_model(?=\.|$)", "model.vision_model"),
        (r"^vit_large_projector(?=\.|$)", "model.multi_modal_projector"),
        *_TEXT,
        (r"\bmoe\.gate(?=\.|$)", "mlp.gate"),
        (r"\bmoe\.router_bias$", "mlp.gate.e_score_correction_bias"),
        (r"\bmoe\.down_proj(?:\.weight)?(?=\.|$)", "mlp.experts.down_proj"),
        (r"\bshare_expert(?=\.|$)", "mlp.shared_experts"),
    ),
    "t5gemma2": (
        (
            r"(?<!vision_tower\.)(?<!vision_model\.)\bencoder\.(embed_tokens|norm|layers)(?=\.|$)",
            r"encoder.text_model.\1",
        ),
    ),
    "vibevoice_asr": (
        *_LANGUAGE,
        (
            r"^(?=(?:acoustic_tokenizer_encoder|semantic_tokenizer_encoder|multi_modal_projector)(?:\.|$))",
            "model.",
        ),
    ),
    "video_llava": (*_LLAVA, (r"^(?=(?:image_tower|video_tower)(?:\.|$))", "model.")),
    "vipllava": _LLAVA,
    "voxtral": _AUDIO,
    "voxtral_realtime": _AUDIO,
}


# model_type -> rules for a checkpoint that has no other type: nested in another model, these names are the other's.
ALONE: dict[str, RenameRules] = {
    **dict.fromkeys(
        """chinese_clip_vision_model clip_vision_model clipseg_vision_model metaclip_2_vision_model mlcd
        mlcd_vision_model siglip2_vision_model siglip_vision_model xclip_vision_model""".split(),
        ((r"^vision_model\.", ""),),
    ),
    **dict.fromkeys(
        """clip_text_model clipseg_text_model metaclip_2_text_model siglip2_text_model siglip_text_model
        xclip_text_model""".split(),
        ((r"^text_model\.", ""),),
    ),
    **dict.fromkeys(
        "apertus1p5_text gemma3n_text qwen3_5_moe_text qwen3_5_text qwen4_exp_text".split(),
        ((r"^model\.language_model\.", "model."),),
    ),
}


# The last part of one expert's path -> (parameter of all experts, which equal slice of its rows, of how many)
ExpertRows = dict[str, tuple[str, int, int]]


_GATE_UP_DOWN: ExpertRows = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}


_W1_W3_W2: ExpertRows = {
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
}


# Types whose files have one matrix for each expert (`...experts.3.w1.weight`) and whose models have one 3-D parameter.
EXPERTS: dict[str, ExpertRows] = {
    **dict.fromkeys(
        """afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1
        ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm4v_moe glm5_next glm5_next_text glm_moe_dsa
        hunyuan_v1_moe hy_v3 jamba kimi_k25 kolibri1 laguna longcat_flash mellum mimo_v2_flash olmoe qwen2_moe
        qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker qwen4_exp_text
        sarvam_mla sarvam_moe solar_open""".split(),
        _GATE_UP_DOWN,
    ),
    **dict.fromkeys(
        """deepseek_v4 kimi_linear lfm2_moe minimax minimax_m2 minimax_m3_vl mistral_large4_text mixtral
        phimoe""".split(),
        _W1_W3_W2,
    ),
    "nemotron_h": {"up_proj": ("up_proj", 0, 1), "down_proj": ("down_proj", 0, 1)},
}


# Types whose 3-D expert parameters are (expert, in, out); all others have (expert, out, in).
TRANSPOSED_EXPERTS = frozenset({"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"})


# Those of TRANSPOSED_EXPERTS whose class does not tell PEFT so; PEFT takes them for (expert, out, in).
PEFT_TAKES_AS_PLAIN = frozenset({"llama4", "llama4_text"})


@dataclass(frozen=True)
class ExpertPart:
    """The rows of a fused parameter that are the matrix of one expert.

    They are rows [part * n, (part + 1) * n) of `fused[expert]`, which has parts * n rows.
    """

    fused: str  # name of the 3-D parameter
    expert: int
    part: int
    parts: int


def canonical(path: str, model_types: Collection[str]) -> str:
    """Return the name that transformers 5 has for a tensor or module; an unknown name is returned unchanged.

    model_types: those of config.json, nested configs included.
    """
    for pattern, replacement in _rows(frozenset(model_types)):
        if pattern.search(path):  # hardly any matches, and `search` is faster than `sub` at finding that out
            path = pattern.sub(replacement, path, count=1)
    return path


@lru_cache(maxsize=64)
def _rows(model_types: frozenset[str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    tables = [rows for model_type, rows in RENAMES.items() if model_type in model_types]
    tables += [ALONE[model_type] for model_type in model_types if len(model_types) == 1 and model_type in ALONE]
    return tuple((re.compile(pattern), to) for rows in [*tables, LEGACY] for pattern, to in rows)


def expert_part(name: str, model_types: Collection[str]) -> ExpertPart | None:
    """Locate the matrix of one expert in the fused parameter; None for any other tensor, scales and biases included."""
    path = canonical(name, model_types)
    found = re.fullmatch(r"(.*\bexperts)\.(\d{1,9})\.(\w+?)(?:\.weight)?", path) if "experts." in path else None
    if found is None:
        return None
    for model_type, rows in EXPERTS.items():
        if model_type in model_types and found[3] in rows:
            fused, part, parts = rows[found[3]]
            return ExpertPart(f"{found[1]}.{fused}", int(found[2]), part, parts)
    return None
