"""Name the modules of CogVideoX as THUDM's SAT, diffusers and ComfyUI do.

Sources: THUDM/CogVideo `sat/dit_video_concat.py`; diffusers `scripts/convert_cogvideox_to_diffusers.py`; ComfyUI
`comfy/ldm/cogvideo/model.py`. ComfyUI's names were read, not run.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Naming, Run, Width

FAMILY = ModelFamily(
    key="cogvideox",
    title="CogVideoX",
    blocks=(
        Block(
            "transformer.layers.{i}",
            "transformer_blocks.{i}",
            {
                "attention.query_key_value": Fused(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                "attention.dense": "attn1.to_out.0",
                "mlp.dense_h_to_4h": "ff.net.0.proj",
                "mlp.dense_4h_to_h": "ff.net.2",
                "input_layernorm": "norm1.norm",
                "post_attention_layernorm": "norm2.norm",
            },
            comfy={
                "q": "attn1.to_q",
                "k": "attn1.to_k",
                "v": "attn1.to_v",
                "attn_out": "attn1.to_out.0",
                "norm_q": "attn1.norm_q",
                "norm_k": "attn1.norm_k",
                "ff_proj": "ff.net.0.proj",
                "ff_out": "ff.net.2",
                "norm1.norm": "norm1.norm",
                "norm2.norm": "norm2.norm",
                "norm1.linear": "norm1.linear",
                "norm2.linear": "norm2.linear",
            },
            comfy_stem="blocks.{i}",
            counts=(30, 42),
        ),
        Block(
            "mixins.adaln_layer.adaLN_modulations.{i}",
            "transformer_blocks.{i}",
            {
                "1": Fused(
                    (
                        Run("norm1.linear", 0, 2),
                        Run("norm2.linear", 0, 2),
                        Run("norm1.linear", 1, 2),
                        Run("norm2.linear", 1, 2),
                    )
                )
            },
            counts=(30, 42),
        ),
        Block(
            "mixins.adaln_layer.query_layernorm_list.{i}",
            "transformer_blocks.{i}",
            {"": "attn1.norm_q"},
            counts=(30, 42),
        ),
        Block(
            "mixins.adaln_layer.key_layernorm_list.{i}",
            "transformer_blocks.{i}",
            {"": "attn1.norm_k"},
            counts=(30, 42),
        ),
    ),
    outside={
        "mixins.patch_embed.proj": "patch_embed.proj",
        "mixins.patch_embed.text_proj": "patch_embed.text_proj",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "ofs_embed.0": "ofs_embedding.linear_1",
        "ofs_embed.2": "ofs_embedding.linear_2",
        "transformer.final_layernorm": "norm_final",
        "mixins.final_layer.norm_final": "norm_out.norm",
        "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
        "mixins.final_layer.linear": "proj_out",
    },
    outside_tensors={"mixins.pos_embed.pos_embedding": "patch_embed.pos_embedding"},
    outside_comfy={
        "patch_embed.proj": "patch_embed.proj",
        "patch_embed.text_proj": "patch_embed.text_proj",
        "time_embedding_linear_1": "time_embedding.linear_1",
        "time_embedding_linear_2": "time_embedding.linear_2",
        "ofs_embedding_linear_1": "ofs_embedding.linear_1",
        "ofs_embedding_linear_2": "ofs_embedding.linear_2",
        "norm_final": "norm_final",
        "norm_out.norm": "norm_out.norm",
        "norm_out.linear": "norm_out.linear",
        "proj_out": "proj_out",
    },
    diffusers_class="CogVideoXTransformer3DModel",
    other_classes=("ConsisIDTransformer3DModel",),
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder.", "t5"),
    ),
    marks=("mixins.adaln_layer.", "patch_embed.text_proj"),
    widths=(
        Width(
            "unet",
            (".time_embedding.linear_1", ".proj_out", ".to_q", ".to_k", ".to_v", ".to_out.0", ".0.proj"),
            (1920, 3072),
        ),
        Width("unet", (".linear_2", ".linear"), (512,)),
        Width("unet", (".net.2",), (7680, 12288)),
    ),
    kohya=Naming.DIFFUSERS,  # as CogVideoX-Fun writes them
)
