"""Name the modules of Mochi 1 as Genmo and diffusers do.

Sources: genmoai/mochi `src/genmo/mochi_preview/dit/joint_model/asymm_models_joint.py`; diffusers
`loaders/single_file_utils.py`; ComfyUI `comfy/ldm/genmo/joint_model/asymm_models_joint.py`.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width, swapped

FAMILY = ModelFamily(
    key="mochi",
    title="Mochi",
    blocks=(
        Block(
            "blocks.{i}",
            "transformer_blocks.{i}",
            {
                "mod_x": "norm1.linear",
                "mod_y": "norm1_context.linear_1",
                "attn.qkv_x": Fused(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                "attn.qkv_y": Fused(("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj")),
                "attn.proj_x": "attn1.to_out.0",
                "attn.proj_y": "attn1.to_add_out",
                "mlp_x.w1": swapped("ff.net.0.proj"),
                "mlp_x.w2": "ff.net.2",
                "mlp_y.w1": swapped("ff_context.net.0.proj"),
                "mlp_y.w2": "ff_context.net.2",
                "attn.q_norm_x": "attn1.norm_q",
                "attn.k_norm_x": "attn1.norm_k",
                "attn.q_norm_y": "attn1.norm_added_q",
                "attn.k_norm_y": "attn1.norm_added_k",
            },
            # The last block has only a scale.
            by_ratio={"mod_y": (2, "norm1_context.linear")},
            counts=(48,),
        ),
    ),
    outside={
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
        "t5_y_embedder.to_q": "time_embed.pooler.to_q",
        "t5_y_embedder.to_out": "time_embed.pooler.to_out",
        "t5_yproj": "time_embed.caption_proj",
        "final_layer.mod": swapped("norm_out.linear"),
        "final_layer.linear": "proj_out",
    },
    outside_tensors={"pos_frequencies": "pos_frequencies"},
    diffusers_class="MochiTransformer3DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "text_encoders.t5xxl.transformer.", "text_encoder.", "t5"),
    ),
    marks=("t5_y_embedder.", "time_embed.pooler."),
    widths=(
        Width(
            "unet",
            (
                ".linear_2",
                ".linear",
                ".proj_out",
                ".norm1_context.linear_1",
                ".attn1.to_q",
                ".to_k",
                ".to_v",
                ".to_out.0",
                ".to_add_out",
                ".ff.net.0.proj",
            ),
            (3072,),
        ),
        Width("unet", (".add_q_proj", ".add_k_proj", ".add_v_proj", ".ff_context.net.0.proj"), (1536,)),
        Width("unet", (".ff.net.2",), (8192,)),
        Width("unet", (".ff_context.net.2",), (4096,)),
    ),
    kernels={"patch_embed.proj": (2, 2)},
)
