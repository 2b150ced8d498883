"""Leave out of adapters what stands beside a model's layers, unless a pattern names it, and say so."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, weights, write_model
from lib.models.mtp_models import MODELS, D, is_mtp

import loratool
from loratool import InputError, NeedsFlag

# what `init` lists as left out, by group: one parameter for all experts' gates and ups, one for their downs
LEFT_OUT = {
    "deepseek_v3": {"MTP layers": 7, "routers": 1, "experts": 2},
    "glm4_moe": {"MTP layers": 7, "routers": 1, "experts": 2},
    "qwen3_next": {"MTP layers": 5, "routers": 2, "experts": 4, "gates with one output": 2},
}


def write_pair(folder: Path, family: str, change: Callable[[str], bool] = lambda name: True) -> tuple[Path, Path]:
    tensors, settings = MODELS[family]
    tuned = {n: W + 0.1 * weights(*W.shape, seed=i) if change(n) else W for i, (n, W) in enumerate(tensors.items())}
    return write_model(folder / "base", tensors, settings), write_model(folder / "tuned", tuned, settings)


@pytest.mark.parametrize("family", MODELS)
def test_init_leaves_out_what_stands_beside_the_layers(family: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", *MODELS[family])
    report = loratool.init(base, tmp_path / "a", rank=1)
    ends = {module.name.removesuffix(".weight").rpartition(".")[2] for module in report.modules}
    assert ends <= {"q_proj", "down_proj"} and not any(is_mtp(module.name) for module in report.modules)
    assert Counter(report.left_out.values()) == LEFT_OUT[family]


def test_what_is_named_gets_factors(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", *MODELS["qwen3_next"])
    for target, end in (("mlp.gate", "gate"), ("shared_expert_gate", "shared_expert_gate")):
        report = loratool.init(base, tmp_path / end, rank=1, target=[target])
        assert {m.name for m in report.modules} == {f"model.layers.{i}.mlp.{end}.weight" for i in range(2)}
        assert {*report.left_out.values()} == {"MTP layers", "routers", "gates with one output"} - {
            "routers" if end == "gate" else "gates with one output"
        }


@pytest.mark.parametrize("target", [["q_proj"], ["attention"], ["re:attn"]])
def test_a_pattern_of_the_layers_means_no_mtp_layer(target: list[str], tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", *MODELS["deepseek_v3"])
    report = loratool.init(base, tmp_path / "a", rank=1, target=target)
    assert [m.name for m in report.modules] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert "model.layers.2.self_attn.q_proj.weight" in report.left_out


@pytest.mark.parametrize(("family", "target"), [("deepseek_v3", "eh_proj"), ("qwen3_next", "re:^mtp")])
def test_a_named_mtp_layer_is_refused_for_peft(family: str, target: str, tmp_path: Path) -> None:
    """transformers loads none of them, so that PEFT would find no module; the flag that is named suffices."""
    base = write_model(tmp_path / "base", *MODELS[family])
    with pytest.raises(InputError, match="is of an MTP layer"):
        loratool.init(base, tmp_path / "a", rank=1, target=[target])
    with pytest.raises(NeedsFlag, match="is of an MTP layer") as error:
        loratool.init(base, tmp_path / "a", rank=1, target=["q_proj", target])
    words = shlex.split(error.value.remedy or "")[1:]
    report = loratool.init(base, tmp_path / "a", rank=1, target=["q_proj", target], exclude=words[1::2])
    assert not any(is_mtp(m.name) for m in report.modules)


@pytest.mark.parametrize("family", MODELS)
def test_extract_keeps_routers_and_gates_whole_and_names_the_rest(family: str, tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, family)
    report = loratool.extract(base, tuned, tmp_path / "a", rank=D, allow=("unrelated",))
    before, after = load_model(base), load_model(tuned)
    expected = {n: float((after[n].double() - before[n].double()).norm()) for n in before if is_mtp(n)}
    assert report.left_out == pytest.approx(expected, rel=1e-5)
    chosen = {n for n in before if n.endswith(("mlp.gate.weight", "shared_expert_gate.weight")) and not is_mtp(n)}
    assert chosen <= {*report.exact} and not any(is_mtp(name) for name in report.exact)
    assert not chosen & {m.name for m in report.modules}
    loratool.merge(base, tmp_path / "a", tmp_path / "merged", undo=False)
    merged = load_model(tmp_path / "merged")
    assert all(torch.equal(merged[name], after[name]) for name in chosen)
    assert all(torch.equal(merged[name], before[name]) for name in before if is_mtp(name))


def test_extract_of_a_changed_mtp_layer_alone(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, "deepseek_v3", is_mtp)
    with pytest.raises(InputError, match="no changed tensor is selected and supported by adapters"):
        loratool.extract(base, tuned, tmp_path / "a")


def test_a_router_that_is_named_is_factored(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, "qwen3_next", lambda name: "shared_expert_gate" in name)
    report = loratool.extract(base, tuned, tmp_path / "a", target=["shared_expert_gate"])
    assert [m.name for m in report.modules] == [f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in range(2)]
    assert not report.exact and not report.left_out


def test_embeddings_beside_the_vocabulary(tmp_path: Path) -> None:
    names = {
        "model.language_model.embed_tokens.weight": (20, D),
        "model.language_model.embed_tokens_per_layer.weight": (20, 2 * D),
        "model.language_model.layers.0.self_attn.q_proj.weight": (D, D),
        "model.visual.pos_embed.weight": (9, D),
    }
    settings = {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_vl_text", "num_hidden_layers": 1, "tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }
    tensors = {name: weights(*shape, seed=i) for i, (name, shape) in enumerate(names.items())}
    base = write_model(tmp_path / "base", tensors, settings)
    tuned = write_model(tmp_path / "tuned", {n: 1.1 * W for n, W in tensors.items()}, settings)
    report = loratool.extract(base, tuned, tmp_path / "a")
    assert {*report.left_out} == {n for n in names if "per_layer" in n or "pos_embed" in n}
    assert {m.name for m in report.modules} == names.keys() - report.left_out.keys()
    started = loratool.init(base, tmp_path / "b", rank=1)
    assert {*started.left_out} == {*report.left_out} and {*started.left_out.values()} == {"embeddings"}
    everything = loratool.extract(base, tuned, tmp_path / "c", target=["*"])
    assert {m.name for m in everything.modules} == {*names} and not everything.left_out


def test_a_report_groups_what_is_left_out(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, tuned = write_pair(tmp_path, "deepseek_v3")
    printed = run("init", base, "--rank", "1", "-o", tmp_path / "a").stdout
    assert "skipped: experts (2), routers (1); to include them, name them in --target" in printed
    assert "always skipped: MTP layers (7)" in printed
    arguments = ("extract", base, tuned, "--allow", "unrelated", "--force", "-o", tmp_path / "b")
    left_out = json.loads(run(*arguments, "--json").stdout)["report"]["left_out"]
    squares = {
        name: float((load_model(tuned)[name].double() - W.double()).square().sum())
        for name, W in load_model(base).items()
        if name in left_out
    }
    printed, each = run(*arguments).stdout, run(*arguments, "-v").stdout
    assert 1 <= printed.count("not in the adapter:") <= 4 and each.count("not in the adapter:") == len(left_out) > 12
    in_all = float(re.search(r"the norm of the deltas that are not in the adapter is (.*)", printed)[1])  # type: ignore[index]
    assert math.isclose(in_all, math.sqrt(math.fsum(squares.values())), rel_tol=5e-3)
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    assert f"not in the adapter: {name}, delta {math.sqrt(squares[name]):.3g}\n" in each


def test_of_a_bare_class_a_towers_embeddings_are_the_towers(tmp_path: Path) -> None:
    """Its paths do not begin with the model's, by which they are told from an encoder's own."""
    names = {
        "model.vision_tower.embeddings.position_embedding.weight": (6, 8),
        "model.language_model.layers.0.self_attn.q_proj.weight": (8, 8),
    }
    config = {"model_type": "gemma3", "architectures": ["Gemma3Model"], "text_config": {"model_type": "gemma3_text"}}
    base = write_model(tmp_path / "base", {name: weights(*shape) for name, shape in names.items()}, config)
    assert [*loratool.init(base, tmp_path / "a", rank=2).left_out.values()] == ["embeddings"]
