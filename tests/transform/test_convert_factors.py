"""Hold converted factors: exact to the bit where they are called so, else off by the error of a dense difference."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import factors, weights, write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.adapters.updates.low_rank import LowRank
from loratool.adapters.updates.update import UpdateSpec
from loratool.binding.modules.image_modules import SourceModule
from loratool.files.dtypes import TensorSpec
from loratool.numerics.forms import F16
from loratool.numerics.tensors import numbers_of, tensor_of
from loratool.transform.factors import ModuleFactors, common_scale, make_factors
from loratool.transform.lazy import start
from loratool.transform.module_map import RowSlice, TargetModule
from loratool.transform.numbers import alpha_for_scale, fold, is_exact_product, settle

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAME = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k"


def source(rows: int, columns: int, rank: int) -> SourceModule:
    specs = {"A": TensorSpec("F32", (rank, columns)), "B": TensorSpec("F32", (rows, rank))}
    return SourceModule("m", UpdateSpec(LowRank, "m", {}, specs), "unet", "m")


def whole(update: ModuleFactors) -> TargetModule:
    own = source(len(update.B), update.A.shape[1], len(update.A))
    return TargetModule("unet", "m", len(update.B), (RowSlice(own, 0, len(update.B)),), "exact")


def dense_error(true: Tensor, made: Tensor) -> float:
    return float((made - true).norm() / true.norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [0.25, 2.0, -0.5, 3.0, 1 / 3, 0.1, 2**-20, 0.0])
def test_a_fold_is_exact_just_where_fractions_say_so(dtype: torch.dtype, scale: float, tmp_path: Path) -> None:
    A, B = (side / 7 for side in factors(5, 4, 3, dtype=dtype))  # with all the bits of their type
    source = open_adapter(write_peft(tmp_path, {"m": (A, B)}))
    state = start(replace(source, updates={"m": replace(source.updates["m"], scale=scale)}))
    settled = settle(fold(state), None)
    made = settled.adapter.load(settled.adapter.updates["m"])
    assert isinstance(made, LowRank)
    same = all(
        Fraction(float(new)) == Fraction(float(old)) * Fraction(scale)
        for new, old in zip(tensor_of(made.B).flatten(), B.flatten(), strict=True)
    )
    error = settled.log["m"].loss.relative
    assert (error == 0.0) is same and made.scale == 1.0 and error < 2e-7
    true = scale * B.double() @ A.double()
    if error > 1e-12:
        assert math.isclose(error, dense_error(true, torch.from_numpy(made.B.wide() @ made.A.wide())), rel_tol=1e-3)


@given(st.floats(1e-3, 1e3), st.integers(1, 256))
def test_an_alpha_gives_its_scale_again(alpha: float, rank: int) -> None:
    assert alpha_for_scale(alpha / rank, rank) / rank == alpha / rank
    assert alpha_for_scale(3.0 / rank, rank) == 3.0


@given(st.floats(-1e3, 1e3, allow_subnormal=False), st.floats(-1e3, 1e3, width=16, allow_subnormal=False))
def test_products_that_float64_holds(scale: float, number: float) -> None:
    if is_exact_product(F16, scale):
        assert Fraction(scale * number) == Fraction(scale) * Fraction(number)


def test_scales_that_are_powers_of_two_apart_stay_in_alpha() -> None:
    assert common_scale([0.3, 0.6, 0.15]) == 0.3
    assert common_scale([0.3, 0.5]) == 1.0
    assert common_scale([0.0, 0.5]) == 1.0


def fused(updates: list[ModuleFactors]) -> TargetModule:
    parts, at = [], 0
    for update in updates:
        parts.append(RowSlice(source(len(update.B), update.A.shape[1], len(update.A)), 0, len(update.B), at))
        at += len(update.B)
    return TargetModule("unet", "m", at, tuple(parts), "fused")


def test_parts_of_several_types_lose_nothing() -> None:
    """float32 beside 16 bits, in either order, and fp16 beside bf16, of which neither holds the other."""
    for types in ((0, 2), (2, 0), (0, 1), (1, 3)):
        pairs = [factors(4, 6, 2, seed=i, dtype=TYPES[t]) for i, t in enumerate(types)]
        scales = 0.5, 1.0
        updates = [ModuleFactors(*map(numbers_of, pair), s) for pair, s in zip(pairs, scales, strict=True)]
        made = make_factors(fused(updates), updates)
        true = torch.cat([s * B.double() @ A.double() for (A, B), s in zip(pairs, scales, strict=True)])
        made_B, made_A = (tensor_of(side).double() for side in (made.B, made.A))
        assert made.exact and torch.equal(made.scale * made_B @ made_A, true)


def test_a_start_keeps_its_ranks_where_it_is_split() -> None:
    """B = 0 reaches no rows, and is every part's; a rank of other rows is not."""
    A = weights(4, 6)
    B = torch.zeros(9, 4)
    part = TargetModule("unet", "q", 3, (RowSlice(source(9, 6, 4), 0, 3),), "split")
    assert make_factors(part, [ModuleFactors(numbers_of(A), numbers_of(B), 1.0)]).A.shape == (4, 6)
    B[3:, 1], B[:3, 2] = 1.0, 1.0
    made = make_factors(part, [ModuleFactors(numbers_of(A), numbers_of(B), 1.0)])
    assert torch.equal(tensor_of(made.A), A[[0, 2, 3]]) and torch.equal(tensor_of(made.B), B[:3, [0, 2, 3]])


