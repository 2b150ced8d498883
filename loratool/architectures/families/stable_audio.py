"""Name the modules of Stable Audio as diffusers does.

Source: diffusers' class `StableAudioDiTModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="stable_audio",
    title="Stable Audio",
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
                "norm3",
                "ff.net.0.proj",
                "ff.net.2",
            ),
            counts=(24,),
        ),
    ),
    alike=(
        "time_proj",
        "timestep_proj.0",
        "timestep_proj.2",
        "global_proj.0",
        "global_proj.2",
        "cross_attention_proj.0",
        "cross_attention_proj.2",
        "preprocess_conv",
        "proj_in",
        "proj_out",
        "postprocess_conv",
    ),
    diffusers_class="StableAudioDiTModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=("cross_attention_proj.",),
    widths=(
        Width("unet", (".timestep_proj.0",), (256,)),
        Width(
            "unet",
            (
                ".attn1.to_k",
                ".attn1.to_v",
                ".global_proj.0",
                ".global_proj.2",
                ".proj",
                ".proj_out",
                ".timestep_proj.2",
                ".to_out.0",
                ".to_q",
            ),
            (1536,),
        ),
        Width("unet", (".attn2.to_k", ".attn2.to_v", ".cross_attention_proj.0", ".cross_attention_proj.2"), (768,)),
        Width("unet", (".proj_in",), (64,)),
        Width("unet", (".net.2",), (6144,)),
    ),
    kernels={"preprocess_conv": (1,), "postprocess_conv": (1,)},
)
