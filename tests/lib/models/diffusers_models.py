"""Build a tiny UNet and text encoder of diffusers and transformers, with the topology of SD 1.5 and SDXL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pipelines = pytest.importorskip("diffusers.loaders.lora_pipeline")

WIDTH = 12  # of the text encoder, which is the width of what the UNet attends to
COMMON = {"sample_size": 8, "norm_num_groups": 4, "cross_attention_dim": WIDTH, "attention_head_dim": 4}
SD1 = {
    **COMMON,
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL = {
    **COMMON,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
LOADERS = {"sd1": "StableDiffusionLoraLoaderMixin", "sdxl": "StableDiffusionXLLoraLoaderMixin"}
FILE = "pytorch_lora_weights.safetensors"


def unet(family: str) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**(SD1 if family == "sd1" else SDXL)).eval()


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    sizes = {"vocab_size": 32, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    layers = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, **layers)).eval()


def compute(model: Any, text: Any) -> Tensor:
    g = torch.Generator().manual_seed(3)
    more = {"text_embeds": torch.randn(1, 8, generator=g), "time_ids": torch.zeros(1, 6)}
    extra = {"added_cond_kwargs": more} if model.config.addition_embed_type else {}
    with torch.no_grad():
        states = text(torch.arange(5)[None]).last_hidden_state
        out: Tensor = model(torch.randn(1, 4, 8, 8, generator=g), 7, states, **extra).sample
    return out
