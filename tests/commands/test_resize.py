"""Hold resize against the dense SVD and peft's own conversion, in merges, and at the edges of every rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, bits, factors, load_model, weights, write_kohya, write_model, write_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.transform.rank_rules import RANK_RULES, SingularValues

MODULES = {"model.a.q_proj": (24, 20), "model.a.down_proj": (16, 40), "model.b.q_proj": (24, 20)}
ZERO_BASE = {f"{module}.weight": torch.zeros(*shape) for module, shape in MODULES.items()}


def adapter(folder: Path, rank: int = 6, **config: Any) -> Path:
    pairs = {m: factors(*shape, rank, seed=i) for i, (m, shape) in enumerate(MODULES.items())}
    return write_peft(folder, pairs, **config)


def changes(path: Path, tmp_path: Path, name: str) -> dict[str, Tensor]:
    """Return the delta of each module, as merging onto zeros gives it."""
    base = write_model(tmp_path / "zero", ZERO_BASE)
    loratool.merge(base, path, tmp_path / name, undo=False)
    return {key.removesuffix(".weight"): W.double() for key, W in load_model(tmp_path / name).items()}


def best(D: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("rank", [1, 4, 6, 9])
@pytest.mark.parametrize(
    "config",
    [{}, {"lora_alpha": 3}, {"use_rslora": True, "lora_alpha": 5}, {"alpha_pattern": {"q_proj": 11}}],
    ids=["plain", "alpha", "rslora", "pattern"],
)
def test_the_result_is_the_best_of_its_rank(rank: int, config: dict[str, Any], tmp_path: Path) -> None:
    source = adapter(tmp_path / "a", **config)
    report = loratool.resize(source, tmp_path / "out", rank=rank)
    before, after = changes(source, tmp_path, "m1"), changes(tmp_path / "out", tmp_path, "m2")
    for m in report.modules:
        D, expected = before[m.name], best(before[m.name], rank)
        assert float((after[m.name] - expected).norm() / D.norm()) < 1e-6
        assert m.new_rank == rank and math.isclose(m.norm, float(D.norm()), rel_tol=1e-6)
        assert abs(m.error - float((after[m.name] - D).norm() / D.norm())) < 1e-6
        assert math.isclose(m.kept, float(expected.norm() / D.norm()) ** 2, rel_tol=1e-6)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["r"] == said["lora_alpha"] == rank and not said["use_rslora"] and not said["rank_pattern"]
    assert not said["alpha_pattern"]


def test_peft_agrees_with_the_change(tmp_path: Path) -> None:
    """The file as PEFT reads it, scale and all; the fixture's adapter is PEFT's own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loratool.resize(FIXTURES / "llama" / "adapter", tmp_path / "small", rank=3)
    deltas = []
    for path in (FIXTURES / "llama" / "adapter", tmp_path / "small"):
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / "llama" / "base", dtype=torch.float32)
        layers = PeftModel.from_pretrained(model, path).named_modules()
        deltas.append({n: m.get_delta_weight("default").detach() for n, m in layers if hasattr(m, "get_delta_weight")})
    for name, D in deltas[0].items():
        assert float((deltas[1][name] - best(D, 3)).norm() / D.norm()) < 1e-5


def test_kohya_files_stay_kohya(tmp_path: Path) -> None:
    """Names, alphas and metadata; what is stale in the latter goes."""
    file = tmp_path / "k.safetensors"
    write_kohya(
        file, {m: factors(*shape, 6, seed=i) for i, (m, shape) in enumerate(MODULES.items())}, torch.tensor(3.0)
    )
    tensors = load_file(file)
    save_file(tensors, file, {"ss_network_module": "networks.lora", "sshs_model_hash": "x", "ss_network_dim": "6"})
    loratool.resize(file, tmp_path / "out.safetensors", rank=2, dtype="fp16")
    with safe_open(tmp_path / "out.safetensors", "pt") as found:
        said = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "2.0"}
        assert found.metadata() == said
        assert set(found.keys()) == set(tensors)
        assert float(found.get_tensor("lora_unet_model_a_q_proj.alpha")) == 2
        assert found.get_tensor("lora_unet_model_a_q_proj.lora_up.weight").dtype == torch.float16
    before, after = changes(file, tmp_path, "m1"), changes(tmp_path / "out.safetensors", tmp_path, "m2")
    for name, D in before.items():
        assert float((after[name] - best(D, 2)).norm() / D.norm()) < 1e-3
    with pytest.raises(UsageError, match="single files"):
        loratool.resize(file, tmp_path / "folder", rank=2)


