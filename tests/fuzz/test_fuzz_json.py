"""Hold every command against JSON files of models and adapters with wrong types, numbers, encodings and nesting."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from damages import VALUES, damaged_bytes
from fuzzing import Case, Fuzzer
from lies import find, lie, places
from safetensors.torch import save
from valid_files import COMMANDS, LLAMA, PEFT, as_json, everything, factors

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


def test_json_files(fuzz: Fuzzer) -> None:
    fuzz(make_case, 25)


def test_json_of_pipelines(fuzz: Fuzzer) -> None:
    fuzz(make_pipeline, 8)
