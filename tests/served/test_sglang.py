"""Hold what `convert --for sglang` writes against SGLang itself: its classes, loader and memory pool of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pairs import pair
from servers import Server, convert, running

pytestmark = pytest.mark.slow

# (table of tiny's, model type): one of each shape of names, groups and experts
EXACT = """causal:llama causal:phi3 causal:qwen3 causal:glm4 causal:qwen3_moe causal:mixtral causal:gpt_oss
    causal:granitemoe causal:gemma3_text causal:gemma3 image:qwen2_5_vl image:qwen3_vl image:glm4v_moe
    causal:cohere2""".split()

_STACKS = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]

# name -> (table and type, options of PEFT's): what an adapter can have beside factors of one rank and one scale
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("causal:llama", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "ranks": ("causal:llama", {"rank_pattern": {"q_proj": 4, "down_proj": 8}}),
    "scales": ("causal:llama", {"alpha_pattern": {"q_proj": 8, "model.layers.1.mlp.down_proj": 1}}),
    "q alone": ("causal:llama", {"target_modules": ["q_proj"]}),
    "k alone": ("causal:llama", {"target_modules": ["k_proj"]}),
    "up alone": ("causal:llama", {"target_modules": ["up_proj"]}),
    "one layer": ("causal:llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "by an expression": ("causal:llama", {"target_modules": r".*\.1\..*(q_proj|down_proj)"}),
    "embedding and head": ("causal:llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "half of the experts' matrices": ("causal:qwen3_moe", {"target_parameters": _STACKS[::2]}),
    "the other half": ("causal:qwen3_moe", {"target_parameters": _STACKS[1::2]}),
    "rslora of experts": ("causal:qwen3_moe", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
}


@pytest.fixture(scope="module")
def sglang() -> Iterator[Server]:
    with running("sglang") as server:
        yield server


@pytest.mark.parametrize("family", EXACT)
def test_every_weight_gets_its_change(sglang: Server, tmp_path: Path, family: str) -> None:
    pair(tmp_path, *family.split(":"))
    assert not sglang.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path, "sglang"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_written_so_that_it_acts(sglang: Server, tmp_path: Path, kind: str) -> None:
    family, options = KINDS[kind]
    pair(tmp_path, *family.split(":"), **options)
    assert not sglang.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path, "sglang"))


# what SGLang would do with PEFT's own adapter: the reasons for what `--for sglang` does
def test_sglang_takes_rslora_for_lora(sglang: Server, tmp_path: Path) -> None:
    pair(tmp_path, "causal", "llama", r=4, lora_alpha=8, use_rslora=True)
    assert len(sglang.wrong(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")) == 8


def test_sglang_drops_what_its_transformers_classes_keep_apart(sglang: Server, tmp_path: Path) -> None:
    pair(tmp_path, "causal", "smollm3")
    wrong = sglang.wrong(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    assert {name.split(".")[-2] for name in wrong} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


# (table and type, options, words of the refusal, exit code)
REFUSED: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "a class that SGLang has not": ("causal:smollm3", {}, "Smol", 3),
    "up without gate": ("causal:apertus", {}, "up_proj", 4),
    "a saved head": ("causal:llama", {"modules_to_save": ["lm_head"]}, "lm_head", 4),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_sglang_cannot_apply_is_refused(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, options, words, code = REFUSED[case]
    pair(tmp_path, *family.split(":"), **options)
    convert(tmp_path, "sglang", code=code)
    assert words in capsys.readouterr().err
