"""Name the modules of Kandinsky 6 as diffusers does.

Source: diffusers' class `Kandinsky6Transformer3DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

_ATTENTION = ("to_query", "to_key", "to_value", "query_norm", "key_norm", "out_layer")
_FEED_FORWARD = ("feed_forward.net.0.proj", "feed_forward.net.2")
_TEXT = ("text_modulation.out_layer", *(f"attn.{name}" for name in _ATTENTION), *_FEED_FORWARD)
_DECODER = (
    "visual_modulation.out_layer",
    *(f"self_attention.{name}" for name in _ATTENTION),
    *(f"cross_attention.{name}" for name in _ATTENTION),
    *_FEED_FORWARD,
)

FAMILY = ModelFamily(
    key="kandinsky6",
    title="Kandinsky 6",
    blocks=(
        Block(
            "video_text_transformer_blocks.{i}",
            "video_text_transformer_blocks.{i}",
            alike=_TEXT,
            counts=(4,),
        ),
        Block(
            "audio_text_transformer_blocks.{i}",
            "audio_text_transformer_blocks.{i}",
            alike=_TEXT,
            counts=(4,),
        ),
        Block(
            "visual_transformer_blocks.{i}",
            "visual_transformer_blocks.{i}",
            alike=(
                *(f"{kind}_dec_block.{name}" for kind in ("video", "audio") for name in _DECODER),
                *(f"{kind}_cross_attention.{name}" for kind in ("va", "av") for name in _ATTENTION),
                "va_modulation.out_layer",
                "av_modulation.out_layer",
            ),
            counts=(60,),
        ),
    ),
    alike=(
        "visual_embeddings.in_layer",
        "out_layer.modulation.out_layer",
        "out_layer.out_layer",
        "audio_embeddings.in_layer",
        "audio_embeddings.norm",
        "audio_out_layer.modulation.out_layer",
        "audio_out_layer.out_layer",
        "video_time_embeddings.timestep_embedder.linear_1",
        "video_time_embeddings.timestep_embedder.linear_2",
        "video_text_embeddings.in_layer",
        "video_text_embeddings.norm",
        "video_pooled_text_embeddings.in_layer",
        "video_pooled_text_embeddings.norm",
        "audio_time_embeddings.timestep_embedder.linear_1",
        "audio_time_embeddings.timestep_embedder.linear_2",
        "audio_text_embeddings.in_layer",
        "audio_text_embeddings.norm",
        "audio_pooled_text_embeddings.in_layer",
        "audio_pooled_text_embeddings.norm",
    ),
    diffusers_class="Kandinsky6Transformer3DModel",
    components=(
        Component("unet", "", "", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
        Component("text_encoder_2", "", "", "text_encoder_2.", "clip"),
    ),
    marks=("audio_transformer_blocks.", "av_cross_attention."),
    widths=(
        Width("unet", (".visual_embeddings.in_layer",), (132,)),
        Width(
            "unet",
            (
                ".av_modulation.out_layer",
                ".linear_2",
                ".modulation.out_layer",
                ".text_modulation.out_layer",
                ".va_modulation.out_layer",
                ".visual_modulation.out_layer",
            ),
            (1024,),
        ),
        Width(
            "unet",
            (
                ".attn.out_layer",
                ".audio_out_layer.out_layer",
                ".av_cross_attention.out_layer",
                ".cross_attention.out_layer",
                ".linear_1",
                ".out_layer.out_layer",
                ".proj",
                ".self_attention.out_layer",
                ".to_key",
                ".to_query",
                ".to_value",
                ".va_cross_attention.out_layer",
            ),
            (4096,),
        ),
        Width("unet", (".audio_embeddings.in_layer",), (20,)),
        Width("unet", (".audio_text_embeddings.in_layer", ".video_text_embeddings.in_layer"), (3584,)),
        Width("unet", (".audio_pooled_text_embeddings.in_layer", ".video_pooled_text_embeddings.in_layer"), (768,)),
        Width("unet", (".net.2",), (16384,)),
    ),
)
