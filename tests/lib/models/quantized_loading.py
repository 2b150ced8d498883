"""Write tiny quantized checkpoints with the formats' own software, and load folders on transformers' quantized path.

The path matters: where transformers decodes on loading, a wrong skip list goes unnoticed. On a machine without a GPU it
decodes fp8, unless its check of the machine is off; loading itself needs no kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
# Of one weight under its module's path: the tensors that it is stored in.
Encoder = Callable[[str, Tensor], Tensors]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 320}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False}
FP8_MAX = 448.0


def tiny_llama(**fields: Any) -> Any:
    return _model("LlamaForCausalLM", "LlamaConfig", **fields)


def tiny_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [0]}
    return _model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", decoder_sparse_step=1, **experts)


def tiny_llava() -> Any:
    """A multimodal model whose files and modules have other names."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    text = transformers.LlamaConfig(**SIZES, **HEADS)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=128)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=300)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()


def _model(cls: str, config: str, **fields: Any) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    made = getattr(transformers, cls)(getattr(transformers, config)(**{**SIZES, **HEADS, **fields}))
    return made.to(torch.bfloat16).eval()


def fp8_blocks(module: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True) / FP8_MAX
    codes = (blocks / scale).to(torch.float8_e4m3fn).reshape(rows, columns)
    return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale[:, 0, :, 0].contiguous()}


def fp8_channels(module: str, weight: Tensor) -> Tensors:
    scale = weight.float().abs().amax(1, keepdim=True) / FP8_MAX
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale.to(torch.bfloat16)}


def int4_groups(module: str, weight: Tensor) -> Tensors:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    groups = weight.float().reshape(weight.shape[0], -1, 32)
    scale = groups.abs().amax(2, keepdim=True) / 7.5
    codes = (groups / scale).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
    return {
        f"{module}.weight_packed": pack_to_int32(codes, 4),
        f"{module}.weight_scale": scale[..., 0].to(torch.bfloat16),
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }


def nf4(module: str, weight: Tensor) -> Tensors:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return {f"{module}.weight": codes, **{f"{module}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}}


def _compressed(format: str, **weights: Any) -> dict[str, Any]:
    scheme = {"symmetric": True, "dynamic": False, "observer": "minmax", **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    if format == "float-quantized":
        dynamic = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
        group["input_activations"] = dynamic
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_skip_modules": None,
}

# name -> (encoder, quantization config of a checkpoint that it coded)
METHODS: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "fp8": (
        fp8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "compressed-tensors int4": (
        int4_groups,
        _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "compressed-tensors fp8": (
        fp8_channels,
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "bitsandbytes nf4": (nf4, _NF4),
}

PACKAGES = {
    "fp8": "accelerate",
    "compressed-tensors int4": "compressed_tensors",
    "compressed-tensors fp8": "compressed_tensors",
    "bitsandbytes nf4": "bitsandbytes",
}


def require(method: str) -> None:
    """Skip the test if the package that transformers reads this method with is not installed."""
    pytest.importorskip(PACKAGES[method], reason=f"{PACKAGES[method]} is not installed")


def linear_modules(tensors: Collection[str]) -> list[str]:
    """The linear layers of the language model's blocks, routers left out, as a file names them."""
    ends = tuple(f".{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down"))
    return [name.removesuffix(".weight") for name in tensors if name.endswith(ends) and "vision" not in name]


def write_coded(model: Any, folder: Path, method: str, **declared: Any) -> tuple[Tensors, list[str]]:
    """Write a model with its linear layers coded; return its tensors before, and the modules that were coded.

    `declared` are more fields of the quantization config.
    """
    model.save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    encode, fields = METHODS[method]
    modules = linear_modules(plain)
    stored = {name: tensor for name, tensor in plain.items() if name.removesuffix(".weight") not in modules}
    for module in modules:
        stored |= encode(module, plain[f"{module}.weight"])
    save(stored, folder)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, {**config, "quantization_config": {**fields, **declared}})
    return plain, modules


def save(tensors: Tensors, folder: Path, metadata: dict[str, str] | None = None) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt", **(metadata or {})})


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def make_plain(folder: Path, modules: Collection[str], plain: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Put the plain weights of some modules into the place of their codes and companions."""
    stored = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not any(name.startswith(f"{m}.") for m in modules)}
    save({**kept, **{f"{module}.weight": plain[f"{module}.weight"] for module in modules}}, folder, metadata)


def load_quantized(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a folder in transformers with its weights coded; return the model and the missing and unexpected keys."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # the report of the keys is what is returned
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    with patch.object(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None):
        return getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)


def loading_faults(folder: Path) -> list[str]:
    """Return every key that is missing, unexpected or of another shape when transformers loads a folder."""
    _, info = load_quantized(folder)
    return sorted(str(key) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[what])
