"""Hold `inspect --for`: a finding for what a runtime does not apply as it was trained, none for what `--for` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, run_command, weights, write_model, write_peft
from lib.models.converted_sources import LANGUAGE
from lib.models.served_models import HEADS, LAYER, both, llama, mixtral, stacked
from safetensors.torch import load_file, save_file

import loratool
from loratool import InputError, UsageError
from loratool.adapters.formats import loaded_by
from loratool.architectures.runtimes.table import RUNTIMES
from loratool.views.inspect_runtime import Finding

Q = f"{LAYER.format(0)}self_attn.q_proj"


def findings(adapter: Path, runtime: str, base: Path | None = None) -> dict[str, Finding]:
    return {each.what: each for each in loratool.inspect_for(adapter, runtime=runtime, base=base).findings}


@pytest.mark.parametrize("runtime", [key for key in RUNTIMES if key != "ollama"])
def test_what_is_written_for_a_runtime_is_applied_by_it(runtime: str, tmp_path: Path) -> None:
    start, base = FIXTURES / "llama" / "adapter", FIXTURES / "llama" / "base"
    out = tmp_path / ("b.gguf" if loaded_by(runtime).key == "gguf" else "b")
    loratool.convert(start, out, runtime=runtime, base=base)
    assert findings(out, runtime, base) == {}


@pytest.mark.parametrize("runtime", ["vllm", "exllamav3", "sglang", "trtllm"])
def test_experts_too(runtime: str, tmp_path: Path) -> None:
    start, _ = stacked(tmp_path / "a")
    base = mixtral(tmp_path / "base")
    assert "experts" in findings(start, runtime, base)
    loratool.convert(start, tmp_path / "b", runtime=runtime, base=base)
    assert findings(tmp_path / "b", runtime, base) == {}


@pytest.mark.parametrize("runtime", ["vllm", "tgi", "trtllm", "exllamav3"])
def test_parts_of_fused_modules_too(runtime: str, tmp_path: Path) -> None:
    names = {"model.layers.0.self_attn.qkv_proj.weight": (16, 8), "model.layers.0.mlp.gate_up_proj.weight": (24, 8)}
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **HEADS}
    base = write_model(tmp_path / "base", {n: weights(*s) for n, s in names.items()}, config)
    start = write_peft(tmp_path / "a", {n.removesuffix(".weight"): factors(*s, 2) for n, s in names.items()})
    loratool.convert(start, tmp_path / "b", runtime=runtime, base=base)
    assert findings(tmp_path / "b", runtime, base) == {}
    loratool.convert(tmp_path / "b", tmp_path / "c", runtime=runtime, base=base)
    (one, two) = (load_file(tmp_path / each / "adapter_model.safetensors") for each in "bc")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_parts_alone_need_those_beside_them(tmp_path: Path) -> None:
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **HEADS}
    base = write_model(tmp_path / "base", {"model.layers.0.self_attn.qkv_proj.weight": weights(16, 8)}, config)
    start = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)})
    assert findings(start, "trtllm", base)["missing"].outcome == "refuses"
    assert findings(start, "vllm", base)["absent"].outcome == "ignores"  # which has phi3's qkv_proj alone


class TestNumbers:
    def test_rslora(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", {Q: factors(8, 8, 4)}, use_rslora=True)
        found = findings(start, "sglang")["rslora"]
        assert found.outcome == "ignores" and "2 times too small" in found.says
        assert "rslora" not in findings(start, "vllm") and "rslora" not in findings(start, "tgi")

    def test_ranks_and_alphas(self, tmp_path: Path) -> None:
        pairs = {Q: factors(8, 8, 2), f"{LAYER.format(0)}self_attn.o_proj": factors(8, 8, 3)}
        start = write_peft(tmp_path / "a", pairs, rank_pattern={"o_proj": 3}, alpha_pattern={"o_proj": 9})
        assert {*findings(start, "sglang")} >= {"rank_pattern", "alpha_pattern"}
        assert findings(start, "tgi")["rank_pattern"].outcome == "misreads"
        assert findings(start, "vllm") == {}
        wide = write_peft(tmp_path / "b", {Q: factors(8, 8, 600)}, r=600)
        assert "resize --rank 512" in findings(wide, "vllm", llama(tmp_path / "base"))["rank"].remedy

    def test_a_start_that_changed_the_base(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)}, init_lora_weights="pissa")
        assert findings(start, "vllm")["start"].outcome == "misreads" and findings(start, "transformers") == {}

    def test_an_expression_of_targets(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)}, target_modules=".*q_proj")
        assert findings(start, "sglang")["targets"].outcome == "refuses" and "targets" not in findings(start, "vllm")

    @pytest.mark.parametrize(("runtime", "outcome"), [("vllm", "refuses"), ("tgi", "ignores"), ("trtllm", "misreads")])
    def test_dora(self, runtime: str, outcome: str, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)}, use_dora=True)
        pairs = load_file(start / "adapter_model.safetensors")
        save_file(
            pairs | {f"base_model.model.{Q}.lora_magnitude_vector": weights(8)}, start / "adapter_model.safetensors"
        )
        assert findings(start, runtime)["dora"].outcome == outcome and findings(start, "transformers") == {}


class TestNames:
    def test_mixtrals_are_elsewhere_in_vllm(self, tmp_path: Path) -> None:
        start, _ = stacked(tmp_path / "a")
        found = findings(start, "vllm", mixtral(tmp_path / "base"))["experts"]
        assert found.outcome == "ignores" and len(found.modules) == 2

    def test_of_a_text_model_on_a_wrapper(self, tmp_path: Path) -> None:
        """vLLM tries the text model's names too, PEFT does not; idefics3 has none of the old names."""
        start = write_peft(tmp_path / "a", {Q: factors(16, 8, 2)})
        names = {"model.language_model.layers.0.self_attn.q_proj.weight": weights(16, 8)}
        names["model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"] = weights(8, 8)
        config = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
        config |= {"text_config": {"model_type": "qwen3_vl_text", **HEADS}}
        base = write_model(tmp_path / "base", names, config)
        assert findings(start, "vllm", base) == {}
        assert findings(start, "transformers", base)["names"].modules == (Q,)

    def test_of_a_wrapper_on_a_text_model(self, tmp_path: Path) -> None:
        path = "model.language_model.layers.0.self_attn.q_proj"
        start = write_peft(tmp_path / "a", {path: factors(8, 8, 2)})
        base = llama(tmp_path / "base", "gemma3_text", "Gemma3ForCausalLM")
        assert findings(start, "vllm", base)["names"].outcome == "ignores"
        assert "names" not in findings(start, "sglang", llama(tmp_path / "other"))  # which looks at no prefix
        assert findings(start, "tgi", base)["names"].outcome == "ignores"

    def test_rows_that_vllm_has_in_another_order(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", both(0))
        found = findings(start, "vllm", llama(tmp_path / "base", "llama4_text", "Llama4ForCausalLM"))["rows"]
        assert found.outcome == "misreads"
        assert {module.rpartition(".")[2] for module in found.modules} == {"q_proj", "k_proj"}

    def test_what_has_to_be_beside(self, tmp_path: Path) -> None:
        start, base = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)}), llama(tmp_path / "base")
        assert findings(start, "sglang", base)["missing"].outcome == "refuses"
        assert findings(start, "tgi", base)["missing"].outcome == "ignores"
        assert findings(start, "lmdeploy", base)["missing"].outcome == "misreads"
        assert findings(start, "vllm", base) == {}

    def test_memory_that_is_not_set(self, tmp_path: Path) -> None:
        base = llama(tmp_path / "base")
        names = load_file(base / "model.safetensors") | {"vision.layers.0.self_attn.q_proj.weight": weights(8, 8)}
        write_model(tmp_path / "wide", names, json.loads((base / "config.json").read_text()))
        start = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)})
        assert (
            "uninitialized memory for vision.layers.0" in findings(start, "lmdeploy", tmp_path / "wide")["missing"].says
        )


