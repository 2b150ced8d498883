"""Name the modules of Ovis-Image as AIDC and diffusers do.

Its blocks are Flux's, with gated MLPs.

Sources: diffusers `scripts/convert_ovis_image_to_diffusers.py`; ComfyUI `comfy/model_detection.py` (read, not
run).
"""

from __future__ import annotations

from . import flux
from .table import JOINT_ATTENTION, Block, Component, Fused, ModelFamily, Run, Width, swapped

FAMILY = ModelFamily(
    key="ovis_image",
    title="Ovis-Image",
    blocks=(
        Block(
            "double_blocks.{i}",
            "transformer_blocks.{i}",
            {
                **flux.MODULATION,
                **flux.ATTENTION,
                "img_mlp.up_proj": Fused((Run("ff.net.0.proj", 0, 2),)),
                "img_mlp.gate_proj": Fused((Run("ff.net.0.proj", 1, 2),)),
                "img_mlp.down_proj": "ff.net.2",
                "txt_mlp.up_proj": Fused((Run("ff_context.net.0.proj", 0, 2),)),
                "txt_mlp.gate_proj": Fused((Run("ff_context.net.0.proj", 1, 2),)),
                "txt_mlp.down_proj": "ff_context.net.2",
                **flux.NORMS,
            },
            counts=(6,),
        ),
        Block(
            "single_blocks.{i}",
            "single_transformer_blocks.{i}",
            {
                "modulation.lin": "norm.linear",
                "linear1": Fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, None)),
                "linear2": "proj_out",
                "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            },
            counts=(27,),
        ),
    ),
    outside={
        "time_in.in_layer": "timestep_embedder.linear_1",
        "time_in.out_layer": "timestep_embedder.linear_2",
        "semantic_txt_in": "context_embedder",
        "img_in": "x_embedder",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
        "semantic_txt_norm": "context_embedder_norm",
    },
    outside_comfy={"txt_in": "context_embedder", "txt_norm": "context_embedder_norm"},
    diffusers_class="OvisImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("img_mlp.gate_proj", "context_embedder_norm"),
    widths=(
        Width("unet", (".linear_2", ".linear", *JOINT_ATTENTION, ".proj", ".proj_mlp"), (3072,)),
        Width("unet", (".context_embedder",), (2048,)),
        Width("unet", (".proj_out",), (3072, 15360)),
        Width("unet", (".net.2",), (12288,)),
    ),
    # Flux has these names with other ratios.
    ratios={".linear1": 11, ".proj_mlp": 8},
)
