"""Name the modules of SD 1."""

from __future__ import annotations

from .table import Component, ModelFamily, Naming, Width
from .unet import KERNELS

# Modules that SDXL does not have: its innermost blocks are the third, and have attention.
FOUR_LEVELS = r"^(down_blocks\.(0\.att|2\.down|3)|up_blocks\.(2\.(att|up)|3))"

UNET = Component("unet", "lora_unet_", "diffusion_model.", "unet.")

FAMILY = ModelFamily(
    key="sd1",
    title="SD 1",
    diffusers_class="UNet2DConditionModel",
    other_classes=("UNetMotionModel",),
    up_attention=(False, True, True, True),
    components=(
        UNET,
        Component("text_encoder", "lora_te_", "text_encoders.clip_l.transformer.", "text_encoder.", "clip"),
    ),
    marks=("input_blocks.", "down_blocks."),
    telling=FOUR_LEVELS,
    widths=(
        Width("unet", (".attn2.to_k", ".attn2.to_v"), (768,)),
        Width("text_encoder", ("q_proj", "k_proj", "v_proj", "out_proj", ".fc1"), (768,)),
    ),
    kohya=Naming.DIFFUSERS,
    kernels={**KERNELS, "proj_in": (1, 1), "proj_out": (1, 1)},  # which are linear in later families
    kohya_version="sd_v1",
)
