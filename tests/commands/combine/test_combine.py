"""Hold combine against peft's own merges and formulas on dense float64 deltas, then properties, then refusals."""

from __future__ import annotations

import json
import math
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, spread, write_kohya, write_peft
from lib.files.lycoris_files import base_of, roles_of, write_lycoris
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool import NeedsFlag
from loratool.commands.combine.methods.delta import WeightedDelta
from loratool.commands.combine.methods.entries import dare_linear
from loratool.commands.combine.methods.table import METHODS
from loratool.numerics.factored_svd import factored_svd

Run = Callable[..., Any]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 20))
        self.down_proj = nn.Parameter(torch.randn(3, 20, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eio,eoj->...j", x, self.gate_up_proj, self.down_proj) / 9


class Net(nn.Module):
    """One of each kind of layer that LoRA changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 12)
        self.q, self.v, self.wide = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 24)
        self.experts = Experts()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.experts(x)
        x = self.wide(torch.tanh(self.q(x)) * self.v(x))
        return self.head(self.norm(x)) + self.conv(x.unsqueeze(1)).mean()


IDS = torch.arange(30).reshape(3, 10)


def net() -> Net:
    return Net().double()


def train(folder: Path, seed: int, **fields: Any) -> Path:
    """Write an adapter that peft made and saved, all of it random."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q", "v", "wide"], **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net(), config)
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float32).double() * 0.1 + 0.05
    model.save_pretrained(str(folder))
    return folder


