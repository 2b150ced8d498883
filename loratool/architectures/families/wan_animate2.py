"""Name the modules of Wan-Animate 2 as Wan-AI and diffusers do.

Sources: diffusers `loaders/single_file_utils.py` and its class, whose defaults are the sizes.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="wan_animate2",
    title="Wan-Animate 2",
    blocks=(
        Block(
            "blocks.{i}.block",
            "blocks.{i}",
            {
                "self_attn.q": "self_attn.to_q",
                "self_attn.k": "self_attn.to_k",
                "self_attn.v": "self_attn.to_v",
                "self_attn.o": "self_attn.to_out.0",
                "cross_attn.q": "cross_attn.to_q",
                "cross_attn.k": "cross_attn.to_k",
                "cross_attn.v": "cross_attn.to_v",
                "cross_attn.o": "cross_attn.to_out.0",
                "cross_attn.k_img": "cross_attn.add_k_proj",
                "cross_attn.v_img": "cross_attn.add_v_proj",
                "cross_attn.norm_k_img": "cross_attn.norm_added_k",
            },
            alike=(
                "self_attn.norm_q",
                "self_attn.norm_k",
                "norm3",
                "cross_attn.norm_q",
                "cross_attn.norm_k",
                "ffn.0",
                "ffn.2",
            ),
            tensors={"modulation": "modulation"},
            counts=(40,),
        ),
    ),
    alike=(
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
        "img_emb.proj.0",
        "img_emb.proj.1",
        "img_emb.proj.3",
        "img_emb.proj.4",
    ),
    outside_tensors={"head.modulation": "head.modulation"},
    diffusers_class="WanAnimate2Transformer3DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.", "t5")),
    marks=("block.self_attn.", "cross_attn.add_k_proj"),
    widths=(
        Width("unet", (".text_embedding.0",), (4096,)),
        Width(
            "unet",
            (
                ".add_k_proj",
                ".add_v_proj",
                ".ffn.0",
                ".head",
                ".text_embedding.2",
                ".time_embedding.2",
                ".time_projection.1",
                ".to_k",
                ".to_out.0",
                ".to_q",
                ".to_v",
            ),
            (5120,),
        ),
        Width("unet", (".time_embedding.0",), (256,)),
        Width("unet", (".ffn.2",), (13824,)),
        Width("unet", (".proj.1", ".proj.3"), (1280,)),
    ),
    kernels={"patch_embedding": (1, 2, 2)},
)
