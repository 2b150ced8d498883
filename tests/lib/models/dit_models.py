"""Build tiny denoisers of diffusers' own classes, one a row: every module of the real ones, few of each.

Kept of the real configs is what a table of names may rely on: ratios of rows to columns, which numbers are equal, two
blocks at least of each stack where the first or the last is unlike the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}  # width 16
FLUX = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}
SD3 = {
    **HEADS,
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 4,
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
HUNYUAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 20,
    "rope_axes_dim": (2, 2, 4),
}
HUNYUAN1 = {**HUNYUAN, "num_single_layers": 2, "pooled_projection_dim": 12}
HUNYUAN_DIT = {
    **HEADS,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 4,
    "hidden_size": 16,
    "num_layers": 4,
    "mlp_ratio": 4.3637,
    "cross_attention_dim": 12,
    "cross_attention_dim_t5": 20,
    "pooled_projection_dim": 12,
    "text_len": 3,
    "text_len_t5": 5,
}
LTX = {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 20}
LTX2 = {
    **LTX,
    "num_attention_heads": 4,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}
LTX2_3 = {
    **LTX2,
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
}
COGVIDEOX = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 12,
    "text_embed_dim": 20,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 3,
}
PIXART = {
    **HEADS,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "sample_size": 4,
    "caption_channels": 20,
}
COSMOS = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 20,
    "adaln_lora_dim": 12,
    "max_size": (2, 4, 4),
}
KANDINSKY6 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "time_dim": 8,
    "model_dim": 16,
    "ff_dim": 64,
    "num_visual_blocks": 2,
    "axes_dims": (2, 2, 4),
}
JOYIMAGE = {
    "in_channels": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "text_dim": 20,
    "num_layers": 2,
    "rope_dim_list": [2, 2, 4],
}
SINGLES = {**FLUX, "pooled_projection_dim": 12}

# family, and after a slash its variant -> (diffusers' class, its config)
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", {**SINGLES, "guidance_embeds": True}),
    "flux2": (
        "Flux2Transformer2DModel",
        {**FLUX, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 12},
    ),
    "flux2/klein": (
        "Flux2Transformer2DModel",
        {**FLUX, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 12, "guidance_embeds": False},
    ),
    "flux3": (
        "Flux3Transformer2DModel",
        {**FLUX, "axes_dims_rope": (2, 2, 2, 2), "cond_in_channels": 4, "timestep_channels": 12},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {**FLUX, "approximator_num_channels": 12, "approximator_hidden_dim": 20, "approximator_layers": 2},
    ),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3/3.5-medium": ("SD3Transformer2DModel", {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {**HEADS, "in_channels": 8, "out_channels": 2, "num_layers": 2, "joint_attention_dim": 12,
         "axes_dims_rope": (2, 2, 4)},
    ),
    "qwen_image/layered": (
        "QwenImageTransformer2DModel",
        {**HEADS, "in_channels": 8, "out_channels": 2, "num_layers": 2, "joint_attention_dim": 12,
         "axes_dims_rope": (2, 2, 4), "use_additional_t_cond": True, "use_layer3d_rope": True},
    ),
    "qwen_image21": (
        "QwenImage21Transformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "context_in_dim": 12,
         "axes_dims_rope": (2, 2, 4)},
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 2,
         "cap_feat_dim": 20, "axes_dims": [2, 2, 4], "axes_lens": [8, 8, 8]},
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"sample_size": 4, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 2,
         "num_attention_heads": 6, "num_kv_heads": 2, "multiple_of": 8, "axes_dim_rope": (2, 2, 0),
         "axes_lens": (8, 8, 8), "cap_feat_dim": 20},
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {**HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "caption_channels": [20, 20], "text_emb_dim": 12, "axes_dims_rope": (4, 2, 2), "llama_layers": [0, 1]},
    ),
    "wan": ("WanTransformer3DModel", WAN),
    "wan/i2v": (
        "WanTransformer3DModel",
        {**WAN, "in_channels": 9, "image_dim": 20, "added_kv_proj_dim": 24},
    ),
    "wan/flf2v": (
        "WanTransformer3DModel",
        {**WAN, "in_channels": 9, "image_dim": 20, "added_kv_proj_dim": 24, "pos_embed_seq_len": 6},
    ),
    "wan/vace": ("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 1], "vace_in_channels": 6}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", HUNYUAN1),
    "hunyuan_video/i2v": (
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN1, "in_channels": 9, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    ),
    "hunyuan_video/framepack": (
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN1, "has_image_proj": True, "image_proj_dim": 28, "has_clean_x_embedder": True},
    ),
    "hunyuan_video15": (
        "HunyuanVideo15Transformer3DModel",
        {**HUNYUAN, "text_embed_2_dim": 12, "image_embed_dim": 28},
    ),
    "hunyuan_image": (
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN, "num_single_layers": 2, "text_embed_2_dim": 12, "rope_axes_dim": (4, 4)},
    ),
    "hunyuan_image/distilled": (
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN, "num_single_layers": 2, "text_embed_2_dim": 12, "rope_axes_dim": (4, 4),
         "guidance_embeds": True, "use_meanflow": True},
    ),
    "hunyuan_dit": ("HunyuanDiT2DModel", {**HUNYUAN_DIT, "use_style_cond_and_image_meta_size": False}),
    "hunyuan_dit/1.1": ("HunyuanDiT2DModel", {**HUNYUAN_DIT, "use_style_cond_and_image_meta_size": True}),
    "ltx": ("LTXVideoTransformer3DModel", LTX),
    "ltx2": ("LTX2VideoTransformer3DModel", LTX2),
    "ltx2/2.3": ("LTX2VideoTransformer3DModel", LTX2_3),
    "cogvideox": ("CogVideoXTransformer3DModel", COGVIDEOX),
    "cogvideox/1.5-i2v": (
        "CogVideoXTransformer3DModel",
        {**COGVIDEOX, "in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 12,
         "use_rotary_positional_embeddings": True, "sample_frames": 9},
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 20, "time_embed_dim": 12,
         "condition_dim": 8, "pos_embed_max_size": 4, "sample_size": 4, "rope_axes_dim": (4, 4)},
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {**HEADS, "num_layers": 3, "pooled_projection_dim": 8, "in_channels": 4, "text_embed_dim": 20,
         "time_embed_dim": 16, "max_sequence_length": 8},
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {**HEADS, "sample_size": 4, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 2,
         "num_single_dit_layers": 2, "joint_attention_dim": 20, "caption_projection_dim": 16, "pos_embed_max_size": 8},
    ),
    "pixart": ("PixArtTransformer2DModel", {**PIXART, "use_additional_conditions": True}),
    "pixart/sigma": ("PixArtTransformer2DModel", {**PIXART, "use_additional_conditions": False}),
    "sana": (
        "SanaTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 20, "sample_size": 4},
    ),
    "omnigen": (
        "OmniGenTransformer2DModel",
        {"in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
         "intermediate_size": 40, "num_layers": 2, "pad_token_id": 3, "vocab_size": 9, "max_position_embeddings": 16,
         "original_max_position_embeddings": 8, "pos_embed_max_size": 4, "time_step_dim": 12,
         "rope_scaling": {"type": "su", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}},
    ),
    "cosmos1": ("CosmosTransformer3DModel", {**COSMOS, "extra_pos_embed_type": "learnable"}),
    "cosmos_predict2": ("CosmosTransformer3DModel", {**COSMOS, "extra_pos_embed_type": None}),
    "anima": ("CosmosTransformer3DModel", {**COSMOS, "extra_pos_embed_type": None}),
    "krea2": (
        "Krea2Transformer2DModel",
        {"in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
         "num_key_value_heads": 1, "intermediate_size": 40, "timestep_embed_dim": 12, "text_hidden_dim": 16,
         "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
         "text_intermediate_size": 24, "num_layerwise_text_blocks": 2, "num_refiner_text_blocks": 2,
         "axes_dims_rope": (4, 2, 2)},
    ),
    "ideogram4": (
        "Ideogram4Transformer2DModel",
        {**HEADS, "in_channels": 4, "num_layers": 2, "intermediate_size": 40, "adaln_dim": 12,
         "llm_features_dim": 20, "mrope_section": (2, 1, 1)},
    ),
    "minimax_h3": (
        "MiniMaxH3Transformer3DModel",
        {**HEADS, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 2, "ffn_dim": 40, "in_channels": 4,
         "audio_in_channels": 6, "text_dim": 20, "freq_dim": 12, "time_embed_hidden_dim": 24, "time_embed_dim": 14,
         "rope_freq_dim": 2},
    ),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 12, "time_dim": 8, "out_visual_dim": 4,
         "model_dim": 16, "ff_dim": 64, "num_text_blocks": 2, "num_visual_blocks": 2, "axes_dims": (2, 2, 4)},
    ),
    "ernie_image": (
        "ErnieImageTransformer2DModel",
        {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 40, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 20, "rope_axes_dim": (2, 2, 4)},
    ),
    "ovis_image": ("OvisImageTransformer2DModel", {**FLUX, "out_channels": 4}),
    "longcat_image": ("LongCatImageTransformer2DModel", SINGLES),
    "allegro": (
        "AllegroTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24,
         "sample_height": 4, "sample_width": 4, "sample_frames": 2, "caption_channels": 20},
    ),
    "bria": ("BriaTransformer2DModel", {**FLUX, "pooled_projection_dim": None}),
    "bria_fibo": ("BriaFiboTransformer2DModel", {**FLUX, "pooled_projection_dim": None, "text_encoder_dim": 6}),
    "prx": (
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": 20, "hidden_size": 16, "num_heads": 2, "depth": 2, "axes_dim": [4, 4]},
    ),
    "glm_image": (
        "GlmImageTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 12, "time_embed_dim": 20,
         "condition_dim": 8, "prior_vq_quantizer_codebook_size": 7},
    ),
    "ace_step": (
        "AceStepTransformer1DModel",
        {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
         "in_channels": 12, "audio_acoustic_hidden_dim": 4},
    ),
    "bria_fibo2": (
        "BriaFibo2Transformer2DModel",
        {"in_channels": 4, "dim": 24, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 3,
         "cap_feat_dim": 20, "injection_layer_ids": (1,), "axes_dims": (2, 2, 4)},
    ),
    "cogview3": (
        "CogView3PlusTransformer2DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "text_embed_dim": 20, "time_embed_dim": 12, "condition_dim": 8,
         "pos_embed_max_size": 4, "sample_size": 4},
    ),
    "cosmos3": (
        "Cosmos3OmniTransformer",
        {"head_dim": 8, "hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 30,
         "latent_channel": 4, "patch_latent_dim": 16},
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**HEADS, "num_layers": 2, "sample_size": 4},
    ),
    "easyanimate": (
        "EasyAnimateTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 2,
         "mmdit_layers": 2, "time_embed_dim": 12, "text_embed_dim": 20},
    ),
    "joyimage": (
        "JoyImageEditTransformer3DModel",
        JOYIMAGE,
    ),
    "kandinsky6": (
        "Kandinsky6Transformer3DModel",
        {**KANDINSKY6, "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 20,
         "in_text_dim2": 12, "num_text_blocks": 2},
    ),
    "kandinsky6_sr": (
        "Kandinsky6SRTransformer3DModel",
        {**KANDINSKY6, "in_visual_dim": 4, "out_visual_dim": 4},
    ),
    "latte": (
        "LatteTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "patch_size": 2,
         "sample_size": 4, "caption_channels": 20, "cross_attention_dim": 16,
         "norm_type": "ada_norm_single"},
    ),
    "longcat_audio": (
        "LongCatAudioDiTTransformer",
        {"dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 12, "latent_dim": 4},
    ),
    "lumina_next": (
        "LuminaNextDiT2DModel",
        {"sample_size": 4, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 2,
         "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 20},
    ),
    "minimax_music3": (
        "MiniMaxMusic3Transformer1DModel",
        {**HEADS, "in_channels": 4, "condition_dim": 12, "num_layers": 2,
         "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8},
    ),
    "motif_video": (
        "MotifVideoTransformer3DModel",
        {**HEADS, "in_channels": 9, "out_channels": 4, "num_layers": 2,
         "num_single_layers": 2, "text_embed_dim": 20, "rope_axes_dim": (2, 2, 4)},
    ),
    "nucleus_image": (
        "NucleusMoEImageTransformer2DModel",
        {**HEADS, "num_attention_heads": 6, "in_channels": 16, "num_layers": 6, "joint_attention_dim": 12,
         "axes_dims_rope": (2, 2, 4), "num_experts": 2, "moe_intermediate_dim": 8},
    ),
    "sana_video": (
        "SanaVideoTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
         "cross_attention_dim": 16, "caption_channels": 20, "sample_size": 4},
    ),
    "sana_wm": (
        "SanaWMTransformer3DModel",
        {"in_channels": 4, "num_layers": 4, "hidden_size": 16, "num_attention_heads": 2,
         "linear_head_dim": 8, "caption_channels": 20, "chunk_plucker_channels": 6,
         "chunk_plucker_post_attn_blocks": 4},
    ),
    "stable_audio": (
        "StableAudioDiTModel",
        {"in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 12,
         "global_states_input_dim": 12, "cross_attention_input_dim": 12, "time_proj_dim": 8},
    ),
    "stable_audio3": (
        "StableAudio3DiTModel",
        {"io_channels": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "cond_token_dim": 12,
         "global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 8},
    ),
    "wan_animate2": (
        "WanAnimate2Transformer3DModel",
        {"in_dim": 12, "dim": 24, "ffn_dim": 40, "freq_dim": 16, "text_dim": 20,
         "out_dim": 4, "num_heads": 2, "num_layers": 2},
    ),
}  # fmt: skip


# family -> the argument that is the width of its text, or of what else only one layer reads. Real models' widths tell
# families apart whose names are alike; here this one does, which no other number of any model is.
TELLING: Mapping[str, tuple[str, int]] = {
    "flux": ("joint_attention_dim", 302),
    "flux2": ("joint_attention_dim", 304),
    "flux3": ("joint_attention_dim", 306),
    "chroma": ("joint_attention_dim", 308),
    "sd3": ("joint_attention_dim", 310),
    "qwen_image": ("joint_attention_dim", 312),
    "qwen_image21": ("context_in_dim", 314),
    "z_image": ("cap_feat_dim", 316),
    "lumina2": ("cap_feat_dim", 318),
    "hidream": ("text_emb_dim", 322),
    "wan": ("text_dim", 324),
    "hunyuan_video": ("text_embed_dim", 326),
    "hunyuan_video15": ("text_embed_dim", 328),
    "hunyuan_image": ("text_embed_dim", 330),
    "hunyuan_dit": ("cross_attention_dim_t5", 332),
    "ltx": ("caption_channels", 334),
    "ltx2": ("in_channels", 338),
    "cogvideox": ("text_embed_dim", 340),
    "cogview4": ("text_embed_dim", 342),
    "mochi": ("text_embed_dim", 344),
    "auraflow": ("joint_attention_dim", 346),
    "pixart": ("caption_channels", 348),
    "sana": ("caption_channels", 350),
    "omnigen": ("time_step_dim", 354),
    "cosmos1": ("text_embed_dim", 356),
    "cosmos_predict2": ("text_embed_dim", 358),
    "anima": ("text_embed_dim", 360),
    "krea2": ("timestep_embed_dim", 362),
    "ideogram4": ("llm_features_dim", 364),
    "minimax_h3": ("text_dim", 366),
    "kandinsky5": ("in_text_dim", 370),
    "ernie_image": ("text_in_dim", 372),
    "ovis_image": ("joint_attention_dim", 374),
    "longcat_image": ("joint_attention_dim", 376),
    "allegro": ("caption_channels", 378),
    "bria": ("joint_attention_dim", 380),
    "bria_fibo": ("joint_attention_dim", 382),
    "prx": ("context_in_dim", 386),
    "glm_image": ("text_embed_dim", 388),
    "ace_step": ("encoder_hidden_size", 390),
    "bria_fibo2": ("cap_feat_dim", 392),
    "cogview3": ("text_embed_dim", 394),
    "cosmos3": ("patch_latent_dim", 396),
    "dit": ("in_channels", 398),
    "easyanimate": ("text_embed_dim", 400),
    "joyimage": ("text_dim", 402),
    "kandinsky6": ("in_text_dim", 404),
    "kandinsky6_sr": ("time_dim", 406),
    "latte": ("caption_channels", 408),
    "longcat_audio": ("dit_text_dim", 410),
    "lumina_next": ("cross_attention_dim", 412),
    "minimax_music3": ("fourier_embedding_dim", 414),
    "motif_video": ("text_embed_dim", 416),
    "nucleus_image": ("joint_attention_dim", 418),
    "sana_video": ("caption_channels", 420),
    "sana_wm": ("caption_channels", 422),
    "stable_audio": ("cross_attention_input_dim", 424),
    "stable_audio3": ("cond_token_dim", 426),
    "wan_animate2": ("text_dim", 428),
}


def family_of(case: str) -> str:
    return case.partition("/")[0]


def build(case: str) -> Any:
    """Return the model of a case in float32, every parameter and stored buffer a random number of its own."""
    name, config = MODELS[case]
    argument, width = TELLING[family_of(case)]
    model = getattr(diffusers, name)(**{**config, argument: width}).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=g) * 0.3)
    return model


def linears(model: nn.Module) -> list[str]:
    """Return the paths of all linear layers but a language model's head, in the model's order."""
    every = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [path for path in every if path != "lm_head"]