def applied(*adapters: Path) -> dict[str, Tensor]:
    """Return the weights that peft makes of the base and an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = net()
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def changes(adapter: Path) -> dict[str, Tensor]:
    base = net().state_dict()
    return {name: tensor - base[name] for name, tensor in applied(adapter).items()}


def expect_sum(out: Path, terms: Sequence[tuple[Path, float]]) -> None:
    """Check that peft makes of the combination the base plus the weighted sum, and that so is its forward."""
    each = [(changes(path), weight) for path, weight in terms]
    base, found = net().state_dict(), applied(out)
    for name, tensor in found.items():
        expected = base[name] + sum(weight * change[name] for change, weight in each)
        assert torch.allclose(tensor, expected, rtol=1e-6, atol=2e-6), name
    assert any(not torch.equal(found[name], base[name]) for name in found)
    wanted = net()
    wanted.load_state_dict({name: base[name] + sum(w * change[name] for change, w in each) for name in base})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(net(), str(out))
    lacks = [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
    # a lora_bias that one adapter lacks starts as 0, which is right
    assert all(set(re.findall(r"lora_\w+\.default\.\w+", line)) == {"lora_B.default.bias"} for line in lacks), lacks
    assert torch.allclose(model(IDS), wanted(IDS), rtol=1e-5, atol=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v": 2, "wide": 6}, "alpha_pattern": {"q": 3}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"v": 9}, "alpha_pattern": {"wide": 5}},
    "another rank and other targets": {"r": 7, "target_modules": ["wide", "head"]},
    "embedding": {"target_modules": ["embed", "q"]},
    "convolution": {"target_modules": ["conv", "q"]},
    "lora_bias": {"lora_bias": True},
    "experts": {"target_modules": ["q"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "half of the experts": {"target_modules": ["q"], "target_parameters": ["experts.down_proj"]},
    "the other half": {"target_modules": ["q"], "target_parameters": ["experts.gate_up_proj"]},
}
WHOLE: dict[str, dict[str, Any]] = {
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["head", "norm"]},
    "trained tokens": {"target_modules": ["q"], "trainable_token_indices": {"embed": [3, 7]}},
    "dora": {"use_dora": True},
}


class TestCat:
    @pytest.mark.parametrize("kind", [*KINDS, *WHOLE])
    def test_one_adapter_at_weight_1_is_the_same(self, kind: str, tmp_path: Path) -> None:
        adapter = train(tmp_path / "a", 1, **{**KINDS, **WHOLE}[kind])
        report = loratool.combine(adapter, tmp_path / "out")
        expect_sum(tmp_path / "out", [(adapter, 1.0)])
        assert report.error < 1e-7 and report.kept == 1

    @pytest.mark.parametrize("one", spread(KINDS, 5))
    @pytest.mark.parametrize("two", ["rslora with patterns", "another rank and other targets", "half of the experts"])
    def test_two_of_any_kinds_are_the_weighted_sum(self, one: str, two: str, tmp_path: Path) -> None:
        a, b = train(tmp_path / "a", 1, **KINDS[one]), train(tmp_path / "b", 2, **KINDS[two])
        exclude = [f"{module}.bias" for module in ("q", "v", "wide")] if "half" in two and one == "lora_bias" else []
        if exclude:
            with pytest.raises(NeedsFlag, match="PEFT cannot load one together with target_parameters"):
                loratool.combine([(a, 0.7), (b, -0.4)], tmp_path / "out")
        report = loratool.combine([(a, 0.7), (b, -0.4)], tmp_path / "out", exclude=exclude)
        if exclude:
            assert PeftModel.from_pretrained(net(), str(tmp_path / "out"))
        else:
            expect_sum(tmp_path / "out", [(a, 0.7), (b, -0.4)])
        assert all(row.rank == sum(row.ranks) for row in report.modules)

    def test_three_in_any_order(self, tmp_path: Path) -> None:
        three = [train(tmp_path / str(i), i, **kind) for i, kind in enumerate(list(KINDS.values())[1:4])]
        terms = list(zip(three, (0.5, -1.5, 2.0), strict=True))
        for name, order in (("x", terms), ("y", terms[::-1])):
            loratool.combine(order, tmp_path / name)
            expect_sum(tmp_path / name, terms)

    def test_where_peft_is_right_it_is_pefts_and_where_rslora_makes_it_too_strong_it_is_not(
        self, tmp_path: Path
    ) -> None:
        for rslora, factor in ((False, 1.0), (True, math.sqrt(8))):
            a, b = (train(tmp_path / f"{i}{rslora}", i, use_rslora=rslora) for i in (1, 2))
            model = PeftModel.from_pretrained(net(), str(a), adapter_name="a")
            model.load_adapter(str(b), "b")
            model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "ab", combination_type="cat")
            theirs = model.base_model.model.q.get_delta_weight("ab")
            loratool.combine([(a, 0.7), (b, 0.3)], tmp_path / f"out{rslora}")
            ours = changes(tmp_path / f"out{rslora}")["q.weight"]
            assert torch.allclose(factor * ours, theirs.double(), rtol=1e-5, atol=1e-6)

    def test_kohyas_ratio_acts_once(self, tmp_path: Path) -> None:
        """networks/merge_lora.py multiplies both factors by the ratio, so that 0.5 acts as 0.25."""
        pairs = [{"x": factors(20, 12, 4, seed)} for seed in (0, 1)]
        files = [write_kohya(tmp_path / f"{i}.safetensors", pair, torch.tensor(2.0)) for i, pair in enumerate(pairs)]
        loratool.combine([(files[0], 0.5), (files[1], -0.25)], tmp_path / "out.safetensors")
        found = load_file(tmp_path / "out.safetensors")
        (A, B), (C, D) = (pair["x"] for pair in pairs)
        up, down = found["lora_unet_x.lora_up.weight"].double(), found["lora_unet_x.lora_down.weight"].double()
        wanted = 0.5 * 0.5 * B.double() @ A.double() - 0.25 * 0.5 * D.double() @ C.double()
        assert torch.allclose(up @ down * (found["lora_unet_x.alpha"] / 8), wanted, atol=1e-7)

    @pytest.mark.parametrize("option", [{"rank": 3}, {"energy": 0.9}, {"params": 500}, {"size": 2000}, {"max_rank": 2}])
    def test_with_a_rank_it_is_the_best_of_that_rank(self, option: dict[str, Any], tmp_path: Path) -> None:
        a, b = train(tmp_path / "a", 1), train(tmp_path / "b", 2, r=6, use_rslora=True)
        report = loratool.combine([(a, 0.7), (b, 0.3)], tmp_path / "out", **option)
        one, two, found = changes(a), changes(b), changes(tmp_path / "out")
        for row in report.modules:
            D = 0.7 * one[f"{row.name}.weight"] + 0.3 * two[f"{row.name}.weight"]
            U, S, Vh = torch.linalg.svd(D, full_matrices=False)
            best = U[:, : row.rank] * S[: row.rank] @ Vh[: row.rank]
            assert torch.allclose(found[f"{row.name}.weight"], best, atol=2e-6)
            assert math.isclose(row.norm, float(D.norm()), rel_tol=1e-5)
            assert abs(row.error - float((D - best).norm() / D.norm())) < 1e-5
            assert abs(row.kept - float(S[: row.rank].square().sum() / S.square().sum())) < 1e-5
            if "energy" in option:
                assert row.kept >= 0.9 > float(S[: row.rank - 1].square().sum() / S.square().sum())
        if "params" in option or "size" in option:
            cost = min(16 + 12, 24 + 16)
            assert 500 - cost < report.parameters <= 500

    def test_a_rank_above_is_zeros(self, tmp_path: Path) -> None:
        a = train(tmp_path / "a", 1)
        loratool.combine([(a, 0.5)], tmp_path / "out", rank=11)
        expect_sum(tmp_path / "out", [(a, 0.5)])


def dense(adapters: Sequence[dict[str, tuple[Tensor, Tensor]]], module: str) -> list[Tensor]:
    return [B.double() @ A.double() for A, B in (adapter[module] for adapter in adapters)]


def written(out: Path, module: str) -> Tensor:
    tensors = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]
    A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return B @ A


def mergekit_ties(D: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """mergekit 0.1.5, merge_methods/generalized_task_arithmetic.py, as the registry's `ties` has it: normalized."""
    weighted = []
    for x, w in zip(D, weights, strict=True):
        order = x.abs().flatten().argsort(descending=True)
        flat = torch.zeros(x.numel(), dtype=x.dtype)
        top = order[: int(density * x.numel())]
        flat[top] = x.flatten()[top]
        weighted.append(w * flat.view_as(x))
    stack = torch.stack(weighted)
    majority = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    mask = stack.sign() == majority
    divisor = (weights.view(-1, 1, 1) * mask).sum(0)
    return (stack * mask).sum(0) / torch.where(divisor == 0, 1.0, divisor)


