"""Hold the intruder dimensions of adapters and fine-tunes against PEFT's own search and full decompositions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_model, write_peft
from lib.models.peft_models import DOWN, GATE_UP, gpt_oss, load, mixtral, wrap, write_base
from torch import Tensor

import loratool
from loratool import InputError, UsageError

LLAMA = {"model_type": "llama"}


def count(W: Tensor, tuned: Tensor, top: int = 10, threshold: float = 0.5) -> int:
    """Count as algorithm 1 of the paper does, by full decompositions of matrices (out, in)."""
    U = torch.linalg.svd(W.double(), full_matrices=False).U
    leading = torch.linalg.svd(tuned.double(), full_matrices=False).U[:, :top]
    return int(((leading.T @ U).abs().amax(1) < threshold).sum())


def decaying(out: int, inp: int, seed: int) -> Tensor:
    U, _, Vh = torch.linalg.svd(weights(out, inp, seed=seed), full_matrices=False)
    return U * torch.arange(1, min(out, inp) + 1) ** -0.5 @ Vh


def test_counts_as_peft_does(tmp_path: Path) -> None:
    """`reduce_intruder_dimension` says how many it found in each layer."""
    peft = pytest.importorskip("peft")
    reduce_intruder_dimension = pytest.importorskip("peft.tuners.lora.intruders").reduce_intruder_dimension

    shapes = {"small": (40, 30), "middle": (30, 40), "large": (36, 36)}
    model = torch.nn.ModuleDict({name: torch.nn.Linear(inp, out, bias=False) for name, (out, inp) in shapes.items()})
    base = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        base[f"{name}.weight"] = model[name].weight.data = decaying(*shape, seed=seed)
    write_model(tmp_path / "base", base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(shapes)))
    for seed, (name, size) in enumerate({"small": 0.05, "middle": 0.5, "large": 4.0}.items()):
        layer = wrapped.base_model.model[name]
        layer.lora_A["default"].weight.data, B = factors(*shapes[name], 4, seed=seed)
        layer.lora_B["default"].weight.data = B * size * 5
    wrapped.save_pretrained(tmp_path / "adapter")
    said: list[str] = []
    reduce_intruder_dimension(wrapped, logging_sink=said.append)
    found = {
        line.split(":")[0].rpartition(".")[2]: int(line.split()[-1].replace("intruders", "0")) for line in said[:3]
    }
    rows = loratool.spectra(tmp_path / "adapter", base=tmp_path / "base").modules
    ours = {row.name.rpartition(".")[2]: row.intruders for row in rows}
    assert {name: each.new for name, each in ours.items() if each} == found
    assert found["small"] == 0 and found["large"] >= 4
    assert all(each and each.examined == 10 and not each.undecided for each in ours.values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_an_adapter_and_of_its_merge(family: str, tmp_path: Path) -> None:
    """gpt2 stores its layers as (in, out); what is compared are directions of the outputs."""
    base, adapter = (FIXTURES / family / what for what in ("base", "adapter"))
    loratool.merge(base, adapter, tmp_path / "merged", dtype="fp32", undo=False)
    before, after = load_model(base), load_model(tmp_path / "merged")
    options: dict[str, Any] = {"top": 12, "threshold": 0.8}
    by_module = {row.name: row.intruders for row in loratool.spectra(adapter, base=base, **options).modules}
    report = loratool.diff_spectra(base, tmp_path / "merged", **options)
    assert len(report.weights) == len(by_module) and report.equal == 0
    for row in report.weights:
        sides = [side[row.name].T if family == "gpt2" else side[row.name] for side in (before, after)]
        ours = next(each for name, each in by_module.items() if row.name.endswith(f"{name}.weight"))
        assert ours == row.intruders and row.intruders.new == count(sides[0], sides[1], 12, 0.8)
    assert sum(row.intruders.new for row in report.weights) > 0


@pytest.mark.parametrize("make", [gpt_oss, mixtral])
def test_of_stacks_of_experts(make: Callable[[], Any], tmp_path: Path) -> None:
    """gpt-oss stores a stack as (E, in, out), Mixtral each expert's parts; PEFT's adapter has the stack of either."""
    model = make()
    base = write_base(tmp_path / "base", model)
    targets = {"target_parameters": [GATE_UP, DOWN], "target_modules": ["q_proj"]}
    wrap(load(base, type(model)), r=4, lora_alpha=40, **targets).save_pretrained(tmp_path / "adapter")
    loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", dtype="fp32", undo=False)
    before, after = load_model(base), load_model(tmp_path / "merged")
    parts = {"gate_up_proj": ("gate_up_proj", "w1.weight", "w3.weight"), "down_proj": ("down_proj", "w2.weight")}
    rows = [row for row in loratool.spectra(tmp_path / "adapter", base=base).modules if "experts" in row.name]
    for row in rows:
        layer, part = row.name.split(".")[2], row.name.rpartition(".")[2]
        names = [n for n in before if f"layers.{layer}." in n and ".experts." in n and n.endswith(parts[part])]
        pairs = [
            (before[n].mT, after[n].mT) if before[n].dim() == 3 else (before[n][None], after[n][None]) for n in names
        ]
        counts = [count(W, tuned) for sides in pairs for W, tuned in zip(*sides, strict=True)]
        assert row.intruders and row.intruders.new == sum(counts) > 0 and row.intruders.examined == 10 * len(counts)
    assert len(rows) == 4


def test_of_dora_and_of_experts(tmp_path: Path) -> None:
    """W' is what a merge gives, of DoRA with its magnitudes; a stack counts all its matrices."""
    A, B = factors(24, 20, 4)
    W = decaying(24, 20, seed=5)
    base = write_model(tmp_path / "base", {"a.q_proj.weight": W})
    adapter = write_peft(tmp_path / "dora", {"a.q_proj": (A, 30 * B)}, use_dora=True)
    tensors = load_model(adapter)
    magnitude = (1 + torch.arange(24) % 3) * torch.linalg.vector_norm(W, dim=1)
    name = "base_model.model.a.q_proj.lora_magnitude_vector"
    write_model(adapter, {**tensors, name: magnitude})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (row,) = loratool.spectra(adapter, base=base).modules
    V = W.double() + 30 * B.double() @ A.double()
    tuned = magnitude[:, None] * V / torch.linalg.vector_norm(V, dim=1, keepdim=True)
    assert row.intruders and row.intruders.new == count(W, tuned) > 0

    stack = torch.stack([decaying(16, 24, seed=seed) for seed in range(3)])
    config = {"model_type": "qwen3_moe", "num_experts": 3}
    single = {
        f"model.layers.0.mlp.experts.{e}.{part}_proj.weight": torch.zeros_like(stack[e])
        + stack[e] * (1 + (part == "up"))
        for e in range(3)
        for part in ("gate", "up")
    }
    base = write_model(tmp_path / "experts", single, config)
    adapter = write_peft(
        tmp_path / "lora",
        {name.removesuffix(".weight"): (A, 20 * B) for name in single for A, B in [factors(16, 24, 2)]},
    )
    rows = loratool.spectra(adapter, base=base).modules
    A, B = factors(16, 24, 2)
    assert len(rows) == 6
    for row in rows:
        before = single[f"{row.name}.weight"]
        assert row.intruders and row.intruders.new == count(before, before + 20 * B @ A)


