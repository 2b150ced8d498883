"""Name the modules of Hunyuan-DiT as Tencent and diffusers do.

Sources: Tencent/HunyuanDiT `hydit/modules/models.py`; diffusers `scripts/convert_hunyuandit_to_diffusers.py`; ComfyUI
`comfy/ldm/hydit/models.py`. `norm2` and `norm3` of a block change places.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width, swapped

FAMILY = ModelFamily(
    key="hunyuan_dit",
    title="Hunyuan-DiT",
    blocks=(
        Block(
            "blocks.{i}",
            "blocks.{i}",
            {
                "attn1.Wqkv": Fused(("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                "attn1.out_proj": "attn1.to_out.0",
                "attn2.q_proj": "attn2.to_q",
                "attn2.kv_proj": Fused(("attn2.to_k", "attn2.to_v")),
                "attn2.out_proj": "attn2.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
                "default_modulation.1": "norm1.linear",
                "norm1": "norm1.norm",
                "norm2": "norm3",
                "norm3": "norm2",
                "attn1.q_norm": "attn1.norm_q",
                "attn1.k_norm": "attn1.norm_k",
                "attn2.q_norm": "attn2.norm_q",
                "attn2.k_norm": "attn2.norm_k",
            },
            alike=("skip_linear", "skip_norm"),
            counts=(40,),
        ),
    ),
    outside={
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
        "pooler.q_proj": "time_extra_emb.pooler.q_proj",
        "pooler.k_proj": "time_extra_emb.pooler.k_proj",
        "pooler.v_proj": "time_extra_emb.pooler.v_proj",
        "pooler.c_proj": "time_extra_emb.pooler.c_proj",
        "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
        "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
        "mlp_t5.0": "text_embedder.linear_1",
        "mlp_t5.2": "text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": swapped("norm_out.linear"),
        "style_embedder": "time_extra_emb.style_embedder",
    },
    outside_tensors={
        "pooler.positional_embedding": "time_extra_emb.pooler.positional_embedding",
        "text_embedding_padding": "text_embedding_padding",
    },
    diffusers_class="HunyuanDiT2DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te1_", "text_encoders.hydit_clip.transformer.bert.", "text_encoder."),
        Component("text_encoder_2", "", "", "text_encoder_2.", "t5"),
    ),
    marks=("mlp_t5.", "time_extra_emb."),
    widths=(
        Width(
            "unet",
            (
                ".timestep_embedder.linear_2",
                ".proj_out",
                ".linear",
                ".to_q",
                ".attn1.to_k",
                ".attn1.to_v",
                ".to_out.0",
                ".0.proj",
            ),
            (1408,),
        ),
        Width("unet", (".attn2.to_k", ".attn2.to_v"), (1024,)),
        Width("unet", (".net.2",), (6144,)),
        Width("unet", (".skip_linear",), (2816,)),
    ),
    kernels={"pos_embed.proj": (2, 2)},
)