def knots_reference(D: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The wide SVD as KnOTS's task_merger.py has it, and peft's ties on S V_i^T."""
    U, S, Vh = torch.linalg.svd(torch.cat(D, 1), full_matrices=False)
    k = int((S > 1e-9).sum())
    parts = list((S[:k, None] * Vh[:k]).split(D[0].shape[1], 1))
    return U[:, :k] @ merge_utils.ties(parts, weights, density)


ORACLES: dict[str, Callable[[list[Tensor], Tensor, float], Tensor]] = {
    "cat": lambda D, w, _: merge_utils.task_arithmetic(D, w),
    "ties": merge_utils.ties,
    "ties-mergekit": mergekit_ties,
    "magnitude": merge_utils.magnitude_prune,
    "knots": knots_reference,
}
WHOLE_RESULT = {"rank": 14, "rank_method": "truncate"}  # all of a dense one
CUT = ("cat", "ties", "ties-mergekit", "dare-linear", "magnitude", "knots", "tsv", "core-ties")  # of each kind
FACTORS = [{"x": factors(20, 14, r, r), "y": factors(14, 26, r, r + 9)} for r in (3, 5, 4)]


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [write_peft(tmp_path / f"adapter{i}", each) for i, each in enumerate(FACTORS)]


class TestMethods:
    @pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 1.3), (1.0, -0.5, 0.8)], ids=str)
    @pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
    @pytest.mark.parametrize("method", ORACLES)
    def test_against_peft_and_mergekit(
        self, method: str, density: float, weights: tuple[float, ...], three: list[Path], tmp_path: Path
    ) -> None:
        if not METHODS[method].negative:
            weights = tuple(map(abs, weights))
        options = {"density": density} if METHODS[method].density else {}
        report = loratool.combine(
            list(zip(three, weights, strict=True)), tmp_path / "out", method=method, **WHOLE_RESULT, **options
        )
        for module in ("x", "y"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft, of a density of 1
                wanted = ORACLES[method](dense(FACTORS, module), torch.tensor(weights).double(), density)
            assert torch.allclose(written(tmp_path / "out", module), wanted, atol=1e-6 * float(wanted.norm()))
        assert report.error < 1e-6

    @pytest.mark.parametrize("method", CUT)
    def test_by_default_the_rank_is_the_sum_and_the_error_what_that_loses(
        self, method: str, three: list[Path], tmp_path: Path
    ) -> None:
        full = loratool.combine(three, tmp_path / "full", method=method, **WHOLE_RESULT)
        report = loratool.combine(three, tmp_path / "out", method=method)
        assert [row.rank for row in report.modules] == [12, 12]
        for row, whole in zip(report.modules, full.modules, strict=True):
            D = written(tmp_path / "full", row.name)
            error = float((written(tmp_path / "out", row.name) - D).norm() / D.norm())
            S = torch.linalg.svdvals(D)
            assert abs(row.error - error) < 1e-6 and math.isclose(row.norm, whole.norm, rel_tol=1e-9)
            assert abs(row.kept - float(S[:12].square().sum() / S.square().sum())) < 1e-6
            assert abs(error - math.sqrt(max(0.0, 1 - row.kept))) < 1e-3

    @pytest.mark.parametrize("method", CUT)
    def test_a_rule_takes_the_ranks_of_the_results_spectrum(
        self, method: str, three: list[Path], tmp_path: Path
    ) -> None:
        loratool.combine(three, tmp_path / "full", method=method, **WHOLE_RESULT)
        report = loratool.combine(three, tmp_path / "out", method=method, energy=0.6)
        for row in report.modules:
            squares = torch.linalg.svdvals(written(tmp_path / "full", row.name)).square()
            assert row.rank == int((squares.cumsum(0) < 0.6 * squares.sum()).sum()) + 1
        report = loratool.combine(three, tmp_path / "few", method=method, params=200, max_rank=3)
        assert report.parameters <= 200 and all(1 <= row.rank <= 3 for row in report.modules)

    @pytest.mark.parametrize("method", METHODS)
    def test_other_factors_of_the_same_changes_give_the_same(self, method: str, tmp_path: Path) -> None:
        """TIES on the factors themselves would not hold this."""
        found = []
        for turned in (False, True):
            adapters = []
            for i, each in enumerate(FACTORS):
                pairs = {}
                for module, (A, B) in each.items():
                    M = torch.randn(len(A), len(A), generator=torch.Generator().manual_seed(i)).double()
                    A, B = (torch.linalg.inv(M) @ A.double(), B.double() @ M) if turned else (A.double(), B.double())
                    pairs[module] = (A, B)
                adapters.append(write_peft(tmp_path / f"{turned}{i}", pairs))
            # DARE draws by the adapter's content, which here differs: its numbers are compared below
            options = {"density": 1.0 if METHODS[method].draws else 0.4} if METHODS[method].density else {}
            options |= {} if METHODS[method].flat else WHOLE_RESULT
            loratool.combine(adapters, tmp_path / f"out{turned}", method=method, **options)
            found.append([written(tmp_path / f"out{turned}", module) for module in ("x", "y")])
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))

    def test_knots_of_changes_that_share_directions_has_their_rank(self) -> None:
        B, A = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, 2), (2, 7)))
        parts = [WeightedDelta(B, A, 1.0, "", 7), WeightedDelta(-2 * B @ torch.eye(2).double(), A, 1.0, "", 7)]
        U, X = METHODS["knots"].run(parts, 1.0)
        assert U.shape == (9, 4) and X.shape == (4, 7) and not X[2:].any()
        assert torch.allclose(U[:, :2].T @ U[:, :2], torch.eye(2).double(), atol=1e-12)

    def test_a_module_of_one_adapter_alone(self, tmp_path: Path) -> None:
        one = write_peft(tmp_path / "one", {"x": factors(20, 14, 3, 0)})
        two = write_peft(tmp_path / "two", {"y": factors(14, 26, 3, 1)})
        report = loratool.combine([(one, 2.0), two], tmp_path / "out", method="ties", density=1.0)
        assert [row.ranks for row in report.modules] == [(3, 0), (0, 3)]
        A, B = factors(20, 14, 3, 0)
        assert torch.allclose(written(tmp_path / "out", "x"), 2 * B.double() @ A.double(), atol=1e-7)


class TestDare:
    def test_entries_are_dropped_at_the_density_and_the_rest_rescaled(self) -> None:
        B, A = torch.randn(300, 8, dtype=torch.float64), torch.randn(8, 400, dtype=torch.float64)
        found = dare_linear([WeightedDelta(B, A, 1.0, "key", 300)], 0.3)
        D = (B @ A).float()
        kept = found != 0
        assert torch.allclose(found[kept], D[kept] / 0.3, rtol=1e-6)
        assert abs(float(kept.double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / D.numel())
        assert abs(float(kept[:150].double().mean()) - 0.3) < 0.02

    def test_dare_ties_is_pefts_ties_of_what_is_left(self, three: list[Path], tmp_path: Path) -> None:
        left = []
        for i, path in enumerate(three):
            loratool.combine(path, tmp_path / f"left{i}", method="dare-linear", density=0.4, **WHOLE_RESULT)
            kept = written(tmp_path / f"left{i}", "x")
            left.append(torch.where(kept.abs() > 1e-7, kept, 0.0))
        weights = torch.tensor([0.7, -0.2, 1.0]).double()
        pairs = list(zip(three, weights.tolist(), strict=True))
        stack = torch.stack(left)
        wanted = merge_utils.disjoint_merge(
            stack * weights.view(-1, 1, 1), merge_utils.calculate_majority_sign_mask(stack)
        )
        loratool.combine(pairs, tmp_path / "ties", method="dare-ties", density=0.4, **WHOLE_RESULT)
        assert torch.allclose(written(tmp_path / "ties", "x"), wanted, atol=1e-6)
        loratool.combine(pairs, tmp_path / "linear", method="dare-linear", density=0.4, **WHOLE_RESULT)
        wanted = merge_utils.task_arithmetic(left, weights)
        assert torch.allclose(written(tmp_path / "linear", "x"), wanted, atol=1e-6)

    def test_what_is_random_follows_from_seed_module_and_adapter_alone(self, three: list[Path], tmp_path: Path) -> None:
        def run(name: str, adapters: Sequence[Path], **options: Any) -> Tensor:
            loratool.combine(adapters, tmp_path / name, method="dare-linear", **WHOLE_RESULT, **options)
            return written(tmp_path / name, "x")

        first = run("first", three)
        assert torch.equal(first, run("again", three))
        assert torch.allclose(first, run("order", three[::-1]), atol=1e-7)
        assert torch.equal(first, run("alone", three, exclude=["y"]))
        (tmp_path / "moved").mkdir()
        moved = [path.rename(tmp_path / "moved" / path.name) for path in three]
        assert torch.equal(first, run("moved away", moved))
        assert not torch.allclose(first, run("other", moved, seed=1), atol=1e-4)


class TestWhole:
    """Tensors that were trained whole: V - W adds up without the base where the weights sum to 1."""

    @pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "dora"])
    def test_weights_that_sum_to_1_average(self, kind: str, tmp_path: Path) -> None:
        a, b = (train(tmp_path / str(seed), seed, **WHOLE[kind]) for seed in (1, 2))
        loratool.combine([(a, 0.7), (b, 0.3)], tmp_path / "out")
        expect_sum(tmp_path / "out", [(a, 0.7), (b, 0.3)])

    @pytest.mark.parametrize("kind", ["bias=lora_only", "modules_to_save", "trained tokens"])
    def test_one_that_has_them_at_weight_1_beside_another(self, kind: str, tmp_path: Path) -> None:
        """The fields of the config that announce them come from the second."""
        a, b = train(tmp_path / "a", 1, target_modules=["q"]), train(tmp_path / "b", 2, **WHOLE[kind])
        loratool.combine([(a, -0.4), b], tmp_path / "out")
        expect_sum(tmp_path / "out", [(a, -0.4), (b, 1.0)])

    @pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind not in ("dora", "trained tokens")])
    def test_other_weights_are_refused_and_the_remedy_works(self, kind: str, tmp_path: Path, run: Run) -> None:
        a, b = (train(tmp_path / str(seed), seed, **WHOLE[kind]) for seed in (1, 2))
        call = ["combine", f"{a}:0.7", f"{b}:0.5", "-o", tmp_path / "out"]
        result = run(*call)
        assert result.exit_code == 4 and "must sum to 1 as the base is unknown" in result.stderr
        assert not (tmp_path / "out").exists()
        result = run(*call, *shlex.split(result.stderr.rpartition("add ")[2]))
        assert result.exit_code == 0 and "excluded: " in result.stdout, result.stderr
        one, two, found = changes(a), changes(b), changes(tmp_path / "out")
        for name in ("q.weight", "v.weight", "wide.weight"):
            assert torch.allclose(found[name], 0.7 * one[name] + 0.5 * two[name], atol=2e-6)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert not config["modules_to_save"] and config["bias"] == "none"
        assert loratool.inspect(str(tmp_path / "out")).problems == ()

    def test_tokens_of_other_rows_are_refused(self, tmp_path: Path, run: Run) -> None:
        a, b = (
            train(tmp_path / str(rows), 1, target_modules=["q"], trainable_token_indices={"embed": rows})
            for rows in ([1, 2], [1, 3])
        )
        result = run("combine", f"{a}:0.5", f"{b}:0.5", "-o", tmp_path / "out")
        assert result.exit_code == 4 and "embed: has different rows" in result.stderr
        assert run("combine", f"{a}:0.5", f"{b}:0.5", "-o", tmp_path / "out", "--exclude", "embed").exit_code == 0

    def test_the_weight_under_a_factor_that_adapters_bring_along(self, tmp_path: Path, run: Run) -> None:
        """PEFT saves that of embeddings: the base's own is no delta, and two different ones have no sum."""
        own = net().state_dict()["embed.weight"].float()
        for name, base in (("a", own), ("b", own), ("c", own + 1)):
            train(tmp_path / name, ord(name), **KINDS["embedding"])
            file = tmp_path / name / "adapter_model.safetensors"
            save_file({**load_file(file), "base_model.model.embed.base_layer.weight": base.clone()}, file)
        a, b, c = (tmp_path / name for name in "abc")
        d = train(tmp_path / "d", 4, **KINDS["embedding"])
        for i, terms in enumerate([[(a, 0.5), (b, 0.7)], [(d, -0.5), (a, 2.0)]]):
            report = loratool.combine(terms, tmp_path / f"out{i}")
            assert report.carried == ("base_model.model.embed.base_layer.weight",)
            expect_sum(tmp_path / f"out{i}", terms)
        result = run("combine", a, c, "-o", tmp_path / "out")
        assert result.exit_code == 4 and "embed: has a different base weight in each adapter" in result.stderr
        assert run("combine", a, c, "-o", tmp_path / "out", "--exclude", "embed").exit_code == 0

    def test_a_nan_in_a_tensor_that_is_averaged(self, tmp_path: Path, run: Run) -> None:
        a, b = (train(tmp_path / str(seed), seed, modules_to_save=["head"]) for seed in (1, 2))
        tensors = load_file(b / "adapter_model.safetensors")
        tensors["base_model.model.head.weight"][0, 0] = math.nan
        save_file(tensors, b / "adapter_model.safetensors")
        result = run("combine", f"{a}:0.5", f"{b}:0.5", "-o", tmp_path / "out")
        assert result.exit_code == 3 and "head.weight: holds nan or inf" in result.stderr
        assert not (tmp_path / "out").exists()


class TestImage:
    """diffusers' files: an alpha as a tensor or in the metadata, which must not outlive the factors that it scaled."""

    def write(self, file: Path, seed: int, ends: tuple[str, str], alpha: float | None, **config: Any) -> Tensor:
        A, B = factors(20, 14, 3, seed)
        tensors = {f"unet.mid.to_q.{end}.weight": side.contiguous() for end, side in zip(ends, (A, B), strict=True)}
        tensors |= {} if alpha is None else {"unet.mid.to_q.alpha": torch.tensor(alpha)}
        metadata = {"format": "pt", "kept": "yes"}
        metadata |= {"lora_adapter_metadata": json.dumps(config)} if config else {}
        save_file(tensors, file, metadata=metadata)
        scale = (config.get("unet.lora_alpha", 3.0) if alpha is None else alpha) / 3
        return scale * B.double() @ A.double()

    @pytest.mark.parametrize("ends", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
    def test_scales_of_all_kinds_are_in_the_factors(self, ends: tuple[str, str], tmp_path: Path) -> None:
        config = {"unet.r": 3, "unet.lora_alpha": 12.0}
        files = [tmp_path / f"{i}.safetensors" for i in range(3)]
        D = [
            self.write(files[0], 0, ends, None, **config),
            self.write(files[1], 1, ends, 6.0),
            self.write(files[2], 2, ends, None),
        ]
        wanted = 0.5 * D[0] - D[1] + 0.25 * D[2]
        loratool.combine(list(zip(files, (0.5, -1.0, 0.25), strict=True)), tmp_path / "sum.safetensors")
        loratool.resize(tmp_path / "sum.safetensors", tmp_path / "out.safetensors", rank=14)
        for name in ("sum", "out"):
            with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
                assert set(file.keys()) == {f"unet.mid.to_q.{end}.weight" for end in ends}
                assert file.metadata() == {"format": "pt", "kept": "yes"}
                A, B = (file.get_tensor(f"unet.mid.to_q.{end}.weight").double() for end in ends)
            assert torch.allclose(B @ A, wanted, atol=1e-7)

    def test_two_spellings(self, tmp_path: Path, run: Run) -> None:
        a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        self.write(a, 0, ("lora_A", "lora_B"), None)
        self.write(b, 1, ("lora.down", "lora.up"), None)
        result = run("combine", a, b, "-o", tmp_path / "out.safetensors")
        assert result.exit_code == 3 and "no loader reads both" in result.stderr


X = {"x": factors(20, 14, 3)}


def one_more(folder: Path, **config: Any) -> Path:
    return write_peft(folder, {"x": factors(20, 14, 3, 7)}, **config)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "code", "says"),
        [
            (["--method", "linear"], 2, "cross terms"),
            (["--method", "svd"], 2, "use cat with --rank"),
            (["--method", "slerp"], 2, "slerp is not supported: it interpolates"),
            (["--density", "0.5"], 2, "--density has no effect on cat, which keeps all entries"),
            (["--method", "ties", "--density", "0"], 2, "is not between 0 and 1"),
            (["--method", "ties", "--density", "nan"], 2, "nan is not a finite number"),
            (["--method", "ties", "--rank-rule", "sv_cumulative=0.9"], 2, "needs all singular values"),
            (["--rank", "4", "--energy", "0.9"], 2, "rank and energy exclude each other"),
            (["--params", "10"], 2, "--params is too little: rank 1 everywhere takes 34 parameters, and 10 fit in"),
            (["--dtype", "fp16"], 4, "add --dtype fp32"),
            (["--exclude", "x,nothing"], 3, "--exclude nothing: names no module of"),
            (["--rank-rule", "rank=0"], 2, "rank 0 is out of range"),
            (["--exclude", "x"], 3, "have no low-rank factors to combine"),
            (["--alpha", "3"], 2, "--alpha is for adapters that do not store theirs"),
        ],
        ids=str,
    )
    def test_options(self, options: list[str], code: int, says: str, tmp_path: Path, run: Run) -> None:
        a, b = write_peft(tmp_path / "a", X), one_more(tmp_path / "b")
        weight = "1e9" if "fp16" in options else "0.5"
        result = run("combine", f"{a}:{weight}", b, *options, "-o", tmp_path / "out")
        assert (result.exit_code, says in result.stderr) == (code, True), result.stderr
        assert not (tmp_path / "out").exists() and result.stderr.count("\n") <= 2

    def test_negative_weights_of_mergekits_ties(self, tmp_path: Path, run: Run) -> None:
        a, b = write_peft(tmp_path / "a", X), one_more(tmp_path / "b")
        result = run("combine", a, f"{b}:-0.5", "--method", "ties-mergekit", "-o", tmp_path / "out")
        assert result.exit_code == 2 and "--method ties" in result.stderr
        assert run("combine", a, f"{b}:-0.5", "--method", "ties", "-o", tmp_path / "out").exit_code == 0

    @pytest.mark.parametrize("method", ["cat", "ties", "knots"])
    @pytest.mark.parametrize(("weight", "code"), [("nan", 2), ("inf", 2), ("-1e39", 2), ("1e38", 3)])
    def test_weights(self, weight: str, code: int, method: str, tmp_path: Path, run: Run) -> None:
        a = write_peft(tmp_path / "a", X, lora_alpha=3e200)
        for options in ([], ["--energy", "0.5"], ["--rank", "2"]):
            result = run("combine", f"{a}:{weight}", "-o", tmp_path / "out", "--method", method, *options)
            assert result.exit_code == code and ("the weight" if code == 2 else "x: ") in result.stderr
            assert not (tmp_path / "out").exists()

    def test_shapes_that_contradict(self, tmp_path: Path, run: Run) -> None:
        a, b = write_peft(tmp_path / "a", X), write_peft(tmp_path / "b", {"x": factors(20, 15, 3)})
        result = run("combine", a, b, "-o", tmp_path / "out")
        assert result.exit_code == 3
        assert result.stderr == f"error: x: is 20x14 in {a}, 20x15 in {b}: their bases differ\n"

    def test_two_formats(self, tmp_path: Path, run: Run) -> None:
        a, b = write_peft(tmp_path / "a", X), write_kohya(tmp_path / "b.safetensors", X, torch.tensor(1.0))
        result = run("combine", a, b, "-o", tmp_path / "out")
        assert result.exit_code == 3 and "combine adapters of one format" in result.stderr

    def test_two_model_classes(self, tmp_path: Path, run: Run) -> None:
        a = write_peft(tmp_path / "a", {"model.layers.0.q": factors(8, 8, 2), "lm_head": factors(8, 8, 2)})
        b = write_peft(tmp_path / "b", {"layers.0.q": factors(8, 8, 2)})
        for pair in ((a, b), (b, a)):
            result = run("combine", *pair, "-o", tmp_path / "out")
            assert result.exit_code == 3
            assert (
                f"layers.0.q: is in {b}, and {a} calls it model.layers.0.q: they belong to two model classes"
                in result.stderr
            )

    def test_dora_beside_another(self, tmp_path: Path, run: Run) -> None:
        a, b = train(tmp_path / "a", 1, use_dora=True), train(tmp_path / "b", 2)
        for call in ((a, b), (b, a), (f"{a}:0.5",)):
            result = run("combine", *call, "-o", tmp_path / "out")
            assert result.exit_code == 3 and "dora" in result.stderr.lower()

    def test_dora_alone_is_cut_with_a_warning_and_by_no_method_but_the_sum(self, tmp_path: Path, run: Run) -> None:
        a = train(tmp_path / "a", 1, use_dora=True)
        assert not loratool.combine(a, tmp_path / "out").warnings
        (said,) = loratool.combine(a, tmp_path / "cut", rank=2).warnings
        assert said == loratool.resize(a, tmp_path / "resized", rank=2).warnings[0] and "before the norm" in said
        for method in ("iso-c", "ties"):
            result = run("combine", a, "--method", method, "-o", tmp_path / method)
            assert result.exit_code == 3 and "its delta depends on the base" in result.stderr

    def test_a_pissa_adapter_beside_a_plain_one(self, tmp_path: Path, run: Run) -> None:
        a, b = write_peft(tmp_path / "a", X, init_lora_weights="pissa"), one_more(tmp_path / "b")
        result = run("combine", b, a, "-o", tmp_path / "out")
        assert result.exit_code == 3 and f"{a}: was initialized with pissa" in result.stderr
        c = one_more(tmp_path / "c", init_lora_weights="pissa")
        result = run("combine", a, c, "-o", tmp_path / "out")
        assert result.exit_code == 3 and "at another rank it would be wrong on any base" in result.stderr
        result = run("combine", a, c, "-o", tmp_path / "out", "--rank", 3)
        assert result.exit_code == 0 and "warning: " in result.stderr
        d = one_more(tmp_path / "d", init_lora_weights="olora")
        result = run("combine", a, d, "-o", tmp_path / "other", "--rank", 3)
        assert result.exit_code == 3 and "they do not share a base" in result.stderr
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"

    def test_a_nan_in_a_factor(self, tmp_path: Path, run: Run) -> None:
        A, B = factors(20, 14, 3)
        A[1, 1] = math.inf
        a, b = write_peft(tmp_path / "a", {"x": (A, B)}), one_more(tmp_path / "b")
        result = run("combine", b, a, "-o", tmp_path / "out")
        assert result.exit_code == 3 and "x.lora_A.weight: holds nan or inf" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_kohya_into_a_folder(self, tmp_path: Path, run: Run) -> None:
        a = write_kohya(tmp_path / "a.safetensors", X, torch.tensor(1.0))
        result = run("combine", a, a, "-o", tmp_path / "out")
        assert result.exit_code == 2 and "single files" in result.stderr

    def test_an_output_that_is_an_input(self, tmp_path: Path, run: Run) -> None:
        a, b = write_peft(tmp_path / "a", X), one_more(tmp_path / "b")
        assert run("combine", a, b, "-o", b, "--force").exit_code == 2


