"""Name the modules of AuraFlow as fal and diffusers do.

Sources: diffusers `scripts/convert_aura_flow_to_diffusers.py` and `loaders/single_file_utils.py`; ComfyUI
`comfy/ldm/aura/mmdit.py`.
"""

from __future__ import annotations

from .table import JOINT_ATTENTION, Block, Component, ModelFamily, Width, swapped

FAMILY = ModelFamily(
    key="auraflow",
    title="AuraFlow",
    blocks=(
        Block(
            "double_layers.{i}",
            "joint_transformer_blocks.{i}",
            {
                "attn.w2q": "attn.to_q",
                "attn.w2k": "attn.to_k",
                "attn.w2v": "attn.to_v",
                "attn.w2o": "attn.to_out.0",
                "attn.w1q": "attn.add_q_proj",
                "attn.w1k": "attn.add_k_proj",
                "attn.w1v": "attn.add_v_proj",
                "attn.w1o": "attn.to_add_out",
                "mlpX.c_fc1": "ff.linear_1",
                "mlpX.c_fc2": "ff.linear_2",
                "mlpX.c_proj": "ff.out_projection",
                "mlpC.c_fc1": "ff_context.linear_1",
                "mlpC.c_fc2": "ff_context.linear_2",
                "mlpC.c_proj": "ff_context.out_projection",
                "modX.1": "norm1.linear",
                "modC.1": "norm1_context.linear",
            },
            counts=(4,),
        ),
        Block(
            "single_layers.{i}",
            "single_transformer_blocks.{i}",
            {
                "attn.w1q": "attn.to_q",
                "attn.w1k": "attn.to_k",
                "attn.w1v": "attn.to_v",
                "attn.w1o": "attn.to_out.0",
                "mlp.c_fc1": "ff.linear_1",
                "mlp.c_fc2": "ff.linear_2",
                "mlp.c_proj": "ff.out_projection",
                "modCX.1": "norm1.linear",
            },
            counts=(32,),
        ),
    ),
    outside={
        "init_x_linear": "pos_embed.proj",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "cond_seq_linear": "context_embedder",
        "final_linear": "proj_out",
        "modF.1": swapped("norm_out.linear"),
    },
    outside_tensors={"positional_encoding": "pos_embed.pos_embed", "register_tokens": "register_tokens"},
    diffusers_class="AuraFlowTransformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "text_encoders.pile_t5xl.transformer.", "text_encoder.", "t5"),
    ),
    marks=("double_layers.", "joint_transformer_blocks."),
    widths=(
        Width(
            "unet",
            (".linear_2", ".proj_out", ".linear", *JOINT_ATTENTION, ".ff.linear_1", ".ff_context.linear_1"),
            (3072,),
        ),
        Width("unet", (".context_embedder",), (2048,)),
        Width("unet", (".out_projection",), (8192,)),
    ),
)
