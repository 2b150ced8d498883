"""Name the modules of Lumina-Next as diffusers does.

Source: diffusers' class `LuminaNextDiT2DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="lumina_next",
    title="Lumina-Next",
    blocks=(
        Block(
            "layers.{i}",
            "layers.{i}",
            alike=(
                "attn1.norm_q",
                "attn1.norm_k",
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn2.norm_q",
                "attn2.norm_k",
                "attn2.to_q",
                "attn2.to_k",
                "attn2.to_v",
                "attn2.to_out.0",
                "feed_forward.linear_1",
                "feed_forward.linear_2",
                "feed_forward.linear_3",
                "norm1.linear",
                "norm1.norm",
                "ffn_norm1",
                "norm2",
                "ffn_norm2",
                "norm1_context",
            ),
            tensors={"gate": "gate"},
            counts=(24,),
        ),
    ),
    alike=(
        "patch_embedder.proj",
        "time_caption_embed.timestep_embedder.linear_1",
        "time_caption_embed.timestep_embedder.linear_2",
        "time_caption_embed.caption_embedder.0",
        "time_caption_embed.caption_embedder.1",
        "norm_out.linear_1",
        "norm_out.linear_2",
    ),
    outside_tensors={"pad_token": "pad_token"},
    diffusers_class="LuminaNextDiT2DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=("feed_forward.linear_3",),
    widths=(
        Width("unet", (".proj",), (16,)),
        Width("unet", (".timestep_embedder.linear_1",), (256,)),
        Width("unet", (".linear", ".norm_out.linear_1", ".timestep_embedder.linear_2"), (1024,)),
        Width("unet", (".attn2.to_k", ".attn2.to_v", ".caption_embedder.1"), (2048,)),
        Width(
            "unet",
            (
                ".attn1.to_k",
                ".attn1.to_v",
                ".feed_forward.linear_1",
                ".linear_3",
                ".norm_out.linear_2",
                ".to_out.0",
                ".to_q",
            ),
            (2304,),
        ),
        Width("unet", (".feed_forward.linear_2",), (6144,)),
    ),
)
