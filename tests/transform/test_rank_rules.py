"""Hold the rank rules of extract and resize to dense SVDs, and the rule `noise` to changes of known rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model, weights, write_model, write_peft
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool import InputError, UsageError

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
NAMES = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(out: int, inp: int, rank: int, size: float, seed: int = 5) -> Tensor:
    """A change of this rank and norm, its singular values all near one another."""
    U, V = (torch.linalg.qr(randn(side, rank, seed=seed + side)).Q for side in (out, inp))
    return (U * (size / rank**0.5)) @ V.T


def write_pair(folder: Path, sides: dict[str, tuple[Tensor, Tensor]], config: dict[str, Any] = LLAMA) -> list[Path]:
    return [
        write_model(folder / n, {k: v[i] for k, v in sides.items()}, config) for i, n in enumerate(("base", "tuned"))
    ]


class TestNoise:
    @pytest.mark.parametrize("uneven", [False, True])
    @pytest.mark.parametrize("dtype", TYPES)
    def test_of_16_bits_it_finds_the_true_rank(self, dtype: str, uneven: bool, tmp_path: Path) -> None:
        """Both models are rounded from finer numbers, and 382 of 384 components of the difference are rounding."""
        W = randn(512, 384, seed=1) * 0.02
        if uneven:
            W *= randn(512, 1, seed=2).mul(0.7).exp()
        D = low_rank(512, 384, 2, 0.02 * float(W.norm()))
        sides = write_pair(tmp_path, {NAMES[0]: (W.to(TYPES[dtype]), (W + D).to(TYPES[dtype]))})
        (row,) = loratool.extract(*sides, tmp_path / "a", rank_rule=("noise", 1.0)).modules
        assert row.rank == row.above_noise == 2
        rounding = load_model(sides[1])[NAMES[0]].double() - load_model(sides[0])[NAMES[0]].double() - D
        assert 1 < row.noise / float(torch.linalg.svdvals(rounding)[0]) < (2 if uneven else 1.3)

    def test_the_column_has_the_same_number(self, tmp_path: Path) -> None:
        W = randn(120, 90, seed=1) * 0.02
        D = low_rank(120, 90, 3, 0.05 * float(W.norm()))
        sides = write_pair(tmp_path, {NAMES[0]: (W.bfloat16(), (W + D).bfloat16())})
        ruled, plain = (
            loratool.extract(*sides, tmp_path / str(i), **options).modules[0]
            for i, options in enumerate(({"rank_rule": ("noise", 1.0)}, {"rank": 8}))
        )
        assert ruled.rank == plain.above_noise == 3 and ruled.noise == plain.noise

    def test_more_than_is_computed_at_first(self, tmp_path: Path) -> None:
        W = randn(200, 180, seed=1) * 0.02
        D = low_rank(200, 180, 40, 0.3 * float(W.norm()))
        sides = write_pair(tmp_path, {NAMES[0]: (W.bfloat16(), (W + D).bfloat16())})
        (row,) = loratool.extract(*sides, tmp_path / "a", rank_rule=("noise", 1.0)).modules
        assert row.rank == 40
        (row,) = loratool.extract(*sides, tmp_path / "b", rank_rule=("noise", 1.0), max_rank=7).modules
        assert row.rank == 7

    def test_a_stack_of_experts(self, tmp_path: Path) -> None:
        """Squares and bounds are summed over the stack, whose experts' scales differ."""
        name, config = "model.layers.0.mlp.experts.gate_up_proj", {"model_type": "qwen3_moe"}
        W = randn(3, 120, 90, seed=1) * torch.tensor([0.02, 0.2, 0.002], dtype=torch.float64)[:, None, None]
        D = torch.stack([low_rank(120, 90, 2, 0.05 * float(W[e].norm()), seed=e) for e in range(3)])
        sides = write_pair(tmp_path, {name: (W.bfloat16(), (W + D).bfloat16())}, config)
        (row,) = loratool.extract(*sides, tmp_path / "a", rank_rule=("noise", 1.0)).modules
        assert row.rank == row.above_noise == 2
        rounding = load_model(sides[1])[name].double() - load_model(sides[0])[name].double() - D
        largest = float(torch.linalg.svdvals(rounding)[:, 0].square().mean().sqrt())
        assert 1 < row.noise / largest < 1.5

    @pytest.mark.parametrize("shape", [(120, 90), (2, 60, 90)], ids=["matrix", "stack"])
    def test_of_32_bits_the_noise_is_unknown(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        """Noise that no type tells of, as training leaves it, is told from three directions that are more."""
        name = "model.layers.0.mlp.experts.gate_up_proj" if len(shape) == 3 else NAMES[0]
        W, noise = weights(*shape), randn(*shape, seed=3).mul(1e-4)
        D = torch.stack([low_rank(*shape[-2:], 3, 0.02, seed=e) for e in range(2)]) if len(shape) == 3 else None
        change = low_rank(*shape, 3, 0.02) if D is None else D
        config = LLAMA if D is None else {"model_type": "qwen3_moe"}
        sides = write_pair(tmp_path, {name: (W, (W + change + noise).float())}, config)
        (row,) = loratool.extract(*sides, tmp_path / "a", rank_rule=("noise", 1.0)).modules
        assert row.rank == row.above_noise == 3
        assert 1 < row.noise / float(torch.linalg.svdvals(noise)[..., 0].square().mean().sqrt()) < 1.4
        (plain,) = loratool.extract(*sides, tmp_path / "b", rank=8).modules
        assert plain.noise < row.noise and plain.above_noise == 8

    @pytest.mark.parametrize("rows", [2, 7])
    def test_few_singular_values_tell_of_no_noise(self, rows: int, tmp_path: Path) -> None:
        """The median of a head's two is its change; above fp32's rounding are all of them."""
        W, D = weights(rows, 40), randn(rows, 40, seed=3).mul(0.005)
        sides = write_pair(tmp_path, {NAMES[0]: (W, (W + D).float())})
        (row,) = loratool.extract(*sides, tmp_path / "a", rank_rule=("noise", 1.0)).modules
        assert row.rank == row.above_noise == rows and row.noise < 1e-5

    def test_the_steps_of_codes(self, tmp_path: Path) -> None:
        """A change of the numbers that codes mean is found, and one below what rounding to them did is not."""
        codes = (randn(120, 90, seed=1) * 8).round().clamp(-31, 31)
        scales, D = randn(120, 1, seed=2).mul(0.3).exp() * 0.002, low_rank(120, 90, 3, 0.01)
        coded = {NAMES[0]: codes.to(torch.int8), f"{NAMES[0]}_scale": scales.float()}
        base = write_model(tmp_path / "base", coded, LLAMA)
        numbers = codes * scales.float().double()
        tuned = write_model(tmp_path / "tuned", {NAMES[0]: (numbers + D).bfloat16()}, LLAMA)
        (row,) = loratool.extract(base, tuned, tmp_path / "a", rank_rule=("noise", 1.0)).modules
        assert row.rank == 3
        finer = numbers + (torch.rand(120, 90, generator=torch.Generator().manual_seed(3)) - 0.5) * scales
        tuned = write_model(tmp_path / "rounded", {NAMES[0]: (finer + D).float()}, LLAMA)
        with pytest.raises(InputError, match="larger than rounding"):
            loratool.extract(base, tuned, tmp_path / "b", rank_rule=("noise", 1.0))
        tuned = write_model(tmp_path / "more", {NAMES[0]: (finer + 30 * D).float()}, LLAMA)
        (row,) = loratool.extract(base, tuned, tmp_path / "c", rank_rule=("noise", 1.0), allow="unrelated").modules
        assert row.rank == 3

    def test_what_it_leaves_nothing_of_is_named(self, tmp_path: Path) -> None:
        W = [randn(120, 90, seed=i) * 0.02 for i in range(2)]
        D = [low_rank(120, 90, 2, 0.05 * float(W[0].norm())), low_rank(120, 90, 2, 1e-4 * float(W[1].norm()))]
        tensors = {name: (w.bfloat16(), (w + d).bfloat16()) for name, w, d in zip(NAMES[:2], W, D, strict=True)}
        sides = write_pair(tmp_path, tensors)
        report = loratool.extract(*sides, tmp_path / "a", rank_rule=("noise", 1.0))
        assert [(row.name, row.rank) for row in report.modules] == [(NAMES[0], 2)]
        left = (tensors[NAMES[1]][1].double() - tensors[NAMES[1]][0].double()).norm()
        assert report.left_out == {NAMES[1]: pytest.approx(float(left), rel=1e-6)}
        with pytest.raises(InputError, match="no delta is larger than rounding can explain"):
            loratool.extract(*sides, tmp_path / "b", rank_rule=("noise", 1000.0))
        assert not (tmp_path / "b").exists()

    def test_the_command_takes_it_without_a_number(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        W = randn(120, 90, seed=1) * 0.02
        D = low_rank(120, 90, 3, 0.05 * float(W.norm()))
        sides = write_pair(tmp_path, {NAMES[0]: (W.bfloat16(), (W + D).bfloat16())})
        for i, word in enumerate(("noise", "noise=1.5")):
            found = run("extract", *sides, "--rank-rule", word, "-o", tmp_path / str(i))
            assert found.exit_code == 0 and "rank 3, F32" in found.stdout


@pytest.mark.parametrize(
    ("rule", "value"),
    [("sv_ratio", 3.0), ("sv_cumulative", 0.6), ("sv_cumulative", 1.0), ("sv_fro", 0.9), ("rank", 5.0)],
)
def test_extract_takes_every_rule(rule: str, value: float, tmp_path: Path) -> None:
    """More than 32 values decide, which is what is computed at first."""
    U, V = (torch.linalg.qr(randn(side, 80, seed=side)).Q for side in (100, 80))
    D = (U * torch.arange(1, 81) ** -0.25) @ V.T
    sides = write_pair(tmp_path, {NAMES[0]: (torch.zeros(100, 80), D.float())})
    (row,) = loratool.extract(*sides, tmp_path / "a", rank_rule=(rule, value), allow="unrelated").modules
    S = torch.arange(1, 81).double() ** -0.25
    expected = {
        "sv_ratio": int((S * 3 > 1).sum()),
        "sv_cumulative": int((S.cumsum(0) < value * S.sum() - 1e-5).sum()) + 1,
        "sv_fro": int((S.square().cumsum(0) < 0.81 * S.square().sum()).sum()) + 1,
        "rank": 5,
    }
    assert row.rank == expected[rule]
    assert row.kept == pytest.approx(float(S[: row.rank].square().sum() / S.square().sum()), rel=1e-5)


class TestNoiseOfFactors:
    def made(self, folder: Path, dtype: torch.dtype, alpha: float = 12) -> Path:
        """Factors of rank 6, of which the second half says again what the first does, up to rounding."""
        pairs = {}
        for i, module in enumerate(("model.a.q_proj", "model.b.q_proj")):
            B, mix, A = randn(90, 3, seed=i), randn(3, 6, seed=i + 10), randn(3, 120, seed=i + 20)
            pairs[module] = torch.linalg.pinv(mix).mm(A).to(dtype), (B @ mix).to(dtype)
        return write_peft(folder, pairs, lora_alpha=alpha)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_what_rounding_made_is_left_out(self, dtype: torch.dtype, tmp_path: Path) -> None:
        report = loratool.resize(self.made(tmp_path / "a", dtype), tmp_path / "out", rank_rule=("noise", 1.0))
        assert [(row.rank, row.new_rank) for row in report.modules] == [(6, 3)] * 2 and report.kept > 1 - 1e-4

    def test_the_scale_counts_for_both(self, tmp_path: Path) -> None:
        for alpha in (0.01, -12, 1e4):
            source = self.made(tmp_path / str(alpha), torch.bfloat16, alpha)
            report = loratool.resize(source, tmp_path / f"{alpha} out", rank_rule=("noise", 1.0))
            assert {row.new_rank for row in report.modules} == {3}

    def test_a_module_stays_a_target(self, tmp_path: Path) -> None:
        source = self.made(tmp_path / "a", torch.bfloat16)
        report = loratool.resize(source, tmp_path / "out", rank_rule=("noise", 1e6))
        assert {row.new_rank for row in report.modules} == {1}

    def test_where_it_has_no_meaning_it_is_refused(self, tmp_path: Path, run: Callable[..., Any]) -> None:
        source = self.made(tmp_path / "a", torch.bfloat16)
        with pytest.raises(UsageError, match="to may split or fuse"):
            loratool.resize(source, tmp_path / "out", rank_rule=("noise", 1.0), to="kohya")
        found = run("combine", source, source, "--rank-rule", "noise", "-o", tmp_path / "out")
        assert found.exit_code == 2 and "a combination has several" in found.stderr
        assert not (tmp_path / "out").exists()

    def test_products_are_refused_by_name(self, tmp_path: Path) -> None:
        """LoHa's factors as LoRA are products of numbers that were rounded, and float32 themselves."""
        sides = {f"hada_w{i}_a": randn(20, 2, seed=i) for i in (1, 2)} | {
            f"hada_w{i}_b": randn(2, 30, seed=i) for i in (1, 2)
        }
        tensors = {f"lora_unet_q_proj.{role}": side.half() for role, side in sides.items()}
        save_file({**tensors, "lora_unet_q_proj.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match="is loha, but the rule noise needs factors of LoRA"):
            loratool.resize(tmp_path / "a.safetensors", tmp_path / "out.safetensors", rank_rule=("noise", 1.0))
