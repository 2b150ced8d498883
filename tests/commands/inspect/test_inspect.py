"""Hold inspect on real key lists of large models over sparse files: grouping, coverage, and the time it takes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    FIXTURES,
    SHARED,
    factors,
    load_model,
    needs_shared,
    run_command,
    weights,
    write_kohya,
    write_model,
    write_peft,
)
from lib.files.gguf_bytes import tensor as gguf_tensor
from lib.files.gguf_bytes import write as write_gguf
from safetensors.torch import save_file

import loratool
from loratool.architectures.numbered_names import _ranges
from loratool.errors import InputError, LoratoolError, UsageError
from loratool.files.containers.safetensors_file import build_header
from loratool.files.dtypes import TensorSpec
from loratool.views.inspect_adapter import AdapterInspection
from loratool.views.inspect_model import CheckpointReport


def sparse_model(
    folder: Path, tensors: dict[str, tuple[str, list[int]]], config: dict[str, Any], shards: int = 1
) -> Path:
    """Write a model of any size: true headers over empty data sections."""
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        specs = {n: TensorSpec(tensors[n][0], tuple(tensors[n][1])) for n in names[i::shards]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        header, _ = build_header(specs, specs, {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(s.nbytes for s in specs.values()))
        weight_map.update(dict.fromkeys(specs, file))
    (folder / "config.json").write_text(json.dumps(config))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def checkpoint_report(path: Path) -> CheckpointReport:
    report = loratool.inspect(path)
    assert isinstance(report, CheckpointReport)
    return report


def adapter_report(path: Path, **options: Any) -> AdapterInspection:
    report = loratool.inspect(path, **options)
    assert isinstance(report, AdapterInspection)
    return report


def test_a_models_groups_read_like_its_config() -> None:
    report = checkpoint_report(FIXTURES / "llama" / "base")
    assert (report.model_type, report.tensors, report.tied, report.quantization) == ("llama", 30, False, None)
    assert report.parameters == 171_456 and report.nbytes == 2 * 171_456 and report.dtypes == {"BF16": 171_456}
    roles = {g.name: (g.tensors, g.shape, g.role) for g in report.groups}
    assert roles["model.layers.{0..2}.self_attn.q_proj.weight"] == (3, (64, 64), "linear")
    assert roles["model.embed_tokens.weight"] == (1, (256, 64), "embedding")
    assert roles["lm_head.weight"] == (1, (256, 64), "head")
    assert roles["model.layers.{0..2}.input_layernorm.weight"] == (3, (64,), "")
    assert sum(g.parameters for g in report.groups) == report.parameters


def test_linear_targets_are_pefts_all_linear() -> None:
    """The role `linear` is what peft's target_modules="all-linear" takes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for name in ("llama", "gpt2"):
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / name / "base")
        live = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        theirs = {n.removeprefix("base_model.model.") for n, m in live.named_modules() if hasattr(m, "lora_A")}
        marked = [g for g in checkpoint_report(FIXTURES / name / "base").groups if g.role == "linear"]
        assert sum(g.tensors for g in marked) == len(theirs)
        assert {g.name.rpartition(".weight")[0].rpartition(".")[2] for g in marked} == {
            t.rpartition(".")[2] for t in theirs
        }


def test_a_head_that_the_file_lacks_is_marked_tied(tmp_path: Path) -> None:
    assert checkpoint_report(FIXTURES / "gpt2" / "base").tied
    tensors = {"model.embed_tokens.weight": weights(8, 4)}
    for config, tied in (
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, True),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"architectures": ["BertModel"]}, False),
        ({}, False),
    ):
        assert checkpoint_report(write_model(tmp_path / "m", tensors, config)).tied is tied


@pytest.mark.parametrize(
    ("values", "text"), [([3], "3"), ([0, 1, 2], "{0..2}"), ([0, 2, 3, 7], "{0,2..3,7}"), ([1, 3], "{1,3}")]
)
def test_ranges(values: list[int], text: str) -> None:
    assert _ranges(values) == text