def test_of_a_fused_base(tmp_path: Path) -> None:
    """A module that is some rows of a tensor is compared with these rows."""
    W = {name: decaying(rows, 16, seed=i) for i, (name, rows) in enumerate({"q": 16, "k": 8, "v": 8}.items())}
    config = {"model_type": "sarvam_moe", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    fused = {"model.layers.0.self_attn.query_key_value.weight": torch.cat([*W.values()])}
    base = write_model(tmp_path / "base", fused, config)
    A, B = factors(16, 16, 2)
    adapter = write_peft(tmp_path / "q", {"model.layers.0.self_attn.q_proj": (A, 40 * B)})
    (row,) = loratool.spectra(adapter, base=base, threshold=0.7).modules
    both = write_peft(
        tmp_path / "both",
        {
            "model.layers.0.self_attn.q_proj": (A, B),
            "model.layers.0.self_attn.query_key_value": factors(32, 16, 2),
        },
    )
    with pytest.raises(InputError, match="overlap in some rows only"):
        loratool.spectra(both, base=base)
    assert row.intruders and row.intruders.new == count(W["q"], W["q"] + 40 * B @ A, 10, 0.7) > 0


def test_of_quantized_weights_as_numbers() -> None:
    base = FIXTURES / "llama" / "base"
    coded = loratool.open_checkpoint(FIXTURES / "llama" / "fp8")
    plain = load_model(base)
    report = loratool.diff_spectra(base, FIXTURES / "llama" / "fp8", target="q_proj,down_proj", threshold=0.99)
    assert report.weights
    for row in report.weights:
        assert row.intruders.new == count(plain[row.name], torch.as_tensor(coded[row.name]), 10, 0.99)


def test_what_is_equal_or_has_no_partner(tmp_path: Path, run: Callable[..., Any]) -> None:
    W = {f"a.{name}.weight": decaying(12, 12, seed=seed) for seed, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    one = write_model(tmp_path / "one", W)
    two = write_model(
        tmp_path / "two", {**W, "a.k_proj.weight": -W["a.k_proj.weight"], "a.v_proj.weight": torch.ones(5, 5)}
    )
    report = loratool.diff_spectra(one, two)
    assert [row.name for row in report.weights] == ["a.k_proj.weight"] and report.equal == 1
    assert report.not_compared == ("a.v_proj",) and report.weights[0].intruders.new == 0
    printed = run("diff", one, two, "--spectra")
    assert "not compared: a.v_proj" in printed.stdout and "0 of 10 leading" in printed.stdout
    assert json.loads(run("diff", one, one, "--spectra", "--json").stdout)["report"]["equal"] == 3


def test_modules_without_factors_are_listed(tmp_path: Path) -> None:
    A, B = factors(12, 12, 2)
    base = write_model(
        tmp_path / "base", {"a.q_proj.weight": decaying(12, 12, seed=0), "a.q_proj.bias": torch.ones(12)}, LLAMA
    )
    adapter = write_peft(tmp_path / "adapter", {"a.q_proj": (A, B)}, bias="all")
    write_model(adapter, {**load_model(adapter), "base_model.model.a.q_proj.bias": torch.ones(12)})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    report = loratool.spectra(adapter, base=base)
    assert len(report.modules) == 1 and len(report.without_factors) == 1


def test_refusals(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, adapter = (FIXTURES / "llama" / what for what in ("base", "adapter"))
    with pytest.raises(UsageError, match="add base"):
        loratool.spectra(adapter, top=3)
    with pytest.raises(UsageError, match="above 0"):
        loratool.spectra(adapter, base=base, threshold=0.0)
    with pytest.raises(UsageError, match="is a model"):
        loratool.spectra(base, base=base)
    with pytest.raises(InputError, match="compares two models") as raised:
        loratool.diff_spectra(base, adapter)
    assert raised.value.remedy == f"loratool inspect {adapter} --spectra --base {base}"
    with pytest.raises(InputError, match="no module of"):
        loratool.spectra(adapter, base=base, target="what")
    for call in (
        ("inspect", adapter, "--base", base, "--top", 3),
        ("inspect", adapter, "--spectra", "--strict"),
        ("diff", base, base, "--threshold", 0.4),
        ("diff", base, base, "--spectra", "--fail-above", 1),
        ("diff", base, base, "--spectra", "--top", 0),
    ):
        assert run(*call).exit_code == 2, call
    W = decaying(12, 12, seed=0)
    W[3, 4] = torch.nan
    broken = write_model(tmp_path / "broken", {"a.q_proj.weight": W}, LLAMA)
    with pytest.raises(InputError, match="nan"):
        loratool.spectra(write_peft(tmp_path / "a", {"a.q_proj": factors(12, 12, 2)}), base=broken)
