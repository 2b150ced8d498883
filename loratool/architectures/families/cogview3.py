"""Name the modules of CogView 3 as diffusers does.

Source: diffusers' class `CogView3PlusTransformer2DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="cogview3",
    title="CogView 3",
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
        "patch_embed.proj",
        "patch_embed.text_proj",
        "time_condition_embed.timestep_embedder.linear_1",
        "time_condition_embed.timestep_embedder.linear_2",
        "time_condition_embed.condition_embedder.linear_1",
        "time_condition_embed.condition_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    diffusers_class="CogView3PlusTransformer2DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.", "t5")),
    marks=("time_condition_embed.condition_embedder.", "patch_embed.text_proj"),
    widths=(
        Width("unet", (".patch_embed.proj",), (64,)),
        Width("unet", (".text_proj",), (4096,)),
        Width(
            "unet",
            (".0.proj", ".proj_out", ".timestep_embedder.linear_1", ".to_k", ".to_out.0", ".to_q", ".to_v"),
            (2560,),
        ),
        Width("unet", (".linear", ".linear_2"), (512,)),
        Width("unet", (".condition_embedder.linear_1",), (1536,)),
        Width("unet", (".net.2",), (10240,)),
    ),
)
