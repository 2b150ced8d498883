"""Read optimum-quanto's weights by hand, keep its map of modules true, and refuse weights whose shape none says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lib.files.one_weight import codec_of, only, random_bytes, stored
from lib.models.coded_models import files_of, numbers_of, write_adapter, write_base
from safetensors.torch import load_file

import loratool
from loratool import InputError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def test_low_bits_are_of_the_first_rows(tmp_path: Path) -> None:
    tensors = {
        "x.weight._data._data": torch.tensor([[0x21, 0x43]], dtype=torch.uint8),
        "x.weight._scale": torch.tensor([[0.5], [2.0]]),
        "x.weight._shift": torch.tensor([[1.0], [-1.0]]),
    }
    assert stored(tmp_path, tensors)["x.weight"].tolist() == [[-0.5, 0.5], [5.0, 9.0]]
    whole = {**tensors, "x.weight._shift": torch.tensor([[1], [-1]], dtype=torch.int8)}
    assert stored(tmp_path, whole)["x.weight"].tolist() == [[0.0, 1.0], [6.0, 10.0]]


def grouped(bias: int | None) -> dict[str, torch.Tensor]:
    tensors = {
        "x.weight._data._data": random_bytes(4, 64),
        "x.weight._scale": torch.rand(8, 1),
        "x.weight._shift": torch.rand(8, 1),
    }
    return tensors if bias is None else {**tensors, "x.bias": torch.rand(bias)}


def test_a_bias_says_the_shape_of_groups(tmp_path: Path) -> None:
    assert stored(tmp_path, grouped(2))["x.weight"].shape == (2, 256)
    assert stored(tmp_path, grouped(8))["x.weight"].shape == (8, 64)


@pytest.mark.parametrize("bias", [None, 0, 3, 16])
def test_groups_without_a_shape_are_refused(bias: int | None, tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, grouped(bias))
    assert "no tensor says its shape" in checkpoint.faults["x.weight._data._data"]


def test_bits_beyond_the_last_group_are_damage(tmp_path: Path) -> None:
    tensors = {
        "x.weight._data._data": torch.full((2, 20), 0x11, dtype=torch.uint8),
        "x.weight._scale": torch.ones(3, 1),
        "x.weight._shift": torch.ones(3, 1),
    }
    parts = only(stored(tmp_path, tensors))
    with pytest.raises(InputError, match="bits beyond its codes"):
        codec_of(parts).check(parts)


@pytest.mark.parametrize("way", ["mixed", "dequantize"])
def test_the_map_has_the_modules_that_are_codes(way: str, tmp_path: Path) -> None:
    base = write_base("quanto_int4", tmp_path / "base")
    adapter, _ = write_adapter(tmp_path / "adapter", {f"{Q}.weight": numbers_of(base)[f"{Q}.weight"]})
    loratool.merge(base, adapter, tmp_path / "out", quantized=way)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    place = tmp_path / "out" / "quantization_map.json"
    if way == "mixed":
        assert json.loads(place.read_text()).keys() == {DOWN, "conv"}
        assert f"{Q}.weight" in names and f"{Q}.input_scale" not in names and f"{DOWN}.input_scale" in names
    else:
        assert not place.exists() and not [name for name in names if "scale" in name or "_data" in name]
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


@pytest.mark.slow
def test_quanto_loads_a_mixed_model(tmp_path: Path) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    base = write_base("quanto_int4", tmp_path / "base")
    adapter, _ = write_adapter(tmp_path / "adapter", {f"{Q}.weight": numbers_of(base)[f"{Q}.weight"]})
    loratool.merge(base, adapter, tmp_path / "out")
    model = torch.nn.Module()
    for name, layer in ((Q, torch.nn.Linear(64, 12)), (DOWN, torch.nn.Linear(20, 7, bias=False))):
        model.add_module(name.replace(".", "_"), layer)
    model.add_module("conv", torch.nn.Conv2d(4, 8, 3, bias=False))
    spelled = {Q: Q.replace(".", "_"), DOWN: DOWN.replace(".", "_"), "conv": "conv"}
    state = load_file(tmp_path / "out" / "model.safetensors")
    renamed = {
        new + k.removeprefix(old): v for k, v in state.items() for old, new in spelled.items() if k.startswith(old)
    }
    modules = json.loads((tmp_path / "out" / "quantization_map.json").read_text())
    quanto.requantize(model, renamed, {spelled[name]: kinds for name, kinds in modules.items()})
    assert type(model.get_submodule(spelled[Q])) is torch.nn.Linear
    assert torch.equal(model.get_submodule(spelled[Q]).weight, state[f"{Q}.weight"])
    number = numbers_of(base)[f"{DOWN}.weight"]
    assert torch.allclose(model.get_submodule(spelled[DOWN]).weight.dequantize().double(), number, atol=1e-3)
