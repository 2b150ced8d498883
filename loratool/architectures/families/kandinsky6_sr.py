"""Name the modules of Kandinsky 6 SR as diffusers does.

Source: diffusers' class `Kandinsky6SRTransformer3DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="kandinsky6_sr",
    title="Kandinsky 6 SR",
    blocks=(
        Block(
            "visual_transformer_blocks.{i}",
            "visual_transformer_blocks.{i}",
            alike=(
                "visual_modulation.out_layer",
                "self_attention.to_query",
                "self_attention.to_key",
                "self_attention.to_value",
                "self_attention.query_norm",
                "self_attention.key_norm",
                "self_attention.out_layer",
                "feed_forward.net.0.proj",
                "feed_forward.net.2",
            ),
            counts=(32,),
        ),
    ),
    alike=(
        "time_embeddings.timestep_embedder.linear_1",
        "time_embeddings.timestep_embedder.linear_2",
        "visual_embeddings.in_layer",
        "out_layer.modulation.out_layer",
        "out_layer.out_layer",
    ),
    outside_tensors={"pooled_bias": "pooled_bias"},
    diffusers_class="Kandinsky6SRTransformer3DModel",
    components=(Component("unet", "", "", "transformer."),),
    marks=("time_embeddings.timestep_embedder.",),
    widths=(
        Width(
            "unet",
            (
                ".linear_1",
                ".out_layer.out_layer",
                ".proj",
                ".self_attention.out_layer",
                ".to_key",
                ".to_query",
                ".to_value",
            ),
            (1792,),
        ),
        Width("unet", (".linear_2", ".modulation.out_layer", ".visual_modulation.out_layer"), (512,)),
        Width("unet", (".in_layer",), (129,)),
        Width("unet", (".net.2",), (7168,)),
    ),
)
