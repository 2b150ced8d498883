"""Make small models that mlx-lm loads, and adapters by mlx-lm itself, for the tests that hold ours against it.

transformers 5 writes configs without some fields that mlx-lm asks for: these are put back as configs on the hub have
them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lib.models import tiny

# What fields mlx-lm's dataclass asks for may be called in a config of transformers 5, and what they are without one
CALLED = {
    "num_layers": ("num_hidden_layers",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_local_experts": ("num_experts",),
    "n_routed_experts": ("num_experts",),
    "block_dim": ("hidden_size",),
    "n_shared_experts": ("num_shared_experts",),
    "num_experts_per_tok": ("top_k", "num_experts_per_token"),
    "rotary_dim": ("head_dim",),
    "shared_intermediate_size": ("intermediate_size",),
}
ELSE = {
    "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "rope_scaling": None, "rope_traditional": False,
    "mlp_bias": False, "post_norm": True, "qk_norm": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "layer_norm_epsilon": 1e-5, "n_ctx": 128, "moe_layer_freq": 1, "rotary_pct": 0.25,
    "rotary_emb_base": 10000, "tie_word_embeddings": False,
}  # fmt: skip
# model type -> fields of its config, or of the config of its text, that no rule gives
_GLOBAL = {"global_head_dim": 16, "num_global_key_value_heads": 2}
_YARN = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0}
FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"rope_scaling": {**_YARN, "beta_fast": 32, "beta_slow": 1}},
    "exaone4": {"sliding_window_pattern": "LG", "sliding_window": 16},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "gemma3": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 2},
    **dict.fromkeys(("gemma4", "gemma4_text"), _GLOBAL),
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "llama4": {"num_experts_per_tok": 1, "num_local_experts": 4},
    "mamba2": {"intermediate_size": 128},
    **{each: {"full_attention_interval": 2} for each in ("qwen3_5", "qwen3_5_moe", "qwen3_next")},
    "qwen3_vl_moe": {"num_experts": 4, "rope_theta": 10000.0, "norm_topk_prob": True, "rope_scaling": None},
}
# model type of a config -> what `tiny` has to make it with
MADE_WITH: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        **_GLOBAL, "per_layer_config": {}, "head_dim": 16, "hidden_size_per_layer_input": 64, "enable_moe_block": True,
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48,
    },
    "gpt_neox": {"intermediate_size": 256},
    "llama4_text": {
        "num_experts_per_tok": 1, "num_local_experts": 4, "moe_layers": [1], "interleave_moe_layer_step": 2,
        "intermediate_size": 96, "intermediate_size_mlp": 80,
    },
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
}  # fmt: skip


def make_base(table: str, model_type: str, folder: Path) -> Path:
    """Write a small model as the hub has it, which mlx-lm loads."""
    import torch
    from mlx_lm import utils

    with pytest.MonkeyPatch.context() as patch:
        for name, fields in MADE_WITH.items():
            patch.setitem(tiny.FIELDS, name, {**tiny.FIELDS.get(name, {}), **fields})
        _, model = tiny.build(table, model_type)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    tensors = as_on_the_hub(model_type, load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text.update(FIELDS.get(model_type, {}))
    _, arguments = utils._get_classes(config)
    fill(config, arguments)
    if text is not config:
        of_text = [each for each in vars(sys.modules[arguments.__module__]).values() if is_arguments(each)]
        with suppress(ValueError):
            of_text.append(utils._get_classes(text)[1])
        for each in of_text:
            fill(text, each)
        for key in ("tie_word_embeddings", "vocab_size"):
            config[key] = text[key] = config.get(key, text.get(key))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_on_the_hub(model_type: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors that transformers saved as the hub's files have them, where these differ and mlx-lm minds."""
    import torch

    if model_type == "gpt2":  # has no prefix
        return {name.removeprefix("transformer."): W for name, W in tensors.items() if "lm_head" not in name}
    if model_type == "qwen3_vl_moe":  # has stacks (expert, in, out), and its head
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
        stacks = ("experts.gate_up_proj", "experts.down_proj")
        return {name: W.mT.contiguous() if name.endswith(stacks) else W for name, W in tensors.items()}
    if model_type == "qwen3_5_moe":  # has stacks
        found: dict[str, list[Any]] = {}
        for name in [name for name in tensors if re.search(r"experts\.\d+\.", name)]:
            found.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(tensors.pop(name))
        stacked = {name.removesuffix(".weight"): torch.stack(each) for name, each in found.items()}
        for name in [name for name in stacked if name.endswith("gate_proj")]:
            up = stacked.pop(name.replace("gate_proj", "up_proj"))
            stacked[name.replace("gate_proj", "gate_up_proj")] = torch.cat([stacked.pop(name), up], 1)
        return {**tensors, **stacked}
    return tensors


def is_arguments(each: Any) -> bool:
    return isinstance(each, type) and each.__name__ in ("TextArgs", "TextConfig", "TextModelArgs")


def fill(config: dict[str, Any], arguments: Any) -> None:
    """Add the fields that mlx-lm's dataclass asks for and the config does not have."""
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    rope = next((each for each in rope.values() if isinstance(each, dict)), rope)
    for each in dataclasses.fields(arguments):
        needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if config.get(each.name) is not None:
            continue
        if each.name in rope:
            config[each.name] = rope[each.name]
        elif each.name == "head_dim" and needed:
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        elif needed:
            others = (config[name] for name in CALLED.get(each.name, ()) if name in config)
            found = next(others, ELSE.get(each.name, dataclasses.MISSING))
            if found is not dataclasses.MISSING:
                config[each.name] = found


def train(base: Path, folder: Path, kind: str = "lora", keys: list[str] | None = None) -> Path:
    """Let mlx-lm wrap a model and save its adapter, with random numbers in place of trained ones."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    model = loaded(base)
    model.freeze()
    lora = {"rank": 3, "scale": 10.0, "dropout": 0.0, **({"keys": keys} if keys else {})}
    if kind == "full":
        for layer in model.layers:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, -1, lora, use_dora=kind == "dora")
    moved = {
        name: value * 1.1 if name.endswith(".m") else value * (kind == "full") + mx.random.normal(value.shape) * 0.1
        for name, value in tree_flatten(model.trainable_parameters())
    }
    model.update(tree_unflatten(list(moved.items())))
    folder.mkdir(parents=True)
    saved = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), saved)
    config = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return model


def fused(base: Path, adapter: Path, dequantize: bool = False) -> Any:
    """Return the model with an adapter, which mlx-lm's own loader has taken, added to its weights."""
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import dequantize_model

    model = loaded(base)
    load_adapters(model, str(adapter))
    wrapped = [(name, each.fuse(dequantize=True)) for name, each in model.named_modules() if hasattr(each, "fuse")]
    model.update_modules(tree_unflatten(wrapped))
    return dequantize_model(model) if dequantize else model


def numbers(model: Any) -> dict[str, Any]:
    """Return the parameters as float32 arrays of numpy."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(model.parameters())}


def answers(model: Any) -> Any:
    """Return what a model says of a few tokens."""
    import mlx.core as mx
    import numpy as np

    return np.array(model(mx.array([[3, 5, 7, 11]])).astype(mx.float32))
