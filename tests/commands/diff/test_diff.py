"""Hold diff against dense matrices and brute force, whatever factors, formats and kinds; models tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_kohya, write_model, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, UsageError

MODULES = {"model.layers.0.self_attn.q_proj": (24, 20), "model.layers.1.self_attn.q_proj": (24, 20)}
Q0, Q1 = MODULES


def pairs(rank: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    return {m: factors(*shape, rank, seed=seed + i) for i, (m, shape) in enumerate(MODULES.items())}


def dense(found: dict[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    return {m: scale * B.double() @ A.double() for m, (A, B) in found.items()}


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 1.0), ({"lora_alpha": 3}, 0.5), ({"lora_alpha": 3, "use_rslora": True}, 3 / math.sqrt(6))],
)
def test_the_numbers_are_those_of_the_dense_changes(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    one, two = pairs(6), pairs(4, seed=7)
    report = loratool.diff(write_peft(tmp_path / "a", one, **config), write_peft(tmp_path / "b", two))
    D1, D2 = dense(one, scale), dense(two, 1.0)
    for m in report.modules:
        x, y = D1[m.name], D2[m.name]
        largest = max(x.norm(), y.norm())
        assert abs(m.norm_a - x.norm()) < 1e-9 * largest and abs(m.norm_b - y.norm()) < 1e-9 * largest
        assert abs(m.distance - (y - x).norm()) < 1e-9 * largest
        assert abs(m.relative - (y - x).norm() / largest) < 1e-9
        assert abs(m.cosine - (x * y).sum() / x.norm() / y.norm()) < 1e-9
        assert (m.rank_a, m.rank_b, m.same) == (6, 4, False)
        U = [torch.linalg.svd(D).Vh.T for D in (x, y)]
        assert m.phi is not None and m.phi.i == (1, 2, 4, 6) and m.phi.j == (1, 2, 4)
        for i, row in zip(m.phi.i, m.phi.right, strict=True):
            for j, value in zip(m.phi.j, row, strict=True):
                found = float((U[0][:, :i].T @ U[1][:, :j]).square().sum()) / min(i, j)
                assert math.isclose(value, found, rel_tol=5.01e-6) and float(f"{value:.6g}") == value
        assert m.phi.random_right[-1][-1] == 6 / 20 and m.phi.random_left[0][0] == 0.0416667
        cosines = torch.linalg.svdvals(U[0][:, :6].T @ U[1][:, :4])
        assert torch.allclose(torch.tensor(m.angles_right, dtype=torch.float64).cos(), cosines, atol=5.01e-6)
    whole = [torch.cat([D[m].flatten() for m in MODULES]) for D in (D1, D2)]
    assert math.isclose(report.distance, float((whole[1] - whole[0]).norm()), rel_tol=1e-9)
    assert math.isclose(report.cosine, float(whole[0] @ whole[1] / whole[0].norm() / whole[1].norm()), rel_tol=1e-6)
    assert report.worst == max(m.relative for m in report.modules)


def test_the_same_change_in_other_factors_is_the_same(tmp_path: Path, run: Callable[..., Any]) -> None:
    one = pairs(6)
    M = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q * torch.logspace(0, 2, 6)
    two = {m: (torch.linalg.inv(M) @ A, B @ M) for m, (A, B) in one.items()}
    wider = {m: (torch.cat([A, A]), torch.cat([B / 2, B / 2], 1)) for m, (A, B) in one.items()}
    a, b, c = (write_peft(tmp_path / n, f) for n, f in (("a", one), ("b", two), ("c", wider)))
    for other in (b, c):
        report = loratool.diff(a, other)
        assert report.same and all(m.same and m.relative < 1e-6 for m in report.modules)
        assert run("diff", a, other, "--fail-above", "1e-5").exit_code == 0
    assert "same: the same delta in" in run("diff", a, b).stdout
    assert loratool.diff(a, c).modules[0].phi.j == (1, 2, 4, 6)  # type: ignore[union-attr]


def test_adapters_without_factors_have_no_delta_to_tell(tmp_path: Path, run: Callable[..., Any]) -> None:
    """A gate of IA3: 2 apart from 4, which is half; of nothing there is no cosine."""
    for name, value in (("a", 4.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        gate = {"base_model.model.model.layers.0.mlp.down_proj.ia3_l": torch.full((1, 16), value)}
        save_file(gate, tmp_path / name / "adapter_model.safetensors")
        fields = {"peft_type": "IA3", "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(fields))
    a, b = tmp_path / "a", tmp_path / "b"
    assert run("diff", a, b).stdout.endswith("\ndifferent: 1 of 1 tensor apart, at most 50.0%\n")
    same = run("diff", a, a).stdout
    assert same.splitlines()[0] == f"A  {a}  1 tensor" and "  ia3  " in same
    assert same.endswith("\nsame: the same values in 1 tensor\n")


def test_formats_meet(tmp_path: Path) -> None:
    """kohya's flattened names, scale by alpha / r, against PEFT's."""
    one = pairs(6)
    kohya = write_kohya(tmp_path / "k.safetensors", one, torch.tensor(3.0))
    peft = write_peft(tmp_path / "p", one, lora_alpha=3)
    for a, b in ((kohya, peft), (peft, kohya)):
        report = loratool.diff(a, b)
        assert report.same and len(report.modules) == 2 and not report.only_a and not report.only_b
        assert set(report.fields) == {"format"}


def test_what_one_side_lacks_counts_as_1(tmp_path: Path, run: Callable[..., Any]) -> None:
    one = pairs(6)
    a, b = write_peft(tmp_path / "a", one), write_peft(tmp_path / "b", {Q0: one[Q0]})
    report = loratool.diff(a, b)
    assert report.only_a == (Q1,) and not report.only_b and report.worst == 1.0 and not report.same
    missing = report.modules[1]
    assert (missing.relative, missing.rank_b, missing.norm_b, missing.cosine) == (1.0, 0, 0.0, 0.0)
    assert math.isclose(missing.distance, missing.norm_a)
    assert run("diff", a, b, "--fail-above", "0.9").exit_code == 1
    assert run("diff", a, b, "--fail-above", "1").exit_code == 0
    found = json.loads(run("diff", a, b, "--fail-above", "0.9", "--json").stdout)
    assert found["status"] == "different" and not found["ok"] and found["exit_code"] == 1
    assert run("diff", a, b, "--fail-above", "0.5", "--layers", "0").exit_code == 0
    assert run("diff", a, b, "--fail-above", "0.5", "--layers", "1").exit_code == 1


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_sizes_and_amplification_beside_a_base(model: str, tmp_path: Path) -> None:
    """Brute force is the reference; GPT-2 stores its weights as (in, out)."""
    folder = FIXTURES / model
    report = loratool.diff(folder / "adapter", folder / "adapter", base=folder / "base")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    base, checked = load_model(folder / "base"), 0
    for m in report.modules:
        names = [f"base_model.model.{m.name}.lora_{side}.weight" for side in "AB"]
        key = next((k for k in base if k.endswith(f"{m.name.removeprefix('transformer.')}.weight")), None)
        if not set(names) <= set(tensors) or key is None:
            continue
        A, B = (tensors[name].double() for name in names)
        patterns = config["alpha_pattern"] or {}
        alpha = next((v for key, v in patterns.items() if m.name.endswith(key)), config["lora_alpha"])
        scale = alpha / (len(A) ** 0.5 if config["use_rslora"] else len(A))
        D, W = B @ A * scale, base[key].double()
        W = W if W.shape == D.shape and model == "llama" else W.T
        U, _, Vh = torch.linalg.svd(D)
        r = len(A)
        assert math.isclose(m.size_a or 0, float(D.norm() / W.norm()), rel_tol=1e-6)
        expected = float(D.norm() / (U[:, :r].T @ W @ Vh[:r].T).norm())
        assert math.isclose(m.amplification_a or 0, expected, rel_tol=1e-6) and m.amplification_b == m.amplification_a
        checked += 1
    assert checked > 5


def test_every_kind_of_update(tmp_path: Path) -> None:
    base = {
        "model.layers.0.mlp.experts.gate_up_proj": weights(3, 32, 24),
        "model.embed_tokens.weight": weights(40, 24, seed=2),
        "model.patch.weight": weights(12, 6, 3, 3, seed=3),
        "model.layers.0.self_attn.q_proj.weight": weights(24, 24, seed=4),
    }
    write_model(tmp_path / "base", base, {"model_type": "mixtral"})
    target = ["q_proj", "embed_tokens", "patch", "re:experts"]
    for name, seed in (("a", 0), ("b", 1)):
        loratool.init(tmp_path / "base", tmp_path / name, target=target, rank=4, seed=seed)
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = {k: t + 0.1 * weights(*t.shape, seed=9 + seed) for k, t in load_file(file).items()}
        tensors["base_model.model.model.norm.weight"] = weights(24, seed=12 + seed)
        save_file(tensors, file, {"format": "pt"})
    report = loratool.diff(tmp_path / "a", tmp_path / "b")
    merged = {}
    for name in "ab":
        loratool.merge(
            tmp_path / "base", tmp_path / name, tmp_path / f"m{name}", exclude=["norm"], undo=False, dtype="fp32"
        )
        merged[name] = load_model(tmp_path / f"m{name}")
    assert {m.name for m in report.modules} == {name.removesuffix(".weight") for name in base}
    for m in report.modules:
        key = m.name if m.name in base else f"{m.name}.weight"
        between = float((merged["b"][key].double() - merged["a"][key].double()).norm())
        assert math.isclose(m.distance, between, rel_tol=1e-4)
        assert (m.phi is None) is (m.kind == "experts")
    (norm,) = report.values
    x, y = weights(24, seed=12).double(), weights(24, seed=13).double()
    assert math.isclose(norm.relative, float((y - x).norm() / max(x.norm(), y.norm())), rel_tol=1e-9)
    assert loratool.diff(tmp_path / "a", tmp_path / "a").same


def test_dora_tells_magnitudes_apart(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"model.q_proj.weight": weights(24, 24)})
    for name in "ab":
        loratool.init(base, tmp_path / name, dora=True, method="orthogonal", rank=4)
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.q_proj.lora_magnitude_vector"
    save_file({**tensors, key: tensors[key] * 1.5}, file)
    report = loratool.diff(tmp_path / "a", tmp_path / "b")
    assert report.modules[0].same and not report.same
    assert report.values[0].name.endswith("magnitude") and math.isclose(report.values[0].relative, 1 / 3, rel_tol=1e-6)


def test_zero_changes(tmp_path: Path, run: Callable[..., Any]) -> None:
    A, B = factors(24, 20, 4)
    zero, some = write_peft(tmp_path / "z", {Q0: (A, B * 0)}), write_peft(tmp_path / "s", {Q0: (A, B)})
    assert loratool.diff(zero, zero).same
    report = loratool.diff(zero, some)
    assert (
        math.isclose(report.modules[0].relative, 1) and report.modules[0].cosine == 0 and report.modules[0].phi is None
    )
    assert run("diff", zero, some, "--json").exit_code == 0


def with_tensors(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Write an adapter with more than factors."""
    write_peft(folder, pairs(4), **config)
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), **{f"base_model.model.{k}": t for k, t in tensors.items()}}, file)
    return folder


