"""Build small models with random weights, and adapters of all their linear layers, for the tests of GGUF's names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lib.models import tiny
from lib.oracles import llama_cpp

# model type -> what its config has to be made with, so that llama.cpp's converter takes it
GIVEN: dict[str, dict[str, Any]] = {"falcon": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}}

# Case -> its model type and fields of its config, if the type is of several architectures or of one in several forms
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoehybrid dense": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "granitemoehybrid attention": (
        "granitemoehybrid",
        {"num_local_experts": 0, "num_experts_per_tok": 0, "layer_types": ["full_attention"] * 2},
    ),
    "gemma3_text headless": ("gemma3_text", {}),
    "t5 encoder": ("t5", {}),
    "nemotron_h dense": ("nemotron_h", {"layers_block_type": ["linear_attention", "full_attention", "mlp"]}),
}


# Model type -> fields that its class or llama.cpp's converter needs at other values than `tiny` gives
FIELDS: dict[str, dict[str, Any]] = {
    "mamba": {"intermediate_size": 128},
    "falcon_mamba": {"intermediate_size": 128},
    "chameleon": {"num_key_value_heads": 4},
    "modernbert": {"decoder_bias": False},
    "eurobert": {"classifier_pooling": "mean"},
    "mt5": {"decoder_start_token_id": 0},
    "t5": {
        "decoder_start_token_id": 0,
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
        "feed_forward_proj": "gated-gelu",
    },
    "umt5": {"decoder_start_token_id": 0},
    "step3p5": {"num_sliding_attention_heads": 4},
}

# Cases without a head, as llama.cpp's converter takes them
HEADLESS = ("eurobert", "gemma3_text headless")

# Model types of which PEFT refuses `out_proj` (peft.utils.constants)
RECURRENT = frozenset("falcon_h1 mamba mamba2 falcon_mamba nemotron_h".split())


def build_model(case: str, folder: Path) -> Path:
    """Save a model of a type or a variant: all numbers are drawn, so that no two rows are alike."""
    import torch

    model_type, fields = VARIANTS.get(case, (case, {}))
    tiny.GIVEN.update(GIVEN)
    tables = [table for table, each in tiny.tables() if each == model_type]
    table = "masked" if "masked" in tables else tables[0]  # BERT's class of both is not llama.cpp's
    with patch.dict(
        tiny.FIELDS, {model_type: {**tiny.FIELDS.get(model_type, {}), **FIELDS.get(model_type, {}), **fields}}
    ):
        _, model = tiny.build(table, model_type)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    model = tiny.of_class("T5EncoderModel", model) if case == "t5 encoder" else model
    llama_cpp.save_model(model.base_model if case in HEADLESS else model, folder)
    as_on_the_hub(case, folder)
    return folder


def as_on_the_hub(case: str, folder: Path) -> None:
    """Write the config, or the experts, of some types as the files on the Hub have them, for which the converter is."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    if case.startswith("granitemoehybrid"):
        config["layer_types"] = [llama_cpp.HYBRID_KINDS[each] for each in config["layer_types"]]
    if case == "nemotron_h dense":
        del config["num_experts_per_tok"]
    if case in ("qwen3_vl_moe", "kimi_linear"):
        tensors = load_file(folder / "model.safetensors")
        if case == "qwen3_vl_moe":
            tensors |= {name: W.mT.contiguous() for name, W in tensors.items() if ".experts." in name}
        else:  # the first layer is dense
            tensors = {name.replace("layers.0.block_sparse_moe", "layers.0.mlp"): W for name, W in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def load_model(folder: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder)


def linear_layers(model: Any) -> list[str]:
    """Return the linear layers of the language model that GGUF has as one matrix each."""
    import torch
    from transformers.pytorch_utils import Conv1D

    text = model.config.get_text_config()
    tied = next((c.tie_word_embeddings for c in (text, model.config) if hasattr(c, "tie_word_embeddings")), False)
    # PEFT takes gate_proj, up_proj and down_proj of any module for the experts' too
    experts = ("mlp.", "feed_forward.", "self_attn.gate_proj") if tiny.stacks(model) else ()
    heads = ("lm_head", "decoder") if tied else ()
    # PEFT refuses these of recurrent layers, whose kernels do not call them
    kernels = ("out_proj",) if model.config.model_type in RECURRENT else ()
    left_out = (
        *experts,
        *heads,
        *kernels,
        "kv_b_proj",
        "altup",
        "aligner",
        "audio_tower",
        "generation_head",
        "visi",
        "visual",
        "projector",
        "predictions",
    )
    layers = [name for name, each in model.named_modules() if isinstance(each, (torch.nn.Linear, Conv1D))]
    return [name for name in layers if not any(part in name for part in left_out)]


def build_adapter(
    model: Any, folder: Path, modules: Iterable[str], parameters: Iterable[str] = (), **options: Any
) -> Path:
    """Save a PEFT adapter whose factors are drawn. parameters: the ends of the paths of stacks of experts."""
    import peft
    import torch

    chosen = {"r": 4, "lora_alpha": 8, **options}
    config = peft.LoraConfig(target_modules=sorted(modules), target_parameters=sorted(parameters) or None, **chosen)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder
