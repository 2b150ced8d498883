"""Make a small base of any model type, a PEFT adapter of it, and PEFT's merge of both, of numbers that add up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.models import tiny
from safetensors.torch import load_file, save_file

# model type -> what released configs say and transformers' classes do not
RELEASED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "minimax_m2": {"rotary_dim": 8, "scoring_func": "sigmoid", "use_routing_bias": True, "qk_norm_type": "per_layer"},
    "gemma3": {"vocab_size": 320},
    "glm4": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, "rope_theta": 10000.0, "norm_topk_prob": True},
    "siglip_vision_model": {"vision_use_head": False},
    "glm4v_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 0.5,
        }
    },
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
}


# Model types whose released files have stacks of (in, out), which transformers 5 turns on reading alone
TURNED = {"qwen3_vl_moe"}

# Types of towers that stand a level deeper in released files
TOWERS = {"siglip_vision_model", "clip_vision_model"}

# PEFT refuses the last projection of these models' Mamba layers
MAMBA = {"falcon_h1", "nemotron_h"}


def eighths(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=generator) / 8


def linear(model: Any) -> list[str]:
    """Return the paths of the linear layers below the head, experts and towers left out."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and not tower(name)
        if not (model.config.model_type in MAMBA and name.endswith("out_proj"))
    ]


def tower(name: str) -> bool:
    parts = ("vision", "visual", "projector", "audio", "connector")
    return any(each.startswith(parts) or each == "multi_modal_projector" for each in name.split("."))


def pair(folder: Path, table: str, model_type: str, architecture: str | None = None, **options: Any) -> Any:
    """Write `base`, `adapter` and `merged` below `folder`, and return the wrapped model before the merge.

    `options` are those of `peft.LoraConfig`; without `target_modules` all linear layers of the language model are
    targets, and without `target_parameters` all stacks of experts (None: no stack).
    """
    peft = pytest.importorskip("peft", minversion="0.19")
    _, model = tiny.build(table, model_type)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(eighths(weight.shape, generator))
    model.tie_weights()
    save(model, folder / "base", architecture)
    stacks = [name for name in tiny.stacks(model) if not tower(name)]
    given = {"r": 2, "lora_alpha": 4, "target_modules": linear(model), "target_parameters": stacks} | options
    given = {name: value for name, value in given.items() if value is not None}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**given))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if ("lora_" in name and "magnitude" not in name) or "modules_to_save" in name:
                weight.copy_(eighths(weight.shape, generator))
    wrapped.save_pretrained(folder / "adapter")
    merged = wrapped.merge_and_unload()
    save(merged, folder / "merged", architecture)
    return merged


def save(model: Any, folder: Path, architecture: str | None = None) -> None:
    """Write a model as its released files are."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    _release(config)
    config["architectures"] = [architecture or type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    tensors = dict(_released(name, weight, config) for name, weight in load_file(file).items() if ".head." not in name)
    save_file(tensors, file, {"format": "pt"})


def _released(name: str, weight: torch.Tensor, config: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """Return a tensor as the files of released models have it, where transformers 5 saves it otherwise."""
    if config["model_type"] in TURNED and weight.dim() == 3 and ".experts." in name:
        weight = weight.mT.contiguous()
    if config.get("vision_config", {}).get("model_type") in TOWERS:
        name = re.sub(r"(vision_tower\.)(?!vision_model\.)", r"\1vision_model.", name)
    return name, weight


def _release(config: dict[str, Any]) -> None:
    config |= RELEASED.get(config.get("model_type", ""), {})
    for part in config.values():
        if isinstance(part, dict):
            _release(part)
