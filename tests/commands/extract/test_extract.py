"""Hold extract against the dense SVD, against peft and transformers loading what it wrote, and against merge."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, SHARED, bits, factors, load_model, needs_shared, spread, weights, write_model, write_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.streaming.threads import restore_threads, set_threads
from loratool.transform.rank_rules import SingularValues, budget_ranks, energy_rank, rank_for

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def optimum(D: Tensor, rank: int) -> float:
    """Return the energy of the best approximation, of a stack the sum over its matrices."""
    return float(torch.linalg.svdvals(D.double())[..., :rank].square().sum())


def tune(base: Mapping[str, Tensor], relative: float = 0.1, seed: int = 7) -> dict[str, Tensor]:
    """Change every float tensor by a random matrix of this size whose spectrum falls."""
    g = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, W in base.items():
        noise = torch.randn(W.shape, generator=g)
        if W.dim() >= 2:
            U, S, Vh = torch.linalg.svd(noise.flatten(1) if W.dim() != 3 else noise, full_matrices=False)
            S = S * torch.arange(1, S.shape[-1] + 1) ** -0.7
            noise = ((U * S.unsqueeze(-2)) @ Vh).reshape(W.shape)
        tuned[name] = (W.float() + noise * (relative * W.float().norm() / noise.norm())).to(W.dtype)
    return tuned


def pair(
    folder: Path, base: Mapping[str, Tensor], config: Mapping[str, Any] = LLAMA, **options: Any
) -> tuple[Path, Path]:
    return (
        write_model(folder / "base", base, config),
        write_model(folder / "tuned", tune(base, **options), config),
    )


SMALL = {
    "model.embed_tokens.weight": weights(40, 24),
    "model.layers.0.self_attn.q_proj.weight": weights(24, 24, seed=1),
    "model.layers.0.mlp.up_proj.weight": weights(50, 24, seed=2),
    "model.layers.0.mlp.up_proj.bias": weights(50, seed=3),
    "model.layers.0.input_layernorm.weight": weights(24, seed=4) + 1,
    "lm_head.weight": weights(40, 24, seed=5),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_weight_gets_the_best_of_its_rank(tmp_path: Path, family: str) -> None:
    """Merged back, the adapter leaves of each change what a dense SVD leaves; what has no factors comes back
    exactly.
    """
    base, tuned = FIXTURES / family / "base", FIXTURES / family / "tuned"
    report = loratool.extract(base, tuned, tmp_path / "adapter", rank=4)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", dtype="fp32", undo=False)
    before, after, merged = load_model(base), load_model(tuned), load_model(tmp_path / "merged")
    assert not report.left_out and not report.only_base and not report.only_tuned
    for row in report.modules:
        D = (after[row.name].float() - before[row.name].float()).double()
        assert row.kept * float(D.square().sum()) >= 0.9999 * optimum(D, 4)
        left = float((after[row.name].double() - merged[row.name].double()).norm())
        assert left == pytest.approx(row.residual, rel=1e-4)
        assert row.relative == pytest.approx(float(D.norm() / before[row.name].double().norm()), rel=1e-5)
    exact = set(before) - {row.name for row in report.modules}
    assert exact == set(report.exact)
    assert all(torch.equal(merged[name], after[name].float()) for name in exact)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_it_and_answers_as_the_tuned_model(tmp_path: Path, family: str) -> None:
    """At full rank nothing is lost: biases, norms, Conv1D and tied heads included."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, tuned = FIXTURES / family / "base", FIXTURES / family / "tuned"
    loratool.extract(base, tuned, tmp_path / "adapter", rank=500)

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()

    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = load(tuned)(tokens).logits
        found = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")(tokens).logits
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def low_rank_and_tail(shape: tuple[int, ...], tail: float) -> Tensor:
    """Return a change of rank 4 and norm 1, and beside it one of every rank and of norm `tail`."""
    *experts, out, inp = shape
    D = weights(*experts, out, 4, seed=1).double() @ weights(*experts, 4, inp, seed=2).double()
    rest = weights(*shape, seed=3).double()
    return D / D.norm() + rest * (tail / rest.norm())


