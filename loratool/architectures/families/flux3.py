"""Name the modules of Flux 3 as Black Forest Labs and diffusers do.

Source: diffusers `loaders/single_file_utils.py`. Not checked: `ref_time_in` of the distilled model;
`repa_projectors`, heads used only in training.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width, swapped

_NAMES = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_TENSORS = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}

FAMILY = ModelFamily(
    key="flux3",
    title="Flux 3",
    blocks=(
        Block(
            "content_mode_blocks.image.{i}",
            "mode_blocks.image.{i}",
            _NAMES,
            tensors=_TENSORS,
            counts=(5,),
        ),
        Block(
            "content_mode_blocks.image_cond.{i}",
            "mode_blocks.image_cond.{i}",
            _NAMES,
            tensors=_TENSORS,
            counts=(5,),
        ),
        Block(
            "txt_mode_blocks.{i}",
            "txt_mode_blocks.{i}",
            _NAMES,
            tensors=_TENSORS,
            counts=(5,),
        ),
        Block(
            "single_blocks.{i}",
            "single_transformer_blocks.{i}",
            _NAMES,
            tensors=_TENSORS,
            counts=(28,),
        ),
    ),
    outside={
        "time_in.in_layer": "timestep_embedder.linear_1",
        "time_in.out_layer": "timestep_embedder.linear_2",
        "emb_in.image": "x_embedders.image",
        "emb_in.image_cond": "x_embedders.image_cond",
        "txt_in": "context_embedder",
        "early_stream_modulations.image.lin": "early_stream_modulations.image.linear",
        "early_stream_modulations.image_cond.lin": "early_stream_modulations.image_cond.linear",
        "early_stream_modulations.txt.lin": "early_stream_modulations.txt.linear",
        "single_stream_modulations.image.lin": "single_stream_modulations.image.linear",
        "single_stream_modulations.image_cond.lin": "single_stream_modulations.image_cond.linear",
        "single_stream_modulations.txt.lin": "single_stream_modulations.txt.linear",
        "final_layer.image.linear": "proj_out",
        "final_layer.image.adaLN_modulation.1": swapped("norm_out.linear"),
    },
    diffusers_class="Flux3Transformer2DModel",
    components=(Component("unet", "lora_unet_", "diffusion_model.", "transformer."),),
    marks=("early_stream_modulations.",),
    widths=(
        Width(
            "unet", (".linear_2", ".proj_out", ".linear", ".to_q", ".to_k", ".to_v", ".to_out.0", ".linear_in"), (3072,)
        ),
        Width("unet", (".context_embedder",), (20480,)),
        Width("unet", (".linear_out",), (9216,)),
    ),
)
