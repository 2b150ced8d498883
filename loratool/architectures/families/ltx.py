"""Name the modules of LTX-Video as Lightricks and diffusers do.

Sources: Lightricks/LTX-Video `ltx_video/models/transformers/transformer3d.py`; diffusers
`loaders/single_file_utils.py`; ComfyUI `comfy/ldm/lightricks/model.py`.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="ltx",
    title="LTX-Video",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            {
                "attn1.q_norm": "attn1.norm_q",
                "attn1.k_norm": "attn1.norm_k",
                "attn2.q_norm": "attn2.norm_q",
                "attn2.k_norm": "attn2.norm_k",
            },
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
            counts=(28, 48),
        ),
    ),
    outside={
        "patchify_proj": "proj_in",
        "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
        "adaln_single.linear": "time_embed.linear",
    },
    alike=("caption_projection.linear_1", "caption_projection.linear_2", "proj_out"),
    outside_tensors={"scale_shift_table": "scale_shift_table"},
    diffusers_class="LTXVideoTransformer3DModel",
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "text_encoders.t5xxl.transformer.", "text_encoder.", "t5"),
    ),
    marks=("patchify_proj", "time_embed.emb."),
    widths=(
        Width(
            "unet", (".linear_2", ".linear", ".proj_out", ".to_q", ".to_k", ".to_v", ".to_out.0", ".proj"), (2048, 4096)
        ),
        Width("unet", (".caption_projection.linear_1",), (4096,)),
        Width("unet", (".net.2",), (8192, 16384)),
    ),
)
