"""Hold the seam of GGUF's architectures: a row of names and one of fields, and every command knows such models.

The toy architecture has Llama's rotary order of queries, a fused pair of matrices and a norm that GGUF adds 1 to. What
is expected is written out here, row by row.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import factors, write_peft
from lib.files import gguf_bytes
from safetensors.torch import load_file, save_file

import loratool
from loratool.adapters.formats import open_adapter
from loratool.architectures.gguf import ARCHITECTURES
from loratool.architectures.gguf.config_table import CONFIGS, Config
from loratool.architectures.gguf.table import Architecture, Weight

LAYER = "trunk.blocks.{n}"
ROW = Architecture(
    "toy",
    ("toy_model",),
    (
        Weight("token_embd", "trunk.embed"),
        Weight("output_norm", "trunk.norm", change="plus one"),
        Weight("output", "lm_head"),
        Weight("blk.{n}.attn_q", f"{LAYER}.query", "queries"),
        Weight("blk.{n}.ffn_gate", f"{LAYER}.both", "first half"),
        Weight("blk.{n}.ffn_up", f"{LAYER}.both", "second half"),
    ),
)
FIELDS = Config(
    "toy_model",
    "ToyForCausalLM",
    {"width": "embedding_length", "depth": "block_count", "num_attention_heads": "attention.head_count"},
    rotates=False,
)
WIDTH, WORDS, HEADS = 8, 5, 2
QUERIES = [0, 2, 1, 3, 4, 6, 5, 7]  # of two heads of 4 rows: the halves of each take turns
CONFIG = {"model_type": "toy_model", "num_attention_heads": HEADS}
MODULES = {"trunk.blocks.0.query": (WIDTH, WIDTH), "trunk.blocks.0.both": (6, WIDTH)}


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "toy", ROW)
    monkeypatch.setitem(CONFIGS, "toy", (FIELDS,))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of transformers, and beside it the same as GGUF has it."""
    torch.manual_seed(0)
    shapes = {"trunk.embed": (WORDS, WIDTH), "trunk.norm": (WIDTH,), "lm_head": (WORDS, WIDTH), **MODULES}
    W = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    (tmp_path / "model").mkdir()
    save_file(W, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    query, both = (W[f"{name}.weight"] for name in MODULES)
    stored = {
        "token_embd.weight": W["trunk.embed.weight"],
        "output_norm.weight": W["trunk.norm.weight"] + 1,
        "output.weight": W["lm_head.weight"],
        "blk.0.attn_q.weight": query[QUERIES],
        "blk.0.ffn_gate.weight": both[:3],
        "blk.0.ffn_up.weight": both[3:],
    }
    numbers = {"embedding_length": WIDTH, "block_count": 1, "attention.head_count": HEADS}
    fields = {"general.architecture": "toy", **{f"toy.{key}": value for key, value in numbers.items()}}
    tensors = {name: gguf_bytes.floats(np.asarray(tensor)) for name, tensor in stored.items()}
    gguf_bytes.write(tmp_path / "model.gguf", fields, tensors)
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "adapter", {name: factors(*shape, 2) for name, shape in MODULES.items()})


def test_a_model_becomes_one_of_transformers(model: Path, tmp_path: Path) -> None:
    loratool.convert_model(tmp_path / "model.gguf", tmp_path / "back")
    there, back = (load_file(each / "model.safetensors") for each in (model, tmp_path / "back"))
    assert there.keys() == back.keys()
    assert all(torch.allclose(there[name], back[name], atol=1e-6) for name in there)
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (said["model_type"], said["width"], said["num_attention_heads"]) == ("toy_model", WIDTH, HEADS)


def test_an_adapter_goes_there_and_back(model: Path, adapter: Path, tmp_path: Path) -> None:
    loratool.convert(adapter, tmp_path / "a.gguf", to="gguf", base=model)
    assert {*open_adapter(tmp_path / "a.gguf").updates} == {f"blk.0.{end}" for end in ("attn_q", "ffn_gate", "ffn_up")}
    loratool.convert(tmp_path / "a.gguf", tmp_path / "back", to="peft", base=model / "config.json")
    there, back = (load_file(each / "adapter_model.safetensors") for each in (adapter, tmp_path / "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[key], back[key]) for key in there)


@pytest.mark.parametrize("form", ["adapter", "a.gguf"])
def test_a_merge_into_each_is_the_same_merge(model: Path, adapter: Path, form: str, tmp_path: Path) -> None:
    loratool.convert(adapter, tmp_path / "a.gguf", to="gguf", base=model)
    loratool.merge(model, tmp_path / form, tmp_path / "merged")
    loratool.merge(tmp_path / "model.gguf", tmp_path / form, tmp_path / "merged.gguf")
    loratool.convert_model(tmp_path / "merged.gguf", tmp_path / "back")
    one, two = (load_file(each / "model.safetensors") for each in (tmp_path / "merged", tmp_path / "back"))
    for name in MODULES:
        assert torch.equal(one[f"{name}.weight"], two[f"{name}.weight"])
        assert not torch.equal(one[f"{name}.weight"], load_file(model / "model.safetensors")[f"{name}.weight"])