class TestNames:
    """Inputs with other keys than PEFT saves give an output that has PEFT's."""

    @pytest.mark.parametrize("kind", ["lora_bias", "modules_to_save", "embedding", "dora", "trained tokens", "experts"])
    def test_an_adapters_name_in_the_keys_is_left_out(self, kind: str, tmp_path: Path) -> None:
        a = train(tmp_path / "a", 1, **{**KINDS, **WHOLE}[kind])
        tensors = load_file(a / "adapter_model.safetensors")
        (tmp_path / "b").mkdir()
        named = {}
        for key, tensor in tensors.items():
            for mark in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta"):
                key = key.replace(mark, f"{mark}.mine")
            key = key.replace("lora_magnitude_vector", "lora_magnitude_vector.mine.weight")
            named[re.sub(r"\.(head|norm)\.", r".\1.modules_to_save.mine.", key)] = tensor
        save_file(named, tmp_path / "b" / "adapter_model.safetensors")
        (tmp_path / "b" / "adapter_config.json").write_bytes((a / "adapter_config.json").read_bytes())
        assert set(named) != set(tensors)
        loratool.combine(tmp_path / "b", tmp_path / "out")
        loratool.combine([(tmp_path / "b", 0.5), (tmp_path / "b", 0.5)] if kind != "dora" else a, tmp_path / "twice")
        assert set(load_file(tmp_path / "twice" / "adapter_model.safetensors")) == set(tensors)
        assert set(load_file(tmp_path / "out" / "adapter_model.safetensors")) == set(tensors)
        expect_sum(tmp_path / "out", [(a, 1.0)])

    def test_an_adapter_saved_with_wrappers_beside_one_without(self, tmp_path: Path, run: Run) -> None:
        a = write_peft(tmp_path / "a", {"m.layers.0.q": factors(8, 8, 2), "m.layers.1.q": factors(8, 8, 2)})
        b = write_peft(tmp_path / "b", {"m.module.layers.0.q": factors(8, 8, 2)})
        result = run("combine", a, b, "-o", tmp_path / "out")
        assert result.exit_code == 3 and "calls it m.layers.0.q" in result.stderr

    def test_experts_whose_order_is_not_known(self, tmp_path: Path, run: Run) -> None:
        paths = []
        for parameter in ("first", "second"):
            A, B = factors(12, 20, 4)
            path = write_peft(
                tmp_path / parameter,
                {"experts": (A, B)},
                r=2,
                target_parameters=[f"experts.{parameter}"],
                target_modules=[],
            )
            paths.append(path)
        result = run("combine", *paths, "-o", tmp_path / "out")
        assert result.exit_code == 3 and "their order is unknown" in result.stderr
        assert run("combine", paths[0], paths[0], "-o", tmp_path / "out").exit_code == 0