def test_an_adapter_and_itself_are_no_step_apart(tmp_path: Path, run: Callable[..., Any]) -> None:
    a, b = write_peft(tmp_path / "a", pairs(6)), write_peft(tmp_path / "b", pairs(6))
    assert loratool.diff(a, b).worst == 0 and run("diff", a, b, "--fail-above", "0").exit_code == 0
    assert run("diff", a, b, "--fail-above", "nan").exit_code == 2


def test_values_of_any_shape_and_scale(tmp_path: Path) -> None:
    one, two = ({"logit_scale": torch.tensor(x), "w.bias": torch.full((3,), x * 1e-30)} for x in (1.0, 2.0))
    a, b = with_tensors(tmp_path / "a", one), with_tensors(tmp_path / "b", two)
    report = loratool.diff(a, b)
    assert {v.name: (v.norm_a, v.relative) for v in report.values}["logit_scale"] == (1.0, 0.5) and not report.same
    assert all(math.isclose(v.relative, 0.5) for v in report.values)
    biases = [
        with_tensors(tmp_path / f"{rank}", {f"{Q0}.lora_B.bias": torch.ones(24) * rank}, lora_bias=True, lora_alpha=4.0)
        for rank in (4,)
    ]
    loratool.resize(biases[0], tmp_path / "wider", rank=7)
    assert loratool.diff(biases[0], tmp_path / "wider").same


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_report_holds_nan(value: float, tmp_path: Path, run: Callable[..., Any]) -> None:
    good = with_tensors(tmp_path / "good", {"score.weight": torch.ones(3, 24)})
    bad = with_tensors(tmp_path / "bad", {"score.weight": torch.full((3, 24), value)})
    assert run("diff", good, bad, "--json").exit_code == run("diff", bad, bad, "--json").exit_code == 3
    odd = write_peft(tmp_path / "odd", pairs(4), lora_dropout=value)
    found = json.loads(run("diff", odd, write_peft(tmp_path / "a", pairs(4)), "--json").stdout)
    assert found["report"]["fields"]["lora_dropout"][0] in ("NaN", "Infinity")
    W = {f"{m}.weight": torch.full(shape, value) for m, shape in MODULES.items()}
    assert run("diff", odd, odd, "--base", write_model(tmp_path / "base", W), "--json").exit_code == 3