@pytest.mark.parametrize("tail", spread([1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7], 3))
@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((64, 48), {"rank": 4}),
        ((300, 700), {"rank": 3}),
        ((600, 560), {"rank": 4}),
        ((64, 48), {"energy": 0.9}),
        ((48, 64), {"params": 448}),
        ((3, 30, 20), {"rank": 4}),
    ],
    ids=str,
)
def test_error_and_energy_are_those_of_the_dense_difference(
    tmp_path: Path, shape: tuple[int, ...], rule: dict[str, Any], tail: float
) -> None:
    """However little is left, of which ||D||^2 less the sum of squares would have only the rounding."""
    stack = len(shape) == 3
    name = "model.layers.0.mlp.experts.gate_up_proj" if stack else "model.layers.0.mlp.up_proj.weight"
    config = {"model_type": "qwen3_moe"} if stack else LLAMA
    W = weights(*shape, seed=5)
    tuned = (W.double() + low_rank_and_tail(shape, tail)).float()
    models = {"base": W, "tuned": tuned, "wide": W.double()}
    base, other, wide = (write_model(tmp_path / side, {name: x}, config) for side, x in models.items())
    report = loratool.extract(base, other, tmp_path / "adapter", allow="unrelated", **rule)
    loratool.merge(wide, tmp_path / "adapter", tmp_path / "merged", undo=False)
    D = tuned.double() - W.double()
    left = (tuned.double() - load_model(tmp_path / "merged")[name]).norm()
    (row,) = report.modules
    assert row.residual == pytest.approx(float(left), rel=1e-3, abs=1e-8)
    for found in (row, report):
        assert found.error == pytest.approx(float(left / D.norm()), rel=1e-3, abs=1e-8)
        assert 0 < found.kept <= 1
        assert 1 - found.kept == pytest.approx(float(left / D.norm()) ** 2, rel=2e-3, abs=1e-14)


@pytest.mark.parametrize(
    "options", [{"rank": 4, "certify": True}, {"energy": 0.6}, {"rank_rule": ("sv_ratio", 4.0)}], ids=str
)
def test_the_arrays_of_gpus_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Those are torch's tensors, here on the CPU."""
    base, tuned = pair(tmp_path, {**SMALL, "model.layers.0.mlp.up_proj.weight": weights(700, 620)})
    one = loratool.extract(base, tuned, tmp_path / "numpy", **options)
    monkeypatch.setattr("loratool.commands.extract.extraction.like_of", lambda _: torch.empty(0, dtype=torch.float64))
    other = loratool.extract(base, tuned, tmp_path / "torch", **options)
    assert (one.parameters, other.kept, other.error) == (other.parameters, *map(near, (one.kept, one.error)))
    for row, again in zip(one.modules, other.modules, strict=True):
        assert (again.rank, again.kept, again.relative) == (row.rank, *map(near, (row.kept, row.relative)))


def near(x: float | None) -> Any:
    return pytest.approx(x, rel=1e-4)