class TestReport:
    def test_a_dry_run_has_the_figures_and_writes_nothing(self, tmp_path: Path, run: Run) -> None:
        a, b = write_peft(tmp_path / "a", X), one_more(tmp_path / "b")
        for method in METHODS:
            call = ["combine", f"{a}:0.5", b, "--method", method, "--rank", "2", "-o", tmp_path / method, "--json"]
            plan = json.loads(run(*call, "--dry-run").stdout)["report"]
            assert not (tmp_path / method).exists()
            done = json.loads(run(*call).stdout)["report"]
            assert plan.pop("shared")["pairs"] and done.pop("shared") is None
            assert plan.pop("digests") == {} and done.pop("digests").keys() == {str(a), str(b), str(tmp_path / method)}
            assert {**plan, "dry_run": False} == done and 0 < done["error"] < 1

    def test_a_sum_that_its_type_cannot_hold_is_not_called_exact(self, tmp_path: Path, run: Run) -> None:
        weak = write_peft(tmp_path / "a", {"x": tuple(side * 1e-8 for side in X["x"])})
        call = ["combine", weak, "-o", tmp_path / "out", "--dtype"]
        assert "% of the sum is lost: it is too small for F16" in run(*call, "fp16", "--dry-run").stdout
        assert "exact sum (error " in run(*call, "bf16").stdout

    def test_other_bases_are_told(self, tmp_path: Path, run: Run) -> None:
        a = write_peft(tmp_path / "a", X, base_model_name_or_path="org/one", task_type="CAUSAL_LM")
        b = one_more(tmp_path / "b", base_model_name_or_path="org/two", modules_to_save=["absent"])
        result = run("combine", a, b, "-o", tmp_path / "out")
        assert f"warning: {b} was trained on org/two, but {a} on org/one" in result.stderr
        assert f"warning: {b}: the config's modules_to_save names absent" in result.stderr
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["task_type"]) == ("org/one", "CAUSAL_LM")

    def test_layers_that_the_first_was_limited_to_do_not_limit_the_sum(self, tmp_path: Path) -> None:
        a = train(tmp_path / "a", 1, target_modules=["q", "v"], exclude_modules=["wide"])
        b = train(tmp_path / "b", 2, target_modules=["wide"])
        loratool.combine([a, b], tmp_path / "out")
        expect_sum(tmp_path / "out", [(a, 1.0), (b, 1.0)])

    def test_a_single_file_carries_its_config(self, tmp_path: Path) -> None:
        a, b = train(tmp_path / "a", 1), train(tmp_path / "b", 2, modules_to_save=["head"], r=2)
        loratool.combine([a, b], tmp_path / "out.safetensors", dtype="bf16")
        loratool.combine([tmp_path / "out.safetensors"], tmp_path / "again")
        one, two, found = changes(a), changes(b), changes(tmp_path / "again")
        for name in ("q.weight", "head.bias"):
            assert torch.allclose(found[name], one[name] + two[name], atol=2e-2)

    def test_a_zero_change_and_a_zero_weight(self, tmp_path: Path) -> None:
        A, B = factors(20, 14, 3)
        a = write_peft(tmp_path / "a", {"x": (A, B * 0)})
        b = one_more(tmp_path / "b")
        for method in METHODS:
            report = loratool.combine([a, (b, 0.0)], tmp_path / method, method=method)
            assert (report.kept, report.error) == (1.0, 0.0)
            assert not written(tmp_path / method, "x").any()


