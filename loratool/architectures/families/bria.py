"""Name the modules of Bria 3 as Bria and diffusers do, both in the same way.

Source: only diffusers' class `BriaTransformer2DModel`; no other naming is known.
"""

from __future__ import annotations

from .table import JOINT_ATTENTION, Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="bria",
    title="Bria 3",
    blocks=(
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
                "attn.to_out.0",
                "attn.norm_added_q",
                "attn.norm_added_k",
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
                "ff.net.0.proj",
                "ff.net.2",
                "ff_context.net.0.proj",
                "ff_context.net.2",
            ),
            counts=(19,),
        ),
        Block(
            "single_transformer_blocks.{i}",
            "single_transformer_blocks.{i}",
            alike=(
                "norm.linear",
                "proj_mlp",
                "proj_out",
                "attn.norm_q",
                "attn.norm_k",
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
            ),
            counts=(38,),
        ),
    ),
    alike=(
        "time_embed.timestep_embedder.linear_1",
        "time_embed.timestep_embedder.linear_2",
        "context_embedder",
        "x_embedder",
        "norm_out.linear",
        "proj_out",
    ),
    diffusers_class="BriaTransformer2DModel",
    repeats="flux",
    components=(
        Component("unet", "", "", "transformer."),
        Component("text_encoder", "", "", "text_encoder.", "t5"),
    ),
    marks=("single_transformer_blocks.",),
    widths=(
        Width("unet", (".linear_2", ".linear", *JOINT_ATTENTION, ".proj", ".proj_mlp"), (3072,)),
        Width("unet", (".context_embedder",), (4096,)),
        Width("unet", (".net.2",), (12288,)),
        Width("unet", (".proj_out",), (3072, 15360)),
    ),
    # Ovis has these names with other ratios.
    ratios={".proj_mlp": 4},
)