KINDS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "linear": ("model.layers.0.mlp.up_proj.weight", (30, 20), LLAMA),
    "conv1d": ("h.0.mlp.c_fc.weight", (20, 30), {"model_type": "gpt2"}),
    "conv 3x3": ("down.0.conv.weight", (12, 8, 3, 3), {}),
    "conv 1x1": ("down.0.conv.weight", (12, 8, 1, 1), {}),
    "conv of 3 dimensions": ("down.0.conv.weight", (12, 8, 2, 3, 3), {}),
    "experts": ("model.layers.0.mlp.experts.gate_up_proj", (3, 20, 12), {"model_type": "qwen3_moe"}),
    "experts turned": ("model.layers.0.mlp.experts.down_proj", (3, 20, 12), {"model_type": "gpt_oss"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_weights(tmp_path: Path, kind: str) -> None:
    name, shape, config = KINDS[kind]
    base, tuned = pair(tmp_path, {name: weights(*shape)}, config)
    report = loratool.extract(base, tuned, tmp_path / "adapter", rank=3)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", undo=False)
    D = (load_model(tuned)[name] - load_model(base)[name]).double()
    left = (load_model(tuned)[name] - load_model(tmp_path / "merged")[name]).double()
    best = optimum(D if len(shape) == 3 else D.flatten(1), 3)
    assert float(D.square().sum() - left.square().sum()) == pytest.approx(best, rel=1e-4)
    assert report.kept is not None and report.kept * float(D.square().sum()) == pytest.approx(best, rel=1e-4)


def test_two_stacks_of_experts_of_one_module_nest_as_peft_nests_them(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")]
    base = {names[0]: weights(3, 20, 12), names[1]: weights(3, 12, 10, seed=1)}
    one, two = pair(tmp_path, base, {"model_type": "qwen3_moe"})
    loratool.extract(one, two, tmp_path / "adapter", rank=12)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.mlp.experts"
    assert keys[f"{module}.base_layer.lora_A.weight"].shape == (36, 12)
    assert keys[f"{module}.lora_A.weight"].shape == (30, 10)
    loratool.merge(one, tmp_path / "adapter", tmp_path / "merged", undo=False)
    merged, tuned = load_model(tmp_path / "merged"), load_model(two)
    assert all(torch.allclose(merged[name], tuned[name], atol=1e-6) for name in names)


class TestRanks:
    def test_a_matrix_of_lower_rank_gets_its_own(self, tmp_path: Path) -> None:
        """A matrix that did not change has no entry; targets are full paths, since last names match others too."""
        A, B = factors(24, 24, 2)
        name = "model.layers.0.self_attn.q_proj.weight"
        base = write_model(tmp_path / "base", SMALL, LLAMA)
        tuned = write_model(tmp_path / "tuned", {**SMALL, name: SMALL[name] + B @ A}, LLAMA)
        (row,) = loratool.extract(base, tuned, tmp_path / "adapter", energy=0.999999).modules
        assert row.name == name and row.rank == 2 and row.kept > 1 - 1e-6
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"] and not config["rank_pattern"]

    @pytest.mark.parametrize("energy", [0.3, 0.5, 0.9, 1.0])
    def test_energy_is_the_least_rank_that_has_it(self, tmp_path: Path, energy: float) -> None:
        """The energy is of squares, as peft has it; at 1 it is all."""
        base, tuned = pair(tmp_path, SMALL)
        for row in loratool.extract(base, tuned, tmp_path / "a", energy=energy, embed="skip").modules:
            squares = torch.linalg.svdvals((load_model(tuned)[row.name] - SMALL[row.name]).double()).square()
            shares = squares.cumsum(0) / squares.sum()
            assert row.kept >= energy - 1e-6
            assert row.rank == 1 or float(shares[row.rank - 2]) < energy + 1e-6

    def test_a_budget_is_near_the_best_and_is_it_for_equal_sizes(self) -> None:
        """Against every choice: it falls short by less than the largest square left out, and sometimes does."""
        g, short = torch.Generator().manual_seed(0), 0
        for round in range(120):
            spectra = {}
            for i in range(3):
                squares = torch.rand(4, generator=g).sort(descending=True).values.tolist()
                cost = 2 if round < 10 else int(torch.randint(1, 5, (1,), generator=g))
                spectra[str(i)] = SingularValues(tuple(squares), sum(squares), cost, True)
            budget = int(torch.randint(0, 20, (1,), generator=g))

            def value(ranks: Mapping[str, int], spectra: Mapping[str, SingularValues] = spectra) -> tuple[float, int]:
                kept = math.fsum(sum(spectra[n].squares[:k]) for n, k in ranks.items())
                return kept, sum(spectra[n].cost * k for n, k in ranks.items())

            ranks = budget_ranks(spectra, budget)
            kept, spent = value(ranks)
            ways = (dict(zip(spectra, k, strict=True)) for k in product(range(5), repeat=3))
            best = max(v for v, cost in map(value, ways) if cost <= budget)
            assert spent <= budget and kept <= best + 1e-9
            if len({s.cost for s in spectra.values()}) == 1:
                assert kept == pytest.approx(best)
            left = [s.squares[ranks[n]] for n, s in spectra.items() if ranks[n] < len(s.squares)]
            assert best - kept <= max(left, default=0.0)
            short += best - kept > 1e-9
        assert short

    @pytest.mark.parametrize("budget", [{"params": 1500}, {"size": 6000}, {"size": 3000, "dtype": "fp16"}])
    def test_a_budget_counts_the_whole_adapter(self, tmp_path: Path, budget: dict[str, Any]) -> None:
        base, tuned = pair(tmp_path, SMALL)
        report = loratool.extract(base, tuned, tmp_path / "adapter", **budget)
        assert 1000 < report.parameters <= 1500 and len({row.rank for row in report.modules}) > 1
        sizes = [t.numel() for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()]
        assert sum(sizes) == report.parameters
        loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", undo=False)

    def test_a_budget_sees_as_much_of_a_spectrum_as_it_spends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("loratool.commands.extract.extraction.FIRST_RANK", 1)
        monkeypatch.setattr("loratool.commands.extract.extraction.HEADROOM", 0)
        base, tuned = pair(tmp_path, SMALL)
        grown = loratool.extract(base, tuned, tmp_path / "grown", params=1500)
        monkeypatch.undo()
        assert [r.rank for r in grown.modules] == [
            r.rank for r in loratool.extract(base, tuned, tmp_path / "whole", params=1500).modules
        ]

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_a_budget_counts_a_tied_heads_factors_twice(self, tmp_path: Path, dtype: str) -> None:
        base, tuned = FIXTURES / "gpt2" / "base", FIXTURES / "gpt2" / "tuned"
        for budget in ({"params": 6000}, {"params": 12000}, {"size": 30000}):
            report = loratool.extract(base, tuned, tmp_path / "a", force=True, dtype=dtype, **budget)
            file = load_file(tmp_path / "a" / "adapter_model.safetensors")
            assert sum(t.numel() for t in file.values()) == report.parameters <= budget.get("params", 1 << 30)
            assert sum(t.nbytes for t in file.values()) == report.nbytes <= budget.get("size", 1 << 30)

    def test_a_budget_below_what_is_exact_is_refused(self, tmp_path: Path) -> None:
        base, tuned = FIXTURES / "gpt2" / "base", FIXTURES / "gpt2" / "tuned"
        with pytest.raises(UsageError, match="params=500 is too small: the tensors that are stored exactly take"):
            loratool.extract(base, tuned, tmp_path / "a", params=500)
        assert loratool.extract(base, tuned, tmp_path / "a", params=500, bias=False).parameters <= 500

    def test_a_cap(self, tmp_path: Path) -> None:
        base, tuned = pair(tmp_path, SMALL)
        assert {r.rank for r in loratool.extract(base, tuned, tmp_path / "a", energy=0.99, max_rank=5).modules} == {5}

    def test_rules_exclude_each_other(self, tmp_path: Path) -> None:
        base, tuned = pair(tmp_path, SMALL)
        with pytest.raises(UsageError, match="rank and energy exclude"):
            loratool.extract(base, tuned, tmp_path / "a", rank=4, energy=0.5)
        for energy in (1.5, math.nan, math.inf, 0.0):
            with pytest.raises(UsageError, match="out of range|energy: (nan|inf) is not a finite number"):
                loratool.extract(base, tuned, tmp_path / "a", energy=energy)
        with pytest.raises(UsageError, match="2.5 is not a whole number"):
            loratool.extract(base, tuned, tmp_path / "a", rank=2.5)  # type: ignore[arg-type]

    def test_what_rank_would_do_is_about_right(self) -> None:
        for exponent in (0.5, 1.0, 1.5):
            squares = (torch.arange(1, 501, dtype=torch.float64) ** -exponent).tolist()
            total = sum(squares)
            whole = SingularValues(tuple(squares), total, 1, True)
            seen = SingularValues(tuple(squares[:20]), total, 1, False)
            for share in (0.5, 0.9):
                assert rank_for(seen, share, 500) == pytest.approx(energy_rank(whole, share), rel=0.1, abs=1)


class TestWhatIsNoMatrix:
    def test_a_fine_tune_of_biases_alone_comes_out_exactly(self, tmp_path: Path) -> None:
        """BitFit (Ben Zaken et al., 2022): nothing but biases changed."""
        name = "model.layers.0.mlp.up_proj.bias"
        base = write_model(tmp_path / "base", SMALL, LLAMA)
        tuned = write_model(tmp_path / "tuned", {**SMALL, name: SMALL[name] * 1.1 + 0.3}, LLAMA)
        report = loratool.extract(base, tuned, tmp_path / "adapter")
        assert report.exact == (name,) and not report.modules
        loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", undo=False)
        merged, wanted = load_model(tmp_path / "merged"), load_model(tuned)
        assert all(torch.equal(bits(merged[n]), bits(wanted[n])) for n in wanted)

    def test_without_biases(self, tmp_path: Path) -> None:
        base, tuned = pair(tmp_path, SMALL)
        report = loratool.extract(base, tuned, tmp_path / "adapter", bias=False)
        left = {n: float((load_model(tuned)[n] - SMALL[n]).norm()) for n in SMALL if SMALL[n].dim() == 1}
        assert report.left_out == pytest.approx(left, rel=1e-5) and not report.exact

    @pytest.mark.parametrize("embed", ["lora", "full", "skip"])
    def test_embeddings_and_heads(self, tmp_path: Path, embed: str) -> None:
        base, tuned = pair(tmp_path, SMALL)
        report = loratool.extract(base, tuned, tmp_path / "adapter", rank=24, embed=embed)
        loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", undo=False)
        merged, wanted = load_model(tmp_path / "merged"), load_model(tuned)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected = SMALL[name] if embed == "skip" else wanted[name]
            assert torch.allclose(merged[name], expected, atol=1e-6)
            assert (name in report.left_out) is (embed == "skip") and (name in report.exact) is (embed == "full")

    @pytest.mark.parametrize("embed", ["lora", "full"])
    def test_a_tied_head_stays_tied(self, tmp_path: Path, embed: str) -> None:
        config = {**LLAMA, "tie_word_embeddings": True}
        tensors = {name: W for name, W in SMALL.items() if name != "lm_head.weight"}
        base, tuned = pair(tmp_path, tensors, config)
        loratool.extract(base, tuned, tmp_path / "adapter", rank=24, embed=embed)
        loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", undo=False)
        merged, wanted = load_model(tmp_path / "merged"), load_model(tuned)
        assert "lm_head.weight" not in merged
        assert torch.allclose(merged["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"], atol=1e-6)

    @pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
    def test_a_tied_matrix_is_named_by_any_of_its_modules(self, name: str, tmp_path: Path) -> None:
        tensors = {"model.embed_tokens.weight": weights(30, 8), "model.layers.0.self_attn.q_proj.weight": weights(8, 8)}
        base = write_model(tmp_path / "base", tensors, {**LLAMA, "tie_word_embeddings": True})
        tuned = write_model(tmp_path / "tuned", tune(tensors), {**LLAMA, "tie_word_embeddings": True})
        named = loratool.extract(base, tuned, tmp_path / "a", target=name)
        assert [row.name for row in named.modules] == ["model.embed_tokens.weight"]
        rest = loratool.extract(base, tuned, tmp_path / "b", to="mlx", exclude=name)
        assert [*rest.left_out] == ["model.embed_tokens.weight"]
        with pytest.raises(NeedsFlag, match=r'add exclude=\["embed_tokens", "lm_head"\]'):
            loratool.extract(base, tuned, tmp_path / "c", to="mlx")
        assert loratool.extract(base, tuned, tmp_path / "d", to="mlx", exclude=["embed_tokens", "lm_head"]).modules

    def test_a_head_that_was_untied_is_a_change_of_its_own(self, tmp_path: Path) -> None:
        tensors = {name: W for name, W in SMALL.items() if name != "lm_head.weight"}
        base = write_model(tmp_path / "base", tensors, {**LLAMA, "tie_word_embeddings": True})
        head = tensors["model.embed_tokens.weight"] + 0.1 * weights(40, 24, seed=9)
        tuned = write_model(tmp_path / "tuned", {**tune(tensors), "lm_head.weight": head}, LLAMA)
        report = loratool.extract(base, tuned, tmp_path / "adapter", rank=24)
        assert not report.only_tuned
        loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", undo=False)
        merged, wanted = load_model(tmp_path / "merged"), load_model(tuned)
        assert set(merged) == set(wanted)
        assert all(torch.allclose(merged[n], wanted[n], atol=1e-6) for n in wanted)

    def test_a_grown_vocabulary_is_kept_whole(self, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", SMALL, {**LLAMA, "vocab_size": 40})
        tuned = tune(SMALL)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tuned[name] = torch.cat([tuned[name], weights(3, 24, seed=11)])
        write_model(tmp_path / "tuned", tuned, {**LLAMA, "vocab_size": 43})
        loratool.extract(base, tmp_path / "tuned", tmp_path / "adapter", rank=24)
        loratool.merge(base, tmp_path / "adapter", tmp_path / "merged", undo=False)
        merged = load_model(tmp_path / "merged")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(merged[name], tuned[name])
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 43

    def test_one_side_only_and_what_is_no_float(self, tmp_path: Path) -> None:
        ids = torch.arange(5)
        base = write_model(tmp_path / "base", {**SMALL, "ids": ids, "gone": weights(3)}, LLAMA)
        tuned = write_model(tmp_path / "tuned", {**tune(SMALL), "ids": ids + 1, "new": weights(4)}, LLAMA)
        report = loratool.extract(base, tuned, tmp_path / "adapter")
        assert (report.only_base, report.only_tuned) == (("gone",), ("new",))
        assert report.left_out == {"ids": None}

    def test_a_base_of_zeros_has_no_relative_change(self, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {name: torch.zeros_like(W) for name, W in SMALL.items()}, LLAMA)
        tuned = write_model(tmp_path / "tuned", SMALL, LLAMA)
        with pytest.raises(NeedsFlag, match="but the base is"):
            loratool.extract(base, tuned, tmp_path / "adapter")
        report = loratool.extract(base, tuned, tmp_path / "adapter", allow=("unrelated",))
        assert report.relative is None and all(m.relative is None for m in report.modules)

    def test_changes_beyond_float32(self, tmp_path: Path) -> None:
        """One whose squares it does not hold, and one that it does not see."""
        before = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(8, 6).double() for i in range(2)}
        base = write_model(tmp_path / "base", before, LLAMA)
        huge = write_model(tmp_path / "huge", {name: W * 3e38 for name, W in before.items()}, LLAMA)
        loratool.extract(base, huge, tmp_path / "large", rank=1, allow=("unrelated",))
        found = load_file(tmp_path / "large" / "adapter_model.safetensors")
        A, B = (found[f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"].double() for side in "AB")
        assert torch.allclose(B @ A, torch.full((8, 6), 3e38).double(), rtol=1e-6)
        first, last = before
        tiny = write_model(tmp_path / "tiny", {first: torch.zeros(8, 6).double() + 1e-300, last: before[last] * 1.5})
        zero = write_model(tmp_path / "zero", {**before, first: torch.zeros(8, 6).double()})
        report = loratool.extract(zero, tiny, tmp_path / "adapter")
        assert [m.name for m in report.modules] == [last] and report.unchanged == 1


class TestSides:
    def test_other_dtypes_shards_prefixes_and_pickles(self, tmp_path: Path) -> None:
        base, tuned = pair(tmp_path, SMALL)
        expected = loratool.extract(base, tuned, tmp_path / "adapter", rank=4)
        renamed = {f"module.{name}": W for name, W in load_model(tuned).items()}
        torch.save(renamed, tmp_path / "tuned.bin")
        write_model(tmp_path / "sharded", SMALL, LLAMA, shards=3)
        found = loratool.extract(tmp_path / "sharded", tmp_path / "tuned.bin", tmp_path / "other", rank=4)
        assert {m.name: m.kept for m in found.modules} == {m.name: m.kept for m in expected.modules}

    def test_a_missing_container(self, tmp_path: Path) -> None:
        base, tuned = pair(tmp_path, SMALL)
        short = {name.removeprefix("model."): W for name, W in load_model(tuned).items() if name != "lm_head.weight"}
        other = write_model(tmp_path / "short", short, LLAMA)
        report = loratool.extract(base, other, tmp_path / "adapter", rank=4)
        assert len(report.modules) == 3 and report.only_base == ("lm_head.weight",)

    def test_a_16_bit_base_and_a_32_bit_fine_tune(self, tmp_path: Path) -> None:
        """A difference taken in 16 bits loses bits: it is taken in float32, whatever the types are."""
        base = {name: W.bfloat16() for name, W in SMALL.items()}
        write_model(tmp_path / "base", base, LLAMA)
        write_model(tmp_path / "tuned", tuned := tune(SMALL), LLAMA)
        for row in loratool.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=4).modules:
            D = tuned[row.name].double() - base[row.name].double()
            assert row.kept == pytest.approx(optimum(D, 4) / float(D.square().sum()), rel=1e-5)

    def test_what_is_refused(self, tmp_path: Path) -> None:
        base, tuned = pair(tmp_path, SMALL)
        out = tmp_path / "out"
        with pytest.raises(InputError, match="are equal"):
            loratool.extract(base, base, out)
        other = write_model(tmp_path / "other", {n: W.flip(0) for n, W in SMALL.items()}, LLAMA)
        with pytest.raises(NeedsFlag, match="not a fine-tune of the other"):
            loratool.extract(base, other, out)
        bad = write_model(tmp_path / "nan", {**tune(SMALL), "lm_head.weight": SMALL["lm_head.weight"] / 0}, LLAMA)
        with pytest.raises(InputError, match=r"lm_head.weight: holds nan or inf"):
            loratool.extract(base, bad, out)
        wide = write_model(tmp_path / "wide", {**SMALL, "model.layers.0.mlp.up_proj.weight": weights(51, 24)}, LLAMA)
        with pytest.raises(InputError, match=r"is \(50, 24\) in the base and \(51, 24\)"):
            loratool.extract(base, wide, out)
        alien = write_model(tmp_path / "alien", {"something.else": weights(4, 4)}, {})
        with pytest.raises(InputError, match="no tensor of one side"):
            loratool.extract(base, alien, out)
        adapter = write_peft(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": factors(24, 24, 2)})
        with pytest.raises(InputError, match="is an adapter"):
            loratool.extract(base, adapter, out)
        quantized = write_model(tmp_path / "q", {**SMALL, "q_proj.qweight": torch.ones(3, 8, dtype=torch.int32)}, LLAMA)
        with pytest.raises(InputError, match="quantized"):
            loratool.extract(base, quantized, out)
        with pytest.raises(InputError, match="no changed tensor is selected"):
            loratool.extract(base, tuned, out, exclude=("*",))
        with pytest.raises(InputError, match="exclude absent: names no module of"):
            loratool.extract(base, tuned, out, exclude=("absent",))
        assert not out.exists() and not list(tmp_path.glob("*partial*"))


class TestTheWayBack:
    @pytest.mark.parametrize("size", [1.0, 0.1, 1e-2, 1e-3])
    def test_a_merged_adapter_comes_out_at_its_own_rank(self, tmp_path: Path, size: float) -> None:
        """No value is clamped: few directions of fp32's rounding are kept, and the factors' own."""
        A, B = factors(300, 200, 6)
        B *= size
        name = "model.layers.0.self_attn.q_proj"
        base = write_model(tmp_path / "base", {f"{name}.weight": weights(300, 200)}, LLAMA)
        adapter = write_peft(tmp_path / "adapter", {name: (A, B)})
        loratool.merge(base, adapter, tmp_path / "merged")
        (row,) = loratool.extract(base, tmp_path / "merged", tmp_path / "back", rank=6).modules
        found = load_file(tmp_path / "back" / "adapter_model.safetensors")
        A2, B2 = (found[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        change = B.double() @ A.double()
        assert float((B2 @ A2 - change).norm() / change.norm()) < max(1e-8 / row.relative, 2.0**-23)

    def test_a_16_bit_merge_comes_out_over_its_noise(self, tmp_path: Path) -> None:
        A, B = factors(300, 200, 6)
        name = "model.layers.0.self_attn.q_proj"
        base = write_model(tmp_path / "base", {f"{name}.weight": weights(300, 200, dtype=torch.bfloat16)}, LLAMA)
        loratool.merge(base, write_peft(tmp_path / "adapter", {name: (A, B)}), tmp_path / "merged")
        (row,) = loratool.extract(base, tmp_path / "merged", tmp_path / "back", rank=12).modules
        assert row.above_noise == 6
        D = (
            load_model(tmp_path / "merged")[f"{name}.weight"].double()
            - weights(300, 200, dtype=torch.bfloat16).double()
        )
        rounding = torch.linalg.svdvals(D - B.double() @ A.double())
        assert 0.5 * row.noise < float(rounding[0]) < row.noise  # the base's rounding counts, too

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    def test_the_error_of_the_factors_type_is_told(self, tmp_path: Path, dtype: str) -> None:
        """16-bit factors are off by 0.03 % (fp16) to 0.5 % (bf16), which only the report can say."""
        base, tuned = pair(tmp_path, SMALL)
        report = loratool.extract(base, tuned, tmp_path / "small", rank=4, dtype=dtype)
        loratool.extract(base, tuned, tmp_path / "wide", rank=4)
        small, wide = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("small", "wide"))
        for row in report.modules:
            if row.kind == "linear":
                key = f"base_model.model.{row.name.removesuffix('.weight')}.lora_"
                one, two = (t[f"{key}B.weight"].double() @ t[f"{key}A.weight"].double() for t in (small, wide))
                assert row.stored == pytest.approx(float((one - two).norm() / two.norm()), rel=1e-3)


def test_a_single_file_carries_its_config(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, SMALL)
    loratool.extract(base, tuned, tmp_path / "adapter", rank=4)
    loratool.extract(base, tuned, tmp_path / "adapter.safetensors", rank=4)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        config = json.loads(file.metadata()["loratool"])["adapter_config"]
    assert config == json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name in ("adapter", "adapter.safetensors"):
        loratool.merge(base, tmp_path / name, tmp_path / f"{name}-merged", undo=False)
    one, two = load_model(tmp_path / "adapter-merged"), load_model(tmp_path / "adapter.safetensors-merged")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_seed_decides_the_bytes_whatever_is_selected(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base = write_model(tmp_path / "base", {name: weights(700, 620)}, LLAMA)
    tuned = write_model(tmp_path / "tuned", tune({name: weights(700, 620)}), LLAMA)
    files = []
    for out, options in (("a", {}), ("b", {"target": ("q_proj",)}), ("c", {"seed": 1})):
        loratool.extract(base, tuned, tmp_path / out, **options)
        files.append((tmp_path / out / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    before, kept = set_threads(1), []
    for threads in (1, 2):
        set_threads(threads)
        kept.append(loratool.extract(base, tuned, tmp_path / f"t{threads}").kept)
    restore_threads(before)
    assert kept[0] == pytest.approx(kept[1], rel=1e-6)


@pytest.mark.skipif(os.name == "nt", reason="needs ulimit")
def test_a_write_that_the_system_refuses_names_the_output(tmp_path: Path) -> None:
    paths = f"{FIXTURES / 'gpt2' / 'base'} {FIXTURES / 'gpt2' / 'tuned'}"
    shell = f"ulimit -f 20; '{sys.executable}' -B -c 'from loratool.cli import main; main()' extract {paths} -o out"
    result = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 5 and result.stderr.startswith("error: out: File too large\n")
    assert result.stderr.endswith("stay: the same command with --resume goes on\n")
    resumed, anew = (
        loratool.extract(FIXTURES / "gpt2" / "base", FIXTURES / "gpt2" / "tuned", tmp_path / out, resume=True)
        for out in ("out", "anew")
    )
    assert resumed.modules == anew.modules
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anew", "out"]


def test_the_command(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    result = run("extract", base, tuned, "-o", tmp_path / "a", "--rank", "2", "--certify")
    assert result.exit_code == 0 and result.stdout.startswith(f"{tuned} - {base} -> {tmp_path / 'a'}\n")
    found = json.loads(
        run("extract", tuned, base, "-o", tmp_path / "b", "--params", "2K", "--no-bias", "--json").stdout
    )
    assert found["ok"] and found["report"]["parameters"] <= 2000
    assert run("extract", base, base, "-o", tmp_path / "c").exit_code == 3
    assert run("extract", base, tuned, "-o", tmp_path / "a").exit_code == 4
    assert run("extract", base, tuned, "-o", tmp_path / "a", "--params", "many").exit_code == 2
    assert run("extract", base, tuned, "-o", tmp_path / "d", "--dry-run").exit_code == 0
    assert run("extract", base, tuned, "-o", tmp_path / "d.bin").exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@needs_shared
def test_a_change_of_no_low_rank_is_called_so(tmp_path: Path) -> None:
    """ANI-1x to ANI-1ccx: some layers frozen, the others changed at nearly full rank."""
    base, tuned = (SHARED / "ani-1x-1ccx" / f"ani-{n}_8x_m0.safetensors" for n in ("1x", "1ccx"))
    report = loratool.extract(base, tuned, tmp_path / "adapter", rank=8)
    before, after = load_file(base), load_file(tuned)
    assert report.unchanged == sum(torch.equal(before[n], after[n]) for n in before)
    for row in report.modules:
        D = after[row.name].double() - before[row.name].double()
        assert row.kept * float(D.square().sum()) >= 0.9999 * optimum(D, 8)
        if row.rank_90 is not None:
            assert row.rank_90 > 8
    assert any("its rank is not low" in warning for warning in report.warnings)
