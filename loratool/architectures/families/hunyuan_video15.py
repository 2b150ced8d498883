"""Name the modules of HunyuanVideo 1.5 as Tencent, diffusers and ComfyUI do.

Sources: Tencent-Hunyuan/HunyuanVideo-1.5 `hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py`; diffusers
`scripts/convert_hunyuan_video1_5_to_diffusers.py`; ComfyUI `comfy/ldm/hunyuan_video/model.py`. ComfyUI's names were
read, not run. Not checked: the meanflow variant.
"""

from __future__ import annotations

from . import hunyuan_video
from .table import JOINT_ATTENTION, Block, Component, Fused, ModelFamily, Width

FAMILY = ModelFamily(
    key="hunyuan_video15",
    title="HunyuanVideo 1.5",
    blocks=(
        hunyuan_video.REFINER,
        Block(
            "double_blocks.{i}",
            "transformer_blocks.{i}",
            {
                "img_attn_q": "attn.to_q",
                "txt_attn_q": "attn.add_q_proj",
                "img_attn_k": "attn.to_k",
                "txt_attn_k": "attn.add_k_proj",
                "img_attn_v": "attn.to_v",
                "txt_attn_v": "attn.add_v_proj",
                **hunyuan_video.DOUBLE,
            },
            # In files that were packed for ComfyUI
            aliases={
                "img_attn_qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v")),
                "txt_attn_qkv": Fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            },
            comfy=hunyuan_video.DOUBLE_COMFY,
            counts=(54,),
        ),
    ),
    outside={
        "img_in.proj": "x_embedder.proj",
        "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
        **hunyuan_video.OUTSIDE,
        "byt5_in.layernorm": "context_embedder_2.norm",
        "byt5_in.fc1": "context_embedder_2.linear_1",
        "byt5_in.fc2": "context_embedder_2.linear_2",
        "byt5_in.fc3": "context_embedder_2.linear_3",
        "vision_in.proj.0": "image_embedder.norm_in",
        "vision_in.proj.1": "image_embedder.linear_1",
        "vision_in.proj.3": "image_embedder.linear_2",
        "vision_in.proj.4": "image_embedder.norm_out",
        "cond_type_embedding": "cond_type_embed",
    },
    outside_comfy={
        **hunyuan_video.OUTSIDE_COMFY,
        "time_in.in_layer": "time_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_embed.timestep_embedder.linear_2",
    },
    diffusers_class="HunyuanVideo15Transformer3DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
        Component("text_encoder_2", "", "", "text_encoder_2.", "t5"),
    ),
    marks=("cond_type_embedding", "cond_type_embed"),
    widths=(
        Width(
            "unet",
            (
                ".timestep_embedder.linear_2",
                ".text_embedder.linear_2",
                ".proj_out",
                ".linear",
                ".context_embedder_2.linear_2",
                ".linear_3",
                *JOINT_ATTENTION,
                ".0.proj",
            ),
            (2048,),
        ),
        Width("unet", (".text_embedder.linear_1",), (3584,)),
        Width("unet", (".context_embedder_2.linear_1",), (1472,)),
        Width("unet", (".net.2",), (8192,)),
    ),
    kernels={"x_embedder.proj": (1, 1, 1)},
    kohya_network="networks.lora_hv_1_5",
)
