"""Hold --imatrix of extract, resize and combine against dense SVDs of matrices whose columns are weighted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, run_command, weights, write_model, write_peft
from lib.files.imatrix_files import write_binary, write_gguf
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool import InputError, UsageError
from loratool.transform.delta_factors import SvdChoices, factor_delta

GGUF_OF_LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
GGUF_OF_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def moments(inputs: int, seed: int) -> Tensor:
    return torch.randn(inputs, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


def gguf_name(name: str, table: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    own = None if at is None else table.get(".".join(parts[at + 1 : -1]))
    return f"blk.{parts[at]}.{own}.weight" if own and at is not None else None


def imatrix(path: Path, model: Path, table: Mapping[str, str], turned: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """Write moments for all matrices of a model's layers; return them by the model's names."""
    found: dict[str, Tensor] = {}
    for i, (name, W) in enumerate(load_model(model).items()):
        if gguf_name(name, table) and W.dim() == 2:
            found[name] = moments(W.shape[0 if turned else 1], i)
    sums = {str(gguf_name(name, table)): (h[None] * 3, [3]) for name, h in found.items()}
    return write_gguf(path, sums), found


@pytest.mark.parametrize(("family", "table", "turned"), [("llama", GGUF_OF_LLAMA, False), ("gpt2", GGUF_OF_GPT2, True)])
def test_extract_gives_the_best_for_the_outputs(
    family: str, table: dict[str, str], turned: bool, tmp_path: Path
) -> None:
    """Merged back, each matrix loses of its outputs what the dense SVD of the scaled change loses, and no more."""
    base, tuned = FIXTURES / family / "base", FIXTURES / family / "tuned"
    file, h = imatrix(tmp_path / "imatrix.gguf", base, table, turned)
    plain = loratool.extract(base, tuned, tmp_path / "plain", rank=3)
    report = loratool.extract(base, tuned, tmp_path / "adapter", rank=3, imatrix=file)
    before, after = load_model(base), load_model(tuned)
    for name in ("plain", "adapter"):
        loratool.merge(base, tmp_path / name, tmp_path / f"{name} merged", dtype="fp32", undo=False)
    merged, other = (load_model(tmp_path / f"{name} merged") for name in ("adapter", "plain"))
    rows = {row.name: row for row in report.modules}
    assert h.keys() <= rows.keys() and {*report.unweighted} == {
        n.removesuffix(".weight") for n in rows.keys() - h.keys()
    }
    lost = total = 0.0
    for name, moment in h.items():
        w = (moment / moment.mean()).clamp(min=1e-3).sqrt().double()
        each = [W[name].double().mT if turned else W[name].double() for W in (before, after, merged, other)]
        W, T, M, P = each
        S = torch.linalg.svdvals((T - W) * w)
        best, norm = float(S[3:].square().sum()), float(S.square().sum())
        found = float(((T - M) * w).square().sum())
        assert found == pytest.approx(best, rel=1e-3)
        assert found <= float(((T - P) * w).square().sum()) * (1 + 1e-6)
        row = rows[name]
        assert row.weighted_error == pytest.approx((best / norm) ** 0.5, rel=1e-3)
        assert row.error == pytest.approx(float((T - M).norm() / (T - W).norm()), rel=1e-4)
        assert row.above_noise is None
        lost, total = lost + best, total + norm
    assert report.weighted_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert plain.error is not None and report.error is not None and plain.error < report.error
    assert plain.weighted_error is None and not plain.unweighted
    embedding = next(row for row in report.modules if row.name not in h)
    assert embedding.weighted_error is None
    assert embedding == next(row for row in plain.modules if row.name == embedding.name)


@pytest.mark.parametrize("rule", [{"rank": 4}, {"energy": 0.8}, {"params": 20_000}, {"rank": 4, "certify": True}])
def test_equal_inputs_change_no_byte(rule: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    sums = {
        str(gguf_name(name, GGUF_OF_LLAMA)): (torch.full((1, W.shape[1]), 7.3), [3])
        for name, W in load_model(base).items()
        if gguf_name(name, GGUF_OF_LLAMA)
    }
    loratool.extract(base, tuned, tmp_path / "plain", **rule)
    loratool.extract(base, tuned, tmp_path / "equal", imatrix=write_gguf(tmp_path / "imatrix.gguf", sums), **rule)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "equal"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


LAYERS = {
    "model.layers.0.self_attn.q_proj": (24, 20),
    "model.layers.0.mlp.down_proj": (20, 40),
    "model.layers.11.self_attn.q_proj": (24, 20),
    "model.layers.11.self_attn.k_proj": (12, 20),
}


def known(*modules: str) -> dict[str, Tensor]:
    return {module: moments(LAYERS[module][1], i) for i, module in enumerate(modules)}


def sums_of(h: Mapping[str, Tensor]) -> dict[str, Any]:
    return {str(gguf_name(f"{module}.weight", GGUF_OF_LLAMA)): (m[None] * 5, [5]) for module, m in h.items()}


@pytest.mark.parametrize("tail", [1e-2, 1e-4, 1e-6])
def test_a_small_residual_of_the_outputs_is_not_rounding(tail: float) -> None:
    """Of D W and of D, whose rank is 3 but for a part of this size."""
    A, B = factors(60, 40, 3)
    rest = torch.randn(60, 40, generator=torch.Generator().manual_seed(5))
    w = torch.rand(1, 40, generator=torch.Generator().manual_seed(6)) + 0.1
    C = B @ A + rest * (tail * (B @ A).norm() / rest.norm())
    made = factor_delta("x", "linear", (60, 40), (C.numpy(),), 3, 100, SvdChoices(), w.numpy())
    assert isinstance(made.data, memoryview)
    found = torch.frombuffer(made.data, dtype=torch.float32).double()
    A, B = found[:120].view(3, 40), found[120:].view(3, 60).T
    left, D = C.double() - B @ A * w.double(), C.double() / w.double()
    lost = made.spectrum.total - sum(made.spectrum.squares)
    assert lost == pytest.approx(float(left.square().sum()), rel=1e-3)
    assert [x**0.5 for x in made.residuals] == pytest.approx(
        [float((D - B[:, :k] @ A[:k]).norm()) for k in range(4)], rel=1e-3
    )


def change(folder: Path, module: str) -> Tensor:
    """Return the delta of a module of a PEFT adapter whose alpha is its rank."""
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return B @ A


def adapter(folder: Path, rank: int = 6) -> Path:
    pairs = {module: factors(*shape, rank, seed=i) for i, (module, shape) in enumerate(LAYERS.items())}
    return write_peft(folder, pairs, lora_alpha=rank)


@pytest.mark.parametrize("write", [write_gguf, write_binary])
@pytest.mark.parametrize("rank", [2, 5, 8])
def test_resize_gives_the_best_for_the_outputs(rank: int, write: Any, tmp_path: Path) -> None:
    source, h = adapter(tmp_path / "a"), known(*list(LAYERS)[:3])
    report = loratool.resize(source, tmp_path / "out", rank=rank, imatrix=write(tmp_path / "imatrix", sums_of(h)))
    loratool.resize(source, tmp_path / "plain", rank=rank)
    assert report.unweighted == ("model.layers.11.self_attn.k_proj",)
    lost = total = 0.0
    for row in report.modules:
        D, found, plain = (change(folder, row.name) for folder in (source, tmp_path / "out", tmp_path / "plain"))
        if row.name not in h:
            assert torch.equal(found, plain) and row.weighted_error is None
            continue
        w = (h[row.name] / h[row.name].mean()).clamp(min=1e-3).sqrt().double()
        S = torch.linalg.svdvals(D * w).square()
        best = float(S[rank:].sum())
        left = float(((D - found) * w).square().sum())
        assert left == pytest.approx(best, rel=1e-4, abs=1e-9 * float(S.sum()))
        assert left <= float(((D - plain) * w).square().sum()) + 1e-9 * float(S.sum())
        assert row.kept == pytest.approx(1 - best / float(S.sum()), rel=1e-6)
        assert row.weighted_error == pytest.approx((left / float(S.sum())) ** 0.5, rel=1e-3, abs=1e-6)
        assert row.error == pytest.approx(float((D - found).norm() / D.norm()), rel=1e-3, abs=1e-6)
        assert row.norm == pytest.approx(float(D.norm()), rel=1e-6)
        lost, total = lost + left, total + float(S.sum())
    assert report.weighted_error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("rule", [{"energy": 0.7}, {"params": 500}, {"rank_rule": ("sv_ratio", 3.0)}])
def test_rules_go_by_the_weighted_values(rule: dict[str, Any], tmp_path: Path) -> None:
    source, h = adapter(tmp_path / "a"), known(*LAYERS)
    report = loratool.resize(source, tmp_path / "out", imatrix=write_gguf(tmp_path / "i.gguf", sums_of(h)), **rule)
    squares = {}
    for module, moment in h.items():
        w = (moment / moment.mean()).clamp(min=1e-3).sqrt().double()
        squares[module] = torch.linalg.svdvals(change(source, module) * w).square().tolist()
    ranks = {row.name: row.new_rank for row in report.modules}
    for module, values in squares.items():
        if "energy" in rule:
            assert ranks[module] == next(k for k in range(1, 7) if sum(values[:k]) >= 0.7 * sum(values))
        elif "rank_rule" in rule:
            assert ranks[module] == sum(value > values[0] / 9 for value in values)
    if "params" in rule:
        each = {module: values[ranks[module] - 1] / sum(LAYERS[module]) for module, values in squares.items()}
        others = [values[ranks[m]] / sum(LAYERS[m]) for m, values in squares.items() if ranks[m] < 6]
        chosen = [ratio for module, ratio in each.items() if ranks[module] > 1]
        assert sum(ranks[module] * sum(LAYERS[module]) for module in ranks) <= 500 and min(chosen) > min(others)


def test_equal_inputs_change_no_byte_of_resize(tmp_path: Path) -> None:
    source = adapter(tmp_path / "a")
    sums = {name: (torch.full_like(values, 0.3), counts) for name, (values, counts) in sums_of(known(*LAYERS)).items()}
    loratool.resize(source, tmp_path / "out", rank=3, imatrix=write_gguf(tmp_path / "i.gguf", sums))
    loratool.resize(source, tmp_path / "plain", rank=3)
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "plain"))
    assert one == two


def pair_of_adapters(folder: Path) -> list[tuple[Path, float]]:
    others = {module: factors(*shape, 4, seed=20 + i) for i, (module, shape) in enumerate(LAYERS.items())}
    return [(adapter(folder / "a"), 0.7), (write_peft(folder / "b", others, lora_alpha=4), -0.4)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {"rank": 3}),
        ("cat", {"max_rank": 3}),
        ("tsv", {"rank": 3, "rank_method": "truncate"}),
        ("ties", {"rank": 3, "rank_method": "truncate"}),
    ],
)
def test_combine_cuts_what_matters_least_for_the_outputs(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Of the method's result at full rank the best of rank 3 for the outputs is kept."""
    given, h = pair_of_adapters(tmp_path), known(*list(LAYERS)[:3])
    file = write_gguf(tmp_path / "imatrix.gguf", sums_of(h))
    whole = {"rank": 20, "rank_method": "truncate"} if method == "ties" else {}
    loratool.combine(given, tmp_path / "whole", method=method, **whole)
    plain = loratool.combine(given, tmp_path / "plain", method=method, **options)
    report = loratool.combine(given, tmp_path / "out", method=method, imatrix=file, **options)
    assert report.unweighted == ("model.layers.11.self_attn.k_proj",) and plain.weighted_error is None
    lost = total = 0.0
    for row in report.modules:
        D, found = (change(tmp_path / name, row.name) for name in ("whole", "out"))
        if row.name not in h:
            assert torch.equal(found, change(tmp_path / "plain", row.name))
            continue
        w = (h[row.name] / h[row.name].mean()).clamp(min=1e-3).sqrt().double()
        S = torch.linalg.svdvals(D * w).square()
        best, energy = float(S[3:].sum()), float(S.sum())
        assert float(((D - found) * w).square().sum()) == pytest.approx(best, rel=1e-4)
        assert row.weighted_error == pytest.approx((best / energy) ** 0.5, rel=1e-3)
        assert row.kept == pytest.approx(1 - best / energy, rel=1e-4)
        assert row.error == pytest.approx(float((D - found).norm() / D.norm()), rel=1e-4)
        assert row.norm == pytest.approx(float(D.norm()), rel=1e-5)
        lost, total = lost + best, total + energy
    assert report.weighted_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "cat without a rank truncates nothing"),
        ({"method": "tsv"}, "tsv without a rank truncates nothing"),
        ({"method": "ties", "rank": 3}, "ctm truncates nothing"),
        ({"method": "iso-c", "rank": 3}, "iso-c cannot be truncated"),
    ],
)
def test_combine_without_a_cut_has_no_use_for_inputs(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        loratool.combine(pair_of_adapters(tmp_path), tmp_path / "out", imatrix=tmp_path / "imatrix.gguf", **options)


@pytest.mark.parametrize(
    ("method", "remedy", "options"),
    [
        ("cat", "add --rank", {"rank": 2}),
        ("tsv", "add --rank and --rank-method truncate", {"rank": 2, "rank_method": "truncate"}),
    ],
)
def test_what_combine_says_to_add_makes_it_cut(
    method: str, remedy: str, options: dict[str, Any], tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "imatrix.gguf", sums_of(known(*LAYERS)))
    given, out = pair_of_adapters(tmp_path), tmp_path / "out"
    with pytest.raises(UsageError) as found:
        loratool.combine(given, out, method=method, imatrix=file)
    assert found.value.remedy == remedy
    assert loratool.combine(given, out, method=method, imatrix=file, **options).weighted_error is not None


def test_the_rule_noise_is_of_changes(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "imatrix.gguf", sums_of(known(*LAYERS)))
    with pytest.raises(UsageError, match="the rule noise"):
        loratool.resize(adapter(tmp_path / "a"), tmp_path / "out", rank_rule=("noise", 1.0), imatrix=file)
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    with pytest.raises(UsageError, match="the rule noise"):
        loratool.extract(base, tuned, tmp_path / "out", rank_rule=("noise", 1.0), imatrix=file)


def test_the_file_of_another_model(tmp_path: Path) -> None:
    """Other widths, or names that no module has, are refused before anything is written."""
    wide = {name: (torch.ones(1, 100), [1]) for name in sums_of(known(*LAYERS))}
    other = {"enc.blk.0.attn_q.weight": (torch.ones(1, 20), [1])}
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    given = pair_of_adapters(tmp_path)
    calls: list[Callable[[Path], object]] = [
        lambda file: loratool.extract(base, tuned, tmp_path / "out", imatrix=file),
        lambda file: loratool.resize(given[0][0], tmp_path / "out", rank=2, imatrix=file),
        lambda file: loratool.combine(given, tmp_path / "out", rank=2, imatrix=file),
    ]
    for i, (sums, said) in enumerate([(wide, "it belongs to another model"), (other, "is it the file of this model")]):
        file = write_gguf(tmp_path / f"{i}.gguf", sums)
        for call in calls:
            with pytest.raises(InputError, match=said):
                call(file)
            assert not (tmp_path / "out").exists()


def test_a_model_of_other_layers_is_told(tmp_path: Path) -> None:
    """Of one that is as wide but deeper, whose first layers would fit."""
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    file, _ = imatrix(tmp_path / "imatrix.gguf", base, GGUF_OF_LLAMA)
    assert not loratool.extract(base, tuned, tmp_path / "out", rank=1, imatrix=file).warnings
    deeper = write_gguf(
        tmp_path / "deeper.gguf", {f"blk.{n}.attn_q.weight": (torch.ones(1, 64), [1]) for n in range(5)}
    )
    report = loratool.extract(base, tuned, tmp_path / "deeper", rank=1, imatrix=deeper)
    assert "deeper.gguf has inputs of 5 layers, but the model has 3: is it the file of this model?" in report.warnings


def test_image_models_are_refused_by_name(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "imatrix.gguf", sums_of(known(*LAYERS)))
    base = FIXTURES / "sdxl" / "base.safetensors"
    with pytest.raises(InputError, match="is an image model"):
        loratool.extract(base, base, tmp_path / "out.safetensors", imatrix=file)
    with pytest.raises(InputError, match="is for an image model"):
        loratool.resize(FIXTURES / "sdxl" / "adapter.safetensors", tmp_path / "out.safetensors", rank=2, imatrix=file)


EXPERTS = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "hidden_size": 20, "tie_word_embeddings": False,
}  # fmt: skip


