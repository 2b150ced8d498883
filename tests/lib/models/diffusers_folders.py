"""Write folders of diffusers pipelines: the layout and the names are literals, and diffusers is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import weights
from safetensors.torch import save_file

LAYER = "encoder.layers.0.self_attn.q_proj.weight"
# component -> file -> the tensors' shapes
SDXL: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "unet": {
        "diffusion_pytorch_model-00001-of-00002.safetensors": {
            "conv_in.weight": (8, 4, 3, 3),
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
        },
        "diffusion_pytorch_model-00002-of-00002.safetensors": {
            "up_blocks.0.upsamplers.0.conv.weight": (8, 8, 3, 3),
            "up_blocks.0.upsamplers.0.conv.bias": (8,),
        },
    },
    "text_encoder": {"model.safetensors": {f"text_model.{LAYER}": (8, 8)}},
    "text_encoder_2": {
        "model.safetensors": {
            LAYER: (12, 12),
            "embeddings.token_embedding.weight": (20, 12),
        }  # as transformers 5 has it
    },
    "vae": {"diffusion_pytorch_model.safetensors": {"decoder.up_blocks.0.upsamplers.0.conv.weight": (8, 8, 3, 3)}},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {"_class_name": "UNet2DConditionModel"},
    "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32"},
    "text_encoder_2": {"architectures": ["CLIPTextModelWithProjection"], "dtype": "float32"},
    "vae": {"_class_name": "AutoencoderKL"},
}
OTHERS = {
    "scheduler/scheduler_config.json": '{"_class_name": "EulerDiscreteScheduler"}',
    "tokenizer/vocab.json": "{}",
    "tokenizer/merges.txt": "#version: 0.2",
    "tokenizer/tokenizer_config.json": "{}",
}
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.35.0",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def pipeline(path: Path, components: Mapping[str, Mapping[str, Mapping[str, tuple[int, ...]]]] = SDXL) -> Path:
    seed = 0
    for component, files in components.items():
        folder = path / component
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIGS.get(component, {})))
        for file, shapes in files.items():
            tensors = {name: weights(*shape, seed=(seed := seed + 1)) for name, shape in shapes.items()}
            save_file(tensors, folder / file, {"format": "pt"})
        if len(files) > 1:
            weight_map = {name: file for file, shapes in files.items() for name in shapes}
            index = folder / "diffusion_pytorch_model.safetensors.index.json"
            index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for name, text in OTHERS.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    (path / "model_index.json").write_text(json.dumps(INDEX))
    return path
