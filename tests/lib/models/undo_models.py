"""Write small bases with adapters whose merges leave each kind of entry in an undo file."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import factors, weights, write_model, write_peft
from safetensors.torch import load_file, save_file


def write_resized(folder: Path) -> Path:
    """Write a vocabulary that the adapter cuts, so that rows are copied, and a tokenizer that it adds."""
    tensors = {"model.embed_tokens.weight": weights(24, 8), "model.x.weight": weights(6, 4), "model.n": torch.tensor(3)}
    write_model(folder / "base", tensors, {"model_type": "llama", "vocab_size": 24})
    adapter = write_peft(folder / "adapter", {"model.x": factors(6, 4, 2)}, modules_to_save=["embed_tokens"])
    own = load_file(adapter / "adapter_model.safetensors")
    own["base_model.model.model.embed_tokens.weight"] = weights(20, 8, seed=7)
    save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "tokenizer_config.json").write_text("{}")
    return folder


def write_torch(folder: Path) -> Path:
    (folder / "base").mkdir(parents=True)
    torch.save({"x.weight": weights(6, 4), "y.weight": weights(6, 4)}, folder / "base" / "pytorch_model.bin")
    (folder / "base" / "config.json").write_text("{}")
    write_peft(folder / "adapter", {"x": factors(6, 4, 2)})
    return folder


def write_replaced_codes(folder: Path) -> Path:
    """Write codes in whose place an adapter has numbers.

    Their scales take fewer bytes than they: an index that a forger hashes anew can exchange two tensors of one size,
    each with its hash, and nothing is left of the codes that were replaced to tell.
    """
    state = {"score.weight": weights(6, 4).to(torch.float8_e4m3fn), "score.weight_scale": torch.ones(6, 1).bfloat16()}
    write_model(folder / "base", state, {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})
    adapter = write_peft(folder / "adapter", {"x": factors(6, 4, 2)}, modules_to_save=["score"])
    save_file({"base_model.model.score.weight": weights(6, 4, seed=7)}, adapter / "adapter_model.safetensors")
    return folder


def write_deeper(folder: Path) -> Path:
    """Write two layers, and an adapter for a model that has each twice; it changes both copies of the first."""
    state = {f"model.layers.{i}.{name}.weight": weights(6, 4, seed=i) for i in range(2) for name in ("x", "y")}
    write_model(folder / "base", {**state, "model.z": weights(3)}, {"model_type": "llama", "num_hidden_layers": 2})
    modules = {f"model.layers.{i}.x": factors(6, 4, 2, seed=i) for i in range(3)}
    write_peft(folder / "adapter", modules, layer_replication=[[0, 2], [0, 2]])
    return folder


def write_mixed(folder: Path, dora: bool = False) -> Path:
    """Write weights of all float types that a merge changes, and one that it copies."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    types |= {"e4m3": torch.float8_e4m3fn} if not dora else {}
    state = {f"{name}.weight": weights(6, 20).to(dtype) for name, dtype in types.items()}
    write_model(folder / "base", {**state, "copied.weight": weights(3, 5)}, {"model_type": "llama"})
    adapter = write_peft(folder / "adapter", {name: factors(6, 20, 2) for name in types}, use_dora=dora)
    if dora:
        own = load_file(adapter / "adapter_model.safetensors")
        own |= {f"base_model.model.{name}.lora_magnitude_vector": weights(6).abs() + 1 for name in types}
        save_file(own, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_codes(folder: Path) -> Path:
    """Write two weights that are stored as codes, of which an adapter changes one."""
    state = {f"{name}.weight": weights(6, 20, seed=seed).to(torch.float8_e4m3fn) for seed, name in enumerate("xy")}
    state |= {f"{name}.weight_scale": torch.full((6, 1), 0.5).bfloat16() for name in "xy"}
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    write_model(folder / "base", {**state, "norm.weight": weights(4).bfloat16()}, config)
    write_peft(folder / "adapter", {"x": factors(6, 20, 2)})
    return folder