class TestEveryKind:
    """Experts, embeddings, convolutions, DoRA and all that is no factor, by a merge before and after at full rank."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> tuple[Path, Path]:
        base = {
            "model.layers.0.mlp.experts.gate_up_proj": weights(3, 32, 24),
            "model.layers.0.mlp.experts.down_proj": weights(3, 24, 16, seed=1),
            "model.embed_tokens.weight": weights(40, 24, seed=2),
            "model.patch.weight": weights(12, 6, 3, 3, seed=3),
            "model.layers.0.self_attn.q_proj.weight": weights(24, 24, seed=4),
            "model.layers.0.self_attn.q_proj.bias": weights(24, seed=5),
            "model.layers.0.self_attn.k_proj.bias": weights(24, seed=6),
            "model.layers.0.self_attn.k_proj.weight": weights(24, 24, seed=7),
            "model.norm.weight": weights(24, seed=8),
        }
        write_model(tmp_path / "base", base, {"model_type": "mixtral", "tie_word_embeddings": False})
        target = ["q_proj", "embed_tokens", "patch", "re:experts"]
        loratool.init(tmp_path / "base", tmp_path / "adapter", target=target, rank=4, method="orthogonal", alpha=3)
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = {k: t + 0.1 * weights(*t.shape, seed=9) for k, t in load_file(file).items()}
        q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors[f"{q_proj}.lora_B.bias"] = weights(24, seed=10)
        tensors["base_model.model.model.layers.0.self_attn.k_proj.bias"] = weights(24, seed=11)
        tensors["base_model.model.model.norm.weight"] = weights(24, seed=12)
        save_file(tensors, file, {"format": "pt"})
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        config |= {"lora_bias": True, "modules_to_save": ["norm"], "task_type": "CAUSAL_LM", "strange": [1]}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path / "base", tmp_path / "adapter"

    @pytest.mark.parametrize("rank", [4, 7])
    def test_at_full_rank_the_merge_is_the_same(self, rank: int, made: tuple[Path, Path], tmp_path: Path) -> None:
        base, source = made
        report = loratool.resize(source, tmp_path / "out", rank=rank)
        assert report.error < 1e-6 and len(report.carried) == 3
        for name, path in (("one", source), ("two", tmp_path / "out")):
            loratool.merge(base, path, tmp_path / name, undo=False)
        one, two = load_model(tmp_path / "one"), load_model(tmp_path / "two")
        original = load_model(base)
        for name, W in one.items():
            changed = float((W - original[name]).norm())
            assert (changed > 0) is (name != "model.layers.0.self_attn.k_proj.weight")
            assert float((two[name] - W).norm()) <= 2e-6 * changed, name
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM" and config["strange"] == [1] and config["lora_bias"]

    def test_dora_keeps_its_magnitudes(self, made: tuple[Path, Path], tmp_path: Path) -> None:
        base, _ = made
        loratool.init(base, tmp_path / "d", target=["q_proj", "k_proj"], dora=True, method="gaussian", rank=4)
        report = loratool.resize(tmp_path / "d", tmp_path / "out", rank=2)
        before, after = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("d", "out"))
        magnitudes = [key for key in before if "magnitude" in key]
        assert len(magnitudes) == 2 and all(torch.equal(bits(before[k]), bits(after[k])) for k in magnitudes)
        assert "DoRA" in report.warnings[0]

    def test_what_is_carried_has_names_that_peft_finds(self, tmp_path: Path) -> None:
        """PEFT saves them without an adapter's name and without a training loop's wrappers."""
        before = {
            "lora_A.style.weight": torch.ones(4, 20),
            "lora_B.style.weight": torch.ones(24, 4),
            "lora_B.style.bias": torch.ones(24),
            "lora_magnitude_vector.style.weight": torch.ones(24),
        }
        tensors = {f"module.base_model.model.q.{key}": t for key, t in before.items()}
        tensors["module.base_model.model.head.modules_to_save.style.weight"] = torch.ones(3, 24)
        tensors["module.base_model.model.e.token_adapter.trainable_tokens_delta.style"] = torch.ones(2, 24)
        folder = write_peft(
            tmp_path / "a",
            {"q": factors(24, 20, 4)},
            use_dora=True,
            lora_bias=True,
            trainable_token_indices=[1, 2],
            modules_to_save=["head"],
        )
        save_file(tensors, folder / "adapter_model.safetensors")
        loratool.resize(folder, tmp_path / "out", rank=2)
        ends = [f"q.{key.replace('.style', '')}".replace("vector.weight", "vector") for key in before] + ["head.weight"]
        ends.append("e.token_adapter.trainable_tokens_delta")
        found = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert set(found) == {f"base_model.model.{end}" for end in ends}

    @pytest.mark.parametrize("metadata", [{}, {"unet.r": 6, "unet.lora_alpha": 6, "unet.target_modules": ["to_q"]}])
    def test_files_of_diffusers_keep_their_names(self, metadata: dict[str, Any], tmp_path: Path) -> None:
        tensors = {}
        for i in range(2):
            A, B = factors(24, 20, 6, seed=i)
            tensors |= {f"unet.blocks.{i}.to_q.lora_A.weight": A, f"unet.blocks.{i}.to_q.lora_B.weight": B}
        file, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {})
        loratool.resize(file, out, energy=0.75)
        assert set(load_file(out)) == set(tensors)
        report = loratool.diff(file, out)
        assert not report.only_a and 0 < report.worst < 0.5

    def test_another_rank_is_no_start_of_pissa(self, tmp_path: Path) -> None:
        """PEFT takes as many directions out of the base as the config's rank when it loads such an adapter."""
        source = adapter(tmp_path / "a", init_lora_weights="pissa_niter_4")
        with pytest.raises(InputError, match="pissa"):
            loratool.resize(source, tmp_path / "out", rank=2)
        loratool.resize(source, tmp_path / "out", rank=6, dtype="fp16")

    def test_names_of_an_adapter_are_left_out(self, tmp_path: Path) -> None:
        """PEFT finds `lora_A.weight`, never `lora_A.style.weight`."""
        source = adapter(tmp_path / "a")
        tensors = {
            key.replace(".weight", ".style.weight"): t
            for key, t in load_file(source / "adapter_model.safetensors").items()
        }
        save_file(tensors, source / "adapter_model.safetensors")
        loratool.resize(source, tmp_path / "out", rank=6)
        found = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert set(found) == {key.replace(".style", "") for key in tensors}


