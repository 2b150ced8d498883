"""Name the modules of a CLIP text encoder as OpenCLIP and transformers do."""

from __future__ import annotations

from .table import Block, Fused, ModelFamily

FAMILY = ModelFamily(
    key="clip",
    title="CLIP",
    blocks=(
        Block(
            "transformer.resblocks.{i}",
            "text_model.encoder.layers.{i}",
            {
                "attn.in_proj": Fused(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
            },
            stems=("encoder.layers.{i}",),  # transformers 5 has no `text_model`
        ),
    ),
    outside={"ln_final": "text_model.final_layer_norm"},
    outside_aliases={"final_layer_norm": "text_model.final_layer_norm"},  # as the stem is
    alike=("text_projection",),
    marks=("text_model.encoder.layers.", "embeddings.token_embedding."),
)
