"""Name the modules of HunyuanVideo and its derivative FramePack as Tencent, diffusers and ComfyUI do.

Sources: Tencent/HunyuanVideo `hyvideo/modules/models.py`; diffusers `loaders/single_file_utils.py`,
`models/transformers/transformer_hunyuan_video_framepack.py`; ComfyUI `comfy/ldm/hunyuan_video/model.py`.
"""

from __future__ import annotations

from . import flux
from .table import JOINT_ATTENTION, Block, Component, Fused, ModelFamily, Rows, Width, swapped

# The blocks between text encoder and denoiser, in all models of the kind
REFINER = Block(
    "txt_in.individual_token_refiner.blocks.{i}",
    "context_embedder.token_refiner.refiner_blocks.{i}",
    {
        "self_attn_qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v")),
        "self_attn_proj": "attn.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm_out.linear",
    },
    alike=("norm1", "norm2"),
    comfy={
        "self_attn.qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v")),
        "self_attn.proj": "attn.to_out.0",
        "mlp.0": "ff.net.0.proj",
        "mlp.2": "ff.net.2",
    },
    counts=(2,),
)

# The modules of a double block except queries, keys and values
DOUBLE: dict[str, Rows] = {
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
}

# ComfyUI builds it from Flux's layers.
DOUBLE_COMFY: dict[str, Rows] = {**flux.ATTENTION, **flux.MLPS, **flux.MODULATION, **flux.NORMS}

# The layers for text input, and the last layer, in all models of the kind
OUTSIDE: dict[str, Rows] = {
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
}

OUTSIDE_COMFY: dict[str, Rows] = {
    "txt_in.t_embedder.in_layer": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.out_layer": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.in_layer": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.out_layer": "context_embedder.time_text_embed.text_embedder.linear_2",
}

FAMILY = ModelFamily(
    key="hunyuan_video",
    title="HunyuanVideo or FramePack",
    blocks=(
        REFINER,
        Block(
            "double_blocks.{i}",
            "transformer_blocks.{i}",
            {
                "img_attn_qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v")),
                "txt_attn_qkv": Fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
                **DOUBLE,
            },
            comfy=DOUBLE_COMFY,
            counts=(20,),
        ),
        Block(
            "single_blocks.{i}",
            "single_transformer_blocks.{i}",
            {
                "linear1": Fused(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, None)),
                "linear2": "proj_out",
                "modulation.linear": "norm.linear",
                "q_norm": "attn.norm_q",
                "k_norm": "attn.norm_k",
            },
            comfy={"modulation.lin": "norm.linear", "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"},
            counts=(40,),
        ),
    ),
    outside={
        "img_in.proj": "x_embedder.proj",
        "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        **OUTSIDE,
        "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    },
    outside_comfy={
        **OUTSIDE_COMFY,
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    },
    # Of FramePack, which has HunyuanVideo's modules besides
    alike=(
        "clean_x_embedder.proj",
        "clean_x_embedder.proj_2x",
        "clean_x_embedder.proj_4x",
        "image_projection.up",
        "image_projection.down",
    ),
    unrenamed={"FramePack": "clean_x_embedder."},
    diffusers_class="HunyuanVideoTransformer3DModel",
    other_classes=("HunyuanVideoFramepackTransformer3DModel",),
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te1_", "text_encoders.llama.transformer.", "text_encoder."),
        Component("text_encoder_2", "lora_te2_", "text_encoders.clip_l.transformer.", "text_encoder_2.", "clip"),
    ),
    marks=("individual_token_refiner.", "context_embedder.token_refiner."),
    widths=(
        Width(
            "unet",
            (
                ".timestep_embedder.linear_2",
                ".text_embedder.linear_2",
                *JOINT_ATTENTION,
                ".0.proj",
                ".linear",
                ".proj_mlp",
            ),
            (3072,),
        ),
        Width("unet", (".context_embedder.time_text_embed.text_embedder.linear_1",), (4096,)),
        Width("unet", (".net.2",), (12288,)),
        Width("unet", (".proj_out",), (3072, 15360)),
    ),
    ratios={".linear1": 7, ".proj_mlp": 4},
    kernels={
        "x_embedder.proj": (1, 2, 2),
        "clean_x_embedder.proj": (1, 2, 2),
        "clean_x_embedder.proj_2x": (2, 4, 4),
        "clean_x_embedder.proj_4x": (4, 8, 8),
    },
)
