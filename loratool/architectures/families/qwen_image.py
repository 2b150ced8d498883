"""Name the modules of Qwen-Image (Edit, Layered) as Qwen and diffusers do, both in the same way.

Sources: diffusers' class `QwenImageTransformer2DModel`; ComfyUI `comfy/ldm/qwen_image/model.py`.
"""

from __future__ import annotations

from .table import JOINT_ATTENTION, Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="qwen_image",
    title="Qwen-Image",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "img_mod.1",
                "attn.norm_q",
                "attn.norm_k",
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.add_q_proj",
                "attn.to_out.0",
                "attn.to_add_out",
                "attn.norm_added_q",
                "attn.norm_added_k",
                "img_mlp.net.0.proj",
                "img_mlp.net.2",
                "txt_mod.1",
                "txt_mlp.net.0.proj",
                "txt_mlp.net.2",
            ),
            counts=(60,),
        ),
    ),
    alike=(
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.addition_t_embedding",
        "txt_norm",
        "img_in",
        "txt_in",
        "norm_out.linear",
        "proj_out",
    ),
    diffusers_class="QwenImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te_", "text_encoders.qwen25_7b.transformer.", "text_encoder."),
    ),
    marks=("txt_mod.1",),
    widths=(
        Width(
            "unet",
            (".linear_2", ".img_mod.1", *JOINT_ATTENTION, ".proj", ".txt_mod.1", ".linear", ".proj_out"),
            (3072,),
        ),
        Width("unet", (".txt_in",), (3584,)),
        Width("unet", (".net.2",), (12288,)),
    ),
    ratios={".attn.to_q": 1},
    kohya_network="networks.lora_qwen_image",
)
