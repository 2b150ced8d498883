"""Name the modules of Latte as diffusers does.

Source: diffusers' class `LatteTransformer3DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="latte",
    title="Latte",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "norm1",
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "norm2",
                "attn2.to_q",
                "attn2.to_k",
                "attn2.to_v",
                "attn2.to_out.0",
                "ff.net.0.proj",
                "ff.net.2",
            ),
            tensors={"scale_shift_table": "scale_shift_table"},
            counts=(28,),
        ),
        Block(
            "temporal_transformer_blocks.{i}",
            "temporal_transformer_blocks.{i}",
            alike=(
                "norm1",
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "norm2",
                "ff.net.0.proj",
                "ff.net.2",
            ),
            tensors={"scale_shift_table": "scale_shift_table"},
            counts=(28,),
        ),
    ),
    alike=(
        "pos_embed.proj",
        "proj_out",
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2",
        "adaln_single.linear",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
    ),
    outside_tensors={"scale_shift_table": "scale_shift_table"},
    diffusers_class="LatteTransformer3DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.", "t5")),
    marks=("temporal_transformer_blocks.",),
    widths=(
        Width("unet", (".linear", ".linear_2", ".proj", ".proj_out", ".to_k", ".to_out.0", ".to_q", ".to_v"), (1152,)),
        Width("unet", (".net.2",), (4608,)),
        Width("unet", (".timestep_embedder.linear_1",), (256,)),
        Width("unet", (".caption_projection.linear_1",), (4096,)),
    ),
    kernels={"pos_embed.proj": (2, 2)},
)