def experts_lost(W: Mapping[str, Tensor], V: Mapping[str, Tensor], w: Tensor, rank: int, parts: list[str]) -> float:
    """Return the least share of a stack's outputs, squared, that its matrices at a rank can lose in all."""
    lost = total = 0.0
    for e in range(3):
        names = [f"model.layers.0.mlp.experts.{e}.{part}.weight" for part in parts]
        D = torch.cat([V[name].double() - W[name].double() for name in names])
        S = torch.linalg.svdvals(D * w[e].double()).square()
        lost, total = lost + float(S[rank:].sum()), total + float(S.sum())
    return lost / total


def test_stacks_of_experts(tmp_path: Path) -> None:
    """Each expert has inputs of its own, one that no text used equal ones; they are found in a GGUF adapter too."""
    base, tuned = dict[str, Tensor](), dict[str, Tensor]()
    for e, (part, shape) in product(
        range(3), {"gate_proj": (12, 20), "up_proj": (12, 20), "down_proj": (20, 12)}.items()
    ):
        name = f"model.layers.0.mlp.experts.{e}.{part}.weight"
        base[name] = weights(*shape, seed=e)
        tuned[name] = base[name] + 0.1 * weights(*shape, seed=100 + e + 10 * len(part))
    h = {"blk.0.ffn_gate_exps.weight": (3, 20), "blk.0.ffn_down_exps.weight": (3, 12)}
    sums = {name: (torch.stack([moments(n, e) for e in range(E)]), [2.0, 0.0, 5.0]) for name, (E, n) in h.items()}
    for values, _ in sums.values():
        values[1] = 0
    sums["blk.0.ffn_up_exps.weight"] = sums["blk.0.ffn_gate_exps.weight"]
    file = write_gguf(tmp_path / "imatrix.gguf", sums)
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_model(tmp_path / name, tensors, EXPERTS)
    report = loratool.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=6, imatrix=file)
    assert len(report.modules) == 2 and not report.unweighted
    for row in report.modules:
        values = sums["blk.0.ffn_down_exps.weight" if "down" in row.name else "blk.0.ffn_gate_exps.weight"][0].double()
        w = (values / values.mean(-1, keepdim=True)).nan_to_num(1.0).clamp(min=1e-3).sqrt()
        parts = ["down_proj"] if "down" in row.name else ["gate_proj", "up_proj"]
        assert row.weighted_error == pytest.approx(experts_lost(base, tuned, w, 6, parts) ** 0.5, rel=1e-4)
    loratool.convert(tmp_path / "out", tmp_path / "out.gguf", to="gguf", base=tmp_path / "base" / "config.json")
    for name in ("out", "out.gguf"):
        again = loratool.resize(tmp_path / name, tmp_path / f"small {name}", rank=2, imatrix=file)
        assert not again.unweighted
        (down,) = (row for row in again.modules if "down" in row.name)
        assert down.weighted_error is not None and 0 < down.weighted_error < 1


