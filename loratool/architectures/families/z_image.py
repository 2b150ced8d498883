"""Name the modules of Z-Image as ComfyUI does and as Tongyi and diffusers do.

Sources: diffusers `loaders/single_file_utils.py`; ComfyUI `comfy/ldm/lumina/model.py`. Not checked: the Omni variant.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Naming, Rows, Width

_NAMES: dict[str, Rows] = {
    "attention.qkv": Fused(("attention.to_q", "attention.to_k", "attention.to_v")),
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}
_ALIKE = (
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
    "attention_norm1",
    "attention_norm2",
    "ffn_norm1",
    "ffn_norm2",
)

FAMILY = ModelFamily(
    key="z_image",
    title="Z-Image",
    blocks=(
        Block(
            "noise_refiner.{i}",
            "noise_refiner.{i}",
            _NAMES,
            alike=(*_ALIKE, "adaLN_modulation.0"),
            counts=(2,),
        ),
        Block(
            "context_refiner.{i}",
            "context_refiner.{i}",
            _NAMES,
            alike=_ALIKE,
            counts=(2,),
        ),
        Block(
            "layers.{i}",
            "layers.{i}",
            _NAMES,
            alike=(*_ALIKE, "adaLN_modulation.0"),
            counts=(30,),
        ),
    ),
    outside={
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
    alike=("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1", "cap_embedder.0"),
    outside_tensors={"x_pad_token": "x_pad_token", "cap_pad_token": "cap_pad_token"},
    unused=("norm_final.weight",),
    diffusers_class="ZImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("noise_refiner.",),
    widths=(
        Width("unet", (".linear", ".to_q", ".to_k", ".to_v", ".to_out.0", ".w1", ".w3"), (3840,)),
        Width("unet", (".mlp.2",), (1024,)),
        Width("unet", (".cap_embedder.1",), (2560,)),
        Width("unet", (".w2",), (10240,)),
    ),
    kohya=Naming.DIFFUSERS,  # as musubi-tuner writes them
    kohya_network="networks.lora_zimage",
)
