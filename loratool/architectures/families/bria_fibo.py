"""Name the modules of Bria FIBO as Bria and diffusers do, both in the same way.

Source: only diffusers' class `BriaFiboTransformer2DModel`; no other naming is known.
"""

from __future__ import annotations

from . import bria
from .table import JOINT_ATTENTION, Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="bria_fibo",
    title="Bria FIBO",
    blocks=(
        *bria.FAMILY.blocks,
        Block(
            "caption_projection.{i}",
            "caption_projection.{i}",
            alike=("linear",),
        ),
    ),
    alike=bria.FAMILY.alike,
    diffusers_class="BriaFiboTransformer2DModel",
    repeats="flux",
    components=(
        Component("unet", "", "", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("caption_projection.0.linear",),
    telling=r"^caption_projection\.\d+\.linear",
    widths=(
        Width(
            "unet",
            (
                ".linear_2",
                ".norm1.linear",
                ".norm1_context.linear",
                *JOINT_ATTENTION,
                ".proj",
                ".norm.linear",
                ".proj_mlp",
                ".norm_out.linear",
            ),
            (3072,),
        ),
        Width("unet", (".context_embedder",), (4096,)),
        Width("unet", (".net.2",), (12288,)),
        Width("unet", (".proj_out",), (3072, 15360)),
    ),
    # Ovis has these names with other ratios.
    ratios={".proj_mlp": 4},
)
