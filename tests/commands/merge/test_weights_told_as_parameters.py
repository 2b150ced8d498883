"""A module that PEFT takes for experts stays the parameter `<module>.weight`, whatever is done to its adapter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import factors, write_peft
from lib.models.tiny import build
from safetensors.torch import load_file

import loratool

pytestmark = pytest.mark.filterwarnings("ignore")
DENSE, PLAIN = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
VERBS: dict[str, Callable[[Path, Path], object]] = {
    "combine": lambda source, out: loratool.combine([(source, 0.5), (source, 0.5)], out),
    "resize": lambda source, out: loratool.resize(source, out, rank=4),
    "convert --plain": lambda source, out: loratool.convert(source, out, to="peft", plain=True),
}


@pytest.mark.parametrize("verb", VERBS)
def test_peft_loads_it_and_changes_the_module(verb: str, tmp_path: Path) -> None:
    from peft import PeftModel

    _, model = build("causal", "deepseek_v3")
    pairs = {DENSE: factors(64, 96, 3), PLAIN: factors(64, 64, 2)}
    source = write_peft(
        tmp_path / "a", pairs, r=2, lora_alpha=4, rank_pattern={rf"^{DENSE}.weight": 3}, target_modules=[PLAIN],
        target_parameters=["layers.0.mlp.down_proj.weight"],
    )  # fmt: skip
    VERBS[verb](source, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"{DENSE}.weight"] and config["target_modules"] == [PLAIN]
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b")
    result = wrapped.load_adapter(tmp_path / "b", "again")
    assert not result.missing_keys and not result.unexpected_keys
    wrapped.delete_adapter("again")
    found = wrapped.merge_and_unload()
    for module, rank in ((DENSE, 3), (PLAIN, 2)):
        A, B = pairs[module]
        change = found.get_submodule(module).weight - model.get_submodule(module).weight
        assert torch.allclose(change, 4 / rank * B @ A, atol=1e-4)


def test_it_stays_one_beside_modules_that_are_fused(tmp_path: Path) -> None:
    ends = ("mlp.down_proj", *(f"self_attn.{each}_proj" for each in "qkv"))
    pairs = {f"model.layers.0.{end}": factors(8, 8, 2) for end in ends}
    target = [f"{DENSE}.weight"]
    source = write_peft(tmp_path / "a", pairs, target_modules=[*pairs][1:], target_parameters=target)
    loratool.convert(source, tmp_path / "b", to="peft", layout="fused")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_parameters"] == target and config["target_modules"] == ["model.layers.0.self_attn.qkv_proj"]


def test_stacks_that_are_weights_of_modules_are_combined(tmp_path: Path) -> None:
    """jetmoe's: each is in a module of its own, so that PEFT nests nothing."""
    owner = "model.layers.0.mlp"
    pairs = {f"{owner}.input_linear": factors(12, 8, 6), f"{owner}.output_linear": factors(8, 12, 6)}
    target = sorted(f"{name}.weight" for name in pairs)
    fields = {"r": 2, "lora_alpha": 2, "target_modules": [], "target_parameters": target, "peft_version": "0.21.2"}
    source = write_peft(tmp_path / "a", pairs, **fields)
    loratool.combine([source, source], tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_parameters"] == target and config["r"] == 4
    shapes = {name: tuple(W.shape) for name, W in load_file(tmp_path / "b" / "adapter_model.safetensors").items()}
    assert shapes[f"base_model.model.{owner}.input_linear.lora_A.weight"] == (12, 8)
    assert shapes[f"base_model.model.{owner}.output_linear.lora_B.weight"] == (8, 12)
