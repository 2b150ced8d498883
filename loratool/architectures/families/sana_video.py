"""Name the modules of Sana-Video as NVIDIA and diffusers do.

Sources: diffusers `scripts/convert_sana_video_to_diffusers.py` and its class, whose defaults are the sizes.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width

FAMILY = ModelFamily(
    key="sana_video",
    title="Sana-Video",
    blocks=(
        Block(
            "blocks.{i}",
            "transformer_blocks.{i}",
            {
                "attn.q_norm": "attn1.norm_q",
                "attn.k_norm": "attn1.norm_k",
                "attn.proj": "attn1.to_out.0",
                "cross_attn.q_norm": "attn2.norm_q",
                "cross_attn.k_norm": "attn2.norm_k",
                "cross_attn.q_linear": "attn2.to_q",
                "cross_attn.proj": "attn2.to_out.0",
                "mlp.inverted_conv.conv": "ff.conv_inverted",
                "mlp.depth_conv.conv": "ff.conv_depth",
                "mlp.point_conv.conv": "ff.conv_point",
                "mlp.t_conv": "ff.conv_temp",
                "attn.qkv": Fused(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                "cross_attn.kv_linear": Fused(("attn2.to_k", "attn2.to_v")),
            },
            tensors={"scale_shift_table": "scale_shift_table"},
            counts=(20,),
        ),
    ),
    outside={
        "x_embedder.proj": "patch_embedding",
        "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
        "t_block.1": "time_embed.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "attention_y_norm": "caption_norm",
        "final_layer.linear": "proj_out",
    },
    outside_tensors={"final_layer.scale_shift_table": "scale_shift_table"},
    unused=("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias"),
    diffusers_class="SanaVideoTransformer3DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=("mlp.t_conv", "ff.conv_temp"),
    widths=(
        Width("unet", (".timestep_embedder.linear_1",), (256,)),
        Width("unet", (".linear", ".linear_2", ".proj_out", ".to_k", ".to_out.0", ".to_q", ".to_v"), (2240,)),
        Width("unet", (".caption_projection.linear_1",), (2304,)),
    ),
    kernels={
        "patch_embedding": (1, 2, 2),
        "ff.conv_inverted": (1, 1),
        "ff.conv_depth": (3, 3),
        "ff.conv_point": (1, 1),
        "ff.conv_temp": (3, 1),
    },
)
