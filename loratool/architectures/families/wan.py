"""Name the modules of Wan 2.1 and 2.2 (with VACE and Animate) and of what is made of Wan as Wan-AI and diffusers do.

These are SkyReels-V2, ChronoEdit, AnyFlow and Helios; what the last two add has diffusers' names. Sources:
Wan-Video/Wan2.1 `wan/modules/model.py`; diffusers `loaders/single_file_utils.py` and its classes; ComfyUI
`comfy/ldm/wan/model.py` and `model_animate.py`. Not here: the encoder of motion of Animate, and the modules that S2V,
HuMo and the camera models add.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width

_NAMES = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
}

FAMILY = ModelFamily(
    key="wan",
    title="Wan",
    blocks=(
        Block(
            "blocks.{i}",
            "blocks.{i}",
            {
                **_NAMES,
                "cross_attn.k_img": "attn2.add_k_proj",
                "cross_attn.v_img": "attn2.add_v_proj",
                "cross_attn.norm_k_img": "attn2.norm_added_k",
            },
            tensors={"modulation": "scale_shift_table"},
            counts=(30, 40),
        ),
        Block(
            "vace_blocks.{i}",
            "vace_blocks.{i}",
            {**_NAMES, "before_proj": "proj_in", "after_proj": "proj_out"},
            tensors={"modulation": "scale_shift_table"},
            counts=(8,),
        ),
        Block(
            "face_adapter.fuser_blocks.{i}",
            "face_adapter.{i}",
            {
                "linear1_q": "to_q",
                "linear1_kv": Fused(("to_k", "to_v")),
                "linear2": "to_out",
                "q_norm": "norm_q",
                "k_norm": "norm_k",
            },
            counts=(8,),
        ),
    ),
    outside={
        "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
        "face_encoder.conv2.conv": "face_encoder.conv2",
        "face_encoder.conv3.conv": "face_encoder.conv3",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "head.head": "proj_out",
    },
    alike=(
        "patch_embedding",
        "vace_patch_embedding",
        "pose_patch_embedding",
        "face_encoder.out_proj",
        # Of AnyFlow
        "condition_embedder.delta_embedder.linear_1",
        "condition_embedder.delta_embedder.linear_2",
        "far_patch_embedding",
        # Of Helios
        "patch_short",
        "patch_mid",
        "patch_long",
    ),
    outside_tensors={
        "norm_out.scale_shift_table": "norm_out.scale_shift_table",  # of Helios
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "head.modulation": "scale_shift_table",
        "face_encoder.padding_tokens": "face_encoder.padding_tokens",
    },
    diffusers_class="WanTransformer3DModel",
    other_classes=(
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
        "AnyFlowTransformer3DModel",
        "AnyFlowFARTransformer3DModel",
        "HeliosTransformer3DModel",
    ),
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("transformer_2", "", "", "transformer_2."),
        Component("text_encoder", "", "text_encoders.umt5xxl.transformer.", "text_encoder.", "t5"),
    ),
    marks=("time_projection.", "condition_embedder.time_proj"),
    widths=(
        Width("unet", (".proj_out", ".to_q", ".to_k", ".to_v", ".to_out.0", ".ffn.net.0.proj"), (1536, 3072, 5120)),
        Width("unet", (".ffn.net.2",), (8960, 13824, 14336)),
        Width("unet", (".add_k_proj", ".add_v_proj"), (5120,)),
    ),
    kernels={
        "patch_embedding": (1, 2, 2),
        "vace_patch_embedding": (1, 2, 2),
        "pose_patch_embedding": (1, 2, 2),
        "face_encoder.conv1_local": (3,),
        "face_encoder.conv2": (3,),
        "face_encoder.conv3": (3,),
        "far_patch_embedding": (1, 4, 4),
        "patch_short": (1, 2, 2),
        "patch_mid": (2, 4, 4),
        "patch_long": (4, 8, 8),
    },
    kohya_network="networks.lora_wan",
)
