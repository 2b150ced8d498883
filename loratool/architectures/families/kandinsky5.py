"""Name the modules of Kandinsky 5 as its makers and diffusers do, both in the same way.

Sources: kandinskylab/kandinsky-5 `kandinsky/models/dit.py`; diffusers' class `Kandinsky5Transformer3DModel`; ComfyUI
`comfy/ldm/kandinsky5/model.py`.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

_ATTENTION = ("to_query", "to_key", "to_value", "query_norm", "key_norm", "out_layer")

FAMILY = ModelFamily(
    key="kandinsky5",
    title="Kandinsky 5",
    blocks=(
        Block(
            "text_transformer_blocks.{i}",
            "text_transformer_blocks.{i}",
            alike=(
                "text_modulation.out_layer",
                *(f"self_attention.{end}" for end in _ATTENTION),
                "feed_forward.in_layer",
                "feed_forward.out_layer",
            ),
            counts=(2,),
        ),
        Block(
            "visual_transformer_blocks.{i}",
            "visual_transformer_blocks.{i}",
            alike=(
                "visual_modulation.out_layer",
                *(f"self_attention.{end}" for end in _ATTENTION),
                *(f"cross_attention.{end}" for end in _ATTENTION),
                "feed_forward.in_layer",
                "feed_forward.out_layer",
            ),
            counts=(32, 50, 60),
        ),
    ),
    alike=(
        "time_embeddings.in_layer",
        "time_embeddings.out_layer",
        "text_embeddings.in_layer",
        "text_embeddings.norm",
        "pooled_text_embeddings.in_layer",
        "pooled_text_embeddings.norm",
        "visual_embeddings.in_layer",
        "out_layer.modulation.out_layer",
        "out_layer.out_layer",
    ),
    diffusers_class="Kandinsky5Transformer3DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
        Component("text_encoder_2", "", "", "text_encoder_2.", "clip"),
    ),
    marks=("visual_transformer_blocks.",),
    widths=(
        Width("unet", (".to_query", ".to_key", ".to_value", ".feed_forward.in_layer"), (1792, 2560, 4096)),
        Width("unet", (".self_attention.out_layer", ".cross_attention.out_layer"), (1792, 2560, 4096)),
        Width("unet", (".feed_forward.out_layer",), (7168, 10240, 16384)),
    ),
    kohya_network="networks.lora_kandinsky",
)
