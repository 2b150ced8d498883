"""Name the modules of Nucleus-Image as diffusers does.

Source: diffusers' class `NucleusMoEImageTransformer2DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="nucleus_image",
    title="Nucleus-Image",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "img_mod.1",
                "encoder_proj",
                "attn.norm_q",
                "attn.norm_k",
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_out.0",
                "attn.norm_added_q",
                "attn.norm_added_k",
                "img_mlp.net.0.proj",
                "img_mlp.net.2",
                "img_mlp.gate",
                "img_mlp.shared_expert.net.0.proj",
                "img_mlp.shared_expert.net.2",
            ),
            tensors={
                "img_mlp.experts.gate_up_proj": "img_mlp.experts.gate_up_proj",
                "img_mlp.experts.down_proj": "img_mlp.experts.down_proj",
            },
            counts=(24,),
        ),
    ),
    alike=(
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.norm",
        "txt_norm",
        "img_in",
        "norm_out.linear",
        "proj_out",
    ),
    diffusers_class="NucleusMoEImageTransformer2DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=(".encoder_proj", "shared_expert."),
    widths=(
        Width(
            "unet",
            (
                ".add_k_proj",
                ".add_v_proj",
                ".img_mod.1",
                ".linear",
                ".linear_1",
                ".proj",
                ".proj_out",
                ".to_k",
                ".to_out.0",
                ".to_q",
                ".to_v",
            ),
            (2048,),
        ),
        Width("unet", (".linear_2",), (8192,)),
        Width("unet", (".img_in",), (64,)),
        Width("unet", (".encoder_proj",), (3584,)),
        Width("unet", (".img_mlp.net.2",), (5376,)),
        Width("unet", (".gate",), (4096,)),
        Width("unet", (".shared_expert.net.2",), (1344,)),
    ),
)
