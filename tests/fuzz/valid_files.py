"""Make the valid files that fuzzers damage, by the official libraries, and list the commands that read them."""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "vocab_size": 16,
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GENERATION = {"bos_token_id": 1, "eos_token_id": [2], "do_sample": True, "temperature": 0.6, "_from_model_config": True}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "added_tokens": [{"id": 0, "content": "<unk>", "special": True, "single_word": False, "normalized": False}],
    "model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "a": 1, "b": 2}},
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "model_max_length": 512,
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}}, "chat_template": "{{ messages }}",
}  # fmt: skip
SIDE_FILES = {
    "generation_config.json": GENERATION,
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "special_tokens_map.json": {"unk_token": {"content": "<unk>", "lstrip": False}},
    "added_tokens.json": {"<extra>": 15},
    "vocab.json": {"a": 1, "b": 2},
}
PEFT = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"], "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
    "layers_to_transform": None, "layers_pattern": None, "layer_replication": None, "lora_bias": False,
    "target_parameters": None, "trainable_token_indices": None, "exclude_modules": None, "lora_dropout": 0.0,
    "inference_mode": True, "loftq_config": {}, "megatron_config": None, "eva_config": None, "revision": None,
}  # fmt: skip

# Command -> what it writes. `base` is a model, `adapter` one of it, `tuned` the model with the adapter in its weights.
COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("inspect", "base"): (),
    ("inspect", "adapter"): (),
    ("inspect", "adapter", "--base", "base"): (),
    ("inspect", "base", "--json"): (),
    ("merge", "base", "adapter", "-o", "out"): ("out",),
    ("merge", "base", "adapter", "-o", "out.safetensors"): ("out.safetensors", "out.undo"),
    ("merge", "base", "adapter", "--json", "-o", "out"): ("out",),
    ("convert", "base", "-o", "out"): ("out",),
    ("convert", "base", "--to", "torch", "-o", "out"): ("out",),
    ("convert", "adapter", "--to", "peft", "--plain", "-o", "out"): ("out",),
    ("convert", "adapter", "--for", "vllm", "--base", "base", "-o", "out"): ("out",),
    ("extract", "base", "tuned", "--rank", "2", "-o", "out"): ("out",),
    ("verify", "base", "adapter", "tuned"): (),
    ("diff", "base", "tuned"): (),
    ("diff", "base", "tuned", "--headers"): (),
    ("diff", "adapter", "adapter", "--base", "base"): (),
    ("resize", "adapter", "--rank", "1", "-o", "out"): ("out",),
    ("combine", "adapter", "adapter", "-o", "out"): ("out",),
    ("init", "base", "--rank", "2", "-o", "out"): ("out",),
    ("count", "base"): (),
    ("demo", "out"): ("out",),
}


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@cache
def tensors() -> dict[str, Tensor]:
    """Return a llama's weights."""
    width, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.{each}_proj.weight": (width, width) for each in "qkvo"}
    shapes |= {f"{layer}.mlp.{each}_proj.weight": (inner, width) for each in ("gate", "up")}
    shapes |= {f"{layer}.{each}_layernorm.weight": (width,) for each in ("input", "post_attention")}
    shapes |= {f"{layer}.mlp.down_proj.weight": (width, inner), "model.norm.weight": (width,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (LLAMA["vocab_size"], width))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


@cache
def factors() -> dict[str, Tensor]:
    """Return the factors of a PEFT adapter of rank 2."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for module in PEFT["target_modules"]:
        prefix = f"base_model.model.model.layers.0.self_attn.{module}"
        made[f"{prefix}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
        made[f"{prefix}.lora_B.weight"] = torch.randn(8, 2, generator=generator) / 256
    return made


@cache
def tuned_tensors() -> dict[str, Tensor]:
    """Return the llama's weights with the adapter in them."""
    made = dict(tensors())
    for name, A in factors().items():
        if name.endswith(".lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            made[weight] = made[weight] + 2 * factors()[name.replace("lora_A", "lora_B")] @ A
    return made


def torch_bytes(value: Any, zipped: bool = True, **options: Any) -> bytes:
    """Return what torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped, **options)
    return stream.getvalue()


@cache
def model(folder: str, tuned: bool = False) -> dict[str, bytes]:
    """Return a model's folder."""
    files = {f"{folder}/{name}": as_json(value) for name, value in {"config.json": LLAMA, **SIDE_FILES}.items()}
    weights = save(tuned_tensors() if tuned else tensors(), {"format": "pt"})
    return {**files, f"{folder}/model.safetensors": weights}


@cache
def sharded(folder: str) -> dict[str, bytes]:
    """Return the model's folder with two shards and an index."""
    names = list(tensors())
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    files = {
        f"{folder}/{file}": save({name: tensors()[name] for name in part}, {"format": "pt"})
        for file, part in parts.items()
    }
    weight_map = {name: file for file, part in parts.items() for name in part}
    total = sum(tensor.nbytes for tensor in tensors().values())
    files[f"{folder}/model.safetensors.index.json"] = as_json(
        {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    plain = {name: data for name, data in model(folder).items() if not name.endswith("model.safetensors")}
    return {**plain, **files}


@cache
def adapter(folder: str) -> dict[str, bytes]:
    """Return a PEFT adapter's folder."""
    weights = save(factors(), {"format": "pt"})
    return {f"{folder}/adapter_config.json": as_json(PEFT), f"{folder}/adapter_model.safetensors": weights}


def everything(*, shards: bool = False) -> dict[str, bytes]:
    """Return a working folder for every one of COMMANDS."""
    base = sharded("base") if shards else model("base")
    return {**base, **adapter("adapter"), **model("tuned", tuned=True)}
