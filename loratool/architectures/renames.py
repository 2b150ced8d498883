"""Map names of transformers 4, transformers 5 and model files to the names of version 5.

Version 5 renames and fuses weights on loading and reverses that in `save_pretrained`. Files keep their historical
names, and an adapter has the module names of the version it was trained with. `canonical` maps all three to the module
name of version 5, so that an adapter can be matched with a file; a canonical name is unchanged. Two names in these
tables mean one weight of one layout. Other modules have weights that are stacked on loading (`experts`), split or fused
(`fused_rows`), and mlx-lm's names (`mlx_names`).

Source: `transformers.conversion_mapping` of 5.24, its rows rewritten to be idempotent and to match a module's
path as well as a tensor's name. A row may reach further than its part of the model: both sides then get it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache

from .mlx_names import to_transformers

# (regular expression, its replacement or a function that returns it for a match), applied in order
RenameRules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# For every type: TensorFlow's names of LayerNorm, and weight norm before torch 2. Expressions that begin with letters
# are ten times as fast in `re`.
LEGACY: RenameRules = (
    (r"LayerNorm(?<=\bLayerNorm)\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm(?<=\bLayerNorm)\.beta$", "LayerNorm.bias"),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)

# An adapter of only the language model (`...ForCausalLM`) on a file of the multimodal model.
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

# Files have thinker and talker; an adapter of the thinker's class has no `thinker.`
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

_CLIP_LAYERS: RenameRules = (
    (r"\bln_1(?=\.|$)", "layernorm_before"),
    (r"\bln_2(?=\.|$)", "layernorm_after"),
    (r"\bmlp\.c_fc(?=\.|$)", "mlp.fc1"),
    (r"\bmlp\.c_proj(?=\.|$)", "mlp.fc2"),
    (r"\bls_([12])\.gamma$", r"lambda_\1"),
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


def _half_of_pair(match: re.Match[str]) -> str:
    """Return the layer for one of dory's pairs: its files number attention and MLP separately (`LayerPairCollapse`)."""
    index, name = int(match[1]), match[2]
    part = {"attn_alpha": "lambda_1", "mlp_alpha": "lambda_2"}.get(name, ("self_attn", "mlp")[index % 2])
    return f"layers.{index // 2}.{part}"


_SAM: RenameRules = (
    (r"^(?:model\.)?sam_model(?=\.|$)", "model.vision_tower.sam_encoder"),
    (r"\bsam_encoder\.blocks(?=\.|$)", "sam_encoder.layers"),
    (r"\b(sam_encoder\.layers\.\d+)\.norm([12])(?=\.|$)", r"\1.layer_norm\2"),
    (r"\bsam_encoder\.patch_embed\.proj(?=\.|$)", "sam_encoder.patch_embed.projection"),
    (r"\bsam_encoder\.neck\.0(?=\.|$)", "sam_encoder.neck.conv1"),
    (r"\bsam_encoder\.neck\.1(?=\.|$)", "sam_encoder.neck.layer_norm1"),
    (r"\bsam_encoder\.neck\.2(?=\.|$)", "sam_encoder.neck.conv2"),
    (r"\bsam_encoder\.neck\.3(?=\.|$)", "sam_encoder.neck.layer_norm2"),
    (r"\bsam_encoder\.net_2(?=\.|$)", "sam_encoder.proj.conv1"),
    (r"\bsam_encoder\.net_3(?=\.|$)", "sam_encoder.proj.conv2"),
    (r"^(?:model\.)?view_seperator$", "model.view_separator"),
    (r"^(?:model\.)?projector\.layers(?=\.|$)", "model.multi_modal_projector"),
    *_TEXT,
)

