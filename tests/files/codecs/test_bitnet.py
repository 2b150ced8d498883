"""Read BitNet's ternary weights by hand, name what a merge into numbers makes of the model, and refuse norms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import load_model, write_model, write_peft
from lib.files.one_weight import codec_of, only, random_bytes, stored
from lib.models.coded_models import files_of, write_base
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import loratool

BITNET = {"quantization_config": {"quant_method": "bitnet"}}


def test_four_rows_of_a_byte(tmp_path: Path) -> None:
    """Code 3 is read as transformers reads it, and never chosen."""
    tensors = {"x.weight": torch.tensor([[0b11_10_01_00, 0b00_01_10_11]], dtype=torch.uint8)}
    checkpoint = stored(tmp_path, {**tensors, "x.weight_scale": torch.tensor([4.0])}, BITNET)
    assert checkpoint["x.weight"].tolist() == [[-0.25, 0.5], [0.0, 0.25], [0.25, 0.0], [0.5, -0.25]]
    parts = only(checkpoint)
    far = checkpoint["x.weight"].numpy() * 100
    assert codec_of(parts).nearest(parts, 0, far).tolist() == [[0, 2], [1, 2], [2, 1], [2, 0]]


def test_an_autobitlinear_multiplies(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}
    tensors = {"x.weight": torch.tensor([[0b10]], dtype=torch.uint8), "x.weight_scale": torch.tensor([4.0]).bfloat16()}
    assert stored(tmp_path, tensors, config)["x.weight"].tolist() == [[4.0], [-4.0], [-4.0], [-4.0]]


@pytest.mark.parametrize("how", ["config", "tensor"])
def test_layers_with_a_norm_are_refused(how: str, tmp_path: Path) -> None:
    tensors = {"x.weight": torch.zeros(1, 8, dtype=torch.uint8), "x.weight_scale": torch.ones(1)}
    tensors |= {"x.rms_norm.weight": torch.ones(8)} if how == "tensor" else {}
    config = {"quant_method": "bitnet", "use_rms_norm": how == "config"}
    checkpoint = stored(tmp_path, tensors, {"quantization_config": config})
    assert checkpoint.faults == {"x.weight": "its layer has a norm of its own, which plain layers do not have"}


@pytest.mark.parametrize("way", ["mixed", "dequantize"])
def test_numbers_make_another_model(way: str, tmp_path: Path) -> None:
    base = write_base("bitnet", tmp_path / "base")
    pair = torch.ones(2, 48), torch.ones(64, 2)
    adapter = write_peft(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": pair})
    report = loratool.merge(base, adapter, tmp_path / "out", quantized=way)
    assert any("it is another model than the base" in note for note in report.warnings)
    assert ("quantization_config" in json.loads((tmp_path / "out/config.json").read_text())) == (way == "mixed")
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def test_weights_that_are_rounded_when_they_run_are_named(tmp_path: Path) -> None:
    W = torch.rand(8, 4).bfloat16()
    config = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    base = write_model(tmp_path / "base", {"x.weight": W}, {"quantization_config": config})
    adapter = write_peft(tmp_path / "adapter", {"x": (torch.ones(2, 4), torch.ones(8, 2))})
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert any("round their weights to -1, 0 and 1" in note for note in report.warnings)


@pytest.mark.slow
def test_transformers_loads_what_is_mixed(tmp_path: Path) -> None:
    """Layers that are numbers are plain ones there, and the others keep their codes."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    state = {name: x.contiguous() for name, x in LlamaForCausalLM(config).bfloat16().state_dict().items()}
    for name in [name for name in state if name.endswith("proj.weight")]:
        state[name] = random_bytes(state[name].shape[0] // 4, state[name].shape[1]) & 0b10101010
        state[f"{name}_scale"] = torch.tensor([30.0]).bfloat16()
    quantization = {**BITNET["quantization_config"], "modules_to_not_convert": ["lm_head"]}
    told = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    base = write_model(tmp_path / "base", state, {**told, "quantization_config": quantization})
    adapter = write_peft(tmp_path / "adapter", {"model.layers.1.mlp.down_proj": (torch.rand(4, 64), torch.rand(32, 4))})
    loratool.merge(base, adapter, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert {name for name, kind in kinds.items() if kind == "Linear"} == {"model.layers.1.mlp.down_proj"}
    assert set(kinds.values()) == {"Linear", "BitLinear"}
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in load_model(tmp_path / "out").items())
