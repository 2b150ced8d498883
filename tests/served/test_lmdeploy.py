"""Hold what `convert --for lmdeploy` writes against LMDeploy's own classes, its loader and its reader of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pairs import pair
from servers import Server, convert, running

pytestmark = pytest.mark.slow

FAMILIES = "causal:llama causal:phi3 causal:qwen2 causal:qwen3 causal:mistral causal:gemma2".split()

# name -> options of PEFT's: what an adapter can have beside factors of one rank and one scale in every layer
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 4, "down_proj": 8}},
    "scales": {"alpha_pattern": {"q_proj": 8, "model.layers.1.mlp.down_proj": 1}},
    "q alone": {"target_modules": ["q_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def lmdeploy() -> Iterator[Server]:
    with running("lmdeploy") as server:
        yield server


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_gets_its_change(lmdeploy: Server, tmp_path: Path, family: str) -> None:
    pair(tmp_path, *family.split(":"))
    assert not lmdeploy.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path, "lmdeploy"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_written_so_that_it_acts(lmdeploy: Server, tmp_path: Path, kind: str) -> None:
    pair(tmp_path, "causal", "llama", **KINDS[kind])
    assert not lmdeploy.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path, "lmdeploy"))


def test_lmdeploy_computes_with_memory_that_nothing_has_filled(lmdeploy: Server, tmp_path: Path) -> None:
    """The reason why `--for lmdeploy` writes zeros for every layer."""
    pair(tmp_path, "causal", "llama", target_modules=["q_proj"], layers_to_transform=[1])
    wrong = lmdeploy.wrong(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    assert wrong == ["model.layers.0.self_attn.qkv_proj.weight"]
