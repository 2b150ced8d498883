"""Name the modules of LTX-2 and 2.3 as Lightricks and diffusers do.

Sources: Lightricks/LTX-2 `packages/ltx-core/src/ltx_core/model/transformer/model.py`; diffusers
`loaders/single_file_utils.py` and `loaders/lora_conversion_utils.py`. Not checked: LTX-2.5.
"""

from __future__ import annotations

from .table import Block, Component, ModelFamily, Width

_ADALN = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
}
_ADALN_ENDS = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

FAMILY = ModelFamily(
    key="ltx2",
    title="LTX-2",
    blocks=(
        Block(
            "transformer_blocks.{i}",
            "transformer_blocks.{i}",
            {f"{attention}.{x}_norm": f"{attention}.norm_{x}" for attention in _ATTENTIONS for x in "qk"},
            alike=(
                *(f"{attention}.{end}" for attention in _ATTENTIONS for end in ("to_q", "to_k", "to_v", "to_out.0")),
                *(f"{attention}.to_gate_logits" for attention in _ATTENTIONS),
                "ff.net.0.proj",
                "ff.net.2",
                "audio_ff.net.0.proj",
                "audio_ff.net.2",
            ),
            tensors={
                "scale_shift_table": "scale_shift_table",
                "audio_scale_shift_table": "audio_scale_shift_table",
                "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
                "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
                "prompt_scale_shift_table": "prompt_scale_shift_table",
                "audio_prompt_scale_shift_table": "audio_prompt_scale_shift_table",
            },
            counts=(48,),
        ),
    ),
    outside={
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        **{f"{maker}.{end}": f"{theirs}.{end}" for maker, theirs in _ADALN.items() for end in _ADALN_ENDS},
    },
    alike=(
        "caption_projection.linear_1",
        "caption_projection.linear_2",
        "audio_caption_projection.linear_1",
        "audio_caption_projection.linear_2",
        "proj_out",
        "audio_proj_out",
    ),
    outside_tensors={"scale_shift_table": "scale_shift_table", "audio_scale_shift_table": "audio_scale_shift_table"},
    beside=("video_embeddings_connector.", "audio_embeddings_connector."),
    diffusers_class="LTX2VideoTransformer3DModel",
    other_classes=("SanaWMLTX2RefinerTransformer3DModel",),
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "", "", "text_encoder."),
        Component("connectors", "", "text_embedding_projection.", "connectors.", "ltx2_connectors"),
    ),
    marks=("audio_patchify_proj", "audio_time_embed."),
    telling=r"audio_|prompt_adaln|to_gate_logits",
    widths=(
        Width(
            "unet",
            (
                ".time_embed.emb.timestep_embedder.linear_2",
                ".time_embed.linear",
                ".caption_projection.linear_2",
                ".proj_out",
                ".attn1.to_q",
                ".attn1.to_k",
                ".attn1.to_v",
                ".attn1.to_out.0",
                ".attn2.to_q",
                ".attn2.to_k",
                ".attn2.to_v",
                ".attn2.to_out.0",
                ".audio_to_video_attn.to_q",
                ".video_to_audio_attn.to_k",
                ".video_to_audio_attn.to_v",
                ".ff.net.0.proj",
                ".attn1.to_gate_logits",
                ".attn2.to_gate_logits",
                ".audio_to_video_attn.to_gate_logits",
            ),
            (4096,),
        ),
        Width("unet", (".caption_projection.linear_1",), (3840,)),
        Width(
            "unet",
            (
                ".audio_proj_out",
                ".audio_attn1.to_q",
                ".audio_attn1.to_k",
                ".audio_attn1.to_v",
                ".audio_attn1.to_out.0",
                ".audio_attn2.to_q",
                ".audio_attn2.to_k",
                ".audio_attn2.to_v",
                ".audio_attn2.to_out.0",
                ".audio_to_video_attn.to_k",
                ".audio_to_video_attn.to_v",
                ".audio_to_video_attn.to_out.0",
                ".video_to_audio_attn.to_q",
                ".video_to_audio_attn.to_out.0",
                ".audio_ff.net.0.proj",
                ".audio_attn1.to_gate_logits",
                ".audio_attn2.to_gate_logits",
                ".video_to_audio_attn.to_gate_logits",
            ),
            (2048,),
        ),
        Width("unet", (".ff.net.2",), (16384,)),
        Width("unet", (".audio_ff.net.2",), (8192,)),
    ),
)
