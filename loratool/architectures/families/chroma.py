"""Name the modules of Chroma, a Flux without modulation, as its maker and diffusers do.

Sources: lodestone-rock/flow `src/models/chroma/model.py`; diffusers `loaders/single_file_utils.py`; ComfyUI
`comfy/ldm/chroma/model.py`. Not checked: Chroma Radiance, which has other modules outside of the blocks.
"""

from __future__ import annotations

from . import flux
from .table import JOINT_ATTENTION, Block, Component, Fused, ModelFamily, Width

FAMILY = ModelFamily(
    key="chroma",
    title="Chroma",
    blocks=(
        Block(
            "distilled_guidance_layer.layers.{i}",
            "distilled_guidance_layer.layers.{i}",
            {"in_layer": "linear_1", "out_layer": "linear_2"},
            counts=(5,),
        ),
        Block(
            "double_blocks.{i}",
            "transformer_blocks.{i}",
            {**flux.ATTENTION, **flux.MLPS, **flux.NORMS},
            tensors=flux.SCALES,
            counts=(19,),
        ),
        Block(
            "single_blocks.{i}",
            "single_transformer_blocks.{i}",
            {
                "linear1": Fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, None)),
                "linear2": "proj_out",
                "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            },
            tensors={"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"},
            counts=(38,),
        ),
        Block(
            "distilled_guidance_layer.norms.{i}",
            "distilled_guidance_layer.norms.{i}",
            tensors={"scale": "weight"},
            counts=(5,),
        ),
    ),
    outside={"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"},
    alike=("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"),
    diffusers_class="ChromaTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder.", "t5"),
    ),
    marks=("distilled_guidance_layer.",),
    telling=r"^distilled_guidance_layer\.",
    widths=(
        Width("unet", (".context_embedder",), (4096,)),
        Width("unet", (".proj_out",), (3072, 15360)),
        Width("unet", (".linear_1", ".linear_2"), (5120,)),
        Width("unet", (*JOINT_ATTENTION, ".proj", ".proj_mlp"), (3072,)),
        Width("unet", (".net.2",), (12288,)),
    ),
    ratios=flux.FAMILY.ratios,
    kohya_network="networks.lora_flux",
)
