"""Hold the files beside the weights: which of them travel with a model, and which never do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_model import write_adapter_of_two, write_sharded_model

import loratool
from loratool.files.side_files import edited_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_sharded_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter_of_two(tmp_path / "adapter")


def test_side_files_travel_by_allow_list(tmp_path: Path, model: Path, adapter: Path) -> None:
    """Tokenizers, templates and code go along; weights of other formats and notes are named and left."""
    travels = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling_x.py",
        "LICENSE",
    ]
    stays = [
        "pytorch_model.bin",
        "consolidated.00.pth",
        "model.gguf",
        "optimizer.pt",
        "notes.md",
        "adapter_config.json",
        "other.safetensors",
    ]
    for name in travels + stays:
        (model / name).write_text(name)
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("t")
    report = loratool.merge(model, adapter, tmp_path / "out")
    out = tmp_path / "out"
    for name in [*travels, "config.json", "additional_chat_templates/tool.jinja"]:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert sorted(report.not_copied) == sorted([*stays, "original/"])
    assert not {*stays, "original"} & {p.name for p in out.iterdir()}


def test_templates_and_pooling_folders_can_be_written_twice(tmp_path: Path, model: Path, adapter: Path) -> None:
    for name in ("additional_chat_templates/x.jinja", "1_Pooling/config.json", "1_Pooling/weights.bin"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    for _ in range(2):
        report = loratool.merge(model, adapter, tmp_path / "out", force=True)
    assert report.not_copied == ("1_Pooling/weights.bin",)


def test_a_shard_is_never_a_side_file(tmp_path: Path, model: Path, adapter: Path) -> None:
    """An index may name its shards as it likes, a tokenizer's suffix included."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        (model / file).rename(model / f"{file}.model")
    index["weight_map"] = {name: f"{file}.model" for name, file in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    loratool.merge(model, adapter, tmp_path / "out")
    before, after = (
        load_file(f / f"{index['weight_map']['a.weight'].removesuffix('.model')}.model")
        for f in (model, tmp_path / "out")
    )
    assert not torch.equal(before["a.weight"], after["a.weight"])


@pytest.mark.parametrize("kind", ["dangling", "fifo"])
def test_a_side_file_that_cannot_be_read_is_found_first(tmp_path: Path, model: Path, adapter: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(model / "tokenizer.json")
    else:
        (model / "tokenizer.json").symlink_to("absent")
    with pytest.raises(loratool.InputError, match=r"tokenizer.json: travels with the model"):
        loratool.merge(model, adapter, tmp_path / "out")


def test_nested_configs_follow() -> None:
    config = {
        "torch_dtype": "float16",
        "text_config": {"dtype": "bfloat16", "rope": {"dtype": None}},
        "dtype": {"a": 1},
    }
    expected = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "rope": {"dtype": None}},
        "dtype": {"a": 1},
    }
    assert edited_config(config, {}, "float32") == expected