class TestInFiles:
    """The conversion again, read off the written files by the official library."""

    def kohya(self, path: Path, alpha: Tensor, dtype: torch.dtype = torch.float16) -> Path:
        A, B = factors(8, 768, 4, dtype=dtype)
        save_file({f"{NAME}.lora_down.weight": A, f"{NAME}.lora_up.weight": B, f"{NAME}.alpha": alpha}, path)
        return path

    def change(self, path: Path) -> Tensor:
        found = load_file(path)
        A, B = found[f"{NAME}.lora_down.weight"].double(), found[f"{NAME}.lora_up.weight"].double()
        return float(found[f"{NAME}.alpha"]) / len(A) * B @ A

    @pytest.mark.parametrize(
        ("options", "how"),
        [
            ({}, "exact"),
            ({"dtype": "fp32"}, "exact"),
            ({"dtype": "bf16"}, "rounded"),
            ({"plain": True}, "rounded"),
            ({"plain": True, "dtype": "fp16"}, "rounded"),
            ({"plain": True, "rank": 2}, "truncated"),
        ],
    )
    def test_how_and_error(self, options: dict[str, object], how: str, tmp_path: Path) -> None:
        start = self.kohya(tmp_path / "a.safetensors", torch.tensor(3.3))
        (row,) = loratool.convert(start, tmp_path / "b.safetensors", to="kohya", **options).modules  # type: ignore[arg-type]
        error = dense_error(self.change(start), self.change(tmp_path / "b.safetensors"))
        assert row.how == how and (math.isclose(row.error, error, rel_tol=1e-3) if error else row.error == 0.0)

    def test_the_best_of_a_rank(self, tmp_path: Path) -> None:
        start = self.kohya(tmp_path / "a.safetensors", torch.tensor(3.3))
        (row,) = loratool.convert(start, tmp_path / "b.safetensors", to="kohya", plain=True, rank=2).modules
        S = torch.linalg.svdvals(self.change(start))
        assert row.rank == 2 and math.isclose(row.error, float(S[2:].norm() / S.norm()), rel_tol=1e-5)

    def test_an_alpha_that_is_no_float32(self, tmp_path: Path) -> None:
        """diffusers' metadata has float64, kohya's files float32: the scale is off, by what the report says."""
        start = self.kohya(tmp_path / "a.safetensors", torch.tensor(0.1, dtype=torch.float64))
        loratool.convert(start, tmp_path / "b.safetensors", to="diffusers")
        (row,) = loratool.convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", to="kohya").modules
        error = abs(float(torch.tensor(0.1)) / 0.1 - 1)
        assert row.how == "rounded" and math.isclose(row.error, error, rel_tol=1e-6)
        loratool.convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", to="diffusers")
        (again,) = loratool.convert(tmp_path / "d.safetensors", tmp_path / "e.safetensors", to="kohya").modules
        assert (
            again.how == "exact"
            and load_file(tmp_path / "c.safetensors").keys() == load_file(tmp_path / "e.safetensors").keys()
        )

    @pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"plain": True}, {"plain": True, "rank": 2}])
    def test_language_models(self, options: dict[str, object], tmp_path: Path) -> None:
        start = write_peft(tmp_path / "a", {"q": factors(8, 6, 3)}, lora_alpha=0.7)
        (row,) = loratool.convert(start, tmp_path / "b", to="peft", **options).modules  # type: ignore[arg-type]
        changes = []
        for path in (start, tmp_path / "b"):
            adapter = open_adapter(path)
            update = adapter.load(adapter.updates["q"])
            assert isinstance(update, LowRank)
            changes.append(torch.from_numpy(update.scale * update.B.wide() @ update.A.wide()))
        assert row.how == ("truncated" if "rank" in options else "rounded")
        assert math.isclose(row.error, dense_error(*changes), rel_tol=1e-3)
