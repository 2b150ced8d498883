"""Hold the methods of cores to what they are by definition, compress then merge, and what both refuse."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, write_peft
from safetensors.torch import load_file
from torch import Tensor

import loratool
from loratool.commands.choices import COMBINE_REFUSED
from loratool.commands.combine.methods.delta import WeightedDelta
from loratool.commands.combine.methods.entries import della
from loratool.commands.combine.methods.table import METHODS, NOT_COMPRESSED

Run = Callable[..., Any]
Pair = tuple[Tensor, Tensor]

OUT, INP = 20, 14
THREE = [factors(OUT, INP, rank, rank) for rank in (3, 5, 4)]
CORE = [method for method, row in METHODS.items() if row.acts_on == "core"]
SOME = ("ties", "knots", "iso-cts", "wudi", "core-ties")  # of each kind
COMPRESSED = [method for method in METHODS if method not in NOT_COMPRESSED]


def change(pair: Pair) -> Tensor:
    return pair[1].double() @ pair[0].double()


def split_otherwise(pair: Pair) -> Pair:
    """Return other factors of the same change."""
    M = torch.randn(len(pair[0]), len(pair[0]), generator=torch.Generator().manual_seed(7)).double()
    return torch.linalg.inv(M) @ pair[0].double(), pair[1].double() @ M


class Stage:
    """Combines changes of one matrix by way of files, and returns the change that is written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.report, self.made = folder, Any, 0

    def adapter(self, pair: Pair) -> Path:
        self.made += 1
        return write_peft(self.folder / f"adapter{self.made}", {"x": pair})

    def factors(self, terms: Sequence[Pair | tuple[Pair, float]], method: str, **options: Any) -> Pair:
        given = [(term[0], term[1]) if isinstance(term[1], float) else (term, 1.0) for term in terms]
        paths = [(self.adapter(pair), weight) for pair, weight in given]  # type: ignore[arg-type]
        self.report = loratool.combine(paths, self.folder / "out", method=method, force=True, **options)
        tensors = load_file(self.folder / "out" / "adapter_model.safetensors")
        config = json.loads((self.folder / "out" / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
        A, B = (tensors[f"base_model.model.x.lora_{side}.weight"].double() for side in "AB")
        return A, B

    def combined(self, terms: Sequence[Pair | tuple[Pair, float]], method: str, **options: Any) -> Tensor:
        return change(self.factors(terms, method, **options))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def near(one: Tensor, two: Tensor, error: float = 1e-6) -> bool:
    return float((one - two).norm()) <= error * float(two.norm())


def rank_of(D: Tensor) -> int:
    S = torch.linalg.svdvals(D)
    return int((1e-5 * S[0] < S).sum())


class TestCores:
    @pytest.mark.parametrize("method", ["tsv", "wudi"])
    def test_of_one_change_or_of_two_equal_ones_it_is_that_change(self, method: str, stage: Stage) -> None:
        D = change(THREE[0])
        assert near(stage.combined([THREE[0]], method), D)
        assert near(stage.combined([THREE[0], split_otherwise(THREE[0])], method), D)

    @pytest.mark.parametrize("method", ["tsv", "wudi", "core-ties", "core-magnitude"])
    def test_changes_that_share_no_direction_are_summed(self, method: str, stage: Stage) -> None:
        """Nothing of another is in an entry of the core: neither rounding nor the other's zeros vote or count."""
        (A, B), (C, E) = factors(OUT, INP, 3, 1), factors(OUT, INP, 4, 2)
        A[:, 7:], B[10:], C[:, :7], E[:10] = 0, 0, 0, 0
        pairs: list[Pair] = [(A, B), (C, E)]
        options = {"density": 1.0} if method.startswith("core") else {}
        found = stage.combined([(pairs[0], 0.7), (pairs[1], -2.0)], method, **options)
        assert near(found, 0.7 * change(pairs[0]) - 2 * change(pairs[1]))

    @pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
    def test_all_singular_values_are_equal(self, method: str, stage: Stage) -> None:
        S = torch.linalg.svdvals(stage.combined(THREE, method))
        assert near(S[:12], S[:1].expand(12)) and float(S[12]) < 1e-6 * float(S[0])
        alone, D = stage.combined([THREE[0]], method), change(THREE[0])
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        assert near(alone, U[:, :3] @ Vh[:3] * S[:3].mean())

    @pytest.mark.parametrize("method", CORE)
    def test_what_has_no_weight_or_is_0_is_not_there(self, method: str, stage: Stage) -> None:
        nothing = (THREE[1][0], torch.zeros_like(THREE[1][1]))
        expected = stage.combined([(THREE[0], 0.5), (THREE[2], -2.0)], method)
        assert near(stage.combined([(THREE[0], 0.5), (THREE[1], 0.0), (THREE[2], -2.0)], method), expected)
        assert near(stage.combined([(THREE[0], 0.5), (nothing, 3.0), (THREE[2], -2.0)], method), expected)
        assert not stage.combined([(THREE[0], 0.0), (nothing, 1.0)], method).any()

    @pytest.mark.parametrize("method", CORE)
    def test_a_weight_scales_the_change(self, method: str, stage: Stage) -> None:
        scaled = [(A, weight * B) for (A, B), weight in zip(THREE, (0.5, -1.0, 2.0), strict=True)]
        found = stage.combined(list(zip(THREE, (0.5, -1.0, 2.0), strict=True)), method)
        assert near(found, stage.combined(scaled, method))
        assert near(stage.combined(list(zip(THREE, (-0.5, 1.0, -2.0), strict=True)), method), -found)

    @pytest.mark.parametrize("method", [*CORE, "core-magnitude"])
    def test_opposite_changes_leave_nothing_that_rounding_made(self, method: str, stage: Stage) -> None:
        A, B = split_otherwise(THREE[0])
        found = stage.combined([THREE[0], (A, -B)], method, **({"density": 1.0} if "core" in method else {}))
        assert float(found.norm()) < 1e-6 * float(change(THREE[0]).norm())

    def test_of_opposite_changes_core_ties_takes_what_is_positive(self, stage: Stage) -> None:
        A, B = split_otherwise(THREE[0])
        found = stage.combined([THREE[0], (A, -B)], "core-ties", density=1.0)
        assert found.norm() == pytest.approx(float(change(THREE[0]).norm()), rel=1e-6)

    def test_tsv_of_more_ranks_than_the_matrix_has(self, stage: Stage) -> None:
        """Each of three has the third of 14 that is largest, so that the orthogonal factors exist."""
        full = [factors(OUT, INP, 14, seed) for seed in range(3)]
        cut = []
        for pair in full:
            U, S, Vh = torch.linalg.svd(change(pair), full_matrices=False)
            cut.append((Vh[:4], U[:, :4] * S[:4]))
        found = stage.combined(full, "tsv")
        assert near(found, stage.combined(cut, "tsv")) and rank_of(found) == 12

    def test_tsvs_density_is_of_each_changes_singular_values(self, stage: Stage) -> None:
        assert rank_of(stage.combined(THREE, "tsv", density=0.5)) == 1 + 2 + 2
        assert rank_of(stage.combined(THREE, "tsv", density=0.01)) == 3
        assert stage.report.density == 0.01

    @pytest.mark.parametrize("method", SOME)
    def test_experts_are_each_a_matrix(self, method: str, tmp_path: Path) -> None:
        stacks = []
        each = [[factors(12, 10, rank, 9 * e + rank) for e in range(3)] for rank in (2, 3)]
        for i, pairs in enumerate(each):
            A = torch.cat([A for A, _ in pairs])
            B = torch.stack([B for _, B in pairs], 2).reshape(12, -1)
            config = {"r": len(pairs[0][0]), "lora_alpha": len(pairs[0][0]), "target_modules": []}
            folder = tmp_path / f"stack{i}"
            stacks.append(write_peft(folder, {"experts": (A, B)}, target_parameters=["experts.down_proj"], **config))
        for name, options in (("out", {}), ("small", {"rank": 2})):
            loratool.combine(stacks, tmp_path / name, method=method, **options)  # type: ignore[arg-type]
            found = load_file(tmp_path / name / "adapter_model.safetensors")
            A, B = (found[f"base_model.model.experts.lora_{side}.weight"].double() for side in "AB")
            rank, stage = len(A) // 3, Stage(tmp_path / name / "single")
            for e in range(3):
                D = B.reshape(12, rank, 3)[:, :, e] @ A[e * rank : (e + 1) * rank]
                assert near(D, stage.combined([pairs[e] for pairs in each], method, **options), 1e-5)


class TestDella:
    def test_an_entry_is_kept_by_its_rank_in_the_row(self) -> None:
        """Over 2000 keys, the share that is kept rises evenly from 0.25 to 0.55, and what is left has the mean of D."""
        D, one = torch.tensor([[3.0, -1.0, 0.5, 2.0]], dtype=torch.float64), torch.eye(4, dtype=torch.float64)
        drawn = torch.stack([della([WeightedDelta(D, one, 1.0, f"{key}", 1)], 0.4)[0].double() for key in range(2000)])
        wanted = torch.tensor([0.55, 0.35, 0.25, 0.45], dtype=torch.float64)
        assert torch.allclose((drawn != 0).double().mean(0), wanted, atol=0.04)
        assert torch.allclose(drawn.amax(0) + drawn.amin(0), (D / wanted)[0], rtol=1e-6)

    def test_of_one_column_and_of_all(self, stage: Stage) -> None:
        narrow = [(A[:, :1], B) for A, B in THREE]
        assert stage.combined(narrow, "della", density=0.4).isfinite().all()
        whole = {"density": 1.0, "rank": 14, "rank_method": "truncate"}
        assert near(stage.combined(THREE, "della", **whole), stage.combined(THREE, "ties-mergekit", **whole))


@pytest.mark.parametrize("method", ["ties-mergekit", "della"])
@pytest.mark.parametrize("weight", [1e-300, 1e-39, 3e38])
def test_weights_that_divide_are_relative(method: str, weight: float, stage: Stage) -> None:
    small = [(A, 1e-3 * B) for A, B in THREE]
    found = stage.combined([(pair, weight) for pair in small], method)
    assert near(found, stage.combined(small, method))


class TestCompress:
    @pytest.mark.parametrize("method", COMPRESSED)
    def test_the_rank_is_exact_and_nothing_is_cut(self, method: str, stage: Stage) -> None:
        found = stage.combined(THREE, method, rank=6)
        (row,) = stage.report.modules
        assert row.rank == rank_of(found) == 6 and row.error < 1e-7 and stage.report.rank_method == "ctm"
        assert 0.5 < row.kept < 1 and abs(row.norm - float(found.norm())) < 1e-6 * row.norm
        few = stage.combined(THREE, method, rank_rule=("rank", 6), max_rank=3)
        assert rank_of(few) == 3 and stage.report.kept < row.kept

    def test_kept_is_the_share_of_each_change_in_the_shared_directions(self, stage: Stage) -> None:
        """Of density 1 the result is P P^T sum D_i Q Q^T, whose singular vectors are the directions."""
        U, S, Vh = torch.linalg.svd(stage.combined(THREE, "magnitude", density=1.0, rank=5), full_matrices=False)
        inside = [U[:, :5] @ U[:, :5].mT @ D @ Vh[:5].mT @ Vh[:5] for D in map(change, THREE)]
        shares = [float((part.norm() / D.norm()) ** 2) for part, D in zip(inside, map(change, THREE), strict=True)]
        assert near(U[:, :5] * S[:5] @ Vh[:5], sum(inside, torch.zeros(OUT, INP)), 1e-5)
        assert abs(stage.report.kept - sum(shares) / 3) < 1e-5

    def test_changes_that_cancel_are_held_no_better(self, stage: Stage) -> None:
        A, B = THREE[0]
        assert not stage.combined([(A, B), (A, -B)], "magnitude", rank=1).any()
        (row,) = stage.report.modules
        assert stage.report.kept == row.kept < 0.9

    def test_each_module_counts_by_itself(self, tmp_path: Path, run: Run) -> None:
        """One is a thousand times as large, and what it holds is no more of the changes."""
        sides = [{"x": (A, 1e3 * B), "y": factors(30, 9, len(A), len(A))} for A, B in THREE]
        paths = [write_peft(tmp_path / str(i), side) for i, side in enumerate(sides)]
        report = loratool.combine(paths, tmp_path / "out", method="tsv", rank=1)
        assert report.kept == pytest.approx(sum(row.kept for row in report.modules) / 2, rel=1e-12)
        assert "1 shared direction holds" in run("combine", *paths, "--method", "tsv", "--rank", 1, "--dry-run").stdout

    @pytest.mark.parametrize("method", ["ties", "magnitude"])
    def test_a_method_of_entries_is_then_that_of_the_core(self, method: str, stage: Stage) -> None:
        found = [stage.factors(THREE, name, rank=5, density=0.4) for name in (method, f"core-{method}")]
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))

    @pytest.mark.parametrize("method", COMPRESSED)
    def test_more_directions_than_there_are_lose_nothing(self, method: str, stage: Stage) -> None:
        found = stage.combined(THREE, method, rank=18)
        assert stage.report.kept == pytest.approx(1, abs=1e-12) and stage.report.modules[0].rank == 18
        if METHODS[method].acts_on in ("core", "factors"):
            assert near(found, stage.combined(THREE, method), 1e-5)

    @pytest.mark.parametrize("method", [method for method in COMPRESSED if METHODS[method].draws])
    def test_what_is_drawn_follows_from_seed_module_and_adapter(self, method: str, stage: Stage) -> None:
        found = [stage.combined(THREE, method, rank=5, seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(found[0], found[1]) and not near(found[2], found[0], 0.01)
        assert near(stage.combined(THREE[::-1], method, rank=5), found[0], 1e-5)


def peak_of(call: Callable[[], object]) -> int:
    """Return the most bytes that a call has in memory at a time beside what was there."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", METHODS)
def test_no_matrix_is_formed_but_by_methods_of_entries(method: str, tmp_path: Path) -> None:
    out, inp = 2000, 1000
    small, large = (
        [write_peft(tmp_path / f"{rows} {seed}", {"x": factors(rows, columns, 2, seed)}) for seed in (1, 2)]
        for rows, columns in ((20, 10), (out, inp))
    )
    for options in ({}, {"rank": 3}) if method in COMPRESSED else ({},):
        call = partial(loratool.combine, out=tmp_path / "out", method=method, force=True, **options)
        call(small)  # imports what it needs
        peak = peak_of(partial(call, large))
        if METHODS[method].dense and not options:
            assert peak >= 4 * out * inp
        else:
            assert peak <= 2 * out * inp


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ("--rank 4 --rank-method ctm", "truncating the exact sum to --rank is better"),
            ("--method della --rank 4 --rank-method ctm", "order in a row of the full matrix"),
            (
                "--method ties --rank-method ctm",
                "without --rank does not know how many directions to use\nhint: add --rank",
            ),
            (
                "--method ties --energy 0.9 --rank-method ctm",
                "does not know how many directions to use\nhint: give --rank instead",
            ),
            ("--method iso-c --rank 4 --rank-method truncate", "iso-c makes all singular values equal"),
            ("--method iso-cts --energy 0.9", "use --rank with --rank-method ctm"),
            ("--method iso-c --max-rank 2", "iso-c makes all singular values equal"),
            ("--method della --density 0.9", "between 0.15 and 0.85, not 0.9"),
            ("--method iso-c --density 0.5", "--density has no effect on"),
            ("--method karcher", "karcher is not supported: it averages"),
            ("--method core", "'core' is none of cat, ties"),
            ("--method tsv --rank-method svd", "'svd' is not one of 'ctm', 'truncate'"),
        ],
    )
    def test_options(self, words: str, says: str, stage: Stage, run: Run) -> None:
        result = run("combine", *(stage.adapter(pair) for pair in THREE), *words.split(), "-o", stage.folder / "out")
        assert result.exit_code == 2 and says in result.stderr, result.stderr
        assert not (stage.folder / "out").exists()

    def test_della_divides_by_weights(self, stage: Stage) -> None:
        with pytest.raises(loratool.UsageError, match="weights cannot be negative"):
            stage.combined([(THREE[0], -1.0), (THREE[1], 1.0)], "della")

    @pytest.mark.parametrize("method", COMBINE_REFUSED)
    def test_each_names_what_there_is(self, method: str, stage: Stage) -> None:
        with pytest.raises(loratool.UsageError, match="is not supported") as error:
            stage.combined(THREE, method)
        assert any(each in str(error.value) for each in (*METHODS, "--target")) and method not in METHODS

    @pytest.mark.parametrize("method", SOME)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_no_number(self, method: str, value: float, stage: Stage) -> None:
        A, B = THREE[0][0].clone(), THREE[0][1]
        A[0, 0] = value
        with pytest.raises(loratool.InputError):
            stage.combined([(A, B), THREE[1]], method)

    @pytest.mark.parametrize("method", SOME)
    def test_too_large_for_float32(self, method: str, stage: Stage) -> None:
        pairs = [(A * 1e25, B * 1e25) for A, B in THREE]
        with pytest.raises(loratool.InputError, match="overflow|too large"):
            stage.combined([(pair, 1e38) for pair in pairs], method, rank_method="truncate")


def test_the_guides_have_a_row_for_each_method() -> None:
    definitions, results = (
        [
            line.strip("| ").split(" | ")
            for line in (Path(loratool.__file__).with_name("guides") / f"{page}.md").read_text().splitlines()
            if line[:2] == "| "
        ]
        for page in ("combine", "which-method")
    )
    assert {row[0]: (row[1], row[2]) for row in definitions if row[0] in METHODS} == {
        method: (row.acts_on, row.source) for method, row in METHODS.items()
    }
    combine = (Path(loratool.__file__).with_name("guides") / "combine.md").read_text()
    assert re.findall(r"^- \*\*([\w-]+)\*\*: ", combine, re.MULTILINE) == list(METHODS)
    assert [row[0] for row in results if row[0] in METHODS] == list(METHODS)
