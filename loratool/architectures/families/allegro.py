"""Name the modules of Allegro as Rhymes and diffusers do, both in the same way.

Source: only diffusers' class `AllegroTransformer3DModel`; no other naming is known.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="allegro",
    title="Allegro",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            alike=(
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "attn2.to_q",
                "attn2.to_k",
                "attn2.to_v",
                "attn2.to_out.0",
                "ff.net.0.proj",
                "ff.net.2",
            ),
            tensors={"scale_shift_table": "scale_shift_table"},
            counts=(32,),
        ),
    ),
    alike=(
        "pos_embed.proj",
        "proj_out",
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2",
        "adaln_single.linear",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
    ),
    outside_tensors={"scale_shift_table": "scale_shift_table"},
    diffusers_class="AllegroTransformer3DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder.", "t5"),
    ),
    marks=("adaln_single.emb.",),
    widths=(
        Width(
            "unet", (".to_q", ".to_k", ".to_v", ".to_out.0", ".0.proj", ".proj_out", ".linear_2", ".linear"), (2304,)
        ),
        Width("unet", (".net.2",), (9216,)),
        Width("unet", (".caption_projection.linear_1",), (4096,)),
    ),
    kernels={"pos_embed.proj": (2, 2)},
)
