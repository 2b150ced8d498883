"""Name the modules of OmniGen 2 as its makers do; diffusers does not have this model.

Source: ComfyUI `comfy/ldm/omnigen/omnigen2.py`.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

_ALIKE = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "feed_forward.linear_1",
    "feed_forward.linear_2",
    "feed_forward.linear_3",
    "attn.norm_q",
    "attn.norm_k",
    "ffn_norm1",
    "norm2",
    "ffn_norm2",
)

FAMILY = ModelFamily(
    key="omnigen2",
    title="OmniGen 2",
    blocks=(
        Block(
            "noise_refiner.{i}",
            "noise_refiner.{i}",
            alike=(*_ALIKE, "norm1.linear", "norm1.norm"),
            counts=(2,),
        ),
        Block(
            "ref_image_refiner.{i}",
            "ref_image_refiner.{i}",
            alike=(*_ALIKE, "norm1.linear", "norm1.norm"),
            counts=(2,),
        ),
        Block(
            "context_refiner.{i}",
            "context_refiner.{i}",
            alike=(*_ALIKE, "norm1"),
            counts=(2,),
        ),
        Block(
            "layers.{i}",
            "layers.{i}",
            alike=(*_ALIKE, "norm1.linear", "norm1.norm"),
            counts=(32,),
        ),
    ),
    alike=(
        "x_embedder",
        "ref_image_patch_embedder",
        "time_caption_embed.timestep_embedder.linear_1",
        "time_caption_embed.timestep_embedder.linear_2",
        "time_caption_embed.caption_embedder.1",
        "norm_out.linear_1",
        "norm_out.linear_2",
        "time_caption_embed.caption_embedder.0",
    ),
    outside_tensors={"image_index_embedding": "image_index_embedding"},
    other_classes=("OmniGen2Transformer2DModel",),  # in its makers' code
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "text_encoders.qwen25_3b.transformer.", "mllm."),
    ),
    marks=("ref_image_refiner.",),
    widths=(
        Width("unet", (".timestep_embedder.linear_2", ".linear", ".norm_out.linear_1"), (1024,)),
        Width("unet", (".caption_embedder.1",), (2048,)),
        Width(
            "unet",
            (".to_q", ".to_k", ".to_v", ".to_out.0", ".feed_forward.linear_1", ".linear_3", ".norm_out.linear_2"),
            (2520,),
        ),
        Width("unet", (".feed_forward.linear_2",), (10240,)),
    ),
)
