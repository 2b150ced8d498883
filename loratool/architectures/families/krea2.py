"""Name the modules of Krea 2 as Krea and diffusers do.

Sources: diffusers `loaders/single_file_utils.py`; ComfyUI `comfy/ldm/krea2/model.py`.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

_NAMES = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
_TENSORS = {
    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
}

FAMILY = ModelFamily(
    key="krea2",
    title="Krea 2",
    blocks=(
        Block(
            "txtfusion.layerwise_blocks.{i}",
            "text_fusion.layerwise_blocks.{i}",
            _NAMES,
            tensors=_TENSORS,
            counts=(2,),
        ),
        Block(
            "txtfusion.refiner_blocks.{i}",
            "text_fusion.refiner_blocks.{i}",
            _NAMES,
            tensors=_TENSORS,
            counts=(2,),
        ),
        Block(
            "blocks.{i}",
            "transformer_blocks.{i}",
            _NAMES,
            tensors={**_TENSORS, "mod.lin": "scale_shift_table"},
            counts=(28,),
        ),
    ),
    outside={
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        "last.linear": "final_layer.linear",
    },
    outside_tensors={
        "txtmlp.0.scale": "txt_in.norm.weight",
        "last.norm.scale": "final_layer.norm.weight",
        "last.modulation.lin": "final_layer.scale_shift_table",
    },
    reshaped={"transformer_blocks.{i}.scale_shift_table": (6, -1)},
    diffusers_class="Krea2Transformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
    ),
    marks=("txtfusion.", "text_fusion."),
    widths=(
        Width("unet", (".linear",), (6144,)),
        Width("unet", (".to_q", ".to_k", ".to_v", ".to_out.0", ".to_gate", ".gate", ".up"), (2560, 6144)),
        Width("unet", (".down",), (6912, 16384)),
    ),
)