def test_odd_tensors_and_names(tmp_path: Path) -> None:
    """Scalars, empty and complex tensors, names of numbers alone and no name at all are legal in a file."""
    odd = {
        "scalar": torch.tensor(1.0),
        "none": torch.zeros(0, 4),
        "z": torch.zeros(2, dtype=torch.complex64),
        "0.1.2": torch.ones(1),
        "": torch.ones(1),
    }
    report = checkpoint_report(write_model(tmp_path / "m", odd))
    assert report.tensors == 5 and report.parameters == 1 + 0 + 2 + 1 + 1


@needs_shared
@pytest.mark.parametrize("name", ["llama-2-7b", "mixtral-8x22b", "phi-3-mini", "falcon-180b"])
def test_real_indexes(tmp_path: Path, name: str) -> None:
    """Names, shapes and config of real models: every tensor is counted once, and the table stays short."""
    shapes = json.loads((SHARED / "index" / name / "shapes.json").read_text())
    config = json.loads((SHARED / "index" / name / "config.json").read_text())
    total = json.loads((SHARED / "index" / name / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    folder = sparse_model(tmp_path / "m", {k: ("BF16", v["shape"]) for k, v in shapes.items()}, config, shards=3)
    report = checkpoint_report(folder)
    assert report.tensors == len(shapes) == sum(g.tensors for g in report.groups)
    assert report.nbytes == 2 * sum(math.prod(v["shape"]) for v in shapes.values())
    assert report.nbytes in (total, total // 2)  # some indexes count fp32
    assert len(report.groups) < 30


@needs_shared
def test_quantized_and_expert_marks(tmp_path: Path) -> None:
    for name, quantized in (("gpt-oss-20b", "mxfp4"), ("qwen3-30b-a3b", None)):
        tensors = json.loads((SHARED / "index" / "generated" / f"{name}.json").read_text())
        report = checkpoint_report(
            sparse_model(tmp_path / name, {k: (v["dtype"], v["shape"]) for k, v in tensors.items()}, {})
        )
        assert report.quantization == quantized
        companions = sum(each.endswith("_scales") for each in tensors)
        assert report.tensors == len(tensors) - companions and len(report.groups) < 40
        if name.startswith("qwen3"):
            (experts,) = [g for g in report.groups if "up_proj" in g.name]
            assert (
                experts.name == "model.layers.{0..47}.mlp.experts.{0..127}.up_proj.weight"
                and experts.tensors == 48 * 128
            )


@pytest.mark.slow
def test_ninety_thousand_tensors_in_a_second_or_two(tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, list[int]]] = {
        f"model.layers.{i}.mlp.experts.{e}.{m}_proj.weight": ("BF16", [2048, 7168])
        for i in range(60)
        for e in range(500)
        for m in ("gate", "up", "down")
    }
    folder = sparse_model(tmp_path / "m", tensors, {"model_type": "deepseek_v3"}, shards=30)
    before = os.times()
    command = [sys.executable, "-c", "from loratool.cli import main; main()", "inspect", str(folder)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = os.times()
    assert after.children_user - before.children_user < 6  # of the processor: 0.9 s on an idle machine
    assert (
        re.search(r"mlp\.experts\.\{0-499\}\.up_proj  +0-59  +30,000 ", out)
        and "90,000 tensors" in out
        and len(out.splitlines()) < 10
    )


def test_a_gguf_file_is_told_by_its_types_and_fields(tmp_path: Path) -> None:
    fields = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.rope.freq_base": 5e5,
        "llama.heads": [1, 2], "tokenizer.ggml.tokens": [f"t{i}" for i in range(300)], "tokenizer.template": "{\n}",
        "loratool": "{}",
    }  # fmt: skip
    tensors = {
        "token_embd.weight": gguf_tensor(8, (4, 32), bytes(136)),
        "blk.0.ffn_up_exps.weight": gguf_tensor(12, (2, 3, 256), bytes(864)),
        "blk.1.ffn_up_exps.weight": gguf_tensor(12, (2, 3, 256), bytes(864)),
        "blk.0.attn_norm.weight": gguf_tensor(0, (32,), bytes(128)),
    }
    report = checkpoint_report(write_gguf(tmp_path / "m.gguf", fields, tensors))
    groups = [(g.name, g.dtype, g.codec, g.tensors, g.parameters, g.nbytes, g.role) for g in report.groups]
    assert groups == [
        ("token_embd.weight", "Q8_0", "Q8_0", 1, 128, 136, "embedding"),
        ("blk.{0..1}.ffn_up_exps.weight", "Q4_K", "Q4_K", 2, 3072, 1728, "experts"),
        ("blk.0.attn_norm.weight", "F32", None, 1, 32, 128, ""),
    ]
    assert report.tied and report.quantization == "ggml" and report.metadata == {"loratool": "{}"}
    assert report.fields == {
        "general.architecture": "llama", "llama.block_count": "2", "llama.rope.freq_base": "500000",
        "llama.heads": "[1, 2]", "tokenizer.ggml.tokens": "300 strings", "tokenizer.template": "3 characters",
        "loratool": "{}",
    }  # fmt: skip
    printed = run_command("inspect", tmp_path / "m.gguf").stdout
    assert "llama: block_count 2, rope.freq_base 500000, heads [1, 2]" in printed


def test_an_adapter() -> None:
    report = adapter_report(FIXTURES / "gpt2" / "adapter", base=FIXTURES / "gpt2" / "base")
    assert (report.format, report.modules, report.use_rslora, report.rank, report.alpha) == ("peft", 12, True, None, 6)
    found = {g.name: (g.rank, g.alpha, g.scale, g.modules) for g in report.groups}
    assert found["transformer.h.{0..2}.attn.c_attn"] == (8, pytest.approx(6), 6 / math.sqrt(8), 3)
    assert found["transformer.h.{0..2}.mlp.c_proj"] == (4, 3, 1.5, 3)
    assert report.coverage is not None and (report.coverage.bound, report.coverage.unbound) == (12, {})
    assert report.parameters == sum(
        t.numel() for t in _tensors(FIXTURES / "gpt2" / "adapter" / "adapter_model.safetensors")
    )


def _tensors(file: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(file).values())


def test_coverage_lists_what_does_not_bind(tmp_path: Path) -> None:
    adapter = write_peft(
        tmp_path / "a", {"model.layers.0.q_proj": factors(6, 4, 2), "model.layers.7.q_proj": factors(6, 4, 2)}
    )
    base = write_model(tmp_path / "b", {"model.layers.0.q_proj.weight": weights(6, 4)})
    report = adapter_report(adapter, base=base)
    assert report.coverage is not None and report.coverage.bound == 1
    assert report.coverage.unbound == {"model.layers.7.q_proj": ("model.layers.0.q_proj.weight",)}


def test_many_modules_that_a_base_lacks_are_no_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3,072 experts that a base lacks took minutes, when each was an expression that was tried on each module.

    As one expression of all of them, 44,000 took minutes again.
    """
    there, lacking = "model.layers.0.q_proj", [f"model.layers.0.experts.{i}.up_proj" for i in range(600)]
    adapter = write_peft(tmp_path / "a", {module: factors(6, 4, 2) for module in (there, *lacking)})
    base = write_model(tmp_path / "b", {f"{there}.weight": weights(6, 4)})
    seen: set[str] = set()
    monkeypatch.setattr(
        "loratool.binding.modules.selection.re.search", lambda p, path, s=re.search: seen.add(p) or s(p, path)
    )
    report = adapter_report(adapter, base=base)
    assert report.coverage is not None and report.coverage.bound == 1 and len(report.coverage.unbound) == 600
    assert not any("experts" in pattern for pattern in seen)


def test_a_kohya_file_and_a_bare_file(tmp_path: Path) -> None:
    made = {f"blocks.{i}.to_q": factors(6, 4, 2) for i in range(12)}
    report = adapter_report(write_kohya(tmp_path / "k.safetensors", made, torch.tensor(1.0)))
    assert [(g.name, g.scale, g.modules) for g in report.groups] == [("lora_unet_blocks_{0..11}_to_q", 0.5, 12)]
    A, B = factors(6, 4, 2)
    save_file(
        {"base_model.model.x.lora_A.weight": A, "base_model.model.x.lora_B.weight": B}, tmp_path / "bare.safetensors"
    )
    (problem,) = adapter_report(tmp_path / "bare.safetensors").problems
    assert problem.startswith("x: the adapter does not say its alpha") and "--alpha" in problem
    assert adapter_report(tmp_path / "bare.safetensors", alpha=3).groups[0].scale == 1.5


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base is for adapters"):
        loratool.inspect(FIXTURES / "llama" / "base", base=FIXTURES / "llama" / "base")
    with pytest.raises(InputError, match="is an empty folder"):
        loratool.inspect(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is a text, not weights"):
        loratool.inspect(tmp_path / "x.safetensors")


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    odd = {f"a{{}}.{i}.weight": weights(2, 2) for i in range(3)} | {"b." + "9" * 5000 + ".weight": weights(2, 2)}
    names = [g.name for g in checkpoint_report(write_model(tmp_path / "m", odd)).groups]
    assert sorted(names) == ["a{}.{0..2}.weight", "b." + "9" * 5000 + ".weight"]


def test_an_adapter_is_told_by_its_names_and_not_by_its_suffix(tmp_path: Path) -> None:
    file = write_kohya(tmp_path / "x.sft", {"a": factors(6, 4, 2)})
    assert adapter_report(file).format == "kohya"


def test_grouping_never_joins_what_differs() -> None:
    """Digits inside a word are no index: fc1 and fc2 stay apart."""
    from loratool.commands.inspect.command import _plain_groups

    names = ["l.0.fc1.weight", "l.1.fc1.weight", "l.0.fc2.weight", "l.2.fc1.weight", "12.w", "13.w"]
    specs = {n: TensorSpec("F32", (2, 2)) for n in names} | {"l.3.fc1.weight": TensorSpec("F16", (2, 2))}
    assert [g.name for g in _plain_groups(specs)] == [
        "l.{0..2}.fc1.weight",
        "l.0.fc2.weight",
        "{12..13}.w",
        "l.3.fc1.weight",
    ]
    colons = {f"unet:{i}:{end}": TensorSpec("F16", (4, 4)) for i in range(3) for end in ("up", "down")}
    assert [g.name for g in _plain_groups(colons)] == ["unet:{0..2}:up", "unet:{0..2}:down"]
    assert not re.search(r"fc\{", "".join(g.name for g in _plain_groups(specs)))


class TestAdapterInDepth:
    def test_sizes_and_ranks_are_those_of_the_dense_change(self) -> None:
        """Against torch.linalg on the product itself."""
        report = adapter_report(FIXTURES / "llama" / "adapter", base=FIXTURES / "llama" / "base")
        base, adapter = load_model(FIXTURES / "llama" / "base"), load_model(FIXTURES / "llama" / "adapter")
        for each in report.details:
            A, B = (adapter[f"base_model.model.{each.name}.lora_{role}.weight"].double() for role in "AB")
            D = 2.0 * B @ A
            p = torch.linalg.svdvals(D)[:8] / torch.linalg.svdvals(D).sum()
            assert each.norm == pytest.approx(float(torch.linalg.norm(D)), rel=1e-12)
            assert each.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-9)
            W = base[f"{each.name}.weight"].double()
            assert each.relative == pytest.approx(float(torch.linalg.norm(D) / torch.linalg.norm(W)), rel=1e-12)
        assert report.problems == ()

    def test_experts_count_together(self, tmp_path: Path) -> None:
        A, B = torch.randn(3 * 2, 6), torch.randn(4, 2 * 3)
        fields = {"target_modules": [], "target_parameters": ["experts.down_proj"], "r": 2, "lora_alpha": 2}
        (each,) = adapter_report(write_peft(tmp_path / "a", {"experts": (A, B)}, **fields)).details
        dense = torch.stack([B.view(4, 2, 3)[:, :, e] @ A.view(3, 2, 6)[e] for e in range(3)])
        assert (each.kind, each.rank) == ("experts", 2)
        assert each.norm == pytest.approx(float(torch.linalg.norm(dense.double())), rel=1e-6)

    def test_an_adapter_that_changes_nothing(self, tmp_path: Path) -> None:
        A, B = factors(6, 4, 2)
        nothing = write_peft(tmp_path / "a", {"x.q": (A, torch.zeros_like(B))})
        assert adapter_report(nothing).problems == ("it changes nothing: B @ A is 0 in every module",)
        half = write_peft(tmp_path / "b", {"x.q": (A, torch.zeros_like(B)), "x.v": (A.clone(), B)})
        assert adapter_report(half).problems == ("B @ A is 0 in 1 of 2 modules: x.q",)

    def test_a_factor_that_is_not_finite(self, tmp_path: Path) -> None:
        """One nan or inf would spread over whole rows of a merge."""
        A, B = factors(6, 4, 2)
        (problem,) = adapter_report(write_peft(tmp_path / "a", {"x.q": (A, B / 0)})).problems
        assert problem.startswith("base_model.model.x.q.lora_B.weight: holds nan or inf")

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"target_modules": ["q", "v"]}, "target_modules has v, which matches no module of the file"),
            ({"target_modules": ["v"]}, "target_modules does not match 1 modules: x.q"),
            ({"target_modules": r".*\.v"}, "target_modules does not match 1 modules: x.q"),
            ({"target_modules": r".*\.q"}, None),
            ({"target_modules": "all-linear"}, None),
            ({"fan_in_fan_out": True}, "fan_in_fan_out is true, but the base stores its weights as (out, in)"),
            ({"fan_in_fan_out": False}, None),
        ],
    )
    def test_the_config_against_the_tensors(self, tmp_path: Path, fields: dict[str, Any], problem: str | None) -> None:
        adapter = write_peft(tmp_path / "a", {"x.q": factors(6, 4, 2)}, **fields)
        base = write_model(tmp_path / "b", {"x.q.weight": weights(6, 4)})
        problems = adapter_report(adapter, base=base).problems
        assert problem in problems if problem else problems == ()

    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_a_dora_that_was_never_trained(self, tmp_path: Path, kind: str) -> None:
        A, B = factors(6, 4, 2)
        adapter = write_peft(tmp_path / "a", {"x.q": (A, B * 0)}, use_dora=kind == "dora")
        if kind == "dora":
            file = adapter / "adapter_model.safetensors"
            save_file({**load_model(file), "base_model.model.x.q.lora_magnitude_vector": torch.ones(6)}, file)
        what = {"lora": "it changes nothing", "dora": "it was never trained"}[kind]
        assert adapter_report(adapter).problems == (f"{what}: B @ A is 0 in every module",)

    @pytest.mark.parametrize("based", [False, True])
    @pytest.mark.parametrize(
        ("case", "kind", "problem"),
        [
            ("unpaired", "unpaired", "x.v: has no partner: the B factor of it is missing"),
            ("shapes", "unpaired", "x.v: A is (3, 4) and B is (6, 2): they do not share a rank"),
            ("rank", "lora", "x.q, x.v: the config says rank 4, but A is (2, 4); the config is of another adapter"),
            ("alpha", "lora", "x.q, x.v: the adapter does not say its alpha; pass --alpha"),
        ],
    )
    def test_what_a_merge_refuses_is_a_finding(
        self, tmp_path: Path, run: Callable[..., Any], case: str, kind: str, problem: str, based: bool
    ) -> None:
        """A factor without its partner, and a rank that is not the config's, are told and not corrected."""
        made = {"x.q": factors(6, 4, 2), "x.v": factors(6, 4, 2, seed=1)}
        fields: dict[str, Any] = {"rank": {"r": 4}, "alpha": {"lora_alpha": None}}.get(case, {})
        adapter = write_peft(tmp_path / "a", made, **fields)
        file = adapter / "adapter_model.safetensors"
        tensors = load_model(file)
        if case == "unpaired":
            del tensors["base_model.model.x.v.lora_B.weight"]
        if case == "shapes":
            tensors["base_model.model.x.v.lora_A.weight"] = torch.zeros(3, 4)
        save_file(tensors, file)
        base = write_model(tmp_path / "b", {"x.q.weight": weights(6, 4), "x.v.weight": weights(6, 4)})
        report = adapter_report(adapter, base=base if based else None)
        assert len(report.problems) == 1 and report.problems[0].startswith(problem)
        row = {each.name: each for each in report.details}["x.v"]
        assert (row.kind, row.norm) == (kind, None) and len(report.groups) == 2
        assert run("inspect", adapter).exit_code == 0
        strict = run("inspect", adapter, "--strict", "--json")
        assert strict.exit_code == 1 and json.loads(strict.stdout)["status"] == "problems"
        with pytest.raises(LoratoolError):
            loratool.merge(base, adapter, tmp_path / "out")

    @pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
    def test_a_pattern_that_is_for_no_module(self, tmp_path: Path, field: str) -> None:
        """Such a config is of another adapter, or its pattern misspelled: the scale would be wrong in silence."""
        adapter = write_peft(tmp_path / "a", {"x.q": factors(6, 4, 2)}, **{field: {"q": 2, "nothing": 7}})
        assert adapter_report(adapter).problems == (f"{field} has nothing, which matches no module of the file",)

    def test_relative_sizes_of_a_tied_head_and_of_new_values(self, tmp_path: Path) -> None:
        A, B = factors(8, 4, 2)
        adapter = write_peft(tmp_path / "a", {"lm_head": (A, B)}, trainable_token_indices=[5, 1], bias="all")
        file, W, rows = adapter / "adapter_model.safetensors", weights(8, 4), weights(2, 4, seed=5)
        rest = {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows, "model.norm.bias": torch.ones(4)}
        rest["model.norm.weight"] = torch.full((4,), 3.0)
        save_file({**load_model(file), **{f"base_model.model.{k}": v for k, v in rest.items()}}, file)
        config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
        tensors = {"model.embed_tokens.weight": W, "model.norm.weight": torch.ones(4), "model.norm.bias": torch.ones(4)}
        base = write_model(tmp_path / "b", tensors, config)
        found = {each.name: each for each in adapter_report(adapter, base=base).details}
        norm = float(torch.linalg.norm(W.double()))
        assert found["lm_head"].relative == pytest.approx(float(torch.linalg.norm((B @ A).double())) / norm)
        moved = float(torch.linalg.norm((rows - W[[5, 1]]).double()))
        assert found["model.embed_tokens"].relative == pytest.approx(moved / norm)
        assert (found["model.norm"].norm, found["model.norm"].relative) == (4.0, 2.0)
        assert (found["model.norm.bias"].norm, found["model.norm.bias"].relative) == (0.0, 0.0)

    def test_a_base_that_does_not_fit(self, tmp_path: Path) -> None:
        adapter = write_peft(tmp_path / "a", {"x.q": factors(6, 4, 2), "x.v": factors(6, 4, 2)})
        report = adapter_report(adapter, base=write_model(tmp_path / "b", {"x.q.weight": weights(5, 4)}))
        assert any("1 of 2 modules are not in the base: x.v" in problem for problem in report.problems)
        assert any(
            problem.startswith("x.q.weight: A is (2, 4) and B is (6, 2)") and "(5, 4)" in problem
            for problem in report.problems
        )

    @pytest.mark.parametrize(("value", "dtype"), [(math.nan, torch.bfloat16), (1e200, torch.float64)])
    def test_a_base_without_a_norm(self, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
        W = weights(6, 4, dtype=dtype)
        W[0, 0] = value
        base = write_model(tmp_path / "base", {"x.weight": W})
        report = adapter_report(write_peft(tmp_path / "adapter", {"x": factors(6, 4, 2)}), base=base)
        assert report.details[0].relative is None
        assert report.problems == ("x.weight: the base's weight has no finite norm",)

    def test_an_init_that_changed_the_base_is_noted(self, tmp_path: Path) -> None:
        """Merged onto the original base such an adapter is wrong by its initial product."""
        report = adapter_report(write_peft(tmp_path / "a", {"x.q": factors(6, 4, 2)}, init_lora_weights="pissa"))
        assert report.notes == ("initialized with pissa: merge it with --initial or --residual-base",)

    def test_strict_exits_with_one_where_something_is_wrong(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        A, B = factors(6, 4, 2)
        wrong = write_peft(tmp_path / "a", {"x.q": (A, B * 0)})
        right = write_peft(tmp_path / "b", {"x.q": (A, B)})
        assert run("inspect", wrong).exit_code == 0
        assert run("inspect", right, "--strict").exit_code == 0
        assert run("inspect", FIXTURES / "llama" / "base", "--strict").exit_code == 0
        strict = run("inspect", wrong, "--strict")
        assert strict.exit_code == 1 and "problem: it changes nothing" in strict.stdout
        value = json.loads(run("inspect", wrong, "--strict", "--json").stdout)
        assert (value["ok"], value["exit_code"], value["status"]) == (False, 1, "problems")
        assert json.loads(run("inspect", wrong, "--json").stdout)["ok"] is True


def test_a_tensor_may_be_called_as_a_group_is(tmp_path: Path) -> None:
    """A range in its name is no range of a group, however long; and two ranges tell only all of their pairs."""
    names = ["x.{0..999999999}.w", "x.{7..3}.w", "y.{0..9}.{0..9}.w", "a.1.2.w", "a.3.4.w", "b.1.2.w", "b.1.3.w"]
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    report = loratool.inspect(tmp_path)
    (table,) = report.document(verbose=True).tables
    assert [row.cells[0] for row in table.rows] == [
        *("a.{1,3}.{2,4}.w", "b.1.2.w", "b.1.3.w"),
        *("x.{0..999999999}.w", "x.{7..3}.w", "y.{0..9}.{0..9}.w"),
    ]
    assert report.document().tables
    assert len(report.page().sheets[0].rows) == 5


def test_a_change_beyond_float64_beside_a_small_weight_has_no_ratio(tmp_path: Path) -> None:
    """It would be inf, which JSON has not."""
    A, B = (matrix.double() * 1e200 for matrix in factors(8, 12, 2))
    adapter = write_peft(tmp_path / "adapter", {"layers.0.q": (A, B)})
    base = write_model(tmp_path / "base", {"layers.0.q.weight": 1e-3 * weights(8, 12)})
    report = loratool.inspect(adapter, base=base)
    assert report.problems == ()
    assert [row.relative for row in report.details] == [None]
    report.to_dict()


@pytest.mark.parametrize(
    ("module", "said"),
    [("transformer.transformer_blocks.0.attn.to_q", None), ("unet.mid_block.attentions.0.proj_in", "sd_1.5")],
)
def test_a_flux_file_is_not_said_to_be_of_sd_1(tmp_path: Path, module: str, said: str | None) -> None:
    """ai-toolkit's metadata said sd_1.5 of every model that it did not know."""
    path, (A, B) = tmp_path / "a.safetensors", factors(8, 8, 2)
    tensors = {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    save_file(tensors, path, metadata={"ss_base_model_version": "sd_1.5", "ss_steps": "3"})
    training = loratool.inspect(path).training
    assert training and (training.base_model, training.steps) == (said, 3)