_INKLING2_TEXT: RenameRules = (
    (r"^model\.llm\.unembed(?=\.|$)", "lm_head"),
    (r"^model\.llm(?=\.|$)", "model"),
    (r"\bembed(?=\.|$)", "embed_tokens"),
    (r"(?<!embed_tokens\.)\bembed_norm(?=\.|$)", "embed_tokens.embed_norm"),
    (r"\bmlp\.experts\.w2_weight$", "mlp.experts.down_proj"),
    (r"\bmlp\.gate\.bias$", "mlp.gate.e_score_correction_bias"),
    (r"\battn(?=\.|$)", "self_attn"),
    (r"\bself_attn\.wq_du(?=\.|$)", "self_attn.q_proj.linear"),
    (r"\bself_attn\.w([kv])_dv(?=\.|$)", r"self_attn.\1_proj.linear"),
    (r"\bself_attn\.([kv])_sconv(?=\.|$)", r"self_attn.\1_proj.sconv"),
    (r"\bself_attn\.rel_logits_proj(?=\.|$)", "self_attn.relative_position_bias"),
    (r"\bself_attn\.wr_du(?=\.|$)", "self_attn.relative_position_bias.linear"),
    (r"\bself_attn\.q_l2_clip(?=\.|$)", "self_attn.q_proj.norm"),
    (r"\bself_attn\.rel_l2_clip(?=\.|$)", "self_attn.relative_position_bias.norm"),
    (r"\bself_attn\.wo_ud(?=\.|$)", "self_attn.o_proj.linear"),
    (r"\bself_attn\.gate_attn(?=\.|$)", "self_attn.o_proj.gate_proj"),
    (r"\bself_attn\.attn_sink_proj(?=\.|$)", "self_attn.sink_proj"),
    (r"\battn_sconv(?=\.|$)", "post_attention_convolution"),
    (r"\bmlp_sconv(?=\.|$)", "post_mlp_convolution"),
    (r"\b(\w*convolution|sconv)(?=\.weight$|$)", r"\1.conv1d"),
    (r"\b(\w*convolution|sconv)\.static_w$", r"\1.static_weight"),
    (r"\b(\w*convolution|sconv)\.weight_proj$", r"\1.weight_proj.weight"),
    (r"\bmlp_norm(?=\.|$)", "post_attention_layernorm"),
    (r"\battn_norm(?=\.|$)", "input_layernorm"),
    (r"\b([qkv])_input_norm(?=\.|$)", r"\1_input_layernorm"),
    (r"\battn_res\.mlp_queries\.(\d+)$", r"layers.\1.mlp_input.query"),
    (r"\battn_res\.output_query$", "final_input.query"),
)

_INKLING2: RenameRules = (
    (r"^model\.llm\.unembed(?=\.|$)", "lm_head"),
    (r"^model\.llm(?=\.|$)", "model.language_model"),
    (r"^model\.visual(?=\.|$)", "model.vision_tower"),
    (r"\bvision_tower\.backbone\.(?=(?:embeddings|layers)(?:\.|$))", "vision_tower."),
    (r"\bvision_tower\.embeddings\.position_embedding$", "vision_tower.embeddings.position_embedding.weight"),
    (r"\bvision_tower\.backbone\.ln_pre(?=\.|$)", "vision_tower.pre_layernorm"),
    (r"\bvision_tower\.proj_in(?=\.|$)", "vision_tower.merger.linear_1"),
    (r"\bvision_tower\.proj_out(?=\.|$)", "vision_tower.merger.linear_2"),
    *_CLIP_LAYERS,
    *_INKLING2_TEXT,
)

