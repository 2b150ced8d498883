"""Name the modules of Cosmos-Predict2 as NVIDIA and diffusers do.

Sources: diffusers `loaders/single_file_utils.py`; ComfyUI `comfy/ldm/cosmos/predict2.py`. Not checked: Predict2.5.
"""

from __future__ import annotations

from . import cosmos1
from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="cosmos_predict2",
    title="Cosmos-Predict2",
    blocks=(
        Block(
            "blocks.{i}",
            "transformer_blocks.{i}",
            {
                "self_attn.q_proj": "attn1.to_q",
                "self_attn.k_proj": "attn1.to_k",
                "self_attn.v_proj": "attn1.to_v",
                "self_attn.output_proj": "attn1.to_out.0",
                "cross_attn.q_proj": "attn2.to_q",
                "cross_attn.k_proj": "attn2.to_k",
                "cross_attn.v_proj": "attn2.to_v",
                "cross_attn.output_proj": "attn2.to_out.0",
                "mlp.layer1": "ff.net.0.proj",
                "mlp.layer2": "ff.net.2",
                "adaln_modulation_self_attn.1": "norm1.linear_1",
                "adaln_modulation_self_attn.2": "norm1.linear_2",
                "adaln_modulation_cross_attn.1": "norm2.linear_1",
                "adaln_modulation_cross_attn.2": "norm2.linear_2",
                "adaln_modulation_mlp.1": "norm3.linear_1",
                "adaln_modulation_mlp.2": "norm3.linear_2",
                "self_attn.q_norm": "attn1.norm_q",
                "self_attn.k_norm": "attn1.norm_k",
                "cross_attn.q_norm": "attn2.norm_q",
                "cross_attn.k_norm": "attn2.norm_k",
            },
            counts=(28, 36),
        ),
    ),
    outside={
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
        "t_embedding_norm": "time_embed.norm",
    },
    unused=cosmos1.FAMILY.unused,
    diffusers_class="CosmosTransformer3DModel",
    config={"extra_pos_embed_type": None},
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder.", "t5"),
    ),
    marks=("adaln_modulation_self_attn.", "time_embed.t_embedder."),
    widths=(
        Width("unet", cosmos1.HIDDEN, (2048, 5120)),
        Width("unet", (".attn2.to_k", ".attn2.to_v"), (1024,)),
        Width("unet", (".net.2",), (8192, 20480)),
    ),
)
