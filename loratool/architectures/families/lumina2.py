"""Name the modules of Lumina-Image 2.0 as Alpha-VLLM and diffusers do.

Sources: diffusers `loaders/single_file_utils.py`; ComfyUI `comfy/ldm/lumina/model.py`. Not checked: NewBie's modules.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Rows, Width

_NAMES: dict[str, Rows] = {
    "attention.qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v"), (1, None, None)),
    "attention.out": "attn.to_out.0",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention_norm2": "norm2",
}
_ALIKE = ("ffn_norm1", "ffn_norm2")

FAMILY = ModelFamily(
    key="lumina2",
    title="Lumina 2",
    blocks=(
        Block(
            "noise_refiner.{i}",
            "noise_refiner.{i}",
            {**_NAMES, "adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"},
            alike=_ALIKE,
            counts=(2,),
        ),
        Block(
            "context_refiner.{i}",
            "context_refiner.{i}",
            {**_NAMES, "attention_norm1": "norm1"},
            alike=_ALIKE,
            counts=(2,),
        ),
        Block(
            "layers.{i}",
            "layers.{i}",
            {**_NAMES, "adaLN_modulation.1": "norm1.linear", "attention_norm1": "norm1.norm"},
            alike=_ALIKE,
            counts=(26,),
        ),
    ),
    outside={
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    },
    alike=("x_embedder",),
    unused=("norm_final.weight",),
    diffusers_class="Lumina2Transformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te_", "text_encoders.gemma2_2b.transformer.", "text_encoder."),
    ),
    marks=("noise_refiner.",),
    widths=(
        Width("unet", (".timestep_embedder.linear_2", ".norm_out.linear_1", ".linear"), (1024,)),
        Width(
            "unet",
            (
                ".caption_embedder.1",
                ".norm_out.linear_2",
                ".to_q",
                ".to_k",
                ".to_v",
                ".to_out.0",
                ".feed_forward.linear_1",
                ".linear_3",
            ),
            (2304,),
        ),
        Width("unet", (".feed_forward.linear_2",), (9216,)),
    ),
    kohya_network="networks.lora_lumina",
)