@pytest.mark.parametrize("rule", [("energy", 0.8), ("sv_ratio", 4.0), ("sv_cumulative", 0.6), ("sv_fro", 0.9)])
def test_rules_of_extract_go_by_the_weighted_values(rule: tuple[str, float], tmp_path: Path) -> None:
    base, tuned = FIXTURES / "llama" / "base", FIXTURES / "llama" / "tuned"
    file, h = imatrix(tmp_path / "imatrix.gguf", base, GGUF_OF_LLAMA)
    report = loratool.extract(base, tuned, tmp_path / "out", rank_rule=rule, imatrix=file)
    before, after = load_model(base), load_model(tuned)
    ranks, (name, value) = {row.name: row.rank for row in report.modules}, rule
    for weight, moment in h.items():
        w = (moment / moment.mean()).clamp(min=1e-3).sqrt().double()
        S = torch.linalg.svdvals((after[weight].double() - before[weight].double()) * w)
        if name == "sv_ratio":
            wanted = int((S * value > S[0]).sum())
        else:
            shares, least = (S, value) if name == "sv_cumulative" else (S.square(), value ** (1 + (name == "sv_fro")))
            wanted = int((shares.cumsum(0) < least * shares.sum()).sum()) + 1
        assert ranks[weight] == wanted


def test_from_the_command_line_and_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "imatrix.gguf", sums_of(known(*list(LAYERS)[:3])))
    adapter(tmp_path / "a")
    words = ["resize", "a", "--rank", "2", "--imatrix", "imatrix.gguf", "-o", "out"]
    done = json.loads(run_command(*words, "--json", "--save-recipe", "resize.yaml").stdout)["report"]
    assert done["imatrix"] == "imatrix.gguf" and done["unweighted"] == ["model.layers.11.self_attn.k_proj"]
    assert 0 < done["weighted_error"] < done["error"]
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert run_command("run", "resize.yaml", "--force").exit_code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == first
    shown = run_command(*words, "--force").stdout
    assert "no inputs in the imatrix: " in shown and "out. error" in shown
    assert "of the outputs lost in 3 modules with known inputs" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--imatrix imatrix.gguf" in card and "ranks are chosen for the outputs" in card
    assert run_command(*words[:-1], "imatrix.gguf", "--force").exit_code == 2  # no output replaces it
