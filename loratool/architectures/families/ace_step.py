"""Name the modules of ACE-Step 1.5 as diffusers does, with the projections of its makers' adapters.

Sources: diffusers' class `AceStepTransformer1DModel`, whose defaults are the sizes, and
`_convert_non_diffusers_ace_step_lora_to_diffusers` in `loaders/lora_conversion_utils.py`. Not here: the makers' names
of other modules.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="ace_step",
    title="ACE-Step 1.5",
    blocks=(
        Block(
            "layers.{i}",
            "layers.{i}",
            alike=(
                "self_attn_norm",
                "self_attn.to_q",
                "self_attn.to_k",
                "self_attn.to_v",
                "self_attn.to_out.0",
                "self_attn.norm_q",
                "self_attn.norm_k",
                "cross_attn_norm",
                "cross_attn.to_q",
                "cross_attn.to_k",
                "cross_attn.to_v",
                "cross_attn.to_out.0",
                "cross_attn.norm_q",
                "cross_attn.norm_k",
                "mlp_norm",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            ),
            aliases={
                "self_attn.q_proj": "self_attn.to_q",
                "self_attn.k_proj": "self_attn.to_k",
                "self_attn.v_proj": "self_attn.to_v",
                "self_attn.o_proj": "self_attn.to_out.0",
                "cross_attn.q_proj": "cross_attn.to_q",
                "cross_attn.k_proj": "cross_attn.to_k",
                "cross_attn.v_proj": "cross_attn.to_v",
                "cross_attn.o_proj": "cross_attn.to_out.0",
            },
            tensors={"scale_shift_table": "scale_shift_table"},
            counts=(24,),
        ),
    ),
    alike=(
        "proj_in_conv",
        "time_embed.linear_1",
        "time_embed.linear_2",
        "time_embed.time_proj",
        "time_embed_r.linear_1",
        "time_embed_r.linear_2",
        "time_embed_r.time_proj",
        "condition_embedder",
        "norm_out",
        "proj_out_conv",
    ),
    outside_tensors={"scale_shift_table": "scale_shift_table"},
    diffusers_class="AceStepTransformer1DModel",
    components=(Component("unet", "", "", "transformer."), Component("text_encoder", "", "", "text_encoder.")),
    marks=("time_embed_r.",),
    widths=(
        Width(
            "unet",
            (
                ".condition_embedder",
                ".gate_proj",
                ".linear_2",
                ".time_proj",
                ".to_k",
                ".to_out.0",
                ".to_q",
                ".to_v",
                ".up_proj",
            ),
            (2048,),
        ),
        Width("unet", (".down_proj",), (6144,)),
        Width("unet", (".linear_1",), (256,)),
    ),
    kernels={"proj_in_conv": (2,), "proj_out_conv": (2,)},
)