def test_the_command_exits_with_1(tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", {Q: factors(8, 8, 4)}, use_rslora=True)
    told = run_command("inspect", start, "--for", "sglang", "--json")
    report = json.loads(told.stdout)
    assert told.exit_code == 1 and report["status"] == "not applied" and report["report"]["kind"] == "runtime"
    told = run_command("inspect", start, "--for", "vllm")
    assert told.exit_code == 0 and "applied in full" not in told.stdout  # as no base tells the names
    assert run_command("inspect", start, "--for", "vllm", "--strict").exit_code == 2


def test_what_exllamav3_leaves_out_on_its_own_format_alone(tmp_path: Path) -> None:
    start, base = write_peft(tmp_path / "a", {Q: factors(8, 8, 4)}), llama(tmp_path / "base")
    for model in ([], ["--base", base]):
        told = run_command("inspect", start, "--for", "exllamav3", "--json", *model)
        assert told.exit_code == 0
        assert any("merge the adapter into the base" in note for note in json.loads(told.stdout)["report"]["notes"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "exl3", "bits": 4}}))
    assert findings(start, "exllamav3", base)["limit"].outcome == "ignores"
    (base / "model.safetensors").unlink()  # whose codes are not read
    assert run_command("inspect", start, "--for", "exllamav3", "--base", base).exit_code == 1


def test_a_file_without_its_config(tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", {Q: factors(8, 8, 4)})
    loratool.convert(start, tmp_path / "b.safetensors", to="peft")
    assert findings(tmp_path / "b.safetensors", "vllm")["format"].outcome == "refuses"
    assert findings(start / "adapter_model.safetensors", "vllm") == {}


def test_what_is_refused(tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", {Q: factors(8, 8, 4)})
    with pytest.raises(UsageError, match="is none of transformers, vllm"):
        loratool.inspect_for(start, runtime="kohya")
    with pytest.raises(InputError, match="without adapters"):
        loratool.inspect_for(start, runtime="vllm", base=llama(tmp_path / "base", "falcon", "FalconForCausalLM"))


def test_modules_to_save(tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", {Q: factors(8, 8, 2)}, modules_to_save=["lm_head"])
    pairs: dict[str, Any] = load_file(start / "adapter_model.safetensors")
    save_file(pairs | {"base_model.model.lm_head.weight": weights(16, 8)}, start / "adapter_model.safetensors")
    found = findings(start, "sglang", llama(tmp_path / "base"))
    assert found["modules_to_save"].outcome == "ignores" and found["modules_to_save"].modules == ("lm_head",)


@pytest.mark.parametrize("kind", ["loha", "lokr", "adalora"])
def test_other_kinds_are_what_only_peft_applies(kind: str, tmp_path: Path) -> None:
    source = LANGUAGE[kind].write(tmp_path / "a")
    assert "kind" not in findings(source.adapter, "transformers", source.base)
    for runtime in ("vllm", "sglang", "tgi"):
        found = findings(source.adapter, runtime, source.base)["kind"]
        assert found.outcome == "refuses" and kind in found.says and len(found.modules) == 8
        loratool.convert(source.adapter, tmp_path / "b", runtime=runtime, base=source.base, force=True)
        assert findings(tmp_path / "b", runtime, source.base) == {}
