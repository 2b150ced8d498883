"""Name the modules between LTX-2's text encoder and its denoiser as Lightricks and diffusers do.

Source: diffusers `loaders/lora_conversion_utils.py`. Not here: the blocks of the connectors, which are beside the
denoiser's in a single file.
"""

from __future__ import annotations

from .table import ModelFamily

FAMILY = ModelFamily(
    key="ltx2_connectors",
    title="LTX-2's connectors",
    outside={
        "aggregate_embed": "text_proj_in",
        "video_aggregate_embed": "video_text_proj_in",
        "audio_aggregate_embed": "audio_text_proj_in",
    },
)
