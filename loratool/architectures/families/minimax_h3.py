"""Name the modules of MiniMax H3 as MiniMax and diffusers do.

Sources: diffusers `scripts/convert_minimax_h3_to_diffusers.py` and `loaders/single_file_utils.py`, for the order q, k,
v of single files. The maker's shards alternate them by head under the same names, and nothing in a file shows which
order it has.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Rows, Width, swapped

_NAMES: dict[str, Rows] = {
    "attn.qkv_proj": Fused(("attn.to_q", "attn.to_k", "attn.to_v")),
    "attn.out_proj": "attn.to_out.0",
    "mlp.fc1": swapped("ff.net.0.proj"),
    "mlp.fc2": "ff.net.2",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
}
_ALIKE = ("norm1", "norm2")

FAMILY = ModelFamily(
    key="minimax_h3",
    title="MiniMax H3",
    blocks=(
        Block(
            "token_refiner.blocks.{i}",
            "token_refiner.refiner_blocks.{i}",
            _NAMES,
            alike=_ALIKE,
            counts=(2,),
        ),
        Block(
            "blocks.{i}",
            "transformer_blocks.{i}",
            _NAMES,
            alike=(*_ALIKE, "adaln_proj.linear"),
            counts=(50,),
        ),
    ),
    outside={
        "video_patch_proj": "proj_in",
        "audio_patch_proj": "audio_proj_in",
        "condition_proj": "context_embedder",
        "time_embedder.proj_in": "time_embedder.linear_1",
        "time_embedder.proj_out": "time_embedder.linear_2",
        "final_layer.adaln_proj.linear": "norm_out.linear",
        "final_layer.video_out": "proj_out",
        "final_layer.audio_out": "audio_proj_out",
        "final_layer.norm": "norm_out.norm",
    },
    alike=("token_refiner.final_norm",),
    diffusers_class="MiniMaxH3Transformer3DModel",
    components=(Component("unet", "lora_unet_", "diffusion_model.", "transformer."),),
    marks=("adaln_proj.linear",),
    widths=(
        Width("unet", (".context_embedder",), (5120,)),
        Width("unet", (".linear",), (2688,)),
        Width("unet", (".proj_out", ".audio_proj_out", ".to_q", ".to_k", ".to_v", ".proj"), (5376,)),
        Width("unet", (".to_out.0",), (7168,)),
        Width("unet", (".net.2",), (14336,)),
    ),
)
