"""Name the modules of SD 2: SD 1 with an OpenCLIP as text encoder."""

from __future__ import annotations

from .sd1 import FOUR_LEVELS, UNET
from .table import Component, ModelFamily, Naming, Width
from .unet import KERNELS

FAMILY = ModelFamily(
    key="sd2",
    title="SD 2",
    diffusers_class="UNet2DConditionModel",
    up_attention=(False, True, True, True),
    components=(
        UNET,
        Component("text_encoder", "lora_te_", "text_encoders.clip_h.transformer.", "text_encoder.", "clip"),
    ),
    marks=("input_blocks.", "down_blocks."),
    telling=FOUR_LEVELS,
    widths=(
        Width("unet", (".attn2.to_k", ".attn2.to_v"), (1024,)),
        Width("text_encoder", ("q_proj", "k_proj", "v_proj", "out_proj", ".fc1"), (1024,)),
    ),
    kohya=Naming.DIFFUSERS,
    kernels=KERNELS,
    kohya_version="sd_v2",
)