_MESSAGE_GATES: RenameRules = (
    (r"\bcontrollers\.attn(?=\.|$)", "q_message_gate"),
    (r"\bcontrollers\.([kv])(?=\.|$)", r"\1_message_gate"),
    (r"\bcontrollers\.mlp(?=\.|$)", "mlp_message_gate"),
    (r"\b(\w+_message_gate)\.down_weight$", r"\1.down_proj.weight"),
    (r"\b(\w+_message_gate)\.gain_weight$", r"\1.message_gate_proj.weight"),
    (r"\b(\w+_message_gate)\.forget_weight$", r"\1.forget_gate_proj.weight"),
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
    "dory": (
        (r"\blayers\.(\d+)\.(mixer|attn_alpha|mlp_alpha)(?=\.|$)", _half_of_pair),
        (r"\bself_attn\.g_proj(?=\.|$)", "self_attn.gate_proj"),
        (r"^backbone(?=\.|$)", "model"),
        (r"\bembeddings(?=\.|$)", "embed_tokens"),
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
    "ultrabert": ((r"^ultrabert(?=\.|$)", "model"), (r"^cls(?=\.|$)", "head.decoder")),
    "ultravbert": ((r"^head\.decoder(?=\.|$)", "lm_head"), (r"^head(?=\.|$)", "projection_head")),
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
    "sapiens2": (
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^storage_tokens$", "embeddings.register_tokens"),
        (r"^patch_embed\.projection(?=\.|$)", "embeddings.patch_embeddings"),
        (r"\bblocks(?=\.|$)", "model.layer"),
        (r"\battn\.proj(?=\.|$)", "attention.o_proj"),
        (r"\battn\.w([qkv])(?=\.|$)", r"attention.\1_proj"),
        (r"\battn\.([qk])_norm(?=\.|$)", r"attention.\1_norm"),
        (r"\battn\.gamma\.weight$", "layer_scale1.lambda1"),
        (r"\bffn\.w3(?=\.|$)", "mlp.down_proj"),
        (r"\b(layer\.\d+)\.ln([12])(?=\.|$)", r"\1.norm\2"),
        (r"^ln1(?=\.|$)", "norm"),
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
    "cohere_asr": (
        (r"\bencoder\.pre_encode\.conv(?=\.|$)", "encoder.subsampling.layers"),
        (r"\bencoder\.pre_encode\.out(?=\.|$)", "encoder.subsampling.linear"),
        (r"\btransf_decoder\._embedding\.position_embedding\.pos_enc$", "decoder.pos_emb.weight"),
        (r"\btransf_decoder\._embedding\.token_embedding(?=\.|$)", "decoder.embed_tokens"),
        (r"\btransf_decoder\._embedding\.layer_norm(?=\.|$)", "decoder.embedding_layernorm"),
        (r"\btransf_decoder\._decoder\.final_layer_norm(?=\.|$)", "decoder.norm"),
        (r"\btransf_decoder\._decoder\.layers(?=\.|$)", "decoder.layers"),
        (r"\bencoder_decoder_proj(?=\.|$)", "decoder.proj"),
        (r"\bself_attn\.linear_([qkv])(?=\.|$)", r"self_attn.\1_proj"),
        (r"\bself_attn\.linear_out(?=\.|$)", "self_attn.o_proj"),
        (r"\bself_attn\.linear_pos(?=\.|$)", "self_attn.relative_k_proj"),
        (r"\bself_attn\.pos_bias_([uv])$", r"self_attn.bias_\1"),
        (r"\bfirst_sub_layer(?=\.|$)", "self_attn"),
        (r"\bsecond_sub_layer(?=\.|$)", "encoder_attn"),
        (r"\b(self_attn|encoder_attn)\.query_net(?=\.|$)", r"\1.q_proj"),
        (r"\b(self_attn|encoder_attn)\.key_net(?=\.|$)", r"\1.k_proj"),
        (r"\b(self_attn|encoder_attn)\.value_net(?=\.|$)", r"\1.v_proj"),
        (r"\b(self_attn|encoder_attn)\.out_projection(?=\.|$)", r"\1.o_proj"),
        (r"\bthird_sub_layer\.dense_in(?=\.|$)", "mlp.fc1"),
        (r"\bthird_sub_layer\.dense_out(?=\.|$)", "mlp.fc2"),
        (r"\blayer_norm_1(?=\.|$)", "input_layernorm"),
        (r"\blayer_norm_2(?=\.|$)", "post_attention_layernorm"),
        (r"\blayer_norm_3(?=\.|$)", "final_layernorm"),
        (r"\bconv\.batch_norm(?=\.|$)", "conv.norm"),
        (r"\blog_softmax\.mlp\.layer0(?=\.|$)", "proj_out"),
    ),
    "deepseek_ocr2": (
        (r"^(?:model\.)?qwen2_model\.model\.model\.(layers|norm)(?=\.|$)", r"model.vision_tower.vision_encoder.\1"),
        (r"^(?:model\.)?qwen2_model\.query_(768|1024)(?=\.|$)", r"model.vision_tower.query_\1_resolution"),
        *_SAM,
    ),
    "dots3_note": (
        (r"^(?:model\.)?vision_encoder(?=\.|$)", "model.vision_tower"),
        (r"^(?:model\.)?audio_encoder\.audio_adapter(?=\.|$)", "model.audio_tower.audio_adapter"),
        (r"^(?:model\.)?audio_adapter(?=\.|$)", "model.audio_tower.audio_adapter"),
        (r"^(?:model\.)?audio_encoder(?=\.|$)", "model.audio_tower"),
        *_TEXT,
        (r"\bvision_tower\.post_trunk_norm(?=\.|$)", "vision_tower.norm"),
        (r"\bvision_tower\.adapter(?=\.|$)", "vision_tower.merger"),
        (r"\b(vision_tower\.blocks\.\d+)\.norm_([12])(?=\.|$)", r"\1.norm\2"),
        (r"\b(vision_tower\.blocks\.\d+\.mlp)\.fc1(?=\.|$)", r"\1.gate_proj"),
        (r"\b(vision_tower\.blocks\.\d+\.mlp)\.fc2(?=\.|$)", r"\1.down_proj"),
        (r"\b(vision_tower\.blocks\.\d+\.mlp)\.fc3(?=\.|$)", r"\1.up_proj"),
        (r"\b(vision_tower\.blocks\.\d+\.mlp)\.gate_weight$", r"\1.gate.weight"),
        (r"\b(vision_tower\.blocks\.\d+\.mlp)\.router_bias$", r"\1.e_score_correction_bias"),
        (r"\baudio_tower\.audio_adapter(?=\.|$)", "audio_tower.adapter"),
        (r"\baudio_tower\.adapter\.proj\.0(?=\.|$)", "audio_tower.adapter.norm"),
        (r"\baudio_tower\.adapter\.proj\.1(?=\.|$)", "audio_tower.adapter.fc1"),
        (r"\baudio_tower\.adapter\.proj\.3(?=\.|$)", "audio_tower.adapter.fc2"),
        (r"\baudio_tower\.dots_encoder(?=\.|$)", "audio_tower"),
        (r"\baudio_tower\.speech_encoder(?=\.|$)", "audio_tower"),
        (r"\baudio_tower\.(conv2d[123]|conv_out)(?=\.|$)", r"audio_tower.conv_stem.\1"),
        (r"\bconv_stem\.conv2d1(?=\.|$)", "conv_stem.convs.0"),
        (r"\bconv_stem\.conv2d2(?=\.|$)", "conv_stem.convs.1"),
        (r"\bconv_stem\.conv2d3(?=\.|$)", "conv_stem.convs.2"),
        (r"\b(audio_tower\.layers\.\d+\.self_attn)\.out_proj(?=\.|$)", r"\1.o_proj"),
        (r"\b(audio_tower\.layers\.\d+)\.self_attn_layer_norm(?=\.|$)", r"\1.input_layernorm"),
        (r"\b(audio_tower\.layers\.\d+)\.final_layer_norm(?=\.|$)", r"\1.post_attention_layernorm"),
        (r"\b(audio_tower\.layers\.\d+)\.fc1(?=\.|$)", r"\1.mlp.gate_up_proj"),
        (r"\b(audio_tower\.layers\.\d+)\.fc2(?=\.|$)", r"\1.mlp.down_proj"),
    ),
    "emu3": (
        (r"^(?:model\.)?text_model\.lm_head(?=\.|$)", "lm_head"),
        (r"^(?:model\.)?text_model(?:\.model)?(?=\.|$)", "model.text_model"),
        (r"^vqmodel(?=\.|$)", "model.vqmodel"),
    ),
    "ernie4_5_vl_moe": (
        (r"^(?:model\.)?vision_model(?=\.|$)", "model.vision_tower"),
        (r"\b(spatial|temporal)_linear\.0(?=\.|$)", r"\1_linear.fc1"),
        (r"\b(spatial|temporal)_linear\.2(?=\.|$)", r"\1_linear.fc2"),
        (r"\b(spatial|temporal)_linear\.3(?=\.|$)", r"\1_linear.ln"),
        *_TEXT,
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
    "inkling2": _INKLING2,
    "inkling2_loop": (*_MESSAGE_GATES, *_INKLING2),
    "inkling2_loop_text": (*_MESSAGE_GATES, *_INKLING2_TEXT),
    "inkling2_text": _INKLING2_TEXT,
    "inkling_mm_model": (
        (r"^model\.llm\.unembed(?=\.|$)", "lm_head"),
        (r"^model\.llm(?=\.|$)", "model.language_model"),
        (r"\blanguage_model\.embed_norm(?=\.|$)", "language_model.embed_tokens.embed_norm"),
        (r"\blanguage_model\.embed(?=\.|$)", "language_model.embed_tokens"),
        (r"^model\.audio(?=\.|$)", "model.audio_tower"),
        (r"^model\.visual(?=\.|$)", "model.vision_tower"),
        (r"\bvision_tower\.layers\.linear_(\d+)(?=\.|$)", r"vision_tower.encoder_layers.\1.projection"),
        (r"\bvision_tower\.layers\.norm_(\d+)(?=\.|$)", r"vision_tower.encoder_layers.\1.layer_norm"),
        (r"\baudio_tower\.encoder(?=\.|$)", "audio_tower.embed_audio_tokens.embed_audio_tokens"),
        (r"\baudio_tower\.final_norm(?=\.|$)", "audio_tower.norm"),
        (r"\bshared_w2_weight$", "down_proj"),
        (r"\bmlp\.experts\.w2_weight$", "mlp.experts.down_proj"),
        (r"\bmlp\.w2_md(?=\.|$)", "mlp.down_proj"),
        (r"\bmlp\.gate\.bias$", "mlp.gate.e_score_correction_bias"),
        (r"\battn(?=\.|$)", "self_attn"),
        (r"\bself_attn\.w([qr])_du(?=\.|$)", r"self_attn.\1_proj"),
        (r"\bself_attn\.w([kv])_dv(?=\.|$)", r"self_attn.\1_proj"),
        (r"\bself_attn\.wo_ud(?=\.|$)", "self_attn.o_proj"),
        (r"\b(\w*_sconv)(?=\.weight$|$)", r"\1.conv1d"),
        (r"\bmlp_norm(?=\.|$)", "post_attention_layernorm"),
        (r"\battn_norm(?=\.|$)", "input_layernorm"),
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
        (r"\bblocks(?=\.|$)", "layers"),  # transformers also writes `blocks` into the language model
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
    "pi0": (
        (r"^(?:model\.)?paligemma_with_expert\.paligemma\.model(?=\.|$)", "model.vlm"),
        (r"^(?:model\.)?paligemma_with_expert\.paligemma\.lm_head(?=\.|$)", "model.vlm.language_model.embed_tokens"),
        (r"^(?:model\.)?paligemma_with_expert\.gemma_expert\.model(?=\.|$)", "model.dit"),
        (r"^(?:model\.)?paligemma_with_expert\.gemma_expert\.lm_head(?=\.|$)", "model.dit.embed_tokens"),
        (r"\bvlm\.language_model\.model(?=\.|$)", "vlm.language_model"),
        (r"\bvlm\.vision_tower\.vision_model(?=\.|$)", "vlm.vision_tower"),
        (
            r"^(?:model\.)?(?=(?:state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out)(?:\.|$))",
            "embed_action_time.",
        ),
        (r"^model\.(?=action_out_proj(?:\.|$))", ""),
    ),
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
        (r"\bvision_model\.conv1(?=\.|$)", "vision_model.embeddings.patch_embedding"),
        (r"\bvision_model\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"\bvision_model\.transformer\.resblocks(?=\.|$)", "vision_model.layers"),
        (r"\bvision_model\.ln_pre(?=\.|$)", "vision_model.pre_layernorm"),
        (r"\bvision_model\.vit_downsampler([12])(?=\.|$)", r"vision_model.downsampler\1"),
        (r"\bvision_model\.layers\.(\d+)\.attn(?=\.|$)", r"vision_model.layers.\1.self_attn"),
        *_CLIP_LAYERS,
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
    "unlimited_ocr": (
        (r"^(?:model\.)?vision_model(?=\.|$)", "model.vision_tower.vision_encoder"),
        (r"\bvision_encoder\.transformer(?=\.|$)", "vision_encoder.encoder"),
        *_SAM,
    ),
    "timesfm2_5": ((r"\bmlp\.ff0(?=\.|$)", "mlp.fc1"), (r"\bmlp\.ff1(?=\.|$)", "mlp.fc2")),
    "tipsv2": (
        (r"^text_encoder(?=\.|$)", "text_model"),
        (r"\btext_model\.ln_final(?=\.|$)", "text_model.final_layer_norm"),
        (r"\btext_model\.token_embedding(?=\.|$)", "text_model.embeddings.token_embedding"),
        (r"\btext_model\.transformer\.resblocks(?=\.|$)", "text_model.encoder.layers"),
        (r"\b(text_model\.encoder\.layers\.\d+)\.ln_([12])(?=\.|$)", r"\1.layer_norm\2"),
        (r"\b(text_model\.encoder\.layers\.\d+)\.attn(?=\.|$)", r"\1.self_attn"),
        (r"^vision_encoder(?=\.|$)", "vision_model"),
        (r"\bvision_model\.patch_embed\.proj(?=\.|$)", "vision_model.embeddings.patch_embeddings.projection"),
        (r"\bvision_model\.((?:cls|mask)_token|register_tokens)$", r"vision_model.embeddings.\1"),
        (r"\bvision_model\.pos_embed$", "vision_model.embeddings.position_embeddings"),
        (r"\bvision_model\.norm(?=\.|$)", "vision_model.layernorm"),
        (r"\bvision_model\.blocks(?=\.|$)", "vision_model.encoder.layer"),
        (r"\b(vision_model\.encoder\.layer\.\d+)\.attn\.proj(?=\.|$)", r"\1.attention.o_proj"),
        (r"\bls([12])\.gamma$", r"layer_scale\1.lambda1"),
        (r"\bmlp\.c_fc(?=\.|$)", "mlp.fc1"),
        (r"\bmlp\.c_proj(?=\.|$)", "mlp.fc2"),
        (r"\bmlp\.w3(?=\.|$)", "mlp.down_proj"),
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

# model_type -> rules for a checkpoint of only this type: nested in another model, these names are the other model's.
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


def canonical(path: str, model_types: Collection[str]) -> str:
    """Return the name of a tensor or module in transformers 5; an unknown name is returned unchanged.

    model_types: those of config.json and its nested configs.
    """
    for pattern, replacement in _rows(frozenset(model_types)):
        if pattern.search(path):  # few patterns match, and `search` is faster than `sub` if there is no match
            path = pattern.sub(replacement, path, count=1)
    return path


@lru_cache(maxsize=64)
def _rows(model_types: frozenset[str]) -> tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]:
    tables: list[RenameRules] = [to_transformers(model_types)]
    tables += [rows for model_type, rows in RENAMES.items() if model_type in model_types]
    tables += [ALONE[model_type] for model_type in model_types if len(model_types) == 1 and model_type in ALONE]
    return tuple((re.compile(pattern), to) for rows in [*tables, LEGACY] for pattern, to in rows)
