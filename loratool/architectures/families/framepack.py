"""Name the modules of FramePack, a HunyuanVideo with diffusers' names, which are the only ones.

Source: diffusers' class `HunyuanVideoFramepackTransformer3DModel`, alone: no other naming was seen.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily

FAMILY = ModelFamily(
    key="framepack",
    title="FramePack",
    blocks=(
        Block(
            "context_embedder.token_refiner.refiner_blocks.{i}",
            "context_embedder.token_refiner.refiner_blocks.{i}",
            alike=(
                "norm1",
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.to_out.0",
                "norm2",
                "ff.net.0.proj",
                "ff.net.2",
                "norm_out.linear",
            ),
        ),
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "norm1.linear",
                "norm1_context.linear",
                "attn.norm_q",
                "attn.norm_k",
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.add_q_proj",
                "attn.to_out.0",
                "attn.to_add_out",
                "attn.norm_added_q",
                "attn.norm_added_k",
                "ff.net.0.proj",
                "ff.net.2",
                "ff_context.net.0.proj",
                "ff_context.net.2",
            ),
        ),
        Block(
            "single_transformer_blocks.{i}",
            "single_transformer_blocks.{i}",
            alike=(
                "attn.norm_q",
                "attn.norm_k",
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "norm.linear",
                "proj_mlp",
                "proj_out",
            ),
        ),
    ),
    alike=(
        "x_embedder.proj",
        "clean_x_embedder.proj",
        "clean_x_embedder.proj_2x",
        "clean_x_embedder.proj_4x",
        "context_embedder.time_text_embed.timestep_embedder.linear_1",
        "context_embedder.time_text_embed.timestep_embedder.linear_2",
        "context_embedder.time_text_embed.text_embedder.linear_1",
        "context_embedder.time_text_embed.text_embedder.linear_2",
        "context_embedder.proj_in",
        "image_projection.up",
        "image_projection.down",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.text_embedder.linear_1",
        "time_text_embed.text_embedder.linear_2",
        "time_text_embed.guidance_embedder.linear_1",
        "time_text_embed.guidance_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    diffusers_class="HunyuanVideoFramepackTransformer3DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te1_", "text_encoders.llama.transformer.", "text_encoder."),
        Component("text_encoder_2", "lora_te2_", "text_encoders.clip_l.transformer.", "text_encoder_2.", "clip"),
    ),
    marks=("clean_x_embedder.",),
    telling=r"^(clean_x_embedder|image_projection)\.",
    kernels={
        "x_embedder.proj": (1, 2, 2),
        "clean_x_embedder.proj": (1, 2, 2),
        "clean_x_embedder.proj_2x": (2, 4, 4),
        "clean_x_embedder.proj_4x": (4, 8, 8),
    },
    kohya_network="networks.lora_framepack",
)
