"""Name the modules of Bria FIBO 2 as diffusers does.

Source: diffusers' class `BriaFibo2Transformer2DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
_LAYER = (
    *(f"attention.{name}" for name in _ATTENTION),
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
    "attention_norm1",
    "ffn_norm1",
    "attention_norm2",
    "ffn_norm2",
    "adaLN_modulation.0",
)

FAMILY = ModelFamily(
    key="bria_fibo2",
    title="Bria FIBO 2",
    blocks=(
        Block(
            "noise_refiner.{i}",
            "noise_refiner.{i}",
            alike=_LAYER,
            counts=(2,),
        ),
        Block(
            "perceiver.layers.{i}",
            "perceiver.layers.{i}",
            alike=(
                "cross_attn_norm",
                *(f"cross_attention.{name}" for name in _ATTENTION),
                "self_attn_norm",
                *(f"self_attention.{name}" for name in _ATTENTION),
                "ffn_norm",
                "ffn.w1",
                "ffn.w2",
                "ffn.w3",
            ),
            counts=(2,),
        ),
        Block(
            "layers.{i}",
            "layers.{i}",
            alike=(
                *_LAYER,
                "cross_attn_norm1",
                *(f"cross_attention.{name}" for name in _ATTENTION),
                "cross_attn_norm2",
            ),
            tensors={"cross_attn_gate": "cross_attn_gate"},
            counts=(44,),
        ),
    ),
    alike=(
        "x_embedder",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "perceiver.norm_out",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
    outside_tensors={"perceiver.latent_queries": "perceiver.latent_queries"},
    diffusers_class="BriaFibo2Transformer2DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=("perceiver.layers.", "cross_attn_gate"),
    widths=(
        Width("unet", (".x_embedder",), (128,)),
        Width("unet", (".adaLN_modulation.0", ".adaLN_modulation.1", ".mlp.0"), (256,)),
        Width("unet", (".mlp.2",), (1024,)),
        Width(
            "unet",
            (
                ".attention.to_k",
                ".attention.to_v",
                ".linear",
                ".self_attention.to_k",
                ".self_attention.to_v",
                ".to_out.0",
                ".to_q",
                ".w1",
                ".w3",
            ),
            (3584,),
        ),
        Width("unet", (".w2",), (9536,)),
        Width("unet", (".cross_attention.to_k", ".cross_attention.to_v"), (7680,)),
    ),
)
