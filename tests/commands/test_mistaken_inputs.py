"""Give models, adapters and configs in each other's places: each is known by its tensors, and the message names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import factors, load_model, weights, write_model, write_peft

import loratool
from loratool import InputError

Run = Callable[..., Any]

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
NAMES = ["model.embed_tokens.weight", *(f"model.layers.{i}.{m}.weight" for i in range(2) for m in ("q_proj", "v_proj"))]
STRAY = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "org/base"}


def model_at(folder: Path, stray: bool = False, shards: int = 1) -> Path:
    write_model(folder, {name: weights(8, 8, seed=i) for i, name in enumerate(NAMES)}, CONFIG, shards)
    if stray:
        (folder / "adapter_config.json").write_text(json.dumps(STRAY))
    return folder


def adapter_at(folder: Path, **config: Any) -> Path:
    return write_peft(
        folder, {"model.layers.0.q_proj": factors(8, 8, 2), "model.layers.1.v_proj": factors(8, 8, 2)}, **config
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_a_stray_adapter_config_makes_no_adapter_of_a_model(tmp_path: Path, shards: int) -> None:
    base, plain, adapter = model_at(tmp_path / "a", True, shards), model_at(tmp_path / "b"), adapter_at(tmp_path / "c")
    report = loratool.inspect(base)
    assert report.kind == "checkpoint" and report.tensors == 5
    assert any("adapter_config.json" in note for note in report.notes) and not loratool.inspect(plain).notes
    for source in (base, plain):
        loratool.merge(source, adapter, tmp_path / f"merged-{source.name}")
    one, two = (load_model(tmp_path / f"merged-{name}") for name in "ab")
    assert (
        all(one[name].equal(two[name]) for name in NAMES) and not (tmp_path / "merged-a/adapter_config.json").exists()
    )
    with pytest.raises(InputError, match="is a model, not an adapter"):
        loratool.merge(plain, base, tmp_path / "out")
    assert loratool.diff(base, plain).same


def test_an_adapter_beside_a_model_is_what_its_config_is_of(tmp_path: Path) -> None:
    folder = adapter_at(model_at(tmp_path / "a"))
    assert loratool.inspect(folder).kind == "adapter"
    loratool.merge(folder, folder, tmp_path / "merged")
    assert len(load_model(tmp_path / "merged")) == 5


def test_two_adapters_and_no_base(tmp_path: Path) -> None:
    one, two = adapter_at(tmp_path / "a", base_model_name_or_path="org/base"), adapter_at(tmp_path / "b")
    for other in (two, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="is an adapter, but the first argument must be the base model") as caught:
            loratool.merge(one, other, tmp_path / "out")
        assert caught.value.remedy == "its base is org/base"
