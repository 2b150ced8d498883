"""Name the modules of Cosmos 1.0 as NVIDIA and diffusers do.

Sources: diffusers `loaders/single_file_utils.py`; ComfyUI `comfy/ldm/cosmos/model.py`.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

# Ends of the paths of modules with the hidden size as number of columns
HIDDEN = (
    ".linear_1",
    ".t_embedder.linear_2",
    ".proj_out",
    ".to_q",
    ".attn1.to_k",
    ".attn1.to_v",
    ".to_out.0",
    ".0.proj",
)

FAMILY = ModelFamily(
    key="cosmos1",
    title="Cosmos 1",
    blocks=(
        Block(
            "blocks.block{i}",
            "transformer_blocks.{i}",
            {
                "blocks.0.block.attn.to_q.0": "attn1.to_q",
                "blocks.0.block.attn.to_k.0": "attn1.to_k",
                "blocks.0.block.attn.to_v.0": "attn1.to_v",
                "blocks.0.block.attn.to_out.0": "attn1.to_out.0",
                "blocks.1.block.attn.to_q.0": "attn2.to_q",
                "blocks.1.block.attn.to_k.0": "attn2.to_k",
                "blocks.1.block.attn.to_v.0": "attn2.to_v",
                "blocks.1.block.attn.to_out.0": "attn2.to_out.0",
                "blocks.2.block.layer1": "ff.net.0.proj",
                "blocks.2.block.layer2": "ff.net.2",
                "blocks.0.adaLN_modulation.1": "norm1.linear_1",
                "blocks.0.adaLN_modulation.2": "norm1.linear_2",
                "blocks.1.adaLN_modulation.1": "norm2.linear_1",
                "blocks.1.adaLN_modulation.2": "norm2.linear_2",
                "blocks.2.adaLN_modulation.1": "norm3.linear_1",
                "blocks.2.adaLN_modulation.2": "norm3.linear_2",
                "blocks.0.block.attn.to_q.1": "attn1.norm_q",
                "blocks.0.block.attn.to_k.1": "attn1.norm_k",
                "blocks.1.block.attn.to_q.1": "attn2.norm_q",
                "blocks.1.block.attn.to_k.1": "attn2.norm_k",
            },
            counts=(28, 36),
        ),
    ),
    outside={
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.adaLN_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
        "affline_norm": "time_embed.norm",
    },
    outside_tensors={
        "extra_pos_embedder.pos_emb_t": "learnable_pos_embed.pos_emb_t",
        "extra_pos_embedder.pos_emb_h": "learnable_pos_embed.pos_emb_h",
        "extra_pos_embedder.pos_emb_w": "learnable_pos_embed.pos_emb_w",
    },
    # Counters of its training, and buffers for positions
    unused=(
        "accum_video_sample_counter",
        "accum_image_sample_counter",
        "accum_iteration",
        "accum_train_in_hours",
        "pos_embedder.seq",
        "pos_embedder.dim_spatial_range",
        "pos_embedder.dim_temporal_range",
    ),
    diffusers_class="CosmosTransformer3DModel",
    config={"extra_pos_embed_type": "learnable"},
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder.", "t5"),
    ),
    marks=("blocks.block0.", "time_embed.t_embedder."),
    widths=(
        Width("unet", HIDDEN, (4096, 5120)),
        Width("unet", (".attn2.to_k", ".attn2.to_v"), (1024,)),
        Width("unet", (".net.2",), (16384, 20480)),
    ),
)
