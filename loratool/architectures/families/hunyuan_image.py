"""Name the modules of HunyuanImage 2.1 as Tencent, diffusers and ComfyUI do.

Sources: diffusers `scripts/convert_hunyuan_image_to_diffusers.py`; ComfyUI `comfy/ldm/hunyuan_video/model.py`. Not
checked: the refiner.
"""

from __future__ import annotations

from . import hunyuan_video
from .table import JOINT_ATTENTION, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="hunyuan_image",
    title="HunyuanImage",
    blocks=hunyuan_video.FAMILY.blocks,
    outside={
        "img_in.proj": "x_embedder.proj",
        "time_in.mlp.0": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_guidance_embed.timestep_embedder.linear_2",
        **hunyuan_video.OUTSIDE,
        "byt5_in.layernorm": "context_embedder_2.norm",
        "byt5_in.fc1": "context_embedder_2.linear_1",
        "byt5_in.fc2": "context_embedder_2.linear_2",
        "byt5_in.fc3": "context_embedder_2.linear_3",
        "guidance_in.mlp.0": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
        "time_r_in.mlp.0": "time_guidance_embed.timestep_embedder_r.linear_1",
        "time_r_in.mlp.2": "time_guidance_embed.timestep_embedder_r.linear_2",
    },
    outside_comfy={
        **hunyuan_video.OUTSIDE_COMFY,
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "time_r_in.in_layer": "time_guidance_embed.timestep_embedder_r.linear_1",
        "time_r_in.out_layer": "time_guidance_embed.timestep_embedder_r.linear_2",
    },
    diffusers_class="HunyuanImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
        Component("text_encoder_2", "", "", "text_encoder_2.", "t5"),
    ),
    marks=("individual_token_refiner.", "context_embedder.token_refiner."),
    widths=(
        Width(
            "unet",
            (
                ".timestep_embedder.linear_2",
                ".text_embedder.linear_1",
                ".text_embedder.linear_2",
                ".linear",
                *JOINT_ATTENTION,
                ".0.proj",
                ".proj_mlp",
            ),
            (3584,),
        ),
        Width("unet", (".proj_out",), (3584, 17920)),
        Width("unet", (".context_embedder_2.linear_1",), (1472,)),
        Width("unet", (".context_embedder_2.linear_2", ".linear_3"), (2048,)),
        Width("unet", (".net.2",), (14336,)),
    ),
    ratios={".linear1": 7, ".proj_mlp": 4},
    kernels={"x_embedder.proj": (1, 1)},
    kohya_network="networks.lora_hunyuan_image",
)
