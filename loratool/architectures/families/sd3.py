"""Name the modules of SD 3 and 3.5 as Stability and diffusers do.

Sources: Stability-AI/sd3.5 `mmditx.py`; diffusers `scripts/convert_sd3_to_diffusers.py`.
"""

from __future__ import annotations

from .table import JOINT_ATTENTION, Block, Component, Fused, ModelFamily, Width, swapped

FAMILY = ModelFamily(
    key="sd3",
    title="SD 3",
    blocks=(
        Block(
            "joint_blocks.{i}",
            "transformer_blocks.{i}",
            {
                "x_block.attn.qkv": Fused(("attn.to_q", "attn.to_k", "attn.to_v")),
                "x_block.attn2.qkv": Fused(("attn2.to_q", "attn2.to_k", "attn2.to_v")),
                "context_block.attn.qkv": Fused(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
                "x_block.attn.proj": "attn.to_out.0",
                "x_block.attn2.proj": "attn2.to_out.0",
                "context_block.attn.proj": "attn.to_add_out",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "context_block.adaLN_modulation.1": "norm1_context.linear",
                "x_block.attn.ln_q": "attn.norm_q",
                "x_block.attn.ln_k": "attn.norm_k",
                "x_block.attn2.ln_q": "attn2.norm_q",
                "x_block.attn2.ln_k": "attn2.norm_k",
                "context_block.attn.ln_q": "attn.norm_added_q",
                "context_block.attn.ln_k": "attn.norm_added_k",
            },
            # The last block's has only a shift and a scale.
            by_ratio={"context_block.adaLN_modulation.1": (2, swapped("norm1_context.linear"))},
            counts=(24, 38),
        ),
    ),
    outside={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
    },
    alike=("context_embedder",),
    outside_tensors={"pos_embed": "pos_embed.pos_embed"},
    diffusers_class="SD3Transformer2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te1_", "text_encoders.clip_l.transformer.", "text_encoder.", "clip"),
        Component("text_encoder_2", "lora_te2_", "text_encoders.clip_g.transformer.", "text_encoder_2.", "clip"),
        Component("text_encoder_3", "lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_3.", "t5"),
    ),
    marks=("joint_blocks.", "norm1_context."),
    widths=(
        Width("unet", (".context_embedder",), (4096,)),
        Width("unet", (".linear_2", ".proj_out", ".linear", *JOINT_ATTENTION, ".0.proj"), (1536, 2432)),
        Width("unet", (".text_embedder.linear_1",), (2048,)),
        Width("unet", (".net.2",), (6144, 9728)),
        Width("unet", (".attn2.to_q", ".attn2.to_k", ".attn2.to_v", ".attn2.to_out.0"), (1536,)),
    ),
    kernels={"pos_embed.proj": (2, 2)},
    kohya_network="networks.lora_sd3",
)
