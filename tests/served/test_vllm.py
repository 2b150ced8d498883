"""Hold what `convert --for vllm` writes against vLLM itself: its classes, its loader, its manager, without kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pairs import pair
from safetensors.torch import load_file, save_file
from servers import Server, convert, running

pytestmark = pytest.mark.slow

# (table of tiny's, model type): one of each shape that vLLM has other names, rows or stacks for
EXACT = """causal:llama causal:phi3 causal:qwen3 causal:glm4 causal:mixtral causal:qwen3_moe causal:gpt_oss
    causal:deepseek_v3 causal:granitemoe causal:laguna causal:afmoe causal:minimax_m2 causal:llama4_text
    causal:qwen3_5_text causal:lfm2_moe causal:falcon_h1 causal:gemma3_text causal:gemma3 image:llava image:idefics3
    image:llama4 image:mistral3 image:qwen2_5_vl image:qwen3_vl image:qwen3_vl_moe image:qwen3_5_moe image:glm4v
    causal:smollm3 causal:nemotron_h causal:phimoe:PhiMoEForCausalLM""".split()

_Q, _GATE = "self_attn.q_proj", "mlp.gate_proj"
_STACKS = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]

# name -> (table and type, options of PEFT's): what an adapter can have beside factors of one rank and one scale
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("causal:llama", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "ranks": ("causal:llama", {"rank_pattern": {"q_proj": 4, "down_proj": 8}}),
    "scales": ("causal:llama", {"alpha_pattern": {"q_proj": 8, "model.layers.1.mlp.down_proj": 1}}),
    "q alone": ("causal:llama", {"target_modules": [_Q]}),
    "gate alone": ("causal:llama", {"target_modules": [_GATE]}),
    "one layer": ("causal:llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "embedding and head": ("causal:llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "half a stack": ("causal:gpt_oss", {"target_parameters": _STACKS[::2]}),
    "the other half": ("causal:gpt_oss", {"target_parameters": _STACKS[1::2]}),
    "half of the experts' matrices": ("causal:mixtral", {"target_parameters": _STACKS[::2]}),
    "rslora of experts": ("causal:mixtral", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "tower": (
        "causal:gemma3",
        {"target_modules": r".*vision_tower.encoder.*\.(q_proj|fc1)|.*language_model.*\.q_proj"},
    ),
}


@pytest.fixture(scope="module")
def vllm() -> Iterator[Server]:
    with running("vllm") as server:
        yield server


@pytest.mark.parametrize("family", EXACT)
def test_every_weight_gets_its_change(vllm: Server, tmp_path: Path, family: str) -> None:
    pair(tmp_path, *family.split(":"))
    assert not vllm.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path, "vllm"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_written_so_that_it_acts(vllm: Server, tmp_path: Path, kind: str) -> None:
    family, options = KINDS[kind]
    pair(tmp_path, *family.split(":"), **options)
    assert not vllm.wrong(tmp_path / "base", tmp_path / "merged", convert(tmp_path, "vllm"))


def test_dora_becomes_plain_lora(vllm: Server, tmp_path: Path) -> None:
    pair(tmp_path, "causal", "llama", use_dora=True)
    out = convert(tmp_path, "vllm", "--rank", "64")
    assert not vllm.wrong(tmp_path / "base", tmp_path / "merged", out, within=1e-5)


# what vLLM would do with PEFT's own adapter: the reasons for what `--for vllm` does
def test_vllm_drops_experts_of_mixtral_without_a_word(vllm: Server, tmp_path: Path) -> None:
    pair(tmp_path, "causal", "mixtral")
    wrong = vllm.wrong(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    assert len(wrong) == 4 and all(".experts." in name for name in wrong)


def test_vllm_turns_no_rows_of_llama4s_factors(vllm: Server, tmp_path: Path) -> None:
    pair(tmp_path, "causal", "llama4_text", target_parameters=None)
    wrong = vllm.wrong(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    assert wrong == [f"model.layers.{i}.self_attn.qkv_proj.weight" for i in range(2)]


# (table and type, options, words of the refusal)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "saved head": ("causal:llama", {"modules_to_save": ["lm_head"]}, "lm_head"),
    "head without a place": ("causal:qwen2", {"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
    "experts of granite's hybrid": ("causal:granitemoehybrid", {"target_modules": ["q_proj"]}, "experts"),
    "experts of no class of its own": ("causal:dots1", {"target_modules": ["q_proj"]}, "experts"),
    "shared input of granite": ("causal:granitemoeshared", {"target_parameters": None}, "input_linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_cannot_apply_is_refused(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, options, words = REFUSED[case]
    pair(tmp_path, *family.split(":"), **options)
    convert(tmp_path, "vllm", code=4)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "mlx"])
def test_rows_trained_under_an_embeddings_factors_are_refused(
    tmp_path: Path, runtime: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT writes the embedding beside its factors; servers skip it, which is right where it is the base's alone."""
    pair(tmp_path, "causal", "llama", target_modules=["embed_tokens", "q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = (each for each in tensors if each.endswith("embed_tokens.base_layer.weight"))
    tensors[name] += 1
    save_file(tensors, file, {"format": "pt"})
    convert(tmp_path, runtime, code=4)
    assert "embed_tokens" in capsys.readouterr().err
