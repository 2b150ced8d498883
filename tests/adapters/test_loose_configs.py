"""Read adapter configs as tools and old PEFT wrote them: whole ranks as floats, flags as numbers, few fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft

import loratool
from loratool.adapters.formats import open_adapter
from loratool.errors import InputError

MODULE = "model.layers.0.self_attn.q_proj"

OLD = {"base_model_name_or_path": "org/base", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
       "lora_alpha": 4, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 2,
       "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip

# as PEFT 0.1 and 0.3 wrote them, and as tools write what Python takes for a number or a flag
CONFIGS = {
    "0.1": {**OLD, "enable_lora": None, "merge_weights": False},
    "0.3": {**OLD, "init_lora_weights": True},
    "few fields": {"peft_type": "LORA", "lora_alpha": 4, "r": 2},
    "floats": {**OLD, "r": 2.0, "lora_alpha": 4.0, "rank_pattern": {"q_proj": 2.0}},
    "numbers for flags": {**OLD, "use_rslora": 0, "fan_in_fan_out": 0, "use_dora": 0},
}


def adapter_at(folder: Path, config: Any) -> Path:
    write_peft(folder, {MODULE: factors(8, 8, 2)})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_it_means_what_it_says(tmp_path: Path, name: str) -> None:
    W, (A, B) = weights(8, 8), factors(8, 8, 2)
    base = write_model(tmp_path / "base", {f"{MODULE}.weight": W}, {"model_type": "llama"})
    adapter = adapter_at(tmp_path / "style", CONFIGS[name])
    assert open_adapter(adapter).config.rank == 2
    loratool.merge(base, adapter, tmp_path / "out")
    expected = (W.double() + 2 * B.double() @ A.double()).float()
    assert torch.equal(load_model(tmp_path / "out")[f"{MODULE}.weight"], expected)


def test_what_is_written_of_it_loads_in_peft(tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = adapter_at(tmp_path / "style", CONFIGS["floats"] | {"use_rslora": 1})
    loratool.convert(adapter, tmp_path / "out", to="peft")
    written = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert type(written.r) is int and written.use_rslora is True
    assert all(type(rank) is int for rank in written.rank_pattern.values())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("r", 2.5, "sets r to 2.5, which is not a whole number"),
        ("r", "2", "sets r to '2', which is not a whole number"),
        ("lora_alpha", "4", "sets lora_alpha to '4', which is not a number"),
        ("lora_alpha", [1] * 999, "sets lora_alpha to"),
        ("use_rslora", "true", "neither true nor false"),
        ("use_rslora", 2, "neither true nor false"),
        ("rank_pattern", {"q_proj": "2"}, "rank_pattern"),
    ],
)
def test_what_peft_cannot_take_is_refused_with_its_value(tmp_path: Path, field: str, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        open_adapter(adapter_at(tmp_path / "style", {**OLD, field: value}))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [8.5, True, {"a": 1}, ["a"], "a\nb", "\x1b[31m", ""])
def test_a_base_that_is_no_name_is_none(tmp_path: Path, run: Callable[..., Any], value: Any) -> None:
    adapter = adapter_at(tmp_path / "style", {**OLD, "base_model_name_or_path": value})
    assert open_adapter(adapter).config.base_model is None
    result = run("inspect", adapter)
    assert result.exit_code == 0 and "\x1b" not in result.stdout


def test_a_config_that_names_no_method(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its adapter_config.json does not name a peft_type"):
        open_adapter(adapter_at(tmp_path / "style", {}))
