"""Name the modules of OmniGen 1 as VectorSpaceLab and diffusers do.

Sources: VectorSpaceLab/OmniGen `OmniGen/model.py`; diffusers `scripts/convert_omnigen_to_diffusers.py`.
"""

from __future__ import annotations

from .table import Block, Component, Fused, ModelFamily, Width

FAMILY = ModelFamily(
    key="omnigen",
    title="OmniGen",
    blocks=(
        Block(
            "llm.layers.{i}",
            "layers.{i}",
            {
                "self_attn.qkv_proj": Fused(("self_attn.to_q", "self_attn.to_k", "self_attn.to_v")),
                "self_attn.o_proj": "self_attn.to_out.0",
            },
            alike=("mlp.gate_up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
            counts=(32,),
        ),
    ),
    outside={
        "x_embedder.proj": "patch_embedding.output_image_proj",
        "input_x_embedder.proj": "patch_embedding.input_image_proj",
        "time_token.mlp.0": "time_token.linear_1",
        "time_token.mlp.2": "time_token.linear_2",
        "t_embedder.mlp.0": "t_embedder.linear_1",
        "t_embedder.mlp.2": "t_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
        "llm.embed_tokens": "embed_tokens",
        "llm.norm": "norm",
    },
    outside_tensors={"pos_embed": "patch_embedding.pos_embed"},
    diffusers_class="OmniGenTransformer2DModel",
    components=(Component("unet", "lora_unet_", "diffusion_model.", "transformer."),),
    marks=("time_token.",),
    widths=(
        Width(
            "unet",
            (".linear_2", ".linear", ".proj_out", ".to_q", ".to_k", ".to_v", ".to_out.0", ".gate_up_proj"),
            (3072,),
        ),
        Width("unet", (".down_proj",), (8192,)),
    ),
    kernels={"patch_embedding.output_image_proj": (2, 2), "patch_embedding.input_image_proj": (2, 2)},
)
