"""Hold the curves of singular values in reports against full decompositions of the matrices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_model, write_peft
from lib.files.imatrix_files import write_gguf
from torch import Tensor

import loratool

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def holds(points: Any, D: Tensor, known: int | None = None, rel: float = 1e-5) -> bool:
    """Return whether points are those of a matrix, or of a stack (E, out, in)."""
    S = np.linalg.svd(D.double().numpy().reshape(-1, *D.shape[-2:]), compute_uv=False)
    squares = (S**2).sum(0)
    shares, S = squares.cumsum() / squares.sum(), np.sqrt(squares / len(S))
    at = np.array(points.places) - 1
    last = known or len(S)
    assert points.places[-1] == last and points.places[:8] == tuple(range(1, last + 1))[:8]
    assert points.values == pytest.approx(S[at], rel=rel, abs=1e-7 * S[0])
    assert points.energies == pytest.approx(shares[at], rel=rel)
    return True


def test_inspect() -> None:
    base, tensors = FIXTURES / "llama" / "base", load_model(FIXTURES / "llama" / "base")
    for row in loratool.spectra(base, target="q_proj,down_proj").modules:
        assert holds(row.spectrum, tensors[row.name]) and len(row.spectrum.places) < row.full


def test_inspect_of_stacks_and_of_low_rank(tmp_path: Path) -> None:
    stack, (A, B) = weights(3, 32, 24), factors(30, 20, 3)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    base = write_model(tmp_path / "base", {name: stack, "a.q_proj.weight": B @ A, "a.k_proj.weight": torch.zeros(9, 4)})
    low, zero, experts = sorted(
        loratool.spectra(base, target=["re:experts", "*_proj"]).modules, key=lambda row: (len(row.shape), -row.norm)
    )
    assert holds(experts.spectrum, stack)
    assert holds(low.spectrum, B @ A) and low.spectrum.values[3:] == (0.0,) * (len(low.spectrum.places) - 3)
    assert zero.spectrum.values == (0.0,) * 4 and zero.spectrum.energies == (1.0,) * 4


def test_inspect_of_an_adapter_and_beside_a_base(tmp_path: Path) -> None:
    A, B = factors(24, 20, 9)
    W = weights(24, 20, seed=3)
    adapter = write_peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (A, B)}, lora_alpha=3)
    base = write_model(tmp_path / "base", {"model.layers.0.self_attn.q_proj.weight": W}, LLAMA)
    (row,) = loratool.spectra(adapter, base=base, top=5).modules
    D = B.double() @ A.double() / 3
    assert holds(row.spectrum, D, known=9)
    assert row.intruders and holds(row.intruders.spectrum, W + D, known=5)


def test_diff(tmp_path: Path) -> None:
    """The leading singular values of the tuned model; a share of all its energy, though no others are known."""
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    after = load_model(tuned)
    report = loratool.diff_spectra(base, tuned, target="q_proj", top=12)
    assert report.weights
    for row in report.weights:
        assert holds(row.intruders.spectrum, after[row.name], known=12)
        assert row.intruders.spectrum.energies[-1] < 1
    stack = weights(2, 30, 24, seed=5)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    models = [write_model(tmp_path / side, {name: stack * factor}) for side, factor in (("a", 1), ("b", 2))]
    (row,) = loratool.diff_spectra(*models, target="re:experts", top=4).weights
    assert holds(row.intruders.spectrum, 2 * stack, known=4)


def test_diff_of_large_matrices(tmp_path: Path) -> None:
    """From a Krylov space, whose vectors may be off by a hundredth, and values by its square."""
    W = (torch.linalg.qr(weights(540, 520)).Q * torch.arange(1, 521) ** -0.5).contiguous()
    models = [write_model(tmp_path / side, {"a.q_proj.weight": W * f}) for side, f in (("a", 1), ("b", 3))]
    (row,) = loratool.diff_spectra(*models).weights
    assert holds(row.intruders.spectrum, 3 * W, known=10, rel=2e-4)


def test_resize_and_its_inputs(tmp_path: Path) -> None:
    A, B = factors(24, 20, 12)
    source = write_peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (A, B)})
    (row,) = loratool.resize(source, tmp_path / "out", rank=2).modules
    assert holds(row.spectrum, B.double() @ A.double(), known=12)
    h = torch.arange(1, 21, dtype=torch.float64)
    imatrix = write_gguf(tmp_path / "i.gguf", {"blk.0.attn_q.weight": (h[None].numpy(), [1])})
    (row,) = loratool.resize(source, tmp_path / "weighted", rank=2, imatrix=imatrix).modules
    assert holds(row.spectrum, B.double() @ A.double() * (h / h.mean()).sqrt(), known=12)


@pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.7}, {"rank_rule": ("sv_cumulative", 0.5)}])
def test_extract(options: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    before, after = load_model(base), load_model(tuned)
    report = loratool.extract(base, tuned, tmp_path / "adapter", **options)
    for row in report.modules:
        known = row.spectrum.places[-1]
        assert holds(row.spectrum, after[row.name].float() - before[row.name].float(), known=known)
        assert known == row.rank if "rank" in options else known >= row.rank
        at = [e for k, e in zip(row.spectrum.places, row.spectrum.energies, strict=True) if k == row.rank]
        assert all(energy == pytest.approx(row.kept, rel=1e-5) for energy in at)


@pytest.mark.parametrize("method", ["cat", "tsv", "ties"])
def test_combine(method: str, tmp_path: Path) -> None:
    """Written in full, the result can be read back; cut to 3, `ties`, one of entries, knows three of its values."""
    module = "model.layers.0.self_attn.q_proj"
    sides = [write_peft(tmp_path / str(seed), {module: factors(24, 20, 9, seed=seed)}) for seed in (1, 2)]
    rank, kept = {"cat": (18, 18), "tsv": (18, 18), "ties": (20, 3)}[method]
    (whole,) = loratool.combine(sides, tmp_path / "a", method=method, rank=rank, rank_method="truncate").modules
    base = write_model(tmp_path / "zero", {f"{module}.weight": torch.zeros(24, 20)})
    loratool.merge(base, tmp_path / "a", tmp_path / "merged", dtype="fp32", undo=False)
    D = load_model(tmp_path / "merged")[f"{module}.weight"]
    assert whole.error < 1e-6 and holds(whole.spectrum, D, known=rank)
    (cut,) = loratool.combine(sides, tmp_path / "b", method=method, rank=3, rank_method="truncate").modules
    assert holds(cut.spectrum, D, known=kept) and cut.spectrum.energies[2] == pytest.approx(cut.kept, rel=1e-5)


@pytest.mark.parametrize("words", [("inspect", "base", "--spectra"), ("diff", "base", "tuned", "--spectra")])
def test_json_has_them(words: tuple[str, ...], run: Callable[..., Any]) -> None:
    given = [FIXTURES / "llama" / word if word in ("base", "tuned") else word for word in words]
    rows = json.loads(run(*given, "--json").stdout)["report"]
    for row in rows["modules"] if words[0] == "inspect" else rows["weights"]:
        points = row["spectrum"] if words[0] == "inspect" else row["intruders"]["spectrum"]
        assert len(points["places"]) == len(points["values"]) == len(points["energies"]) > 5
