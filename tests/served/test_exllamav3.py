"""Hold what `convert --for exllamav3` writes against ExLlamaV3's own classes and its reader of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pairs import pair
from servers import Server, convert, running

pytestmark = pytest.mark.slow

FAMILIES = (
    "causal:llama causal:phi3 causal:glm4 causal:mistral causal:cohere2 causal:mixtral causal:deepseek_v3".split()
)

# name -> options of PEFT's: what an adapter can have beside factors of one rank and one scale
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 4, "down_proj": 8}},
    "scales": {"alpha_pattern": {"q_proj": 8, "model.layers.1.mlp.down_proj": 1}},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.fixture(scope="module")
def exllamav3() -> Iterator[Server]:
    with running("exllamav3") as server:
        yield server


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_gets_its_change(exllamav3: Server, tmp_path: Path, family: str) -> None:
    pair(tmp_path, *family.split(":"))
    assert not exllamav3.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path, "exllamav3"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_written_so_that_it_acts(exllamav3: Server, tmp_path: Path, kind: str) -> None:
    pair(tmp_path, "causal", "llama", **KINDS[kind])
    assert not exllamav3.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path, "exllamav3"))