class TestRules:
    @pytest.mark.parametrize(
        ("rule", "value", "squares", "expected"),
        [
            ("sv_ratio", 2.0, (16.0, 9.0, 4.0, 1.0), 2),  # 4, 3, [2], 1: above 4 / 2
            ("sv_ratio", 2.001, (16.0, 9.0, 4.0, 1.0), 3),
            ("sv_ratio", 1.0, (16.0, 9.0), 0),
            ("sv_cumulative", 0.7, (16.0, 9.0, 4.0, 1.0), 2),  # 7 of 10
            ("sv_cumulative", 0.71, (16.0, 9.0, 4.0, 1.0), 3),
            ("sv_cumulative", 1.0, (16.0, 9.0, 4.0, 1.0), 4),
            ("sv_fro", math.sqrt(25 / 30), (16.0, 9.0, 4.0, 1.0), 2),
            ("sv_fro", math.sqrt(25.1 / 30), (16.0, 9.0, 4.0, 1.0), 3),
            ("sv_fro", 1.0, (16.0, 9.0, 4.0, 1.0), 4),
            ("energy", 25 / 30, (16.0, 9.0, 4.0, 1.0), 2),
            ("energy", 1.0, (16.0, 9.0, 4.0, 1.0), 4),
        ],
    )
    def test_exact_boundaries(self, rule: str, value: float, squares: tuple[float, ...], expected: int) -> None:
        assert RANK_RULES[rule](SingularValues(squares, math.fsum(squares), 1, True), value) == expected

    @pytest.mark.parametrize("option", [{"params": 700}, {"size": 3000}, {"params": 10**9}])
    def test_a_budget_is_kept_and_spent(self, option: dict[str, int], tmp_path: Path) -> None:
        source = adapter(tmp_path / "a")
        report = loratool.resize(source, tmp_path / "out", **option)  # type: ignore[arg-type]
        found = load_file(tmp_path / "out" / "adapter_model.safetensors")
        used = sum(t.numel() for t in found.values()) * (4 if "size" in option else 1)
        assert used == (report.nbytes if "size" in option else report.parameters) <= next(iter(option.values()))
        ranks = {m.name: m.new_rank for m in report.modules}
        if option != {"params": 10**9}:
            assert used + 4 * 64 > next(iter(option.values())) and min(ranks.values()) >= 1
        else:
            assert set(ranks.values()) == {6}

    def test_energy_and_a_cap(self, tmp_path: Path) -> None:
        source = adapter(tmp_path / "a")
        report = loratool.resize(source, tmp_path / "out", energy=0.8)
        D = changes(source, tmp_path, "m")
        for m in report.modules:
            S = torch.linalg.svdvals(D[m.name]).square()
            assert float(S[: m.new_rank].sum() / S.sum()) >= 0.8 > float(S[: m.new_rank - 1].sum() / S.sum())
        capped = loratool.resize(source, tmp_path / "two", energy=0.8, max_rank=2)
        assert {m.new_rank for m in capped.modules} == {2}

    def test_a_cap_leaves_its_part_of_the_budget_to_others(self, tmp_path: Path) -> None:
        strong, weak = factors(24, 20, 6), factors(24, 20, 6, seed=1)
        source = write_peft(tmp_path / "a", {"strong": (strong[0] * 100, strong[1]), "weak": weak})
        report = loratool.resize(source, tmp_path / "out", params=44 * 6, max_rank=3)
        assert [m.new_rank for m in report.modules] == [3, 3]
        assert RANK_RULES["sv_ratio"](SingularValues((16.0, 9.0), 25.0, 1, True), 1e300) == 2

    def test_a_change_of_zero(self, tmp_path: Path) -> None:
        A, B = factors(24, 20, 6)
        source = write_peft(
            tmp_path / "a", {"model.a.q_proj": (A, B * 0), "model.b.q_proj": factors(24, 20, 6, seed=1)}
        )
        for i, rule in enumerate([{"rank": 3}, {"energy": 0.5}, {"params": 500}, {"rank_rule": ("sv_ratio", 2.0)}]):
            report = loratool.resize(source, tmp_path / str(i), **rule)  # type: ignore[arg-type]
            zero = report.modules[0]
            assert zero.error == 0 and zero.norm == 0 and zero.kept == 1 and zero.new_rank >= 1
            assert not changes(tmp_path / str(i), tmp_path, f"m{i}")["model.a.q_proj"].any()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 4, "--rank"),
        (["--rank", "4", "--energy", "0.5"], 2, "exclude"),
        (["--energy", "1.5"], 2, "1.5"),
        (["--rank-rule", "sv_fro=1.5"], 2, "out of range"),
        (["--rank-rule", "sv_ratio=0.5"], 2, "out of range"),
        (["--rank-rule", "sv_ratio=nan"], 2, "nan is not a finite number"),
        (["--rank-rule", "what=1"], 2, "sv_cumulative"),
        (["--rank-rule", "sv_fro"], 2, "NAME=VALUE"),
        (["--params", "5"], 2, "takes 144 parameters"),
        (["--size", "5"], 2, "takes 144 parameters"),
        (["--rank", "1" + "0" * 400], 2, "2^63"),
        (["--rank-rule", "rank=2.5"], 2, "whole number"),
        (["--rank-rule", "sv_ratio=0.99"], 2, "out of range"),
        (["--rank", "0"], 2, "0"),
        (["--rank", "4", "-o", "a"], 2, "overwrite an input"),
        (["--rank", "4", "--alpha", "3"], 2, "contradicts"),
    ],
)
def test_one_clear_line(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("resize", adapter(Path("a")), *arguments)
    assert result.exit_code == code and words in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def test_what_has_no_factors_or_is_damaged(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", ZERO_BASE)
    with pytest.raises(InputError):
        loratool.resize(base, tmp_path / "out", rank=2)
    A, B = factors(24, 20, 6)
    B[2, 2] = math.nan
    with pytest.raises(InputError, match="nan"):
        loratool.resize(write_peft(tmp_path / "a", {"model.a.q_proj": (A, B)}), tmp_path / "out", rank=2)
    biases = tmp_path / "biases"
    biases.mkdir()
    save_file({"base_model.model.q.bias": torch.ones(3)}, biases / "adapter_model.safetensors")
    (biases / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "all"})
    )
    with pytest.raises(InputError, match="no low-rank factors"):
        loratool.resize(biases, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [2, 6])