@pytest.mark.parametrize("method", [*CUT, "della", "iso-cts", "wudi"])
@pytest.mark.parametrize(("out", "inp"), [(0, 14), (20, 0), (1, 1)])
def test_matrices_of_nothing_and_of_one_number(out: int, inp: int, method: str, tmp_path: Path) -> None:
    A, B = factors(out, max(inp, 1), 2)
    a = write_peft(tmp_path / "a", {"x": (A[:, :inp], B)})
    for option in ({}, {"rank": 3}, *([] if METHODS[method].flat else [{"energy": 0.5}])):
        report = loratool.combine(
            [a, (a, 0.5)], tmp_path / f"out{len(option)}{option.get('rank')}", method=method, **option
        )
        assert written(tmp_path / f"out{len(option)}{option.get('rank')}", "x").shape == (out, inp)
        assert math.isfinite(report.error) and report.modules[0].rank >= 1
    shared = loratool.combine([a, (a, 0.5)], tmp_path / "dry", method=method, dry_run=True).shared
    assert shared and shared.pairs[0].interference == pytest.approx(float(out == inp))


def test_a_rank_beyond_the_matrix(tmp_path: Path) -> None:
    pairs = [factors(3, 5, 4, seed) for seed in (0, 1)]
    adapters = [write_peft(tmp_path / str(i), {"x": pair}) for i, pair in enumerate(pairs)]
    wanted = sum((B.double() @ A.double() for A, B in pairs), torch.zeros(3, 5).double())
    for method in ("cat", "knots", "ties", "dare-linear"):
        density = {"density": 1.0} if METHODS[method].density else {}
        report = loratool.combine(adapters, tmp_path / method, method=method, **density)
        assert report.modules[0].rank == (8 if method == "cat" else 3)
        if method in ("cat", "dare-linear"):
            assert torch.allclose(written(tmp_path / method, "x"), wanted, atol=1e-7)


def test_the_change_that_is_written_is_of_the_rank_that_is_said(three: list[Path], tmp_path: Path) -> None:
    for method in METHODS:
        loratool.combine(three, tmp_path / method, method=method, rank=4)
        B = written(tmp_path / method, "x")
        found = int(factored_svd(B, torch.eye(B.shape[1])).S.gt(1e-6 * B.norm()).sum())
        assert found == (3 if method == "tsv" else 4)  # 1 of each: its shared directions are divided between the three


def test_loha_and_lora_of_a_model_that_no_table_knows(tmp_path: Path) -> None:
    """LoHa's factors as LoRA have the format's own spelling, which is that of the other adapter."""
    path, names = base_of("linear", torch.float32).path, ("lora", "loha")
    files = [
        write_lycoris(tmp_path / f"{kind}.safetensors", {path: roles_of(kind, torch.float32)}, "kohya")
        for kind in names
    ]
    loratool.combine(files, tmp_path / "out.safetensors")
    base = base_of("linear", torch.float32).write(tmp_path / "base.safetensors")
    for name, adapters in (("one", [tmp_path / "out.safetensors"]), ("two", files)):
        loratool.merge(base, adapters, tmp_path / f"{name}.safetensors", undo=False)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6) for name in two)
