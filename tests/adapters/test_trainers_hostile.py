"""Hold the readers of trainers' files to an error of ours, whatever the files hold: shapes, names and settings."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import test_trainers_experts as made
import torch
from lib.oracles.matrix import READABLE
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool.adapters.formats import open_adapter
from loratool.errors import LoratoolError

SHAPES = [(), (0,), (3,), (0, 2), (2, 0), (1, 1, 1), (2, 3, 4, 5)]
VALUES: list[Any] = [None, True, -1, 0, 1.5, 10**30, "2", [], [1], {}, {"a": 1}]
TRAINERS = ["PEFT before 0.3, `enable_lora`", "AdapterHub", "torchtune", "litgpt"]


def opened(path: Path, model: dict[str, Any] | None = None) -> None:
    """Open an adapter and load what opens, with nothing but our own errors."""
    try:
        adapter = open_adapter(path, model=model)
        for update in adapter.updates.values():
            adapter.load(update)
    except LoratoolError:
        pass


@pytest.mark.parametrize("trainer", TRAINERS)
def test_other_shapes(trainer: str, tmp_path: Path) -> None:
    adapter = READABLE[trainer](tmp_path / "a")
    file = next(p for p in adapter.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".lora"))
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    for name, shape in itertools.product(tensors, SHAPES):
        changed = {**tensors, name: torch.zeros(shape)}
        save_file(changed, file) if file.suffix == ".safetensors" else torch.save(changed, file)
        opened(adapter)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_other_settings(trainer: str, tmp_path: Path) -> None:
    adapter = READABLE[trainer](tmp_path / "a")
    for file in [p for p in adapter.iterdir() if p.suffix == ".json"]:
        fields = json.loads(file.read_text())
        own = fields.get("config", fields)
        for field, value in itertools.product(list(own), VALUES):
            changed = {**own, field: value}
            file.write_text(json.dumps({**fields, "config": changed} if "config" in fields else changed))
            opened(adapter)
        file.write_text(json.dumps(fields))
    for file in [p for p in adapter.iterdir() if p.suffix == ".yaml"]:
        lines = file.read_text().splitlines()
        for number, value in itertools.product(range(len(lines)), VALUES):
            key = lines[number].partition(":")[0]
            file.write_text("\n".join([*lines[:number], f"{key}: {json.dumps(value)}", *lines[number + 1 :]]))
            opened(adapter)
        file.write_text("\n".join(lines))


def experts() -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    bridge = made.TestMegatronBridge()
    return {
        "unsloth": (made.TestUnsloth().factors(), {}),
        "tinker": (made.TestTinker().stacks(), {}),
        "tinker, qkv": (made.TestTinker().qkv(), {}),
        "Megatron-Bridge": (bridge.pack(bridge.stacks()), made.BRIDGE),
    }


@pytest.mark.parametrize("trainer", experts())
def test_experts(trainer: str, tmp_path: Path) -> None:
    tensors, config = experts()[trainer]
    adapter = made.write_adapter(tmp_path / "a", tensors)
    if config:
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    plain, fields = (
        load_file(adapter / "adapter_model.safetensors"),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    for name, shape in itertools.product(list(plain)[:6], SHAPES):
        save_file({**plain, name: torch.zeros(shape)}, adapter / "adapter_model.safetensors")
        opened(adapter, made.GPT_OSS if trainer in ("unsloth", "tinker") else None)
    save_file(plain, adapter / "adapter_model.safetensors")
    for field, value in itertools.product(
        ("r", "lora_alpha", "rank_pattern", "target_parameters", "use_rslora"), VALUES
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**fields, field: value}))
        opened(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    for field, value in itertools.product(("model_type", "num_local_experts"), VALUES):
        opened(adapter, {**made.GPT_OSS, field: value})
