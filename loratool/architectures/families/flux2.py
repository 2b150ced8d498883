"""Name the modules of Flux 2 (dev, klein) as Black Forest Labs and diffusers do.

Sources: black-forest-labs/flux2 `src/flux2/model.py`; diffusers `scripts/convert_flux2_to_diffusers.py` and
`loaders/single_file_utils.py`. ComfyUI's class was not run.
"""

from __future__ import annotations

from . import flux
from .table import JOINT_ATTENTION, Block, Component, ModelFamily, Width, swapped

FAMILY = ModelFamily(
    key="flux2",
    title="Flux 2",
    blocks=(
        Block(
            "double_blocks.{i}",
            "transformer_blocks.{i}",
            {
                **flux.ATTENTION,
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
                **flux.NORMS,
            },
            tensors=flux.SCALES,
            counts=(5, 8),
        ),
        Block(
            "single_blocks.{i}",
            "single_transformer_blocks.{i}",
            {
                "linear1": "attn.to_qkv_mlp_proj",
                "linear2": "attn.to_out",
                "norm.query_norm": "attn.norm_q",
                "norm.key_norm": "attn.norm_k",
            },
            tensors={"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"},
            counts=(20, 24, 48),
        ),
    ),
    outside={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    },
    diffusers_class="Flux2Transformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("double_stream_modulation_img.",),
    widths=(
        Width("unet", (".context_embedder",), (7680, 12288, 15360)),
        Width(
            "unet",
            (".timestep_embedder.linear_2", ".proj_out", ".linear", *JOINT_ATTENTION, ".linear_in", ".to_qkv_mlp_proj"),
            (3072, 4096, 6144),
        ),
        Width("unet", (".linear_out",), (9216, 12288, 18432)),
        Width("unet", (".to_out",), (12288, 16384, 24576)),
    ),
    ratios={".linear1": 9, "_mlp.0": 6},
    kohya_network="networks.lora_flux_2",
)
