"""Name the modules of PRX as Photoroom and diffusers do, both in the same way.

Source: only diffusers' class `PRXTransformer2DModel`; no other naming is known.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="prx",
    title="PRX",
    blocks=(
        Block(
            "blocks.{i}",
            "blocks.{i}",
            alike=(
                "attention.img_qkv_proj",
                "attention.norm_q",
                "attention.norm_k",
                "attention.txt_kv_proj",
                "attention.norm_added_k",
                "attention.to_out.0",
                "gate_proj",
                "up_proj",
                "down_proj",
                "modulation.lin",
            ),
            counts=(16,),
        ),
    ),
    alike=(
        "img_in",
        "time_in.in_layer",
        "time_in.out_layer",
        "txt_in",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
    diffusers_class="PRXTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("img_qkv_proj",),
    widths=(
        Width(
            "unet",
            (
                ".out_layer",
                ".img_qkv_proj",
                ".txt_kv_proj",
                ".to_out.0",
                ".gate_proj",
                ".up_proj",
                ".lin",
                ".linear",
                ".adaLN_modulation.1",
            ),
            (1792,),
        ),
        Width("unet", (".txt_in",), (2304,)),
        Width("unet", (".down_proj",), (6272,)),
    ),
)
