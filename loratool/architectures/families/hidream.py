"""Name the modules of HiDream I1 and E1 as HiDream.ai and diffusers do, both in the same way.

Sources: HiDream-ai/HiDream-I1 `hi_diffusers/models/transformers/transformer_hidream_image.py`; diffusers' class
`HiDreamImageTransformer2DModel`; ComfyUI `comfy/ldm/hidream/model.py`. HiDream-O1 is another model.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

_ALIKE = (
    "block.adaLN_modulation.1",
    "block.attn1.to_q",
    "block.attn1.to_k",
    "block.attn1.to_v",
    "block.attn1.to_out",
    "block.attn1.q_rms_norm",
    "block.attn1.k_rms_norm",
    "block.ff_i.shared_experts.w1",
    "block.ff_i.shared_experts.w2",
    "block.ff_i.shared_experts.w3",
    *(f"block.ff_i.experts.{expert}.{each}" for expert in range(4) for each in ("w1", "w2", "w3")),
    "block.ff_i.gate",
)

FAMILY = ModelFamily(
    key="hidream",
    title="HiDream",
    blocks=(
        Block(
            "double_stream_blocks.{i}",
            "double_stream_blocks.{i}",
            alike=(
                *_ALIKE,
                "block.attn1.to_q_t",
                "block.attn1.to_k_t",
                "block.attn1.to_v_t",
                "block.attn1.to_out_t",
                "block.attn1.q_rms_norm_t",
                "block.attn1.k_rms_norm_t",
                "block.ff_t.w1",
                "block.ff_t.w2",
                "block.ff_t.w3",
            ),
            counts=(16,),
        ),
        Block(
            "single_stream_blocks.{i}",
            "single_stream_blocks.{i}",
            alike=_ALIKE,
            counts=(32,),
        ),
        Block(
            "caption_projection.{i}",
            "caption_projection.{i}",
            alike=("linear",),
        ),
    ),
    alike=(
        "t_embedder.timestep_embedder.linear_1",
        "t_embedder.timestep_embedder.linear_2",
        "p_embedder.pooled_embedder.linear_1",
        "p_embedder.pooled_embedder.linear_2",
        "x_embedder.proj",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
    diffusers_class="HiDreamImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te1_", "text_encoders.clip_l.transformer.", "text_encoder.", "clip"),
        Component("text_encoder_2", "lora_te2_", "text_encoders.clip_g.transformer.", "text_encoder_2.", "clip"),
        Component("text_encoder_3", "lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_3.", "t5"),
        Component("text_encoder_4", "lora_te4_", "text_encoders.llama.transformer.", "text_encoder_4."),
    ),
    marks=("double_stream_blocks.",),
    widths=(Width("unet", (".final_layer.linear", ".adaLN_modulation.1"), (2560,)),),
)
