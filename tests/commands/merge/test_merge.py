"""Hold merge against peft and an extended-precision reference; then the bytes' independence, then the report."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    FIXTURES,
    MEASURED,
    SHARED,
    bits,
    factors,
    load_model,
    needs_shared,
    weights,
    write_kohya,
    write_model,
    write_peft,
)
from lib.oracles.reference import change_reference, merge_reference, round_reference, to_longdouble
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.numerics.dense import TILE

MODELS = ("llama", "gpt2")


def adapter_of(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    folder = FIXTURES / name / "adapter"
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def base_copy(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """Write the fixture's base in another dtype, as one file."""
    tensors = {k: v.to(dtype) for k, v in load_model(FIXTURES / name / "base").items()}
    config = json.loads((FIXTURES / name / "base" / "config.json").read_text())
    return write_model(folder, tensors, config | {"dtype": str(dtype).removeprefix("torch.")})


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def logits(model: Any) -> Tensor:
    text = torch.tensor([list(b"Shall I compare thee to a summer's day?")])
    with torch.no_grad():
        return model.eval()(input_ids=text).logits


@pytest.mark.parametrize("name", MODELS)
def test_fixtures_merge_to_their_pinned_hashes(tmp_path: Path, name: str) -> None:
    """The hashes come from `reference.py`, through fixtures/make.py, never from loratool."""
    loratool.merge(FIXTURES / name / "base", FIXTURES / name / "adapter", tmp_path / "out")
    pinned = json.loads((FIXTURES / name / "merged.sha256.json").read_text())
    found = {k: hashlib.sha256(bits(v.flatten()).numpy()).hexdigest() for k, v in load_model(tmp_path / "out").items()}
    assert found == pinned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_against_the_reference_and_peft(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Bit-equal to the reference in 16 bits; in fp32 further from the truth than peft in at most 1e-5.

    peft rounds once here too (fp32 adapter, no safe_merge), but from an fp32 sum: that sum lands on a midpoint of the
    16-bit type in about 2**-16 of the weights for bf16 and 2**-13 for fp16, and there peft is one step off.
    """
    base = base_copy(name, tmp_path / "base", dtype)
    loratool.merge(base, FIXTURES / name / "adapter", tmp_path / "out")
    ours = load_model(tmp_path / "out")
    tensors, config = adapter_of(name)
    before = load_model(base)
    reference = merge_reference(before, tensors, config)
    theirs = peft_merged(base, FIXTURES / name / "adapter", dtype)
    adapted = [k for k in reference if not torch.equal(reference[k], before[k])]
    assert len(adapted) == len(tensors) / 2
    total = sum(ours[k].numel() for k in adapted)
    for k in set(ours) - set(adapted):
        assert torch.equal(bits(ours[k]), bits(before[k]))
    if dtype != torch.float32:
        assert all(torch.equal(ours[k], reference[k]) for k in adapted)
        differ = {k: ours[k] != theirs[k] for k in adapted}
        limit = {torch.bfloat16: 1e-4, torch.float16: 4e-4}[dtype]
        assert sum(int(d.sum()) for d in differ.values()) <= limit * total
        for k, where in differ.items():
            step = torch.nextafter(ours[k], theirs[k])[where]
            assert torch.equal(step, theirs[k][where])
    worse = 0
    for k in adapted:
        module = k.removesuffix(".weight")
        A, B = (tensors[f"base_model.model.{module}.lora_{r}.weight"] for r in "AB")
        from lib.oracles.reference import scale_of

        change = change_reference(A, B, scale_of(config, module, len(A)))
        exact = to_longdouble(before[k]) + (change.T if config["fan_in_fan_out"] else change)
        worse += int((np.abs(to_longdouble(ours[k]) - exact) > np.abs(to_longdouble(theirs[k]) - exact)).sum())
    assert worse <= 1e-5 * total


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_answers_as_base_plus_adapter(tmp_path: Path, name: str) -> None:
    """The output loads in transformers, and computes what peft's forward pass computes, to rounding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = FIXTURES / name / "base"
    loratool.merge(base, FIXTURES / name / "adapter", tmp_path / "out", undo=False, dtype="fp32")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untouched = logits(plain)
    adapted = logits(PeftModel.from_pretrained(plain, FIXTURES / name / "adapter"))
    assert (merged - adapted).abs().max() < 1e-4 < 0.1 * (untouched - adapted).abs().max()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_kohya_spelling_gives_the_same_bytes_as_peft(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {f"layers.{i}.to_q.weight": weights(12, 8, seed=i) for i in range(3)})
    made = {f"layers.{i}.to_q": factors(12, 8, 4, seed=i) for i in range(3)}
    loratool.merge(base, write_peft(tmp_path / "p", made, lora_alpha=3), tmp_path / "a")
    loratool.merge(base, write_kohya(tmp_path / "k.safetensors", made, torch.tensor(3.0)), tmp_path / "b")
    a, b = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["layers.0.to_q.weight"], weights(12, 8))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak RSS from /proc")
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path) -> None:
    """One matrix of 268 MB over a sparse file."""
    from loratool.files.containers.safetensors_file import build_header
    from loratool.files.dtypes import TensorSpec

    header, _ = build_header({"x.weight": TensorSpec("BF16", (32768, 4096))}, ["x.weight"], {"format": "pt"})
    with open(tmp_path / "base.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * 32768 * 4096)
    adapter = write_peft(tmp_path / "a", {"x": factors(32768, 4096, 16)})
    arguments = ["merge", "-q", str(tmp_path / "base.safetensors"), str(adapter), "-o", str(tmp_path / "m.safetensors")]
    result = subprocess.run([*MEASURED, *arguments], capture_output=True, text=True, check=True)
    peak = int(result.stderr.splitlines()[-1]) / 1024
    assert 150 < peak < 450  # MB, torch included


class TestSameBytes:
    """Nothing but the inputs decides a byte."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        tensors = {f"l.{i}.w.weight": weights(150, 170, seed=i, dtype=torch.bfloat16) for i in range(3)}
        return write_model(tmp_path / "base", {**tensors, "norm.weight": torch.ones(170)}, shards=2)

    @pytest.fixture
    def adapters(self, tmp_path: Path) -> list[tuple[Path, float]]:
        spread = torch.logspace(-5, 5, 6)
        made = {}
        for i in range(3):
            A, B = factors(150, 170, 6, seed=i)
            made[f"l.{i}.w"] = (A * spread[:, None], B / spread)
        first = write_peft(tmp_path / "a1", made, lora_alpha=7)
        second = write_peft(
            tmp_path / "a2", {f"l.{i}.w": factors(150, 170, 3, seed=9 + i) for i in range(2)}, use_rslora=True
        )
        return [(first, 0.7), (second, -1.3)]

    def digest(self, folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}

    @pytest.mark.parametrize("workers", [1, 2, 5])
    @pytest.mark.parametrize("block", [1, 170, 1000, 1 << 18])
    def test_threads_and_blocks(
        self, tmp_path: Path, base: Path, adapters: Any, workers: int, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loratool.merge(base, adapters, tmp_path / "expected")
        monkeypatch.setattr("loratool.streaming.rewrite.CAST_BLOCK", block)
        monkeypatch.setattr("loratool.numerics.dense.TILE", dict.fromkeys(TILE, max(1, block // 3)))
        monkeypatch.setattr("loratool.numerics.merge.TOGETHER", max(30, block // 5))
        monkeypatch.setattr("loratool.undo.records.ASKED", max(40, block // 2))
        monkeypatch.setattr("loratool.streaming.rewrite.ROWS_ITEM", 1)
        monkeypatch.setattr("loratool.streaming.rewrite.MIN_ROWS", 7)
        monkeypatch.setattr("loratool.streaming.rewrite.COPY_ITEM", 100)
        loratool.merge(base, adapters, tmp_path / "out", workers=workers)
        assert self.digest(tmp_path / "out") == self.digest(tmp_path / "expected")

    def test_order_of_adapters_and_of_the_rank(self, tmp_path: Path, base: Path, adapters: Any) -> None:
        loratool.merge(base, adapters, tmp_path / "expected")
        loratool.merge(base, adapters[::-1], tmp_path / "reversed")
        assert self.digest(tmp_path / "reversed") == self.digest(tmp_path / "expected")
        file = adapters[0][0] / "adapter_model.safetensors"
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        permuted = {k: (v[order] if "lora_A" in k else v[:, order].contiguous()) for k, v in load_file(file).items()}
        save_file(permuted, file)
        loratool.merge(base, adapters, tmp_path / "permuted")
        a, b = load_model(tmp_path / "permuted"), load_model(tmp_path / "expected")
        assert all(torch.equal(a[k], b[k]) for k in b)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_device(self, tmp_path: Path, base: Path, adapters: Any) -> None:
        """TF32 or another order of sums on a GPU would show here."""
        loratool.merge(base, adapters, tmp_path / "cpu", device="cpu")
        loratool.merge(base, adapters, tmp_path / "cuda", device="cuda")
        assert self.digest(tmp_path / "cuda") == self.digest(tmp_path / "cpu")


def one(
    tmp_path: Path, W: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, **options: Any
) -> tuple[Tensor, loratool.MergeReport]:
    """Merge a model of one matrix `x`; return the merged matrix and the report."""
    base = write_model(tmp_path / "base", {"x.weight": W}, {"model_type": "llama"})
    adapter = write_peft(tmp_path / "adapter", {"x": (A, B)}, lora_alpha=scale * len(A))
    report = loratool.merge(base, adapter, tmp_path / "out", force=True, **options)
    return load_model(tmp_path / "out")["x.weight"], report


@pytest.mark.parametrize("weights_of", [(0.5,), (-2.0,), (0.0,), (1.0, -1.0), (0.25, 3.0, 1.0)])
def test_a_weight_means_w_times_the_change(tmp_path: Path, weights_of: Sequence[float]) -> None:
    """W + w * D for each adapter, never w squared, summed and then rounded once."""
    W = weights(10, 12, dtype=torch.bfloat16)
    base = write_model(tmp_path / "base", {"x.weight": W})
    made = [factors(10, 12, 3, seed=i) for i in range(len(weights_of))]
    adapters = [
        (write_peft(tmp_path / f"a{i}", {"x": f}, lora_alpha=6), w)
        for i, (f, w) in enumerate(zip(made, weights_of, strict=True))
    ]
    report = loratool.merge(base, adapters, tmp_path / "out")
    change = sum(change_reference(A, B, 2.0 * w) for (A, B), w in zip(made, weights_of, strict=True))
    assert torch.equal(
        load_model(tmp_path / "out")["x.weight"], round_reference(to_longdouble(W) + change, torch.bfloat16)
    )
    assert report.tensors[0].scales == tuple(2.0 * w for w in weights_of) and report.tensors[0].rank == 3 * len(made)


def test_one_adapter_twice_with_opposite_weights_changes_nothing(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"x.weight": weights(10, 12)})
    adapter = write_peft(tmp_path / "a", {"x": factors(10, 12, 3)})
    report = loratool.merge(base, [(adapter, 0.3), (adapter, -0.3)], tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")["x.weight"], weights(10, 12))
    assert (report.tensors[0].changed, report.kept) == (0.0, None)
    assert report.warnings[0] == "1 tensor is unchanged: its delta is zero or rounds away: x.weight"


def test_a_merge_that_changes_nothing_says_so(tmp_path: Path, run: Callable[..., Any]) -> None:
    """On the terminal and in the JSON, of all tensors or of some; a tensor without a number never changes."""
    base = write_model(
        tmp_path / "base", {"x.weight": weights(10, 12), "y.weight": weights(4, 4), "z.weight": weights(0, 4)}
    )
    A, B = factors(10, 12, 3)
    zero = {"x": (A, B * 0), "z": (weights(3, 4), weights(0, 3))}
    for made, changed, said in (
        (zero, 0, "0 of 3 tensors changed; the merge changes nothing\n"),
        ({**zero, "y": factors(4, 4, 3)}, 1, "1 of 3 tensors changed, 100% of the delta kept\n"),
    ):
        adapter = write_peft(tmp_path / "a", made)
        assert said in run("merge", base, adapter, "-o", tmp_path / "m", "--force").stdout
        report = json.loads(run("merge", base, adapter, "-o", tmp_path / "m", "--force", "--json").stdout)["report"]
        assert (report["changed"], report["kept"] is None) == (changed, changed == 0)
        again = run("merge", base, adapter, "-o", tmp_path / "m", "--force", "--dry-run", "--json")
        assert json.loads(again.stdout)["report"]["changed"] is None
    report = loratool.merge(base, write_peft(tmp_path / "b", {"x": (A, B * 1e-30)}), tmp_path / "m", force=True)
    assert (report.changed, report.kept) == (0, 0.0)


def test_small_factors_in_half_precision(tmp_path: Path) -> None:
    """fp16 factors near the subnormals are not rounded again by the scale."""
    W = weights(20, 30)
    A, B = factors(20, 30, 4)
    A, B = A.half(), (B * 1e-4).half()
    merged, _ = one(tmp_path, W, A, B, 1 / 16)
    assert torch.equal(merged, round_reference(to_longdouble(W) + change_reference(A, B, 1 / 16), torch.float32))


def test_overflow_is_refused_with_the_dtype_that_holds_it(tmp_path: Path) -> None:
    """Exit code 4 keeps its promise: with the flag the command succeeds."""
    W = torch.full((4, 4), 6e4, dtype=torch.float16)
    A, B = torch.ones(1, 4), torch.full((4, 1), 1e4)
    with pytest.raises(
        NeedsFlag, match=r'x.weight: 16 weights become infinite in F16\nadd dtype="fp32", undo=False, which'
    ):
        one(tmp_path, W, A, B)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    merged, _ = one(tmp_path, W, A, B, dtype="fp32", undo=False)
    assert (merged == 7e4).all()


@pytest.mark.parametrize(
    ("dtype", "value", "change", "option", "remedy"),
    [
        (torch.float16, 1.0, 1e39, "keep", "is this the adapter's base"),
        (torch.float16, 1.0, 1e39, "fp32", "leave out dtype"),  # which then gives the line above
        (torch.float32, 3e38, 3e38, "keep", "is this the adapter's base"),
        (torch.float64, 1e200, 1.0, "bf16", "leave out dtype: F64 holds them"),
        (torch.float64, 1e200, 1.0, "fp32", "leave out dtype: F64 holds them"),
    ],
)
def test_overflow_that_no_flag_mends_is_exit_3(
    tmp_path: Path, dtype: torch.dtype, value: float, change: float, option: str, remedy: str
) -> None:
    W = torch.full((4, 4), value, dtype=dtype)
    with pytest.raises(InputError, match=f"become infinite in .*\n{remedy}"):
        one(
            tmp_path,
            W,
            torch.ones(1, 4, dtype=torch.float64),
            torch.full((4, 1), change, dtype=torch.float64),
            dtype=option,
            undo=False,
        )


def test_numbers_at_the_ends_of_float64(tmp_path: Path) -> None:
    """The change is right; what a sum of squares cannot hold is reported as unknown, never as nan."""
    W = torch.full((4, 4), 1e200, dtype=torch.float64)
    merged, report = one(tmp_path, W, torch.ones(1, 4), torch.full((4, 1), 1e200, dtype=torch.float64))
    assert (merged == 2e200).all() and (report.kept, report.tensors[0].relative) == (None, None)
    A, B = torch.full((2, 4), 5e-324, dtype=torch.float64), torch.full((4, 2), 1e308, dtype=torch.float64)
    merged, _ = one(tmp_path, torch.zeros(4, 4, dtype=torch.float64), A, B)
    assert torch.allclose(merged, torch.full((4, 4), 2 * 5e-324 * 1e308, dtype=torch.float64), rtol=1e-6)


@pytest.mark.slow
def test_a_sum_of_squares_of_several_blocks_that_float64_cannot_hold(tmp_path: Path) -> None:
    W = torch.zeros(600, 16384, dtype=torch.float64)
    W[0, 0] = W[300, 0] = 1.2e154
    _, report = one(tmp_path, W, torch.ones(1, 16384), torch.ones(600, 1))
    assert report.tensors[0].relative is None


def test_what_the_base_holds_of_nan_and_inf_is_kept_and_reported(tmp_path: Path) -> None:
    W = weights(8, 8, dtype=torch.bfloat16)
    W[0, 0], W[3, 3], W[4, 4] = torch.nan, torch.inf, -0.0
    merged, report = one(tmp_path, W, *factors(8, 8, 2))
    assert torch.equal(merged.isnan(), W.isnan()) and merged[3, 3] == torch.inf
    assert report.warnings == ("x.weight: 2 weights of the base are inf or nan; they are copied unchanged",)
    assert report.kept is not None and report.kept > 0.99


def test_a_damaged_factor_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """One nan would spread over whole rows."""
    A, B = factors(8, 8, 2)
    A[1, 1] = torch.nan
    with pytest.raises(InputError, match="lora_A.weight: holds nan or inf"):
        one(tmp_path, weights(8, 8), A, B)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("number", [0, 5, 11])
def test_a_damaged_factor_is_named_among_its_neighbours(tmp_path: Path, number: int, bad: float) -> None:
    """Small factors are read many at once, across types and beside one that is too large for that."""
    modules = [f"layers.{i}.q" for i in range(12)]
    rows = {module: 70_000 if i == 6 else 8 for i, module in enumerate(modules)}
    specs = {module: factors(count, 8, 2) for module, count in rows.items()}
    specs = {m: (A.bfloat16() if i % 4 == 1 else A, B) for i, (m, (A, B)) in enumerate(specs.items())}
    specs[modules[number]][1][7, 1] = bad
    base = write_model(tmp_path / "base", {f"{m}.weight": weights(count, 8) for m, count in rows.items()})
    adapter = write_peft(tmp_path / "adapter", specs)
    with pytest.raises(InputError, match=rf"{modules[number]}.lora_B.weight: holds nan or inf"):
        loratool.merge(base, adapter, tmp_path / "out", dry_run=True)
    specs[modules[number]][1][7, 1] = 0.0
    loratool.merge(base, write_peft(tmp_path / "sound", specs), tmp_path / "out", dry_run=True)


def test_report_says_what_rounding_left(tmp_path: Path) -> None:
    """A delta far below the base's ulps: most of it is lost, and the report has to say so."""
    W = weights(200, 200, dtype=torch.bfloat16)
    A, B = factors(200, 200, 4)
    merged, report = one(tmp_path, W, A, B, 2e-3)
    D, gain = change_reference(A, B, 2e-3), to_longdouble(merged) - to_longdouble(W)
    row = report.tensors[0]
    assert row.kept == pytest.approx(float((gain * D).sum() / (D * D).sum()), rel=1e-4) and row.kept < 0.5
    assert row.changed == float((gain != 0).mean())
    assert row.relative == pytest.approx(float(np.sqrt((D * D).sum() / (to_longdouble(W) ** 2).sum())), rel=1e-5)
    assert report.kept == row.kept and "merge with --dtype fp16 or fp32" in report.warnings[0]
    _, wide = one(tmp_path, W, A, B, 2e-3, dtype="fp32", undo=False)
    assert wide.kept == pytest.approx(1, abs=1e-4) and not wide.warnings


@needs_shared
@pytest.mark.parametrize("name", ["0b51ef8", "9dd577d"])
def test_a_real_adapter_that_bf16_swallows(tmp_path: Path, name: str) -> None:
    """Real adapters, so slight that bf16 keeps a few percent of them; the base has the model's names and scale."""
    adapter = SHARED / "minilm-lora-dee66" / f"peft_adapter_r4_a16_d0.0_e1_b16__{name}"
    names = [f"encoder.layer.{i}.attention.self.{m}.weight" for i in range(6) for m in ("query", "value")]
    base = write_model(
        tmp_path / "base",
        {n: 2 * weights(384, 384, seed=i, dtype=torch.bfloat16) for i, n in enumerate(names)},
        {"model_type": "bert"},
    )
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert (
        report.kept is not None and report.kept < 0.15 and any("loses part of the delta" in w for w in report.warnings)
    )


class TestRefusals:
    def test_swapped_arguments(self) -> None:
        base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
        with pytest.raises(InputError, match=rf'is an adapter.*\nswap them: loratool.merge\("{base}", "{adapter}"\)'):
            loratool.merge(adapter, base)

    def test_an_adapter_in_place_of_the_base_and_no_base_at_all(self) -> None:
        adapter = FIXTURES / "llama" / "adapter"
        with pytest.raises(InputError) as caught:
            loratool.merge(adapter, adapter)
        assert caught.value.remedy == "its base is fixtures/llama/base"

    def test_a_weight_that_is_too_large_for_its_scale(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="too large"):
            loratool.merge(FIXTURES / "llama" / "base", (FIXTURES / "llama" / "adapter", 1.7e308), tmp_path / "out")

    @pytest.mark.parametrize("weight", [float("nan"), float("inf")])
    def test_weights_that_are_no_numbers(self, weight: float) -> None:
        with pytest.raises(UsageError, match="not a finite number"):
            loratool.merge(FIXTURES / "llama" / "base", (FIXTURES / "llama" / "adapter", weight))

    def test_options_out_of_their_tables(self, tmp_path: Path) -> None:
        arguments = (FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter", tmp_path / "out")
        with pytest.raises(UsageError, match="dtype: 'int4'"):
            loratool.merge(*arguments, undo=False, dtype="int4")
        with pytest.raises(UsageError, match="no adapter"):
            loratool.merge(arguments[0], [], arguments[2])
        with pytest.raises(UsageError, match="device: 'gpu'"):
            loratool.merge(*arguments, device="gpu")
        with pytest.raises(loratool.MachineError, match="no float64"):
            loratool.merge(*arguments, device="mps")


def test_what_the_warning_advises_fits_the_type(tmp_path: Path) -> None:
    A, B = factors(20, 20, 2)
    for dtype, advice in (
        ("F16", "merge with --dtype fp32, or keep"),
        ("F32", "; keep the adapter separate"),
        ("F64", "; keep"),
    ):
        W = weights(20, 20, dtype={"F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype])
        _, report = one(tmp_path, W, A, B, {"F16": 1e-4, "F32": 1e-8, "F64": 1e-17}[dtype])
        assert advice in report.warnings[0]


def test_an_f64_tensor_is_no_eight_bit_float(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"x.weight": weights(6, 4), "d": weights(2, dtype=torch.float64)})
    report = loratool.merge(
        base, write_peft(tmp_path / "a", {"x": factors(6, 4, 2)}), tmp_path / "out", undo=False, dtype="half"
    )
    assert not report.warnings and load_model(tmp_path / "out")["d"].dtype == torch.float16


def test_alpha_is_for_those_of_several_adapters_that_lack_it(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"x.weight": weights(6, 4)})
    told = write_peft(tmp_path / "a", {"x": factors(6, 4, 2)}, lora_alpha=6)
    A, B = factors(6, 4, 2, seed=1)
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, tmp_path / "bare.safetensors")
    report = loratool.merge(base, [told, tmp_path / "bare.safetensors"], tmp_path / "out", alpha=4)
    assert report.tensors[0].scales == (3.0, 2.0)
    with pytest.raises(NeedsFlag, match="alpha"):
        loratool.merge(base, [told, tmp_path / "bare.safetensors"], tmp_path / "out2")
    with pytest.raises(UsageError, match="all of these do"):
        loratool.merge(base, [told, told], tmp_path / "out2", alpha=4)


def test_a_wrong_base_is_said_before_a_missing_alpha(tmp_path: Path) -> None:
    """--alpha is asked for, with exit 4, only if the merge is right with it."""
    A, B = factors(6, 4, 2, seed=1)
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, tmp_path / "bare.safetensors")
    for shape in ((7, 4), (6, 5)):
        base = write_model(tmp_path / f"base{shape[0]}", {"x.weight": weights(*shape), "y.weight": weights(3, 3)})
        with pytest.raises(InputError, match="but the base weight is"):
            loratool.merge(base, tmp_path / "bare.safetensors", tmp_path / "out")
    with pytest.raises(InputError, match="not in the base"):
        loratool.merge(
            write_model(tmp_path / "other", {"y.weight": weights(6, 4)}), tmp_path / "bare.safetensors", tmp_path / "o"
        )
    assert not (tmp_path / "out").exists()


