"""Give a config.json values and a file names that nobody means: a command that does not work refuses by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import factors, few, weights, write_model, write_peft
from lib.models.mtp_models import MODELS
from torch import Tensor

import loratool
from loratool.errors import LoratoolError

VALUES = ("NaN", "1e400", f"1{'0' * 400}", "-1", "1.5", "true", "null", '"x"', "[]", "[[1]]", '{"model_type": [3]}')
FIELDS = ("num_hidden_layers", "num_attention_heads", "hidden_size", "architectures", "model_type", "text_config")
EXPERTS = "model.layers.1.mlp.experts"
NAMES = {
    f"{EXPERTS}.999999999999.gate_proj.weight": (12, 8),
    f"{EXPERTS}.-1.gate_proj.weight": (12, 8),
    f"{EXPERTS}.\u00b2.gate_proj.weight": (12, 8),
    "experts.999999999999.w1": (12, 8),
    "experts.-1.": (12, 8),
    f"{EXPERTS}.0.gate_proj.weight": (0, 8),
    f"{EXPERTS}.1.down_proj.weight": (),
    f"{EXPERTS}.1.up_proj.weight": (2, 2, 2, 2, 2),
    f"{EXPERTS}.gate_up_proj": (0, 24, 8),
    f"{EXPERTS}.down_proj": (2, 8, 3, 4),
    "model.layers.1.mlp.gate.weight": (0, 8),
    "model.layers.99999999999999999999.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.\u0000\u202e\n\x1b[31m'\"$(x)(((*.weight": (8, 8),
    f"model.{'a' * 20000}.weight": (8, 8),
    f"model.{'a.b.' * 2000}q_proj.weight": (8, 8),
    "....": (8, 8),
    "": (8, 8),
    "mtp.": (8, 8),
}


def run_all(base: Path, tuned: Path, adapter: Path, out: Path) -> int:
    """Run every command that reads the names of a base, and return how many refuse it."""
    refused = 0
    for command in (
        lambda: loratool.inspect(base),
        lambda: loratool.inspect(adapter, base=base),
        lambda: loratool.init(base, out, rank=1, target=("all-linear", "experts"), dry_run=True),
        lambda: loratool.extract(base, tuned, out, rank=1, dry_run=True),
        lambda: loratool.merge(base, adapter, out, dry_run=True),
        lambda: loratool.convert(adapter, out, to="peft", base=base, dry_run=True),
    ):
        try:
            command()
        except LoratoolError as error:
            assert type(error) is not LoratoolError and error.message
            refused += 1
    return refused


def write_both(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> tuple[Path, Path]:
    tuned = {name: W + 0.01 * torch.ones_like(W) for name, W in tensors.items()}
    return write_model(folder / "base", tensors, config), write_model(folder / "tuned", tuned, config)


@pytest.mark.parametrize("field", few(FIELDS, "num_hidden_layers", "architectures"))
def test_values_of_a_config(field: str, tmp_path: Path) -> None:
    tensors, config = MODELS["deepseek_v3"]
    base, tuned = write_both(tmp_path, tensors, config)
    adapter = write_peft(tmp_path / "adapter", {f"{EXPERTS}.0.gate_proj": factors(12, 8, 1)})
    assert run_all(base, tuned, adapter, tmp_path / "out") == 0
    for value in VALUES:
        text = json.dumps({**config, field: "@"}).replace('"@"', f"[{value}]" if field == "architectures" else value)
        (base / "config.json").write_text(text)
        run_all(base, tuned, adapter, tmp_path / "out")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_and_shapes_of_a_file(name: str, tmp_path: Path) -> None:
    tensors, config = MODELS["deepseek_v3"]
    base, tuned = write_both(tmp_path, tensors | {name: torch.full(NAMES[name], 0.02)}, config)
    modules = (f"{EXPERTS}.0.gate_proj", name.removesuffix(".weight") or "x")
    adapter = write_peft(tmp_path / "adapter", {module: factors(12, 8, 1) for module in modules})
    run_all(base, tuned, adapter, tmp_path / "out")


def test_weights_of_modules_that_are_no_stacks(tmp_path: Path) -> None:
    """jetmoe's `input_linear` is a stack where it has three dimensions."""
    tensors = {f"model.layers.0.mlp.{side}_linear.weight": weights(2, 3, 4, 5, seed=2) for side in ("input", "output")}
    tensors |= {"model.layers.0.self_attention.kv_proj.weight": weights(12, 8)}
    config = {"model_type": "jetmoe", "architectures": ["JetMoeForCausalLM"], "num_hidden_layers": 1}
    adapter = write_peft(tmp_path / "adapter", {"model.layers.0.self_attention.kv_proj": factors(12, 8, 1)})
    run_all(*write_both(tmp_path, tensors, config), adapter, tmp_path / "out")
