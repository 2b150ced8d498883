"""Name the modules of Flux as Black Forest Labs and diffusers do.

Sources: black-forest-labs/flux `src/flux/model.py`; diffusers `scripts/convert_flux_to_diffusers.py`.
"""

from __future__ import annotations

from .table import JOINT_ATTENTION, Block, Component, Fused, ModelFamily, Rows, Width, swapped

# The modules of a double block; later models derived from Flux have some of them
ATTENTION: dict[str, Rows] = {
    "img_attn.qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v")),
    "txt_attn.qkv": Fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}

MLPS: dict[str, Rows] = {
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}

MODULATION: dict[str, Rows] = {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}

# Its norms, whose weights end in `.scale`
NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SCALES = {f"{norm}.scale": f"{theirs}.weight" for norm, theirs in NORMS.items()}

FAMILY = ModelFamily(
    key="flux",
    title="Flux",
    blocks=(
        Block(
            "double_blocks.{i}",
            "transformer_blocks.{i}",
            {**ATTENTION, **MLPS, **MODULATION},
            tensors=SCALES,
            counts=(19,),
        ),
        Block(
            "single_blocks.{i}",
            "single_transformer_blocks.{i}",
            {
                "linear1": Fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, None)),
                "linear2": "proj_out",
                "modulation.lin": "norm.linear",
            },
            # XLabs' and ComfyUI's name of the first rows of linear1
            aliases={"linear1_qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v"), (1, 1, 1))},
            tensors={"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"},
            counts=(38,),
        ),
    ),
    outside={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    },
    diffusers_class="FluxTransformer2DModel",
    control_input="x_embedder",
    control_columns=64,
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te1_", "text_encoders.clip_l.transformer.", "text_encoder.", "clip"),
        Component("text_encoder_3", "lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_2.", "t5"),
    ),
    marks=("double_blocks.", "single_transformer_blocks."),
    widths=(
        Width("unet", (".context_embedder",), (4096,)),
        Width(
            "unet",
            (
                ".timestep_embedder.linear_2",
                ".text_embedder.linear_2",
                ".linear",
                *JOINT_ATTENTION,
                ".proj",
                ".proj_mlp",
            ),
            (3072,),
        ),
        Width("unet", (".text_embedder.linear_1",), (768,)),
        Width("unet", (".proj_out",), (3072, 15360)),
        Width("unet", (".net.2",), (12288,)),
    ),
    # Flux 2 and Ovis have names of Flux, with other ratios.
    ratios={".linear1": 7, "_mlp.0": 4, ".ff.net.0.proj": 4, ".ff_context.net.0.proj": 4, ".proj_mlp": 4},
    kohya_version="flux1",
    kohya_network="networks.lora_flux",
)
