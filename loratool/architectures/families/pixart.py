"""Name the modules of PixArt-alpha and PixArt-sigma as their makers and diffusers do.

Sources: PixArt-alpha/PixArt-sigma `diffusion/model/nets/PixArtMS.py`; diffusers
`scripts/convert_pixart_sigma_to_diffusers.py`; ComfyUI `comfy/ldm/pixart/pixartms.py`.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width

FAMILY = ModelFamily(
    key="pixart",
    title="PixArt",
    blocks=(
        Block(
            "blocks.{i}",
            "transformer_blocks.{i}",
            {
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "attn.qkv": Fused(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                "attn.proj": "attn1.to_out.0",
                "cross_attn.q_linear": "attn2.to_q",
                "cross_attn.kv_linear": Fused(("attn2.to_k", "attn2.to_v")),
                "cross_attn.proj": "attn2.to_out.0",
            },
            tensors={"scale_shift_table": "scale_shift_table"},
            counts=(28,),
        ),
    ),
    outside={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
        "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
    },
    outside_tensors={"final_layer.scale_shift_table": "scale_shift_table"},
    unused=("y_embedder.y_embedding", "pos_embed"),
    diffusers_class="PixArtTransformer2DModel",
    other_classes=("Transformer2DModel",),
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te1_", "text_encoders.t5xxl.transformer.", "text_encoder.", "t5"),
    ),
    marks=("cross_attn.kv_linear", "adaln_single.emb."),
    widths=(
        Width(
            "unet",
            (
                ".timestep_embedder.linear_2",
                ".linear",
                ".caption_projection.linear_2",
                ".proj_out",
                ".0.proj",
                ".to_q",
                ".to_k",
                ".to_v",
                ".to_out.0",
            ),
            (1152,),
        ),
        Width("unet", (".caption_projection.linear_1",), (4096,)),
        Width("unet", (".net.2",), (4608,)),
    ),
    kernels={"pos_embed.proj": (2, 2)},
)
