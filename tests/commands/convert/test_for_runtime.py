"""Hold `convert --for`: the changes of the modules are the source's, under the paths that each runtime looks up.

What is expected is computed from the factors in float64, by PEFT's definition of a stack, and by each runtime's own
rule of names and scales as its source has it (`tests/served` asks the runtimes themselves).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, run_command, weights, write_model, write_peft
from lib.models.served_models import HEADS, LAYER, Changes, both, llama, mixtral, stacked
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.architectures.runtimes.runtime import FEATURES, Runtime
from loratool.architectures.runtimes.table import RUNTIMES


def changes(folder: Path) -> Changes:
    """Return s B A of each pair by its path, by PEFT's patterns, written here again for paths without stacks."""
    import re

    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("use_rslora") and not config.get("use_dora")
    found = {}
    for key, A in tensors.items():
        if not (match := re.fullmatch(r"base_model\.model\.(.*)\.lora_(?:A\.weight|embedding_A)", key)):
            continue
        B = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        rank, alpha = config["r"], config["lora_alpha"]
        for pattern, value in config.get("rank_pattern", {}).items():
            rank = value if re.match(rf"(.*\.)?({pattern})$", match[1]) else rank
        for pattern, value in config.get("alpha_pattern", {}).items():
            alpha = value if re.match(rf"(.*\.)?({pattern})$", match[1]) else alpha
        assert rank == len(A)
        found[match[1]] = alpha / rank * (B.double() @ A.double())
    return found


