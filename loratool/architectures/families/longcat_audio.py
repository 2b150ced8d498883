"""Name the modules of LongCat Audio as diffusers does.

Source: diffusers' class `LongCatAudioDiTTransformer`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="longcat_audio",
    title="LongCat Audio",
    blocks=(
        Block(
            "blocks.{i}",
            "blocks.{i}",
            alike=(
                "self_attn.to_q",
                "self_attn.to_k",
                "self_attn.to_v",
                "self_attn.q_norm",
                "self_attn.k_norm",
                "self_attn.to_out.0",
                "cross_attn.to_q",
                "cross_attn.to_k",
                "cross_attn.to_v",
                "cross_attn.q_norm",
                "cross_attn.k_norm",
                "cross_attn.to_out.0",
                "ffn.ff.0",
                "ffn.ff.3",
            ),
            tensors={"adaln_scale_shift": "adaln_scale_shift"},
            counts=(24,),
        ),
        Block(
            "text_conv_layer.{i}",
            "text_conv_layer.{i}",
            alike=("dwconv", "norm", "pwconv1", "pwconv2"),
            tensors={"grn.gamma": "grn.gamma", "grn.beta": "grn.beta"},
            counts=(4,),
        ),
    ),
    alike=(
        "time_embed.time_mlp.0",
        "time_embed.time_mlp.2",
        "input_embed.proj.0",
        "input_embed.proj.2",
        "text_embed.proj.0",
        "text_embed.proj.2",
        "norm_out.linear",
        "proj_out",
        "adaln_global_mlp.mlp.1",
        "latent_embed.proj.0",
        "latent_embed.proj.2",
        "latent_cond_embedder.proj.0",
        "latent_cond_embedder.proj.2",
    ),
    diffusers_class="LongCatAudioDiTTransformer",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=("adaln_global_mlp.", "latent_cond_embedder."),
    widths=(
        Width("unet", (".time_mlp.0",), (256,)),
        Width(
            "unet",
            (
                ".ff.0",
                ".linear",
                ".mlp.1",
                ".proj.2",
                ".proj_out",
                ".pwconv1",
                ".time_mlp.2",
                ".to_k",
                ".to_out.0",
                ".to_q",
                ".to_v",
            ),
            (1536,),
        ),
        Width("unet", (".input_embed.proj.0", ".latent_embed.proj.0"), (64,)),
        Width("unet", (".text_embed.proj.0",), (768,)),
        Width("unet", (".ff.3",), (6144,)),
        Width("unet", (".latent_cond_embedder.proj.0", ".pwconv2"), (3072,)),
    ),
    kernels={"dwconv": (7,)},
)
