"""Name the modules of Qwen-Image 2.1 as Qwen, diffusers and ComfyUI do.

Sources: diffusers' class `QwenImage21Transformer2DModel` and `loaders/single_file_utils.py`, which were read, not
run.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width

FAMILY = ModelFamily(
    key="qwen_image21",
    title="Qwen-Image 2.1",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.to_out.0",
                "attn.norm_q",
                "attn.norm_k",
                "img_mlp.proj",
                "img_mlp.out",
                "img_mlp.gate_layer",
            ),
            comfy={"img_mlp.gate_up": Fused(("img_mlp.gate_layer", "img_mlp.proj"))},
            counts=(32,),
        ),
    ),
    alike=(
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "txt_in.text_norm",
        "txt_in.in_layer",
        "txt_in.out_layer",
        "img_in",
        "modulation.1",
        "norm_out.linear",
        "proj_out",
    ),
    diffusers_class="QwenImage21Transformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("txt_in.text_norm",),
    widths=(
        Width(
            "unet",
            (".linear_2", ".to_q", ".to_k", ".to_v", ".to_out.0", ".proj", ".gate_layer", ".linear", ".proj_out"),
            (4096,),
        ),
        Width("unet", (".out",), (12288,)),
    ),
    kohya_network="networks.lora_qwen_image_21",
)