def fields(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def same(found: Changes, wanted: Changes) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "trtllm", "tgi", "lmdeploy", "exllamav3"])
def test_a_plain_adapter_keeps_its_factors(runtime: str, tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", both(0, 1), lora_alpha=3)
    report: Any = loratool.convert(start, tmp_path / "b", runtime=runtime, base=llama(tmp_path / "base"))
    assert report.runtime == runtime and {row.how for row in report.modules} == {"exact"}
    assert same(changes(tmp_path / "b"), changes(start))
    ends = {"q_proj", "k_proj", "v_proj", "o_proj"}
    paths = {f"{LAYER.format(i)}self_attn.{n}" for i in (0, 1) for n in ends}
    assert {*fields(tmp_path / "b")["target_modules"]} == (ends if runtime in ("sglang", "lmdeploy") else paths)


class TestScales:
    def test_rslora_becomes_another_alpha(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", both(0), r=2, lora_alpha=2, use_rslora=True)
        loratool.convert(start, tmp_path / "b", runtime="sglang", base=llama(tmp_path / "base"))
        config = fields(tmp_path / "b")
        assert config["use_rslora"] is False and config["lora_alpha"] / config["r"] == 2 / math.sqrt(2)
        A = load_file(start / "adapter_model.safetensors")
        B = load_file(tmp_path / "b" / "adapter_model.safetensors")
        assert A.keys() == B.keys() and all(torch.equal(A[k], B[k]) for k in A)

    def test_unequal_ones_go_into_the_factors(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", both(0), r=2, lora_alpha=2, alpha_pattern={"q_proj": 8})
        report: Any = loratool.convert(start, tmp_path / "b", runtime="sglang", base=llama(tmp_path / "base"))
        assert {row.name.rpartition(".")[2]: row.how for row in report.modules}["q_proj"] == "folded"
        assert fields(tmp_path / "b")["alpha_pattern"] == {} and same(changes(tmp_path / "b"), changes(start))

    def test_vllm_keeps_them(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", both(0), r=2, lora_alpha=2, alpha_pattern={"q_proj": 7})
        report: Any = loratool.convert(start, tmp_path / "b", runtime="vllm", base=llama(tmp_path / "base"))
        assert {row.how for row in report.modules} == {"exact"} and same(changes(tmp_path / "b"), changes(start))

    def test_what_rounds_is_said(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", both(0), r=2, lora_alpha=2, alpha_pattern={"q_proj": 1 / 3})
        report: Any = loratool.convert(start, tmp_path / "b", runtime="tgi", base=llama(tmp_path / "base"))
        errors = {row.name: row.error for row in report.modules if row.error}
        assert [*errors] == [f"{LAYER.format(0)}self_attn.q_proj"] and 0 < max(errors.values()) < 1e-7


class TestRanks:
    def unequal(self, folder: Path) -> Path:
        pairs = both(0) | {f"{LAYER.format(0)}self_attn.o_proj": factors(8, 8, 5)}
        return write_peft(folder, pairs, r=2, lora_alpha=2, rank_pattern={"o_proj": 5})

    def test_they_are_padded_to_one(self, tmp_path: Path) -> None:
        start = self.unequal(tmp_path / "a")
        report: Any = loratool.convert(start, tmp_path / "b", runtime="sglang", base=llama(tmp_path / "base"))
        assert {row.rank for row in report.modules} == {5} and fields(tmp_path / "b")["rank_pattern"] == {}
        assert any("3 modules are padded with zeros to rank 5" in note for note in report.notes)
        found, wanted = changes(tmp_path / "b"), changes(start)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], rtol=1e-6) for name in wanted)

    @pytest.mark.parametrize("runtime", ["vllm", "mlx"])
    def test_a_rank_is_what_they_are_truncated_to(self, runtime: str, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", both(0))
        report: Any = loratool.convert(start, tmp_path / "b", runtime=runtime, base=llama(tmp_path / "base"), rank=1)
        assert {(row.how, row.rank) for row in report.modules} == {("truncated", 1)}
        report = loratool.convert(start, tmp_path / "c", runtime=runtime, base=tmp_path / "base", rank=64)
        assert {(row.how, row.rank) for row in report.modules} == {("exact", 2)}

    def test_experts_have_one_in_vllm(self, tmp_path: Path) -> None:
        at = f"{LAYER.format(0)}block_sparse_moe.experts."
        pairs = {f"{at}0.w1": factors(12, 8, 2), f"{at}1.w1": factors(12, 8, 4), f"{at}2.w2": factors(8, 12, 3)}
        start = write_peft(tmp_path / "a", pairs, r=2, lora_alpha=2, rank_pattern={"1.w1": 4, "2.w2": 3})
        loratool.convert(start, tmp_path / "b", runtime="vllm", base=mixtral(tmp_path / "base"))
        tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
        ranks = {key[len(f"base_model.model.{at}") :]: len(A) for key, A in tensors.items() if "lora_A" in key}
        assert {ranks[f"{e}.w1.lora_A.weight"] for e in range(3)} == {4}
        assert {ranks[f"{e}.w2.lora_A.weight"] for e in range(3)} == {3}
        found = changes(tmp_path / "b")
        assert all(torch.allclose(found[path], change, rtol=1e-6) for path, change in changes(start).items())

    def test_vllm_keeps_them(self, tmp_path: Path) -> None:
        start = self.unequal(tmp_path / "a")
        report: Any = loratool.convert(start, tmp_path / "b", runtime="vllm", base=llama(tmp_path / "base"))
        assert {row.rank for row in report.modules} == {2, 5} and same(changes(tmp_path / "b"), changes(start))

    def test_one_above_the_limit_is_refused(self, tmp_path: Path) -> None:
        pairs = {f"{LAYER.format(0)}self_attn.q_proj": factors(8, 8, 600)}
        start = write_peft(tmp_path / "a", pairs, r=600)
        with pytest.raises(InputError, match=r"loratool.resize\(..., rank=512\)"):
            loratool.convert(start, tmp_path / "b", runtime="vllm", base=llama(tmp_path / "base"))

    def test_the_flag_is_named(self, tmp_path: Path) -> None:
        pairs = {f"{LAYER.format(0)}self_attn.q_proj": factors(8, 8, 33)}
        start = write_peft(tmp_path / "a", pairs, r=33)
        report: Any = loratool.convert(start, tmp_path / "b", runtime="vllm", base=llama(tmp_path / "base"))
        assert report.notes == ("start vLLM with --max-lora-rank 64",)


class TestBeside:
    def test_sglang_gets_v_beside_q(self, tmp_path: Path) -> None:
        q = f"{LAYER.format(1)}self_attn.q_proj"
        start = write_peft(tmp_path / "a", {q: factors(8, 8, 2)})
        report: Any = loratool.convert(start, tmp_path / "b", runtime="sglang", base=llama(tmp_path / "base"))
        found, v = changes(tmp_path / "b"), f"{LAYER.format(1)}self_attn.v_proj"
        assert found.keys() == {q, v} and not found[v].any() and found[v].shape == (4, 8)
        assert [row.name for row in report.modules] == [q] and v in report.notes[0]
        with pytest.raises(NeedsFlag, match="base"):
            loratool.convert(start, tmp_path / "c", runtime="sglang")

    def test_tgi_gets_every_layer(self, tmp_path: Path) -> None:
        q = f"{LAYER.format(1)}self_attn.q_proj"
        start = write_peft(tmp_path / "a", {q: factors(8, 8, 2)})
        loratool.convert(start, tmp_path / "b", runtime="tgi", base=llama(tmp_path / "base"))
        found = changes(tmp_path / "b")
        assert found.keys() == {q, f"{LAYER.format(0)}self_attn.q_proj"} and same({q: found[q]}, changes(start))

    def test_lmdeploy_has_nothing_that_is_not_set(self, tmp_path: Path) -> None:
        base = llama(tmp_path / "base")
        names = load_file(base / "model.safetensors") | {"vision.layers.0.self_attn.q_proj.weight": weights(8, 8)}
        write_model(tmp_path / "wide", names, json.loads((base / "config.json").read_text()))
        start = write_peft(tmp_path / "a", {f"{LAYER.format(1)}self_attn.q_proj": factors(8, 8, 2)})
        with pytest.raises(InputError, match="uninitialized memory"):
            loratool.convert(start, tmp_path / "b", runtime="lmdeploy", base=tmp_path / "wide")


class TestExperts:
    @pytest.mark.parametrize(
        ("runtime", "names"),
        [
            ("vllm", {}),
            ("exllamav3", {}),
            ("trtllm", {}),
            ("sglang", {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}),
        ],
    )
    def test_a_stack_is_taken_apart(self, runtime: str, names: dict[str, str], tmp_path: Path) -> None:
        start, wanted = stacked(tmp_path / "a")
        loratool.convert(start, tmp_path / "b", runtime=runtime, base=mixtral(tmp_path / "base"))
        ends = {path: path[:-2] + names.get(path[-2:], path[-2:]) for path in wanted}
        assert same(changes(tmp_path / "b"), {ends[path]: change for path, change in wanted.items()})

    def test_missing_ones_are_zeros(self, tmp_path: Path) -> None:
        path = f"{LAYER.format(0)}mlp.experts.1.w2"
        start = write_peft(tmp_path / "a", {path: factors(8, 12, 2)})
        report: Any = loratool.convert(start, tmp_path / "b", runtime="vllm", base=mixtral(tmp_path / "base"))
        found = changes(tmp_path / "b")
        assert len(found) == 9 and sum(bool(change.any()) for change in found.values()) == 1
        assert "8 modules of zeros" in report.notes[0]

    def test_zeros_beside_stacks_that_are_turned(self, tmp_path: Path) -> None:
        """Llama 4's files have (expert, in, out), and PEFT's factors are of these."""
        owner = f"{LAYER.format(0)}feed_forward.experts"
        config = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], **HEADS}
        stacks = {f"{owner}.gate_up_proj": weights(3, 8, 24), f"{owner}.down_proj": weights(3, 12, 8)}
        base = write_model(tmp_path / "base", stacks, config)
        names = {"target_modules": [], "target_parameters": [f"{owner}.down_proj"], "peft_version": "0.21.2"}
        start = write_peft(tmp_path / "a", {owner: (weights(6, 8), weights(12, 6))}, r=2, **names)
        loratool.convert(start, tmp_path / "b", runtime="vllm", base=base)
        shapes = {path.rpartition(".")[2]: tuple(change.shape) for path, change in changes(tmp_path / "b").items()}
        assert shapes == {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
        assert not loratool.inspect_for(tmp_path / "b", runtime="vllm", base=base).findings

    def test_where_there_are_none_they_are_refused(self, tmp_path: Path) -> None:
        start, _ = stacked(tmp_path / "a")
        with pytest.raises(InputError, match="experts would be ignored without a warning, and nothing else is left"):
            loratool.convert(start, tmp_path / "b", runtime="tgi", base=mixtral(tmp_path / "base"))

    def test_patterns_do_not_grow_with_them(self, tmp_path: Path) -> None:
        start, _ = stacked(tmp_path / "a", rank=3)
        pairs = load_file(start / "adapter_model.safetensors")
        q = f"base_model.model.{LAYER.format(0)}self_attn.q_proj.lora_"
        pairs |= {q + "A.weight": weights(2, 8), q + "B.weight": weights(8, 2)}
        save_file(pairs, start / "adapter_model.safetensors")
        config = fields(start) | {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}
        (start / "adapter_config.json").write_text(json.dumps(config))
        loratool.convert(start, tmp_path / "b", runtime="vllm", base=mixtral(tmp_path / "base"))
        assert fields(tmp_path / "b")["rank_pattern"] == {r"^model\.layers\.\d+\.self_attn\.q_proj": 2}
        assert len(changes(tmp_path / "b")) == 10


class TestNames:
    def test_the_router_of_mixtral(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", {f"{LAYER.format(0)}mlp.gate": factors(3, 8, 2)})
        loratool.convert(start, tmp_path / "b", runtime="vllm", base=mixtral(tmp_path / "base"))
        assert [*changes(tmp_path / "b")] == [f"{LAYER.format(0)}block_sparse_moe.gate"]
        with pytest.raises(InputError, match="modules of such names would be ignored without a warning"):
            loratool.convert(start, tmp_path / "c", runtime="sglang", base=tmp_path / "base")

    def test_a_wrappers_adapter_on_the_text_class(self, tmp_path: Path) -> None:
        path = "model.language_model.layers.0.self_attn.q_proj"
        start = write_peft(tmp_path / "a", {path: factors(8, 8, 2)})
        base = llama(tmp_path / "base", "gemma3_text", "Gemma3ForCausalLM")
        loratool.convert(start, tmp_path / "b", runtime="vllm", base=base)
        assert [*changes(tmp_path / "b")] == ["model.layers.0.self_attn.q_proj"]

    def test_fused_rows_are_split_where_only_the_parts_are_known(self, tmp_path: Path) -> None:
        names = {"model.layers.0.self_attn.qkv_proj.weight": (16, 8), "model.layers.0.mlp.gate_up_proj.weight": (24, 8)}
        config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], **HEADS}
        base = write_model(tmp_path / "base", {n: weights(*s) for n, s in names.items()}, config)
        start = write_peft(tmp_path / "a", {n.removesuffix(".weight"): factors(*s, 2) for n, s in names.items()})
        loratool.convert(start, tmp_path / "b", runtime="tgi", base=base)
        whole, found = changes(start), changes(tmp_path / "b")
        at = "model.layers.0.self_attn."
        parts = [found[f"{at}{name}"] for name in ("q_proj", "k_proj", "v_proj")]
        assert torch.equal(torch.cat(parts), whole[f"{at}qkv_proj"]) and [*map(len, parts)] == [8, 4, 4]
        at = "model.layers.0.mlp."
        assert torch.equal(torch.cat([found[f"{at}gate_proj"], found[f"{at}up_proj"]]), whole[f"{at}gate_up_proj"])
        loratool.convert(start, tmp_path / "c", runtime="vllm", base=base)
        assert same(changes(tmp_path / "c"), whole)
        (base / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
        with pytest.raises(InputError, match="has 16 rows, and by the base's config.json its parts have 24"):
            loratool.convert(start, tmp_path / "d", runtime="tgi", base=base)

    def test_vllm_turns_the_rows_of_llama4(self, tmp_path: Path) -> None:
        """Its `permute_qk_weight_for_rotary` reads the base's rows, of each head, as 0, 2, 1, 3."""
        start = write_peft(tmp_path / "a", both(0))
        base = llama(tmp_path / "base", "llama4_text", "Llama4ForCausalLM")
        report: Any = loratool.convert(start, tmp_path / "b", runtime="vllm", base=base)
        assert any("rows of 2 queries and keys are in the order of vLLM" in note for note in report.notes)
        found, wanted = changes(tmp_path / "b"), changes(start)
        order = {"q_proj": [0, 2, 1, 3, 4, 6, 5, 7], "k_proj": [0, 2, 1, 3]}
        for path, change in wanted.items():
            rows = order.get(path.rpartition(".")[2], [*range(len(change))])
            assert torch.equal(found[path], change[rows])
        said = json.loads((base / "config.json").read_text())
        for heads in (None, 3):  # not said, and not those of 8 rows
            (base / "config.json").write_text(json.dumps({**said, "num_attention_heads": heads}))
            with pytest.raises(InputError, match="has 8 rows, and by the base's config.json . heads"):
                loratool.convert(start, tmp_path / "c", runtime="vllm", base=base)

    def test_what_is_turned_is_for_vllm_alone_and_says_so(self, tmp_path: Path) -> None:
        start, out = write_peft(tmp_path / "a", both(0)), tmp_path / "b"
        base = llama(tmp_path / "base", "llama4_text", "Llama4ForCausalLM")
        loratool.convert(start, out, runtime="vllm", base=base)
        again: dict[str, Any] = {"out": tmp_path / "c", "base": base}
        for refused in (
            lambda: loratool.merge(base, [out], tmp_path / "c"),
            lambda: loratool.convert(out, to="mlx", **again),
            lambda: loratool.convert(out, runtime="vllm", **again),
            lambda: loratool.combine([out], tmp_path / "c"),
            lambda: loratool.resize(out, tmp_path / "c", rank=1),
            lambda: loratool.inspect_for(out, runtime="sglang"),
        ):
            with pytest.raises(InputError, match="is only for vllm: the rows"):
                refused()
        report: Any = loratool.inspect(out)
        assert "it is only for vllm: no other command accepts it" in report.problems
        assert loratool.inspect_for(out, runtime="vllm", base=base).findings == ()
        loratool.convert(start, tmp_path / "d", runtime="vllm", base=llama(tmp_path / "other"))
        loratool.merge(tmp_path / "other", [tmp_path / "d"], tmp_path / "e")

    def test_without_a_base_llamas_names_alone(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", both(0))
        report: Any = loratool.convert(start, tmp_path / "b", runtime="vllm")
        assert same(changes(tmp_path / "b"), changes(start)) and "not compared" in report.notes[0]
        other = write_peft(tmp_path / "c", {"transformer.h.0.attn.c_attn": factors(8, 8, 2)})
        with pytest.raises(NeedsFlag, match="add base"):
            loratool.convert(other, tmp_path / "d", runtime="vllm")


class TestRefused:
    def test_a_convolution_of_a_tower(self, tmp_path: Path) -> None:
        """vLLM's towers have LoRA on linear layers alone."""
        q, conv = "model.language_model.layers.0.self_attn.q_proj", "model.visual.patch_embed.proj"
        config = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
        config |= {"text_config": {"model_type": "qwen2_vl_text", **HEADS}}
        names = {f"{q}.weight": weights(16, 8), f"{conv}.weight": weights(8, 3, 2, 4, 4)}
        base = write_model(tmp_path / "base", names, config)
        pairs = {q: factors(16, 8, 2), conv: (weights(2, 3, 2, 4, 4), weights(8, 2, 1, 1, 1))}
        start = write_peft(tmp_path / "a", pairs)
        with pytest.raises(NeedsFlag, match="LoRA on convolutions would be ignored"):
            loratool.convert(start, tmp_path / "b", runtime="vllm", base=base)
        (found,) = loratool.inspect_for(start, runtime="vllm", base=base).findings
        assert found.what == "convolutions" and found.modules == (conv,)

    def test_a_class_without_adapters(self, tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", both(0))
        base = llama(tmp_path / "base", "falcon", "FalconForCausalLM")
        with pytest.raises(InputError, match="serves FalconForCausalLM without adapters"):
            loratool.convert(start, tmp_path / "b", runtime="vllm", base=base)
        with pytest.raises(InputError, match="is not known to serve with adapters"):
            odd = llama(tmp_path / "x", "llama", "OddForCausalLM")
            loratool.convert(start, tmp_path / "b", runtime="vllm", base=odd)
        with pytest.raises(InputError, match="serves Glm4ForCausalLM without adapters"):
            glm = llama(tmp_path / "glm", "glm4", "Glm4ForCausalLM")
            loratool.convert(start, tmp_path / "b", runtime="lmdeploy", base=glm)

    def test_the_embedding_where_it_is_not_applied(self, tmp_path: Path) -> None:
        q = f"{LAYER.format(0)}self_attn.q_proj"
        start = write_peft(tmp_path / "a", {q: factors(8, 8, 2), "lm_head": factors(16, 8, 2)})
        loratool.convert(start, tmp_path / "b", runtime="vllm", base=llama(tmp_path / "base"))
        assert "lm_head" in changes(tmp_path / "b")
        base = llama(tmp_path / "mistral", "mistral", "MistralForCausalLM")
        with pytest.raises(NeedsFlag, match="LoRA on the head would be refused") as caught:
            loratool.convert(start, tmp_path / "c", runtime="vllm", base=base)
        assert 'exclude="lm_head"' in str(caught.value)
        loratool.convert(start, tmp_path / "c", runtime="vllm", base=base, exclude=["lm_head"])
        assert [*changes(tmp_path / "c")] == [q]

    @pytest.mark.parametrize("runtime", ["vllm", "sglang", "trtllm", "tgi", "lmdeploy", "exllamav3"])
    def test_what_is_no_factor(self, runtime: str, tmp_path: Path) -> None:
        q = f"{LAYER.format(0)}self_attn.q_proj"
        start = write_peft(tmp_path / "a", {q: factors(8, 8, 2), **both(1)}, modules_to_save=["lm_head"])
        pairs = load_file(start / "adapter_model.safetensors")
        save_file(pairs | {"base_model.model.lm_head.weight": weights(16, 8)}, start / "adapter_model.safetensors")
        with pytest.raises(NeedsFlag, match="modules_to_save would be") as caught:
            loratool.convert(start, tmp_path / "b", runtime=runtime, base=llama(tmp_path / "base"))
        assert 'exclude="lm_head"' in str(caught.value) and "a merge applies them to the base" in str(caught.value)
        options: Any = {"runtime": runtime, "base": tmp_path / "base", "exclude": ["lm_head"]}
        report: Any = loratool.convert(start, tmp_path / "b", **options)
        assert report.dropped == ("lm_head",)

    def test_nothing_is_asked_for_that_does_not_help(self, tmp_path: Path) -> None:
        head = write_peft(tmp_path / "a", {"lm_head": factors(16, 8, 2)})
        with pytest.raises(InputError, match="LoRA on the head would be ignored .* and nothing else is left"):
            loratool.convert(head, tmp_path / "b", runtime="trtllm")
        with pytest.raises(NeedsFlag, match="add base"):  # whose class tells
            loratool.convert(head, tmp_path / "b", runtime="vllm")
        base = llama(tmp_path / "base")
        tower = "vision.layers.0.self_attn.q_proj.weight"
        model = load_file(base / "model.safetensors") | {tower: weights(8, 8)}
        save_file(model, base / "model.safetensors")
        start = write_peft(tmp_path / "c", {**both(0), "lm_head": factors(16, 8, 2)})
        with pytest.raises(InputError, match="with uninitialized memory"):
            loratool.convert(start, tmp_path / "b", runtime="lmdeploy", base=base)

    def test_options_that_exclude_each_other(self, tmp_path: Path) -> None:
        start, base = write_peft(tmp_path / "a", both(0)), llama(tmp_path / "base")
        cases: list[Any] = [{"to": "peft"}, {"layout": "fused"}, {"architecture": "LlamaModel"}]
        for options in cases:
            with pytest.raises(UsageError, match="runtime"):
                loratool.convert(start, tmp_path / "b", runtime="vllm", base=base, **options)
        with pytest.raises(UsageError, match="is none of transformers, vllm"):
            loratool.convert(start, tmp_path / "b", runtime="kohya", base=base)
        with pytest.raises(UsageError, match='runtime="vllm" is for adapters of language models'):
            loratool.convert(FIXTURES / "sdxl" / "adapter.safetensors", tmp_path / "b", runtime="vllm")


@pytest.mark.parametrize(
    ("given", "instead"),
    [("--for split", "--layout split"), ("--for fused", "--layout fused"), ("--to vllm", "--for vllm")],
)
def test_words_of_another_option(given: str, instead: str, tmp_path: Path) -> None:
    told = run_command("convert", write_peft(tmp_path / "a", both(0)), *given.split())
    assert told.exit_code == 2 and instead in told.stderr


@pytest.mark.parametrize("runtime", ["vllm", "mlx", "ollama"])
def test_a_folder_is_written(runtime: str, tmp_path: Path) -> None:
    """A file of factors alone is nothing that these load; a folder is replaced by --force."""
    start, base = write_peft(tmp_path / "a", both(0)), llama(tmp_path / "base")
    for name in ("b.safetensors", "b.gguf"):
        with pytest.raises(UsageError, match=r"b\.(safetensors|gguf)"):
            loratool.convert(start, tmp_path / name, runtime=runtime, base=base)
    loratool.convert(start, tmp_path / "b", runtime=runtime, base=base)
    with pytest.raises(NeedsFlag, match="force=True"):
        loratool.convert(start, tmp_path / "b", runtime=runtime, base=base)
    loratool.convert(start, tmp_path / "b", runtime=runtime, base=base, force=True)


def test_the_modelfile_names_a_base_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its own folder, which Ollama starts at; not a file of weights alone, nor what a line cannot hold."""
    start, base, deep = write_peft(tmp_path / "a", both(0)), llama(tmp_path / "base"), tmp_path / "deep" / "down"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    report: Any = loratool.convert(start, "b", runtime="ollama", base=base)
    head, adapter = Path("b", "Modelfile").read_text().splitlines()
    assert (head, adapter) == ("FROM ../../../base", "ADAPTER ./adapter.gguf")
    assert (deep / "b" / head.removeprefix("FROM ")).samefile(base)
    assert report.next == report.document().next == "ollama create NAME -f b/Modelfile"
    (other := tmp_path / "with\nbreak").mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    for unknown in (base / "model.safetensors", other):
        report = loratool.convert(start, "b", runtime="ollama", base=unknown, force=True)
        assert not report.next and Path("b", "Modelfile").read_text().startswith("# FROM the model")


def test_a_config_alone_is_not_asked_for(tmp_path: Path) -> None:
    """The names need no more, and what the runtime does not apply does."""
    start = write_peft(tmp_path / "a", both(0))
    for runtime in ("llama.cpp", "ollama"):
        with pytest.raises(NeedsFlag) as caught:
            loratool.convert(start, tmp_path / "b.gguf" if runtime == "llama.cpp" else tmp_path / "b", runtime=runtime)
        assert caught.value.remedy == "add --base BASE with the served model"


@pytest.mark.parametrize("runtime", ["vllm", "tgi", "lmdeploy"])
def test_a_and_b_of_two_types_are_written_in_the_wider(runtime: str, tmp_path: Path) -> None:
    A, B = factors(8, 8, 2)
    start = write_peft(tmp_path / "a", {f"{LAYER.format(0)}self_attn.q_proj": (A.bfloat16(), B)})
    report: Any = loratool.convert(start, tmp_path / "b", runtime=runtime, base=llama(tmp_path / "base"))
    assert {row.how for row in report.modules} == {"exact"}
    found = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert any(torch.equal(t, A.bfloat16().float()) for t in found.values())


def test_exllamav3_has_float16(tmp_path: Path) -> None:
    A, B = factors(8, 8, 2)
    start = write_peft(tmp_path / "a", {f"{LAYER.format(0)}self_attn.q_proj": (A, B * 1e4)}, lora_alpha=2e4)
    with pytest.raises(InputError, match="overflows float16"):
        loratool.convert(start, tmp_path / "b", runtime="exllamav3", base=llama(tmp_path / "base"), dry_run=True)
    loratool.convert(start, tmp_path / "b", runtime="vllm", base=tmp_path / "base")


def test_modules_that_the_base_does_not_have(tmp_path: Path) -> None:
    start = write_peft(tmp_path / "a", {**both(0), "model.layers.7.self_attn.q_proj": factors(8, 8, 2)})
    with pytest.raises(NeedsFlag, match="modules that the base does not have would be ignored"):
        loratool.convert(start, tmp_path / "b", runtime="vllm", base=llama(tmp_path / "base"))
    (found,) = loratool.inspect_for(start, runtime="vllm", base=tmp_path / "base").findings
    assert found.what == "absent" and found.modules == ("model.layers.7.self_attn.q_proj",)


class TestEmbedding:
    """PEFT stores the embedding's weight under its factors, `embed_tokens.base_layer.weight`."""

    def make(self, folder: Path, under: Tensor) -> Path:
        q, embed = f"{LAYER.format(0)}self_attn.q_proj", "base_model.model.model.embed_tokens."
        start = write_peft(folder, {q: factors(8, 8, 2)})
        pairs = load_file(start / "adapter_model.safetensors")
        pairs |= {f"{embed}lora_embedding_A": weights(2, 16), f"{embed}lora_embedding_B": weights(8, 2)}
        save_file(pairs | {f"{embed}base_layer.weight": under}, start / "adapter_model.safetensors")
        return start

    def test_a_copy_of_the_bases_is_left_out(self, tmp_path: Path) -> None:
        base = llama(tmp_path / "base")
        start = self.make(tmp_path / "a", load_file(base / "model.safetensors")["model.embed_tokens.weight"])
        loratool.convert(start, tmp_path / "b", runtime="vllm", base=base)
        found = load_file(tmp_path / "b" / "adapter_model.safetensors")
        wanted = load_file(start / "adapter_model.safetensors")
        assert wanted.keys() - found.keys() == {"base_model.model.model.embed_tokens.base_layer.weight"}
        assert all(torch.equal(found[name], wanted[name]) for name in found)

    def test_a_trained_one_is_refused(self, tmp_path: Path) -> None:
        start, base = self.make(tmp_path / "a", weights(16, 8, seed=9)), llama(tmp_path / "base")
        with pytest.raises(NeedsFlag, match="weights of their own under the factors would be ignored"):
            loratool.convert(start, tmp_path / "b", runtime="vllm", base=base)
        (found,) = loratool.inspect_for(start, runtime="vllm", base=base).findings
        assert found.what == "replaced" and found.modules == ("model.embed_tokens",)


class TestDora:
    def make(self, folder: Path) -> Path:
        q = f"{LAYER.format(0)}self_attn.q_proj"
        start = write_peft(folder, {q: factors(8, 8, 2)}, use_dora=True)
        magnitude = {f"base_model.model.{q}.lora_magnitude_vector": weights(8).abs() + 1}
        pairs = load_file(start / "adapter_model.safetensors")
        save_file(pairs | magnitude, start / "adapter_model.safetensors")
        return start

    def test_transformers_and_peft_read_its_magnitudes(self, tmp_path: Path) -> None:
        start, base = self.make(tmp_path / "a"), llama(tmp_path / "base")
        report: Any = loratool.convert(start, tmp_path / "b", runtime="transformers", base=base)
        keys = {k for k in load_file(tmp_path / "b" / "adapter_model.safetensors") if "magnitude" in k}
        assert keys == {f"base_model.model.{LAYER.format(0)}self_attn.q_proj.lora_magnitude_vector.weight"}
        assert {row.how for row in report.modules} == {"exact"} and fields(tmp_path / "b")["use_dora"] is True
        for adapter in ("a", "b"):
            loratool.merge(base, tmp_path / adapter, tmp_path / f"merged-{adapter}")
        one, two = (load_file(tmp_path / f"merged-{adapter}" / "model.safetensors") for adapter in "ab")
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_others_get_the_best_lora(self, tmp_path: Path) -> None:
        start, base = self.make(tmp_path / "a"), llama(tmp_path / "base")
        with pytest.raises(NeedsFlag, match="base"):
            loratool.convert(start, tmp_path / "b", runtime="vllm")
        report: Any = loratool.convert(start, tmp_path / "b", runtime="vllm", base=base, rank=8)
        (row,) = report.modules
        assert row.rank == 8 and row.error < 1e-6
        loratool.merge(base, start, tmp_path / "merged")
        name = f"{LAYER.format(0)}self_attn.q_proj"
        moved = (load_file(p / "model.safetensors")[f"{name}.weight"].double() for p in (tmp_path / "merged", base))
        W, before = moved
        assert torch.allclose(changes(tmp_path / "b")[name], W - before, atol=1e-5)


def test_a_runtime_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, types_read_anew: None) -> None:
    """One that nobody has: its own names, one rank, and a limit."""
    reads = dict.fromkeys(FEATURES, "yes") | {"alpha_pattern": "ignores"}
    row = Runtime(
        "toy", "Toy", "1", "read", reads, "ignores", modules=r"block\.\d+\.attn\.\w+", one_rank=True,
        renames=((r"^model\.layers\.(\d+)\.self_attn", r"block.\1.attn"),), max_ranks=(4,), rank_flag="--r",
    )  # fmt: skip
    monkeypatch.setitem(RUNTIMES, "toy", row)
    pairs, base = {**both(0), f"{LAYER.format(1)}self_attn.o_proj": factors(8, 8, 3)}, llama(tmp_path / "base")
    start = write_peft(tmp_path / "a", pairs, rank_pattern={"1.self_attn.o_proj": 3})
    report: Any = loratool.convert(start, tmp_path / "b", runtime="toy", base=base)
    assert {row.name for row in report.modules} == {f"block.{i}.attn.o_proj" for i in (0, 1)} | {
        f"block.0.attn.{n}" for n in ("q_proj", "k_proj", "v_proj")
    }
    assert {row.rank for row in report.modules} == {3} and "start Toy with --r 4" in report.notes
    wide = write_peft(tmp_path / "c", {f"{LAYER.format(0)}mlp.up_proj": factors(12, 8, 2)})
    with pytest.raises(InputError, match="modules of such names would be ignored"):
        loratool.convert(wide, tmp_path / "d", runtime="toy", base=base)


@pytest.mark.slow
def test_peft_and_transformers_answer_alike(tmp_path: Path) -> None:
    """DoRA with rsLoRA on a live model, by `from_pretrained` and by `load_adapter`, which misses PEFT's own names."""
    pytest.importorskip("peft")
    from lib.models import peft_models as made
    from peft import PeftModel

    config = {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
    pair = made.write_pair(tmp_path, made.llama(), **config)
    loratool.convert(pair.adapter, tmp_path / "b", runtime="transformers", base=pair.base)
    by_peft = PeftModel.from_pretrained(made.load(pair.base, pair.cls), str(tmp_path / "b")).eval()
    assert made.agree(made.answer(by_peft), pair.wanted)
    for adapter, right in ((pair.adapter, False), (tmp_path / "b", True)):
        model = made.load(pair.base, pair.cls)
        model.load_adapter(str(adapter))
        assert made.agree(made.answer(model.double()), pair.wanted) is right
