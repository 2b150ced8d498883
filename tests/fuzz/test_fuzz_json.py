"""Hold every command against JSON files of models and adapters with wrong types, numbers, encodings and nesting."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from damages import VALUES, damaged_bytes
from fuzzing import Case, Fuzzer
from lies import find, lie, places
from safetensors.torch import save
from torch import Tensor
from valid_files import COMMANDS, LLAMA, PEFT, as_json, everything, factors, tensors

pytestmark = pytest.mark.fuzz

# Fields beside those of the valid files, whose values decide something
CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"tie_word_embeddings": True},
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4], "modules_to_not_convert": ["x"]}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
    {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
                             "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}},
    {"quantization": {"group_size": 32, "bits": 4}},
    {"model_type": "llava", "text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model"}},
    {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0}, "num_labels": 2, "problem_type": None},
    {"auto_map": {"AutoModel": "modeling.Model"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"model_type": "mixtral", "num_local_experts": 2, "head_dim": 4, "sliding_window": None},
)  # fmt: skip
ADAPTERS: tuple[dict[str, Any], ...] = (
    {},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"^.*v_proj$": 8}},
    {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]},
    {"target_modules": "all-linear", "exclude_modules": ".*", "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_parameters": ["mlp.experts.gate"], "init_lora_weights": "pissa", "use_rslora": True},
    {"layer_replication": [[0, 1]], "megatron_config": {}, "auto_mapping": {"base_model_class": "Llama"}},
    {"peft_type": "IA3", "feedforward_modules": ["q_proj"]},
    {"peft_type": "ADALORA", "init_r": 2, "target_r": 2},
    {"peft_type": "VERA", "d_initial": 0.1, "projection_prng_key": 0, "save_projection": True},
    {"peft_type": "LOKR", "rank_dropout": 0.0, "decompose_both": False},
)  # fmt: skip
PIPELINE = {
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "_diffusers_version": "1",
    "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"], "requires_safety_checker": False,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "cross_attention_dim": 768,
    "block_out_channels": [320],
}
PIPELINE_COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("inspect", "pipe"): (),
    ("inspect", "pipe", "--json"): (),
    ("convert", "pipe", "-o", "out"): ("out",),
    ("merge", "pipe", "adapter", "-o", "out"): ("out",),
}

# From PEFT's names of factors to those of diffusers, cloneofsimo, llama.cpp and kohya: an expression, what it becomes
SPELLINGS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    ("^$", ""),
    (r"base_model\.model\.model\.layers", "unet.down_blocks"),
    (r".*\.([qv])_proj\.lora_([AB])\.weight", lambda m: f"unet:{'qv'.index(m[1])}:{'down' if m[2] == 'A' else 'up'}"),
    (r".*\.([qv])_proj\.lora_([AB])\.weight", lambda m: f"blk.0.attn_{m[1]}.weight.lora_{m[2].lower()}"),
    (r".*\.([qv])_proj\.lora_([AB])", lambda m: f"lora_unet_{m[1]}.lora_{'down' if m[2] == 'A' else 'up'}"),
)
# Metadata of files of weights that are JSON
METADATA: dict[str, Any] = {
    "loratool": {"verb": "merge", "arithmetic": 2, "adapter_config": PEFT, "adapters": [{"name": "x", "weight": 1.0}]},
    "lora_adapter_metadata": {f"unet.{field}": value for field, value in PEFT.items()},
    "unet": ["CrossAttention", "GEGLU"],
    "text_encoder": ["CLIPAttention"],
    "gguf": {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"},
    "_quantization_metadata": {"format_version": "1.0", "layers": {"lm_head": {"format": "float8_e4m3fn"}}},
    "tensor_names": ["lm_head.weight"],
    "lm_head.weight": {"_type": "Tensor"},
    "ss_tag_frequency": {"a": {"b": 1}},
    "ss_network_args": {"algo": "lora", "conv_dim": 4},
}

NOT_OBJECTS = (
    b"",
    b"\0",
    b"null",
    b"[]",
    b'"x"',
    b"5",
    b"{",
    b"}",
    b"{}",
    b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf",
    b"<html>",
)
DEEP = (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 100_000, b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}")


def at_a_place(rng: random.Random, value: Any, text: str) -> bytes:
    """Return the JSON of a value with a text, which may be none, in the place of one of its fields."""
    found = json.loads(json.dumps(value))
    *above, key = rng.choice([*places(found)])
    find(found, above)[key] = "\x01"
    return json.dumps(found).replace('"\\u0001"', text).encode()


def with_a_name_twice(rng: random.Random, value: Any) -> bytes:
    if isinstance(value, list):
        return as_json(value * 2)
    name = rng.choice(list(value))
    return json.dumps(value)[:-1].encode() + b", " + as_json({name: rng.choice((value[name], None, 5))})[1:]


DAMAGES: tuple[Callable[[random.Random, Any], bytes], ...] = (
    lambda rng, value: as_json(lie(value, rng)),
    lambda rng, value: as_json(lie(lie(value, rng) or {"a": 1}, rng)),
    lambda rng, value: as_json(lie(value, rng)),
    lambda rng, value: at_a_place(rng, value, rng.choice(VALUES)),
    lambda rng, value: at_a_place(rng, value, rng.choice(VALUES)),
    with_a_name_twice,
    lambda rng, value: damaged_bytes(rng, as_json(value)),
    lambda rng, value: rng.choice((*NOT_OBJECTS, *DEEP)),
    lambda rng, value: json.dumps(value).encode(rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7"))),
)


def make_case(rng: random.Random) -> Case:
    """Return a case of one of the JSON files of a model or an adapter."""
    files = everything(shards=rng.random() < 0.5)
    files["base/config.json"] = as_json({**LLAMA, **rng.choice(CONFIGS)})
    files["adapter/adapter_config.json"] = as_json({**PEFT, **rng.choice(ADAPTERS)})
    target = rng.choice([name for name in files if name.endswith(".json")])
    if rng.random() < 0.6:
        target = rng.choice(
            [name for name in files if name.endswith(("/config.json", "adapter_config.json", "index.json"))]
        )
    files[target] = rng.choice(DAMAGES)(rng, json.loads(files[target]))
    folder = target.partition("/")[0]
    argv, outputs = rng.choice([(argv, out) for argv, out in COMMANDS.items() if folder in argv])
    return Case(files, argv, outputs)


def make_pipeline(rng: random.Random) -> Case:
    """Return a case of the JSON files of a diffusers pipeline."""
    files = {name: data for name, data in everything().items() if name.startswith("adapter/")}
    jsons = {"pipe/model_index.json": PIPELINE, "pipe/unet/config.json": UNET, "pipe/scheduler/config.json": {"a": 1}}
    target = rng.choice(("pipe/model_index.json", *jsons))
    files |= {name: rng.choice(DAMAGES)(rng, v) if name == target else as_json(v) for name, v in jsons.items()}
    files["pipe/unet/diffusion_pytorch_model.safetensors"] = save(factors())
    argv, outputs = rng.choice(list(PIPELINE_COMMANDS.items()))
    return Case(files, argv, outputs)


def make_metadata(rng: random.Random) -> Case:
    """Return a case of JSON in the metadata of a file of weights."""
    files = everything()
    key, value = rng.choice(list(METADATA.items()))
    text = rng.choice(DAMAGES)(rng, value).decode("utf-8", "ignore")
    named = [renamed(old, new) for old, new in SPELLINGS]
    folder, found = rng.choice((*(("adapter", each) for each in named), ("base", tensors())))
    name = {"adapter": "adapter_model", "base": "model"}[folder]
    others = {other: json.dumps(METADATA[other]) for other in METADATA if rng.random() < 0.1}
    files[f"{folder}/{name}.safetensors"] = save(found, {"format": "pt", **others, key: text})
    if rng.random() < 0.7:
        files.pop("adapter/adapter_config.json")
    argv, outputs = rng.choice([(argv, out) for argv, out in COMMANDS.items() if folder in argv])
    return Case(files, argv, outputs)


def renamed(old: str, new: str | Callable[[re.Match[str]], str]) -> dict[str, Tensor]:
    """Return the adapter's factors under names of another format, as far as a change of a part makes them."""
    return {re.sub(old, new, name): tensor for name, tensor in factors().items()}


def test_json_files(fuzz: Fuzzer) -> None:
    fuzz(make_case, 6)


def test_json_of_pipelines(fuzz: Fuzzer) -> None:
    fuzz(make_pipeline, 5)


def test_json_of_metadata(fuzz: Fuzzer) -> None:
    fuzz(make_metadata, 4)