def test_codes_that_are_not_read_tell_no_sizes(tmp_path: Path) -> None:
    W = {f"{m}.weight": torch.ones(shape).to(torch.int8) for m, shape in MODULES.items()}
    W |= {f"{name}_scales": torch.ones(W[name].shape[1]).half() for name in list(W)}
    a = write_peft(tmp_path / "a", pairs(4))
    with pytest.raises(InputError, match=r"is quantized \(EETQ int8\)"):
        loratool.diff(a, a, base=write_model(tmp_path / "base", W))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("model.layers.0.q", "layers.0.q"),
        ("layers.0.q", "model.layers.0.q"),
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q"),
    ],
)
def test_modules_meet_under_other_names(one: str, two: str, tmp_path: Path) -> None:
    """Saved from the backbone alone, and by another transformers."""
    a, b = (write_peft(tmp_path / n, {m: factors(24, 20, 4)}) for n, m in (("a", one), ("b", two)))
    assert loratool.diff(a, b).same


def test_text_encoders_of_one_shape_are_two(tmp_path: Path) -> None:
    files = []
    for seed in range(2):
        module = "text_model_layers_0_q"
        parts = [
            load_file(write_kohya(tmp_path / p, {module: factors(24, 20, 4, seed=seed + i)}, prefix=p))
            for i, p in enumerate(("lora_te1", "lora_te2"))
        ]
        save_file({**parts[0], **parts[1]}, file := tmp_path / f"{seed}.safetensors")
        files.append(file)
    report = loratool.diff(*files)
    assert [m.name for m in report.modules] == [
        "text_encoder_text_model_layers_0_q",
        "text_encoder_2_text_model_layers_0_q",
    ]
    assert not report.same and not report.only_a and loratool.diff(files[0], files[0]).same


