"""Name the modules of Ideogram 4 as Ideogram and diffusers do.

Sources: diffusers' class `Ideogram4Transformer2DModel` and `loaders/lora_conversion_utils.py`; ComfyUI
`comfy/ldm/ideogram4/model.py`, whose names outside of the blocks are diffusers' too.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width

FAMILY = ModelFamily(
    key="ideogram4",
    title="Ideogram 4",
    blocks=(
        Block(
            "layers.{i}",
            "layers.{i}",
            {
                "attention.qkv": Fused(("attention.to_q", "attention.to_k", "attention.to_v")),
                "attention.o": "attention.to_out.0",
            },
            alike=(
                "feed_forward.w1",
                "feed_forward.w2",
                "feed_forward.w3",
                "adaln_modulation",
                "attention.norm_q",
                "attention.norm_k",
                "attention_norm1",
                "attention_norm2",
                "ffn_norm1",
                "ffn_norm2",
            ),
            counts=(34,),
        ),
    ),
    alike=(
        "input_proj",
        "llm_cond_proj",
        "t_embedding.mlp_in",
        "t_embedding.mlp_out",
        "adaln_proj",
        "final_layer.linear",
        "final_layer.adaln_modulation",
        "llm_cond_norm",
        "embed_image_indicator",
    ),
    diffusers_class="Ideogram4Transformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("unconditional_transformer", "", "", "unconditional_transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("embed_image_indicator",),
    widths=(
        Width("unet", (".linear", ".to_q", ".to_k", ".to_v", ".to_out.0", ".w1", ".w3"), (4608,)),
        Width("unet", (".w2",), (12288,)),
        Width("unet", (".adaln_modulation",), (512,)),
    ),
    kohya_network="networks.lora_ideogram4",
)
