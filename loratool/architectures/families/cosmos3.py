"""Name the modules of Cosmos 3 as diffusers does.

Source: diffusers' class `Cosmos3OmniTransformer`, whose defaults are the sizes. Not here: its makers' names,
and its embeddings and head, which have the names of any language model's.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="cosmos3",
    title="Cosmos 3",
    blocks=(
        Block(
            "layers.{i}",
            "layers.{i}",
            alike=(
                "self_attn.to_q",
                "self_attn.to_k",
                "self_attn.to_v",
                "self_attn.to_out",
                "self_attn.norm_q",
                "self_attn.norm_k",
                "self_attn.add_q_proj",
                "self_attn.add_k_proj",
                "self_attn.add_v_proj",
                "self_attn.to_add_out",
                "self_attn.norm_added_q",
                "self_attn.norm_added_k",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
                "mlp_moe_gen.gate_proj",
                "mlp_moe_gen.up_proj",
                "mlp_moe_gen.down_proj",
                "input_layernorm",
                "input_layernorm_moe_gen",
                "post_attention_layernorm",
                "post_attention_layernorm_moe_gen",
            ),
            counts=(36,),
        ),
    ),
    alike=(
        "norm",
        "norm_moe_gen",
        "proj_in",
        "proj_out",
        "time_embedder.linear_1",
        "time_embedder.linear_2",
        "action_proj_in.fc",
        "action_proj_out.fc",
        "audio_proj_in",
        "audio_proj_out",
    ),
    outside_tensors={
        "action_modality_embed": "action_modality_embed",
        "audio_modality_embed": "audio_modality_embed",
        "action_proj_in.bias.weight": "action_proj_in.bias.weight",
        "action_proj_out.bias.weight": "action_proj_out.bias.weight",
    },
    diffusers_class="Cosmos3OmniTransformer",
    components=(Component("unet", "", "", "transformer."),),
    marks=("mlp_moe_gen.",),
    widths=(
        Width(
            "unet",
            (
                ".add_k_proj",
                ".add_q_proj",
                ".add_v_proj",
                ".audio_proj_out",
                ".gate_proj",
                ".linear_2",
                ".proj_out",
                ".to_add_out",
                ".to_k",
                ".to_out",
                ".to_q",
                ".to_v",
                ".up_proj",
            ),
            (4096,),
        ),
        Width("unet", (".down_proj",), (12288,)),
        Width("unet", (".proj_in",), (192,)),
        Width("unet", (".linear_1",), (256,)),
        Width("unet", (".fc",), (131072,)),
        Width("unet", (".audio_proj_in",), (64,)),
    ),
)
