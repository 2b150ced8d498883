"""Name the modules of LongCat-Image as Meituan and diffusers do, which is the same.

Source: diffusers' class `LongCatImageTransformer2DModel`, alone: no other naming was seen. ComfyUI gives it Flux's
names: such a file is read by the table of Flux.
"""

from __future__ import annotations

from . import bria
from .table import Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="longcat_image",
    title="LongCat-Image",
    blocks=bria.FAMILY.blocks,
    alike=bria.FAMILY.alike,
    diffusers_class="LongCatImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("single_transformer_blocks.",),
    # Bria has the same names.
    widths=(Width("unet", ("context_embedder",), (3584,)),),
    ratios={".proj_mlp": 4},
)
