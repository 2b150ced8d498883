"""Name the modules of LongCat-Image as ComfyUI (with Flux's names), Meituan and diffusers do.

Sources: diffusers' class `LongCatImageTransformer2DModel`; ComfyUI `comfy/model_base.py` (read, not run), where it is a
Flux without vector and guidance.
"""

from __future__ import annotations

from . import flux
from .table import JOINT_ATTENTION, Component, ModelFamily, Width, swapped

FAMILY = ModelFamily(
    key="longcat_image",
    title="LongCat-Image",
    blocks=flux.FAMILY.blocks,
    outside={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_embed.timestep_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    },
    diffusers_class="LongCatImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=flux.FAMILY.marks,
    widths=(
        Width("unet", (".linear_2", ".linear", *JOINT_ATTENTION, ".proj", ".proj_mlp"), (3072,)),
        Width("unet", (".context_embedder",), (3584,)),
        Width("unet", (".net.2",), (12288,)),
        Width("unet", (".proj_out",), (3072, 15360)),
    ),
    ratios=flux.FAMILY.ratios,
)
