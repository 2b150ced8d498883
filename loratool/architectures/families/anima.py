"""Name the modules of Anima, which are those of Cosmos-Predict2, as NVIDIA and diffusers do.

Sources: diffusers `scripts/convert_anima_to_diffusers.py` and `loaders/single_file_utils.py`; ComfyUI
`comfy/ldm/anima/model.py`. The modules of the text conditioner have the same names everywhere and are not
listed.
"""

from __future__ import annotations

from . import cosmos1, cosmos_predict2
from .table import Component, ModelFamily, Width

FAMILY = ModelFamily(
    key="anima",
    title="Anima",
    blocks=cosmos_predict2.FAMILY.blocks,
    outside=cosmos_predict2.FAMILY.outside,
    unused=cosmos_predict2.FAMILY.unused,
    beside=("llm_adapter.",),
    diffusers_class="CosmosTransformer3DModel",
    config={"extra_pos_embed_type": None},
    components=(
        Component("unet", "lora_unet_", "diffusion_model.", "transformer."),
        Component("text_encoder", "lora_te_", "text_encoders.qwen3_06b.transformer.model.", "text_encoder."),
        Component("text_conditioner", "lora_unet_llm_adapter_", "diffusion_model.llm_adapter.", "text_conditioner."),
    ),
    # The transformer alone is one of Cosmos-Predict2.
    marks=("llm_adapter.blocks.",),
    widths=(
        Width("unet", cosmos1.HIDDEN, (2048,)),
        Width("unet", (".attn2.to_k", ".attn2.to_v"), (1024,)),
        Width("unet", (".net.2",), (8192,)),
    ),
    kohya_network="networks.lora_anima",
)
