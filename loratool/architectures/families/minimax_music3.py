"""Name the modules of MiniMax Music 3 as diffusers does.

Source: diffusers' class `MiniMaxMusic3Transformer1DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="minimax_music3",
    title="MiniMax Music 3",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=("norm1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "norm2", "ff_in", "ff_out"),
            counts=(36,),
        ),
    ),
    alike=(
        "time_embed.linear_1",
        "time_embed.linear_2",
        "preprocess_conv",
        "proj_in",
        "proj_out",
        "postprocess_conv",
    ),
    outside_tensors={"time_proj.weight": "time_proj.weight"},  # of frequencies, no linear layer
    diffusers_class="MiniMaxMusic3Transformer1DModel",
    components=(Component("unet", "", "", "transformer."),),
    marks=(".ff_in",),
    widths=(
        Width("unet", (".linear_1",), (256,)),
        Width("unet", (".ff_in", ".linear_2", ".proj_out", ".to_k", ".to_out.0", ".to_q", ".to_v"), (2048,)),
        Width("unet", (".proj_in",), (2304,)),
        Width("unet", (".ff_out",), (8192,)),
    ),
    kernels={"preprocess_conv": (1,), "postprocess_conv": (1,)},
)
