"""Name the modules of DiT as diffusers does.

Source: diffusers' class `DiTTransformer2DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="dit",
    title="DiT",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "norm1.emb.timestep_embedder.linear_1",
                "norm1.emb.timestep_embedder.linear_2",
                "norm1.emb.class_embedder.embedding_table",
                "norm1.linear",
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "ff.net.0.proj",
                "ff.net.2",
            ),
            counts=(28,),
        ),
    ),
    alike=("pos_embed.proj", "proj_out_1", "proj_out_2"),
    diffusers_class="DiTTransformer2DModel",
    components=(Component("unet", "", "", "transformer."),),
    marks=("norm1.emb.class_embedder.",),
    widths=(
        Width("unet", (".linear_1",), (256,)),
        Width(
            "unet",
            (
                ".embedding_table",
                ".linear",
                ".linear_2",
                ".proj",
                ".proj_out_1",
                ".proj_out_2",
                ".to_k",
                ".to_out.0",
                ".to_q",
                ".to_v",
            ),
            (1152,),
        ),
        Width("unet", (".net.2",), (4608,)),
    ),
    kernels={"pos_embed.proj": (2, 2)},
)