def test_alpha_is_for_the_side_that_lacks_it(tmp_path: Path) -> None:
    a, b = write_peft(tmp_path / "a", pairs(4), lora_alpha=8), write_peft(tmp_path / "b", pairs(4), lora_alpha=None)
    assert math.isclose(loratool.diff(a, b, alpha=4).worst, 0.5) and loratool.diff(a, b, alpha=8).same


def test_what_float64_cannot_square_is_said(tmp_path: Path) -> None:
    huge = {m: (A.double() * 1e100, B.double() * 1e100) for m, (A, B) in pairs(4).items()}
    a = write_peft(tmp_path / "a", huge)
    for call in (lambda: loratool.diff(a, a), lambda: loratool.spectra(a), lambda: loratool.resize(a, "x", rank=2)):
        with pytest.raises(InputError, match="too large"):
            call()
    large = {m: (A * 1e30, B * 1e30) for m, (A, B) in pairs(4).items()}
    assert math.isfinite(
        loratool.diff(write_peft(tmp_path / "b", large), write_peft(tmp_path / "c", pairs(4))).distance
    )


def spoiled(count: int, value: float) -> Tensor:
    W = weights(20, 30)
    W.view(-1)[:count] = value
    return W


# Pairs of tensors without a distance, and what is said of them
NOT_COMPARABLE: dict[str, tuple[Tensor, Tensor, str]] = {
    "more rows": (weights(20, 30), weights(50, 30), "shapes differ"),
    "fewer rows": (weights(50, 30), weights(20, 30), "shapes differ"),
    "another order": (weights(20, 30), weights(30, 20), "shapes differ"),
    "a scalar": (weights(1)[0], weights(1), "shapes differ"),
    "no numbers": (torch.zeros(0, 4), torch.zeros(4, 0), "shapes differ"),
    "no numbers on one side": (weights(20, 30), torch.zeros(0, 30), "shapes differ"),
    "a nan": (weights(20, 30), spoiled(1, math.nan), "nan or inf on one side only"),
    "nan everywhere": (spoiled(600, math.nan), weights(20, 30), "nan or inf on one side only"),
    "inf": (weights(20, 30), spoiled(3, math.inf), "nan or inf on one side only"),
    "the other inf": (spoiled(3, -math.inf), spoiled(3, math.inf), "nan or inf on one side only"),
    "integers": (torch.arange(4), torch.arange(4) + 1, "not floating-point"),
    "integers and floats": (torch.arange(4), torch.arange(4.0), "not floating-point"),
}


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("size", "dtype"), [(1e-30, torch.float32), (1e-22, torch.float32), (1e200, torch.float64)]
    )
    def test_values_whose_squares_leave_the_range(
        self, size: float, dtype: torch.dtype, tmp_path: Path, run: Callable[..., Any]
    ) -> None:
        W = weights(20, 30).to(dtype) * size
        a, b = write_model(tmp_path / "a", {"w": W}), write_model(tmp_path / "b", {"w": W * 1.25})
        assert math.isclose(loratool.diff(a, b).relative, 0.2, rel_tol=1e-6)
        assert run("diff", a, b, "--json").exit_code == 0

    def test_single_numbers_and_codes(self, tmp_path: Path) -> None:
        codes = torch.arange(10)
        one = {"scale": torch.tensor(1.0), "codes": codes, "flags": codes > 3, "small": torch.tensor(1.0)}
        two = {"scale": torch.tensor(2.0), "codes": codes.clone(), "flags": codes > 4, "small": one["small"].double()}
        two["codes"][7] += 1
        a, b = write_model(tmp_path / "a", one), write_model(tmp_path / "b", two)
        found = {t.name: t for t in loratool.diff(a, b).tensors}
        assert (found["scale"].relative, found["scale"].largest) == (0.5, 1.0)
        assert found["codes"].changed == found["flags"].changed == 1 and found["small"].relative == 0

    def test_two_tensors_of_one_path_are_both_there(self, tmp_path: Path) -> None:
        W = weights(3, 4)
        a = write_model(tmp_path / "a", {"w.weight": W, "module.w.weight": W * 2})
        report = loratool.diff(a, write_model(tmp_path / "b", {"w.weight": W * 2}))
        assert len(report.only_a) == 1 and not report.same

    def test_each_kind_of_difference(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        W = weights(20, 30, dtype=torch.bfloat16)
        stepped = W.clone()
        bits = stepped.view(torch.int16)
        bits[3, 4] += 5
        odd = W.clone()
        odd[0, 0] = math.nan
        one = {name: W.clone() for name in ("same", "step", "odd", "type", "shape", "only")}
        one |= {"zero": W * 0, "ints": torch.arange(4)}
        two = {
            "same": W.clone(),
            "step": stepped,
            "odd": odd,
            "type": W.float(),
            "shape": W[:7].clone(),
            "new": W.clone(),
            "zero": -(W * 0),
            "ints": torch.arange(4) + 1,
        }
        a, b = write_model(tmp_path / "a", one), write_model(tmp_path / "b", two, shards=2)
        report = loratool.diff(a, b)
        found = {t.name: t for t in report.tensors}
        assert report.equal == 2 and report.only_a == ("only",) and report.only_b == ("new",)
        assert set(found) == {"step", "odd", "type", "shape", "ints"} and not report.same
        assert report.worst == found["step"].relative and report.compared == 4  # and same, zero, type
        assert found["step"].steps == 5 and found["step"].changed == 1
        D = (stepped.double() - W.double()).norm()
        assert math.isclose(
            found["step"].relative, float(D / max(W.double().norm(), stepped.double().norm())), rel_tol=1e-6
        )
        assert math.isclose(
            found["step"].largest or 0, float((stepped.double() - W.double()).abs().max()), rel_tol=1e-12
        )
        assert found["odd"].odd == 1 and found["odd"].relative is None and found["odd"].changed == 1
        assert found["type"].relative == 0 and found["type"].steps is None and found["type"].changed == 0
        assert found["shape"].relative is found["shape"].largest is found["shape"].changed is None
        assert found["ints"].relative is found["ints"].largest is None and found["ints"].changed == 4
        assert run("diff", a, b, "--json").exit_code == 0
        assert run("diff", a, b, "--fail-above", "0.5").exit_code == 1
        assert run("diff", a, b, "--fail-above", "0.5", "--target", "same,step").exit_code == 0

    @pytest.mark.parametrize("why", NOT_COMPARABLE)
    @pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside"])
    def test_what_cannot_be_compared_is_named_and_in_no_total(
        self, why: str, alone: bool, tmp_path: Path, run: Callable[..., Any]
    ) -> None:
        """The totals are torch's over the rest; JSON has null, and text, page and verdict say the same."""
        x, y, reason = NOT_COMPARABLE[why]
        W, V = weights(20, 30), weights(20, 30, seed=1)
        rest = {} if alone else {"l.1.weight": W, "l.2.weight": V}
        tuned = {} if alone else {"l.1.weight": W * 1.5, "l.2.weight": V}
        a = write_model(tmp_path / "a", {"l.0.weight": x, **rest})
        b = write_model(tmp_path / "b", {"l.0.weight": y, **tuned})
        page = tmp_path / "page.html"
        report = json.loads(run("diff", a, b, "--json", "--html", page).stdout)["report"]
        row = next(row for row in report["tensors"] if row["name"] == "l.0.weight")
        assert [row[key] for key in ("relative", "largest", "steps")] == [None] * 3
        share = 0.5 * W.norm() / torch.cat([W * 1.5, V]).norm()
        assert report["compared"] == len(rest) and report["equal"] == (0 if alone else 1)
        assert report["relative"] == (None if alone else pytest.approx(float(share), rel=1e-6))
        assert report["worst"] == (None if alone else pytest.approx(1 / 3))
        text = run("diff", a, b).stdout
        assert f"not comparable, {reason}: l.0.weight\n" in text and ("apart" in text) is not alone
        last = text.splitlines()[-1]
        if alone:
            assert last == "different: 1 of 1 tensor, 1 not comparable"
        else:
            assert last.startswith("different: 2 of 3 tensors, 1 not comparable, ") and last.endswith(
                "% apart over 2 tensors, at most 33.3%"
            )
        assert f"not comparable, {reason}" in page.read_text() and (alone or "over 2 tensors" in page.read_text())
        for limit in ("0.5", "1", "3", "inf"):
            assert run("diff", a, b, "--fail-above", limit).exit_code == 1

    def test_a_tensor_on_one_side_only_is_in_no_total(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        W = weights(20, 30)
        a = write_model(tmp_path / "a", {"l.0.weight": W, "l.1.weight": W.clone()})
        b = write_model(tmp_path / "b", {"l.0.weight": W})
        c = write_model(tmp_path / "c", {"l.0.weight": W * 2})
        report = loratool.diff(a, b)
        assert (report.relative, report.worst, report.compared) == (0, 0, 1)
        assert run("diff", a, b).stdout.endswith("\ndifferent: the 1 tensor of both is equal, 1 only in A\n")
        assert run("diff", c, a).stdout.endswith(
            "\ndifferent: 1 of 1 tensor, 1 only in B, 50.0% apart over 1 tensor, at most 50.0%\n"
        )
        assert [run("diff", a, b, "--fail-above", x).exit_code for x in ("0.5", "1")] == [1, 0]

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
    def test_tensors_without_numbers_are_no_step_apart(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        empty = torch.zeros(shape)
        a = write_model(tmp_path / "a", {"e": empty, "w": weights(2, 3)})
        b = write_model(tmp_path / "b", {"e": empty.half(), "w": weights(2, 3)})
        assert loratool.diff(a, a).same
        (row,) = (report := loratool.diff(a, b)).tensors
        assert (row.relative, row.largest, row.changed) == (0, 0, 0) and (report.relative, report.compared) == (0, 2)

    def test_a_merge_and_its_base(self, tmp_path: Path) -> None:
        base = FIXTURES / "llama" / "base"
        loratool.merge(base, FIXTURES / "llama" / "adapter", tmp_path / "merged")
        report, one, two = loratool.diff(base, tmp_path / "merged"), load_model(base), load_model(tmp_path / "merged")
        assert {t.name for t in report.tensors} == {n for n in one if not torch.equal(one[n], two[n])}
        for t in report.tensors:
            x, y = one[t.name].double(), two[t.name].double()
            assert math.isclose(t.relative, float((y - x).norm() / max(x.norm(), y.norm())), rel_tol=1e-6)
            assert t.changed == int((x != y).sum())
        assert loratool.diff(base, base).same


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    with pytest.raises(InputError, match="is a model"):
        loratool.diff(base, adapter)
    with pytest.raises(UsageError, match="base"):
        loratool.diff(base, base, base=base)
    with pytest.raises(InputError, match="different models"):
        A, B = factors(30, 20, 4)
        loratool.diff(write_peft(tmp_path / "a", pairs(4)), write_peft(tmp_path / "b", {Q0: (A, B)}))
    with pytest.raises(InputError, match="no tensor of one side"):
        loratool.diff(base, write_model(tmp_path / "other", {"x": weights(2, 2)}))
    with pytest.raises(InputError, match="neither adapter has a selected module"):
        loratool.diff(adapter, adapter, exclude=["*"])
    with pytest.raises(InputError, match="neither model has a selected tensor"):
        loratool.diff(base, base, exclude=["*"])
    for two in (adapter, base):
        with pytest.raises(InputError, match='target="q_prj": names no module of .*\ndid you mean q_proj'):
            loratool.diff(two, two, target=["q_prj"])
        with pytest.raises(InputError, match="layers: names no layer of .*\nthere are 0-2"):
            loratool.diff(two, two, layers="7")
    with pytest.raises(InputError):
        loratool.diff(adapter, tmp_path / "absent")
    A, B = factors(24, 20, 4)
    A[0, 0] = math.inf
    with pytest.raises(InputError, match="nan or inf"):
        loratool.diff(write_peft(tmp_path / "n", {Q0: (A, B)}), write_peft(tmp_path / "m", pairs(4)))


@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        ({"bias": "none", "init_lora_weights": True, "use_rslora": False, "qalora_group_size": 16}, {}, ""),
        ({"init_lora_weights": True}, {"init_lora_weights": False}, "init_lora_weights: True in A, False in B"),
        ({"init_lora_weights": False}, {}, "init_lora_weights: False in A, nothing in B"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights: pissa in A, nothing in B"),
    ],
)
def test_a_default_of_pefts_is_what_nothing_means(
    one: dict[str, Any], two: dict[str, Any], told: str, tmp_path: Path, run: Callable[..., Any]
) -> None:
    paths = [write_peft(tmp_path / name, pairs(6)) for name in "ab"]
    for path, config in zip(paths, (one, two), strict=True):
        file = path / "adapter_config.json"
        fields = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("bias", *one, *two)}
        file.write_text(json.dumps({**fields, **config}))
    text = run("diff", *paths).stdout
    assert (told in text) if told else " in A, " not in text
    assert "angle" not in text and "phi" not in text and "layers" in text  # the two changes are one
