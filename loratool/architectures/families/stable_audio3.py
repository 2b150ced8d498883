"""Name the modules of Stable Audio 3 as diffusers does.

Source: diffusers' class `StableAudio3DiTModel`, whose defaults are the sizes. Not here: its makers' names.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="stable_audio3",
    title="Stable Audio 3",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "self_attn.to_qkv",
                "self_attn.to_out",
                "cross_attn.to_q",
                "cross_attn.to_kv",
                "cross_attn.to_out",
                "ff.proj_in",
                "ff.proj_out",
                "to_local_embed.0",
                "to_local_embed.2",
            ),
            tensors={
                "to_scale_shift_gate": "to_scale_shift_gate",
                "pre_norm.gamma": "pre_norm.gamma",
                "self_attn.q_norm.gamma": "self_attn.q_norm.gamma",
                "self_attn.k_norm.gamma": "self_attn.k_norm.gamma",
                "cross_attend_norm.gamma": "cross_attend_norm.gamma",
                "cross_attn.q_norm.gamma": "cross_attn.q_norm.gamma",
                "cross_attn.k_norm.gamma": "cross_attn.k_norm.gamma",
                "ff_norm.gamma": "ff_norm.gamma",
            },
            counts=(24,),
        ),
    ),
    alike=(
        "to_timestep_embed.0",
        "to_timestep_embed.2",
        "to_cond_embed.0",
        "to_cond_embed.2",
        "to_global_embed.0",
        "to_global_embed.2",
        "global_cond_embedder.0",
        "global_cond_embedder.2",
        "preprocess_conv",
        "postprocess_conv",
        "proj_in",
        "proj_out",
    ),
    outside_tensors={
        "prompt_padding_embedding": "prompt_padding_embedding",
        "memory_tokens": "memory_tokens",
        "rotary_pos_emb.inv_freq": "rotary_pos_emb.inv_freq",
    },
    diffusers_class="StableAudio3DiTModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=("to_local_embed.",),
    widths=(
        Width("unet", (".to_timestep_embed.0",), (256,)),
        Width(
            "unet",
            (
                ".ff.proj_in",
                ".global_cond_embedder.0",
                ".global_cond_embedder.2",
                ".to_cond_embed.2",
                ".to_global_embed.2",
                ".to_kv",
                ".to_local_embed.2",
                ".to_out",
                ".to_q",
                ".to_qkv",
                ".to_timestep_embed.2",
            ),
            (1536,),
        ),
        Width("unet", (".to_cond_embed.0", ".to_global_embed.0"), (768,)),
        Width("unet", (".ff.proj_out",), (6144,)),
        Width("unet", (".to_local_embed.0",), (257,)),
    ),
    kernels={"preprocess_conv": (1,), "postprocess_conv": (1,)},
)
