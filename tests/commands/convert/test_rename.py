"""Hold `convert --rename`: paths by patterns, and no two modules that become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, weights, write_peft
from lib.models.converted_sources import LANGUAGE
from safetensors.torch import load_file, save_file

import loratool
from loratool import InputError, UsageError
from loratool.transform.rename import new_paths

PATHS = [f"model.layers.{i}.self_attn.{name}" for i in (0, 12) for name in ("q_proj", "v_proj")]


@pytest.mark.parametrize(
    ("renames", "wanted"),
    [
        (["q_proj=wq"], {PATHS[0]: "model.layers.0.self_attn.wq", PATHS[2]: "model.layers.12.self_attn.wq"}),
        (["self_attn.q_proj=attn.q"], {PATHS[0]: "model.layers.0.attn.q", PATHS[2]: "model.layers.12.attn.q"}),
        (
            ["model.layers.*.self_attn.*_proj=h.*.attn.w*"],
            {
                PATHS[0]: "h.0.attn.wq",
                PATHS[1]: "h.0.attn.wv",
                PATHS[2]: "h.12.attn.wq",
                PATHS[3]: "h.12.attn.wv",
            },
        ),
        (["*.?.self_attn.v_proj=*.?.v"], {PATHS[1]: "model.layers.0.v"}),
        (
            [r"re:layers\.(\d+)\.self_attn\.v=blocks.\1.v"],
            {PATHS[1]: "model.blocks.0.v_proj", PATHS[3]: "model.blocks.12.v_proj"},
        ),
        (["v_proj=x", "q_proj=v_proj"], {p: p[:-6] + ("v_proj" if p[-6] == "q" else "x") for p in PATHS}),
    ],
)
def test_patterns(renames: list[str], wanted: dict[str, str]) -> None:
    assert new_paths(PATHS, renames) == {path: wanted.get(path, path) for path in PATHS}


@pytest.mark.parametrize(
    ("renames", "message"),
    [
        (["k_proj=wk"], "names no module"),
        (["q_proj=wq", "q_proj=x"], "names no module"),
        (["q_proj=v_proj"], "would both become this module"),
        (["re:[qv]_proj=w"], "would both become this module"),
        (["q_proj"], "is not PATTERN=PATH"),
        (["q_proj="], "is not PATTERN=PATH"),
        (["=q"], "is not PATTERN=PATH"),
        (["q_proj=a..b"], "not the path of a module"),
        (["q_proj=a b"], "not the path of a module"),
        (["q_proj=lora_magnitude_vector"], "not the path of a module"),
        (["re:self_attn=base_layer"], "not the path of a module"),
        (["q_proj=bias"], "not the path of a module"),
        (["re:(=x"], "is not an expression and its replacement"),
        ([r"re:q=\1"], "is not an expression and its replacement"),
        (["*.q_proj=*.*.q"], "is not an expression and its replacement"),
    ],
)
def test_what_stops(renames: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        new_paths(PATHS, renames)


def test_the_tensors_stay(tmp_path: Path) -> None:
    """All that PEFT saves of a module moves: factors, biases, magnitudes, trained copies, and the config's names."""
    path = "model.layers.0.self_attn.q_proj"
    start = write_peft(
        tmp_path / "a", {path: factors(8, 8, 2)}, use_dora=True, bias="all", modules_to_save=["lm_head"],
        rank_pattern={"q_proj": 2}, r=7, lora_alpha=14,
    )  # fmt: skip
    tensors = load_file(start / "adapter_model.safetensors")
    more = {f"{path}.lora_magnitude_vector": weights(8), f"{path}.base_layer.bias": weights(8, seed=2)}
    more |= {"lm_head.weight": weights(9, 8), "model.norm.bias": weights(8, seed=3)}
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in more.items()}
    save_file(tensors, start / "adapter_model.safetensors")
    renames = ["self_attn.q_proj=attn.wq", "lm_head=head"]
    report: Any = loratool.convert(start, tmp_path / "b", to="peft", rename=renames)
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    to = {name: name.replace("self_attn.q_proj", "attn.wq").replace("lm_head", "head") for name in tensors}
    assert found.keys() == {*to.values()} and all(torch.equal(found[to[name]], tensors[name]) for name in tensors)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    new = "model.layers.0.attn.wq"
    assert config["target_modules"] == [new] and config["modules_to_save"] == ["head"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 14, {})
    (row,) = report.modules
    assert (row.name, row.sources, row.how, row.rank, row.alpha) == (new, (path,), "exact", 2, 14)


def test_a_stack_keeps_its_last_name(tmp_path: Path) -> None:
    owner = "model.layers.0.mlp.experts"
    names = {"target_modules": [], "target_parameters": [f"{owner}.gate_up_proj"], "peft_version": "0.21.2"}
    start = write_peft(tmp_path / "a", {owner: (weights(6, 8), weights(24, 6))}, r=2, **names)
    loratool.convert(start, tmp_path / "b", to="peft", rename=["re:mlp=moe"])
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["model.layers.0.moe.experts.gate_up_proj"]
    with pytest.raises(UsageError, match="which has another last name"):
        loratool.convert(start, tmp_path / "c", to="peft", rename=["gate_up_proj=up"])


def test_exclude_goes_by_the_new_paths(tmp_path: Path) -> None:
    pairs = {path: factors(8, 8, 2) for path in PATHS}
    start = write_peft(tmp_path / "a", pairs)
    report: Any = loratool.convert(start, tmp_path / "b", to="peft", rename=["q_proj=wq"], exclude=["wq"])
    assert {row.name for row in report.modules} == {PATHS[1], PATHS[3]}


def test_other_kinds_and_image_models_are_refused(tmp_path: Path) -> None:
    start = FIXTURES / "sdxl" / "adapter.safetensors"
    with pytest.raises((InputError, UsageError)):
        loratool.convert(start, tmp_path / "b.safetensors", to="kohya", rename=["q=x"])
    for kind in ("ia3", "vera"):
        source = LANGUAGE[kind].write(tmp_path / kind)
        with pytest.raises(InputError, match=f"is {kind}, and rename is for LoRA"):
            loratool.convert(source.adapter, tmp_path / "b", to="peft", rename=["o_proj=x"])
