"""Name the modules of JoyImage Edit as diffusers does.

Source: diffusers' class `JoyImageEditTransformer3DModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="joyimage",
    title="JoyImage Edit",
    blocks=(
        Block(
            "double_blocks.{i}",
            "double_blocks.{i}",
            alike=(
                "img_mlp.net.0.proj",
                "img_mlp.net.2",
                "txt_mlp.net.0.proj",
                "txt_mlp.net.2",
                "attn.img_attn_qkv",
                "attn.img_attn_q_norm",
                "attn.img_attn_k_norm",
                "attn.img_attn_proj",
                "attn.txt_attn_qkv",
                "attn.txt_attn_q_norm",
                "attn.txt_attn_k_norm",
                "attn.txt_attn_proj",
            ),
            tensors={
                "img_mod.modulate_table": "img_mod.modulate_table",
                "txt_mod.modulate_table": "txt_mod.modulate_table",
            },
            counts=(20,),
        ),
    ),
    alike=(
        "img_in",
        "condition_embedder.time_embedder.linear_1",
        "condition_embedder.time_embedder.linear_2",
        "condition_embedder.time_proj",
        "condition_embedder.text_embedder.linear_1",
        "condition_embedder.text_embedder.linear_2",
        "proj_out",
    ),
    diffusers_class="JoyImageEditTransformer3DModel",
    other_classes=("JoyImageEditPlusTransformer3DModel",),
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=("attn.img_attn_qkv",),
    widths=(
        Width("unet", (".time_embedder.linear_1",), (256,)),
        Width(
            "unet",
            (
                ".img_attn_proj",
                ".img_attn_qkv",
                ".linear_2",
                ".proj",
                ".proj_out",
                ".time_proj",
                ".txt_attn_proj",
                ".txt_attn_qkv",
            ),
            (3072,),
        ),
        Width("unet", (".text_embedder.linear_1",), (4096,)),
        Width("unet", (".net.2",), (12288,)),
    ),
    kernels={"img_in": (1, 2, 2)},
)