def test_only_what_is_selected_is_merged(tmp_path: Path) -> None:
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    report = loratool.merge(
        base, adapter, tmp_path / "out", target=["q_proj", "mlp.down_proj"], exclude=["re:layers.2"], layers="1-2"
    )
    assert {t.name for t in report.tensors} == {
        f"model.layers.1.{m}.weight" for m in ("mlp.down_proj", "self_attn.q_proj")
    }
    assert len(report.left_out) == 19
    before, after = load_model(base), load_model(tmp_path / "out")
    assert {k for k in before if not torch.equal(before[k], after[k])} == {t.name for t in report.tensors}


def test_dry_run_tells_all_and_writes_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "llama" / "base", base)
    report = loratool.merge(base, FIXTURES / "llama" / "adapter", tmp_path / "out", dry_run=True)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    with pytest.raises(loratool.MachineError):
        loratool.merge(base, FIXTURES / "llama" / "adapter", tmp_path / "out", dry_run=True, device="mps")
    done = loratool.merge(base, FIXTURES / "llama" / "adapter", tmp_path / "out")
    assert (report.nbytes, report.files, report.copied) == (done.nbytes, done.files, done.copied)
    assert [(t.name, t.rank, t.scales) for t in report.tensors] == [(t.name, t.rank, t.scales) for t in done.tensors]


