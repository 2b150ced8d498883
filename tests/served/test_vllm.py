"""Hold what `convert --for vllm` writes against vLLM itself: its classes, its loader, its manager of adapters, without kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pairs import pair
from servers import Server, running

from loratool.cli import _run

pytestmark = pytest.mark.slow

# (table of tiny's, model type): one of each shape that vLLM has other names, rows or stacks for
EXACT = """causal:llama causal:phi3 causal:qwen3 causal:glm4 causal:mixtral causal:qwen3_moe causal:gpt_oss causal:deepseek_v3
    causal:granitemoe causal:laguna causal:afmoe causal:minimax_m2 causal:llama4_text causal:qwen3_5_text causal:lfm2_moe causal:falcon_h1
    causal:gemma3_text causal:gemma3 image:llava image:idefics3 image:llama4 image:mistral3 image:qwen2_5_vl image:qwen3_vl
    image:qwen3_vl_moe image:qwen3_5_moe image:glm4v causal:smollm3""".split()


@pytest.fixture(scope="module")
def vllm() -> Iterator[Server]:
    with running("vllm") as server:
        yield server


def convert(folder: Path, *flags: str) -> Path:
    out = folder / "out"
    assert (
        _run(
            [
                "convert",
                str(folder / "adapter"),
                "--for",
                "vllm",
                "--base",
                str(folder / "base"),
                "-o",
                str(out),
                *flags,
            ]
        )
        == 0
    )
    return out


@pytest.mark.parametrize("family", EXACT)
def test_every_weight_gets_its_change(vllm: Server, tmp_path: Path, family: str) -> None:
    pair(tmp_path, *family.split(":"))
    assert not vllm.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path))
