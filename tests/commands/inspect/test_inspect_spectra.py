"""Hold inspect --spectra against torch.linalg's full SVD."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_model, write_peft

import loratool
from loratool import InputError
from loratool.numerics.svd import singular_values_of


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (33, 33), (5, 1)])
def test_all_singular_values(shape: tuple[int, int]) -> None:
    W = weights(*shape)
    expected = torch.linalg.svdvals(W.double())
    assert torch.allclose(singular_values_of(W), expected, atol=1e-8 * float(expected[0]))


def check(row: Any, S: torch.Tensor) -> None:
    assert math.isclose(row.norm, float(S.norm()), rel_tol=1e-6) and torch.allclose(
        torch.tensor(row.top, dtype=torch.float64), S[:8][: len(row.top)], rtol=1e-5
    )
    p = S / S.sum()
    assert math.isclose(row.effective_rank, float((-(p * p.log()).sum()).exp()), rel_tol=1e-5)
    assert math.isclose(row.stable_rank, float((S.norm() / S[0]) ** 2), rel_tol=1e-5)
    shares = S.square().cumsum(0) / S.square().sum()
    for share, rank in ((0.5, row.rank_50), (0.9, row.rank_90), (0.99, row.rank_99)):
        assert shares[rank - 1] >= share - 1e-9 and (rank == 1 or shares[rank - 2] < share + 1e-9)


def test_of_a_model(run: Callable[..., Any]) -> None:
    base = FIXTURES / "llama" / "base"
    report, tensors = loratool.spectra(base, target=["q_proj", "embed_tokens"], layers=None), load_model(base)
    assert {m.name.rpartition(".")[0].rpartition(".")[2] for m in report.modules} == {"q_proj", "embed_tokens"}
    for m in report.modules:
        W = tensors[m.name].double()
        check(m, torch.linalg.svdvals(W))
        assert m.full == min(W.shape)
    linear = loratool.spectra(base).modules
    assert len(linear) == 21 and not any("lm_head" in m.name or "embed" in m.name for m in linear)
    found = json.loads(run("inspect", base, "--spectra", "--json").stdout)
    assert found["report"]["kind"] == "spectra" and len(found["report"]["modules"]) == 21
    assert "90%" in run("inspect", base, "--spectra", "--layers", "0").stdout


def test_of_an_adapter_and_of_stacks(tmp_path: Path) -> None:
    A, B = factors(24, 20, 6)
    adapter = write_peft(tmp_path / "a", {"model.q_proj": (A, B)}, lora_alpha=3)
    (row,) = loratool.spectra(adapter).modules
    check(row, torch.linalg.svdvals(0.5 * B.double() @ A.double())[:6])
    W = weights(3, 32, 24)
    base = write_model(tmp_path / "base", {"model.layers.0.mlp.experts.gate_up_proj": W})
    (row,) = loratool.spectra(base, target=["re:experts"]).modules
    S = torch.linalg.svdvals(W.double()).square().mean(0).sqrt()
    assert math.isclose(row.norm, float(W.double().norm()), rel_tol=1e-6) and math.isclose(
        row.top[0], float(S[0]), rel_tol=1e-6
    )


def test_of_zeros_and_of_nothing(tmp_path: Path, run: Callable[..., Any]) -> None:
    base = write_model(tmp_path / "base", {"a.q_proj.weight": torch.zeros(4, 5)})
    (row,) = loratool.spectra(base).modules
    assert (row.norm, row.effective_rank, row.stable_rank, row.rank_50) == (0, 0, 0, 0)
    (empty,) = loratool.spectra(write_model(tmp_path / "empty", {"a.q_proj.weight": torch.zeros(0, 5)})).modules
    assert (empty.norm, empty.full, empty.rank_99) == (0, 0, 0)
    with pytest.raises(InputError, match="names no weight"):
        loratool.spectra(base, target=["what"])
    assert run("inspect", base, "--target", "q_proj").exit_code == 2
    assert run("inspect", base, "--spectra", "--strict").exit_code == 2
    broken = write_model(tmp_path / "broken", {"a.q_proj.weight": torch.full((4, 5), math.nan)})
    with pytest.raises(InputError, match="nan"):
        loratool.spectra(broken)


def test_experts_are_left_out_by_name_and_their_biases_are_no_matrices(tmp_path: Path, run: Callable[..., Any]) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": weights(8, 8),
        "model.layers.0.mlp.experts.down_proj": weights(3, 8, 6),
        "model.layers.0.mlp.experts.down_proj_bias": weights(3, 8),
    }
    base = write_model(tmp_path / "base", tensors, {"model_type": "gpt_oss"})
    tuned = write_model(tmp_path / "tuned", {name: 2 * W for name, W in tensors.items()}, {"model_type": "gpt_oss"})
    report, changed = loratool.spectra(base), loratool.diff_spectra(base, tuned)
    assert [row.name for row in (*report.modules, *changed.weights)] == 2 * ["model.layers.0.self_attn.q_proj.weight"]
    assert report.left_out == changed.left_out == {"model.layers.0.mlp.experts.down_proj": "experts"}
    for words in (("inspect", base), ("diff", base, tuned)):
        assert "skipped: experts (1); to include them, name them in --target" in run(*words, "--spectra").stdout


def test_an_adapter_without_any_factors(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "adapter", {"base_model.model.a.q_proj.ia3_l": torch.ones(8, 1)})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="a.q_proj and the other selected modules have no factors"):
        loratool.spectra(folder)
