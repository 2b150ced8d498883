"""Merge into GGUF tensors whose rows are not those of one module of transformers, against the formulas, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_peft
from lib.files.gguf_bytes import Array, floats, write

import loratool
from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint

WIDTH = 8


def merged(folder: Path, key: str, fields: dict[str, Any], shapes: dict[str, int], module: str, B: Array) -> Any:
    """Merge B (out, 1) times a row of ones into zeros; return each tensor's first column."""
    named = {"general.architecture": key, f"{key}.block_count": 1, f"{key}.embedding_length": WIDTH}
    tensors = {f"{name}.weight": floats(np.zeros((rows, WIDTH))) for name, rows in shapes.items()}
    base = write(folder / "m.gguf", named | {f"{key}.{name}": value for name, value in fields.items()}, tensors)
    adapter = write_peft(folder / "adapter", {module: (torch.ones(1, WIDTH), torch.tensor(B, dtype=torch.float32))})
    loratool.merge(base, adapter, folder / "out.gguf", undo=False)
    found = open_checkpoint(folder / "out.gguf")
    return {name: found[f"{name}.weight"][:, 0].tolist() for name in shapes}


ROWS = {"q": 3, "k": 3, "v": 10, "z": 10}  # of each key head; it has two heads of values

LINEAR = {"ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.state_size": 3, "ssm.inner_size": 20}


def test_qwen3_nexts_groups_are_queries_keys_values_and_gates(tmp_path: Path) -> None:
    """transformers has [q k v z] for each of 2 key heads; GGUF has q, k and v by kind in one tensor, z in another."""
    named = [f"{kind}{head}.{i}" for head in range(2) for kind, n in ROWS.items() for i in range(n)]
    B = np.arange(1.0, len(named) + 1)[:, None]
    number = dict(zip(named, B[:, 0].tolist(), strict=True))
    shapes, module = {"blk.0.attn_qkv": 32, "blk.0.attn_gate": 20}, "model.layers.0.linear_attn.in_proj_qkvz"
    found = merged(tmp_path, "qwen3next", LINEAR, shapes, module, B)
    order = [f"{kind}{head}.{i}" for kind in "qkv" for head in range(2) for i in range(ROWS[kind])]
    assert found["blk.0.attn_qkv"] == [number[each] for each in order]
    assert found["blk.0.attn_gate"] == [number[f"z{head}.{i}"] for head in range(2) for i in range(10)]


def test_rows_of_another_number_of_heads_are_refused(tmp_path: Path) -> None:
    shapes, module = {"blk.0.attn_qkv": 32, "blk.0.attn_gate": 20}, "model.layers.0.linear_attn.in_proj_qkvz"
    with pytest.raises(InputError, match="50 rows are not those of 2 heads of keys and 4 of values"):
        merged(tmp_path, "qwen3next", LINEAR, shapes, module, np.ones((50, 1)))


@pytest.mark.parametrize("sections", [False, True])
def test_glms_rotated_pairs_become_halves_with_sections_alone(tmp_path: Path, sections: bool) -> None:
    fields: dict[str, Any] = {"attention.head_count": 2, "attention.key_length": 6, "rope.dimension_count": 4}
    fields |= {"rope.dimension_sections": [1, 1, 0, 0]} if sections else {}
    module = "model.language_model.layers.0.self_attn.q_proj" if sections else "model.layers.0.self_attn.q_proj"
    found = merged(tmp_path, "glm4", fields, {"blk.0.attn_q": 12}, module, np.arange(12.0)[:, None])
    expected = [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11] if sections else [*range(12)]
    assert found["blk.0.attn_q"] == expected


def test_layers_without_attention_have_no_heads(tmp_path: Path) -> None:
    """Nemotron-H's file has 0 key heads for its other layers; its queries rotate in pairs."""
    fields = {"attention.head_count": 2, "attention.head_count_kv": [0, 2, 0]}
    found = merged(
        tmp_path, "nemotron_h", fields, {"blk.0.attn_k": 8}, "model.layers.0.mixer.k_proj", np.arange(8.0)[:, None]
    )
    assert found["blk.0.attn_k"] == [0, 2, 1, 3, 4, 6, 5, 7]
