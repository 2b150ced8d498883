"""Name the modules of EasyAnimate as diffusers does.

Source: diffusers' class `EasyAnimateTransformer3DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="easyanimate",
    title="EasyAnimate",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "norm1.linear",
                "norm1.norm",
                "attn1.norm_q",
                "attn1.norm_k",
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.add_k_proj",
                "attn1.add_v_proj",
                "attn1.add_q_proj",
                "attn1.to_out.0",
                "attn1.to_add_out",
                "attn1.norm_added_q",
                "attn1.norm_added_k",
                "norm2.linear",
                "norm2.norm",
                "ff.net.0.proj",
                "ff.net.2",
                "txt_ff.net.0.proj",
                "txt_ff.net.2",
            ),
            counts=(48,),
        ),
    ),
    alike=(
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "proj",
        "text_proj",
        "norm_final",
        "norm_out.linear",
        "norm_out.norm",
        "proj_out",
    ),
    diffusers_class="EasyAnimateTransformer3DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=(".txt_ff.",),
    widths=(
        Width(
            "unet",
            (
                ".add_k_proj",
                ".add_q_proj",
                ".add_v_proj",
                ".linear_1",
                ".proj",
                ".proj_out",
                ".to_add_out",
                ".to_k",
                ".to_out.0",
                ".to_q",
                ".to_v",
            ),
            (3072,),
        ),
        Width("unet", (".linear", ".linear_2"), (512,)),
        Width("unet", (".text_proj",), (3584,)),
        Width("unet", (".net.2",), (12288,)),
    ),
    kernels={"proj": (2, 2)},
)