def test_a_dry_run_is_the_run(rank: int, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    planned = loratool.resize(source, tmp_path / "out", rank=rank, dtype="fp16", dry_run=True)
    assert not (tmp_path / "out").exists()
    done = loratool.resize(source, tmp_path / "out", rank=rank, dtype="fp16")
    assert [*done.digests] == [str(source), str(tmp_path / "out")]
    assert replace(planned, dry_run=False, digests=done.digests) == done
    with pytest.raises(NeedsFlag, match="exists"):
        loratool.resize(source, tmp_path / "out", rank=2)


def test_a_type_that_cannot_hold_the_factors(tmp_path: Path) -> None:
    pairs = {m: tuple(x * 1e10 for x in factors(*shape, 6)) for m, shape in MODULES.items()}
    source = write_peft(tmp_path / "a", pairs)  # type: ignore[arg-type]
    with pytest.raises(NeedsFlag, match="overflow fp16"):
        loratool.resize(source, tmp_path / "out", rank=2, dtype="fp16")
    assert loratool.resize(source, tmp_path / "out", rank=6).error < 1e-6
    empty = write_peft(tmp_path / "empty", {"model.a.q_proj": (torch.zeros(4, 0), torch.zeros(24, 4))})
    with pytest.raises(InputError, match="empty"):
        loratool.resize(empty, tmp_path / "none", rank=2)