def test_a_dry_run_hashes_adapters_only_to_sort_them(tmp_path: Path) -> None:
    """What it says of the output's size is right without a hash, whose length is known."""
    base, one = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    sha256 = hashlib.sha256((one / "adapter_model.safetensors").read_bytes()).hexdigest()
    for adapters, found in ((one, [""]), ([one, (one, 0.5)], [sha256, sha256])):
        report = loratool.merge(base, adapters, tmp_path / "out", dry_run=True)
        assert [each.sha256 for each in report.adapters] == found
        done = loratool.merge(base, adapters, tmp_path / "out", force=True)
        assert (report.nbytes, [each.sha256 for each in done.adapters]) == (done.nbytes, [sha256] * len(found))


def test_progress_ends_at_the_whole_output(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = loratool.merge(
        FIXTURES / "llama" / "base",
        FIXTURES / "llama" / "adapter",
        tmp_path / "out",
        progress=lambda d, t: seen.append((d, t)),
    )
    data = sum(v.nbytes for v in load_model(tmp_path / "out").values())
    assert seen[-1] == (data, report.nbytes) and seen == sorted(seen)


def test_a_stack_that_one_adapter_replaces_takes_no_experts_of_another(tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.experts"
    name = f"{stack}.down_proj"
    base = write_model(tmp_path / "base", {name: weights(3, 4, 5)}, {"model_type": "mixtral"})
    A, B = factors(4, 5, 6)
    parts: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = [
        ({name: weights(3, 4, 5, seed=4)}, {}),
        ({f"{stack}.lora_A.weight": A, f"{stack}.lora_B.weight": B}, {"target_parameters": ["mlp.experts.down_proj"]}),
    ]
    for folder, (tensors, config) in zip(("whole", "added"), parts, strict=True):
        (tmp_path / folder).mkdir()
        stored = {f"base_model.model.{key}": value.contiguous() for key, value in tensors.items()}
        save_file(stored, tmp_path / folder / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "peft_version": "0.19.0", **config}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"whole replaces it, and .*added adds to its experts"):
        loratool.merge(base, [tmp_path / "whole", tmp_path / "added"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loratool.merge(base, tmp_path / "whole", tmp_path / "first")
    loratool.merge(tmp_path / "first", tmp_path / "added", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_kept_of_a_change_that_rounds_away(dtype: torch.dtype, tmp_path: Path) -> None:
    A, B = factors(16, 8, 2, dtype=torch.float64)
    model = write_model(tmp_path / "base", {"x.weight": weights(16, 8, dtype=dtype)})
    report = loratool.merge(model, write_peft(tmp_path / "a", {"x": (A * 1e-21, B * 1e-21)}), tmp_path / "out")
    assert (report.tensors[0].changed, report.tensors[0].kept) == (0.0, 0.0)


def test_what_is_kept_of_a_change_far_below_the_weights_is_a_share(tmp_path: Path) -> None:
    """Where W is 0 all is kept, and everywhere else nothing, whatever tensors are merged in one batch."""
    grid = {f"{name}.weight": torch.randint(-2, 3, (16, 8)) / 8 for name in "pqrstuvw"}
    made = {name: factors(16, 8, 3, seed, torch.float64) for seed, name in enumerate("pqrstuvw")}
    tiny = {name: (A * 1e-21, B * 1e-19) if name in "qt" else (A, B) for name, (A, B) in made.items()}
    model = write_model(tmp_path / "base", grid)
    report = loratool.merge(model, write_peft(tmp_path / "a", tiny, lora_alpha=0.7), tmp_path / "out")
    assert all(row.kept is not None and -0.01 <= row.kept <= 1.01 for row in report.tensors)
    assert {row.name for row in report.tensors if 0 < row.changed < 0.5} == {"q.weight", "t.weight"}


def test_figures_do_not_depend_on_inf_in_another_tensor_of_the_batch(tmp_path: Path) -> None:
    A, B = factors(16, 8, 2, dtype=torch.float64)
    adapter = write_peft(tmp_path / "a", {"x": (A, B * 1e-30), "y": factors(16, 8, 2, seed=1, dtype=torch.float64)})
    whole = {"x.weight": weights(16, 8), "y.weight": weights(16, 8, seed=1)}
    plain = loratool.merge(write_model(tmp_path / "base", whole), adapter, tmp_path / "out")
    whole["y.weight"][3, 4] = torch.inf
    report = loratool.merge(write_model(tmp_path / "odd", whole), adapter, tmp_path / "of-odd")
    assert report.tensors[0] == plain.tensors[0] and (report.tensors[0].relative or 0) > 0
    assert load_model(tmp_path / "of-odd")["y.weight"][3, 4] == torch.inf
