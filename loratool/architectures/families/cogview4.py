"""Name the modules of CogView 4 as THUDM's SAT and diffusers do.

Source: diffusers `scripts/convert_cogview4_to_diffusers.py`. Not checked: the Megatron checkpoint, which alternates
q, k and v.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Naming, Width, swapped

FAMILY = ModelFamily(
    key="cogview4",
    title="CogView 4",
    blocks=(
        Block(
            "transformer.layers.{i}",
            "transformer_blocks.{i}",
            {
                "attention.query_key_value": Fused(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                "attention.dense": "attn1.to_out.0",
                "mlp.dense_h_to_4h": "ff.net.0.proj",
                "mlp.dense_4h_to_h": "ff.net.2",
            },
            counts=(28,),
        ),
        Block(
            "mixins.adaln.adaln_modules.{i}",
            "transformer_blocks.{i}",
            {"1": "norm1.linear"},
            counts=(28,),
        ),
    ),
    outside={
        "mixins.patch_embed.proj": "patch_embed.proj",
        "mixins.patch_embed.text_proj": "patch_embed.text_proj",
        "time_embed.0": "time_condition_embed.timestep_embedder.linear_1",
        "time_embed.2": "time_condition_embed.timestep_embedder.linear_2",
        "label_emb.0.0": "time_condition_embed.condition_embedder.linear_1",
        "label_emb.0.2": "time_condition_embed.condition_embedder.linear_2",
        "mixins.final_layer.adaln.1": swapped("norm_out.linear"),
        "mixins.final_layer.linear": "proj_out",
    },
    diffusers_class="CogView4Transformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("mixins.adaln.", "patch_embed.text_proj"),
    widths=(
        Width(
            "unet",
            (".timestep_embedder.linear_1", ".proj_out", ".to_q", ".to_k", ".to_v", ".to_out.0", ".0.proj"),
            (4096,),
        ),
        Width("unet", (".linear_2", ".linear"), (512,)),
        Width("unet", (".condition_embedder.linear_1",), (1536,)),
        Width("unet", (".net.2",), (16384,)),
    ),
    kohya=Naming.DIFFUSERS,
)
