"""Name the modules of GLM-Image's denoiser as Z.ai and diffusers do, both in the same way.

Source: only diffusers' class `GlmImageTransformer2DModel`; no other naming is known.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="glm_image",
    title="GLM-Image",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "norm1.linear",
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "ff.net.0.proj",
                "ff.net.2",
            ),
            counts=(30,),
        ),
    ),
    alike=(
        "image_projector.proj",
        "glyph_projector.net.0.proj",
        "glyph_projector.net.2",
        "prior_projector.net.0.proj",
        "prior_projector.net.2",
        "time_condition_embed.timestep_embedder.linear_1",
        "time_condition_embed.timestep_embedder.linear_2",
        "time_condition_embed.condition_embedder.linear_1",
        "time_condition_embed.condition_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
        "prior_token_embedding",
    ),
    diffusers_class="GlmImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder.", "t5"),
    ),
    marks=("glyph_projector.",),
    widths=(
        Width("unet", (".timestep_embedder.linear_1", ".linear_2", ".linear"), (512,)),
        Width("unet", (".condition_embedder.linear_1",), (1024,)),
        Width("unet", (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".proj_out"), (2560,)),
        Width("unet", (".ff.net.2",), (10240,)),
    ),
)
