"""Name the modules of ERNIE-Image as Baidu and diffusers do, both in the same way.

Sources: diffusers' class `ErnieImageTransformer2DModel`; ComfyUI `comfy/ldm/ernie/model.py`.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="ernie_image",
    title="ERNIE-Image",
    blocks=(
        Block(
            "layers.{i}",
            "layers.{i}",
            alike=(
                "adaLN_sa_ln",
                "self_attention.to_q",
                "self_attention.to_k",
                "self_attention.to_v",
                "self_attention.norm_q",
                "self_attention.norm_k",
                "self_attention.to_out.0",
                "adaLN_mlp_ln",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.linear_fc2",
            ),
            counts=(24,),
        ),
    ),
    alike=(
        "x_embedder.proj",
        "text_proj",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "adaLN_modulation.1",
        "final_norm.linear",
        "final_linear",
    ),
    diffusers_class="ErnieImageTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("adaLN_sa_ln",),
    widths=(
        Width(
            "unet",
            (
                ".linear_1",
                ".linear_2",
                ".to_q",
                ".to_k",
                ".to_v",
                ".to_out.0",
                ".gate_proj",
                ".up_proj",
                ".final_linear",
            ),
            (3072,),
        ),
        Width("unet", (".linear_fc2",), (8192,)),
    ),
    kernels={"x_embedder.proj": (1, 1)},
    kohya_network="networks.lora_ernie_image",
)
