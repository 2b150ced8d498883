"""Name the modules of SDXL."""

from __future__ import annotations

from .sd1 import UNET
from .table import Component, ModelFamily, Width
from .unet import KERNELS

FAMILY = ModelFamily(
    key="sdxl",
    title="SDXL",
    diffusers_class="UNet2DConditionModel",
    up_attention=(True, True, False),
    components=(
        UNET,
        Component("text_encoder", "lora_te1_", "text_encoders.clip_l.transformer.", "text_encoder.", "clip"),
        Component("text_encoder_2", "lora_te2_", "text_encoders.clip_g.transformer.", "text_encoder_2.", "clip"),
    ),
    marks=("input_blocks.", "down_blocks."),
    telling=r"transformer_blocks\.[1-9]|^up_blocks\.0\.att|^add_embedding",
    widths=(
        Width("unet", (".attn2.to_k", ".attn2.to_v"), (2048,)),
        Width("text_encoder", ("q_proj", "k_proj", "v_proj", "out_proj", ".fc1"), (768,)),
        Width("text_encoder_2", ("q_proj", "k_proj", "v_proj", "out_proj", ".fc1"), (1280,)),
    ),
    kernels=KERNELS,
    kohya_version="sdxl_base_v1-0",
)
