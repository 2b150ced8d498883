"""Name the modules of Sana as NVIDIA and diffusers do.

Sources: NVlabs/Sana `diffusion/model/nets/sana_multi_scale.py`; diffusers `loaders/single_file_utils.py`. Not
checked: the 4.8B model; Sana Sprint, which has more modules.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width

FAMILY = ModelFamily(
    key="sana",
    title="Sana",
    blocks=(
        Block(
            "blocks.{i}",
            "transformer_blocks.{i}",
            {
                "mlp.inverted_conv.conv": "ff.conv_inverted",
                "mlp.depth_conv.conv": "ff.conv_depth",
                "mlp.point_conv.conv": "ff.conv_point",
                "attn.qkv": Fused(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                "attn.proj": "attn1.to_out.0",
                "cross_attn.q_linear": "attn2.to_q",
                "cross_attn.kv_linear": Fused(("attn2.to_k", "attn2.to_v")),
                "cross_attn.proj": "attn2.to_out.0",
            },
            tensors={"scale_shift_table": "scale_shift_table"},
            counts=(20, 28, 60),
        ),
    ),
    outside={
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
        "t_block.1": "time_embed.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
        "attention_y_norm": "caption_norm",
    },
    outside_tensors={"final_layer.scale_shift_table": "scale_shift_table"},
    unused=("y_embedder.y_embedding", "pos_embed"),
    diffusers_class="SanaTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te_", "", "text_encoder."),
    ),
    marks=("mlp.inverted_conv.", "ff.conv_inverted"),
    widths=(
        Width("unet", (".linear_2", ".linear", ".proj_out", ".to_q", ".to_k", ".to_v", ".to_out.0"), (1152, 2240)),
        Width("unet", (".caption_projection.linear_1",), (2304,)),
    ),
    kernels={"patch_embed.proj": (1, 1), "ff.conv_inverted": (1, 1), "ff.conv_depth": (3, 3), "ff.conv_point": (1, 1)},
)
