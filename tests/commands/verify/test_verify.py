"""Hold verify: every planted fault is found and named, and no right merge is called wrong, whoever made it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, covering, factors, few, load_model, slow, spread, weights, write_model, write_peft
from lib.models.peft_models import FAMILIES, kinds, kinds_of_families, write_pair
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.commands.verify import command
from loratool.commands.verify.command import is_optional
from loratool.commands.verify.diagnosis import Sums
from loratool.commands.verify.rounding_bounds import Predictions
from loratool.commands.verify.roundings import DORA_ROUNDINGS, NARROW, ROUNDINGS
from loratool.commands.verify.trial import TrialOutcome, max_ulps_off
from loratool.errors import InputError, UsageError
from loratool.files.dtypes import DTYPE_NAMES
from loratool.numerics.arrays import Numbers
from loratool.numerics.tensors import numbers_of
from loratool.views.parts.document import text_of

pytestmark = [pytest.mark.filterwarnings("ignore")]
SHAPE = (96, 64)
NAMES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("q", "v")]


WIDE = (torch.bfloat16, torch.float16, torch.float32)

# For grids: what float16 rounds, bfloat16 does
FEW_WIDE = [torch.bfloat16, slow(torch.float16), torch.float32]


@pytest.fixture(params=WIDE, ids=["bf16", "fp16", "fp32"])
def dtype(request: Any) -> torch.dtype:
    return request.param


def write_inputs(
    folder: Path,
    dtype: torch.dtype,
    rank: int = 4,
    square: bool = False,
    relative: float | None = None,
    factor_dtype: torch.dtype = torch.float32,
    **config: Any,
) -> tuple[Path, Path]:
    """Write a base of a few matrices and norms, and an adapter whose delta is some percent of them, or `relative`."""
    shape = (96, 96) if square else SHAPE
    tensors = {f"{name}.weight": weights(*shape, seed=i, dtype=dtype) for i, name in enumerate(NAMES)}
    tensors |= {f"{name}.norm.weight": torch.ones(64, dtype=dtype) for name in NAMES}
    base = write_model(folder / "base", tensors, {"model_type": "llama", "tie_word_embeddings": False})
    made = {}
    for i, name in enumerate(NAMES):
        A, B = factors(*shape, rank, seed=i)
        W = tensors[f"{name}.weight"].double()
        B = B * (0.3 if relative is None else relative * float(W.norm() / (B @ A).double().norm()) / 2)
        made[name] = A.to(factor_dtype), B.to(factor_dtype)
    return base, write_peft(folder / "adapter", made, lora_alpha=2 * rank, **config)


def change(adapter: Path, name: str, scale: float = 2.0) -> Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{name}.lora_{role}.weight"].double() for role in "AB")
    return scale * (B @ A)


def write_merged(folder: Path, base: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(base, folder, dirs_exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# How others sum: (W, A, B, scale, dtype) -> W'.
def fp32_sum(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return (W.float() + (B.float() @ A.float()) * s).to(W.dtype)


def rounded_change(kind: torch.dtype) -> Callable[..., Tensor]:
    return lambda W, A, B, s: (W + ((B.float() @ A.float()) * s).to(kind).to(W.dtype)).to(W.dtype)


def rounded_twice(kind: torch.dtype) -> Callable[..., Tensor]:
    return lambda W, A, B, s: (W.float() + ((B.float() @ A.float()).to(kind) * s).float()).to(W.dtype)


def rounded_factors(kind: torch.dtype) -> Callable[..., Tensor]:
    return lambda W, A, B, s: (W.float() + (B.to(kind).float() @ A.to(kind).float()) * s).to(W.dtype)


ARITHMETIC = {
    "fp32": fp32_sum,
    "through double": lambda W, A, B, s: (W.double() + B.double() @ A.double() * s).float().to(W.dtype),
    "reversed order": lambda W, A, B, s: fp32_sum(W, A.flip(0), B.flip(1), s),
    "bf16 change": rounded_change(torch.bfloat16),
    "fp16 change": rounded_change(torch.float16),
    "bf16 product": rounded_twice(torch.bfloat16),
    "fp16 product": rounded_twice(torch.float16),
    "bf16 factors": rounded_factors(torch.bfloat16),
    "fp16 factors": rounded_factors(torch.float16),
}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_other_arithmetic_is_no_fault(tmp_path: Path, dtype: torch.dtype, arithmetic: str) -> None:
    base, adapter = write_inputs(tmp_path, dtype)
    stored = load_file(adapter / "adapter_model.safetensors")
    tensors = load_model(base)
    for name in NAMES:
        A, B = (stored[f"base_model.model.{name}.lora_{role}.weight"] for role in "AB")
        tensors[f"{name}.weight"] = ARITHMETIC[arithmetic](tensors[f"{name}.weight"], A, B, 2.0)
    report = loratool.verify(base, adapter, write_merged(tmp_path / "m", base, tensors))
    assert report.status == "proven", report.tensors
    assert report.exact + report.rounded == len(NAMES)


SUMS: dict[str, Callable[..., Tensor]] = {
    "fp32": fp32_sum,
    "scale first": lambda W, A, B, s: (W.float() + (B.float() * s) @ A.float()).to(W.dtype),
    "scale split": lambda W, A, B, s: (W.float() + (B.float() * s**0.5) @ (A.float() * s**0.5)).to(W.dtype),
    "addmm": lambda W, A, B, s: torch.addmm(W.float(), B.float(), A.float(), alpha=s).to(W.dtype),
    "through double": ARITHMETIC["through double"],
    "bf16 change": rounded_change(torch.bfloat16),
    "fp16 change": rounded_change(torch.float16),
}


@pytest.mark.parametrize(
    ("wide", "factor_dtype", "rank", "relative"),
    covering((torch.float32, torch.float64), (torch.float32, torch.bfloat16, torch.float16), (4, 64), (1e-2, 1e-4)),
)
def test_float32_sums_that_change_few_weights_are_no_fault(
    tmp_path: Path, wide: torch.dtype, factor_dtype: torch.dtype, rank: int, relative: float
) -> None:
    base, adapter = write_inputs(tmp_path, wide, rank, relative=relative, factor_dtype=factor_dtype)
    stored, tensors = load_file(adapter / "adapter_model.safetensors"), load_model(base)
    for title, add in SUMS.items():
        merged = dict(tensors)
        for name in NAMES:
            A, B = (stored[f"base_model.model.{name}.lora_{role}.weight"] for role in "AB")
            merged[f"{name}.weight"] = add(tensors[f"{name}.weight"], A, B, 2.0)
        report = loratool.verify(base, adapter, write_merged(tmp_path / "m", base, merged))
        assert report.status == "proven", (title, report.tensors)


def peft_roundings(
    folder: Path, family: str, dtype: torch.dtype, factor_dtype: torch.dtype, kind: str, safe: bool
) -> set[str]:
    """Let peft merge with and without autocast, and return the roundings that explain it."""
    peft = pytest.importorskip("peft")
    names = FAMILIES[family]
    pair = write_pair(folder / "x", names.make(), **kinds(names)[kind])
    for stored, each in ((pair.base, dtype), (pair.adapter, factor_dtype)):
        for file in stored.glob("*.safetensors"):
            save_file({k: v.to(each) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    found: set[str] = set()
    for autocast in (False, True):
        model = pair.cls.from_pretrained(pair.base, dtype=dtype)
        wrapped = peft.PeftModel.from_pretrained(model, pair.adapter, autocast_adapter_dtype=autocast)
        merged = wrapped.merge_and_unload(safe_merge=safe)
        merged.save_pretrained(folder / f"m{autocast}")
        report = loratool.verify(pair.base, pair.adapter, folder / f"m{autocast}")
        assert report.status == "proven", report.tensors
        found.update(report.rounding)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "embedding and head, dora"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_own_merges(
    tmp_path: Path, family: str, factor_dtype: torch.dtype, safe: bool, kind: str, dtype: torch.dtype
) -> None:
    peft_roundings(tmp_path, family, dtype, factor_dtype, kind, safe)


# Merges of that grid which together need every way that the grid needs, by what sets them apart
PEFT_WAYS: dict[str, list[str]] = {
    "gpt2 fp16 fp32 lora": ["one rounding of a float32 sum (peft with an fp32 adapter)", "factors and change in fp16"],
    "llama bf16 fp32 lora safe": ["change rounded to the base's type, then the sum", "factors and change in bf16"],
    "gpt2 fp16 fp32 dora": [
        "factors and all else in fp16",
        "factors and all else in fp16, from weights in torch.float16",
        "float32 norms, one rounding (peft with an fp32 adapter)",
        "float32 norms, one rounding (peft with an fp32 adapter), from weights in torch.float16",
    ],
    "llama bf16 fp32 dora": [
        "factors and all else in bf16",
        "factors and all else in bf16, from weights in torch.bfloat16",
        "float32 norms, one rounding (peft with an fp32 adapter), from weights in torch.bfloat16",
    ],
    "llama bf16 bf16 dora": ["all in bf16"],
    "llama fp16 bf16 dora": ["all in fp16"],
}


@pytest.mark.parametrize("case", spread(PEFT_WAYS, 3))
def test_each_of_pefts_ways(tmp_path: Path, case: str) -> None:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    family, dtype, factor_dtype, kind, *safe = case.split()
    kind = {"dora": "embedding and head, dora"}.get(kind, kind)
    found = peft_roundings(tmp_path, family, types[dtype], types[factor_dtype], kind, bool(safe))
    assert found >= set(PEFT_WAYS[case])


def merge_rounded(
    words: list[str], kind: torch.dtype, W: Tensor, A: Tensor, B: Tensor, scale: float, m: Tensor | None
) -> Tensor:
    """Merge as a row of the tables of roundings says, in float32 but for what `words` put in `kind`."""

    def narrow(word: str, x: Tensor) -> Tensor:
        return x.to(kind).float() if word in words else x

    D = narrow("change", narrow("product", narrow("factors", B) @ narrow("factors", A)) * scale)
    D = D.to(W.dtype).float() if "cast" in words else D
    if m is None:
        return (W.float() + D).to(W.dtype)
    V = narrow("total", W.float() + D)
    ratio = narrow("ratio", narrow("magnitude", m) / narrow("total", V.norm(dim=1)))
    return narrow("ratio", ratio[:, None] * V).to(W.dtype)


KINDS = {name: getattr(torch, DTYPE_NAMES[form.name]) for name, form in NARROW.items()}


def rounds_in_the_wider_type(title: str, kind: str, dtype: torch.dtype) -> bool:
    """Whether torch would add two types in the wider one, where the title says the other."""
    return "total" in (ROUNDINGS | DORA_ROUNDINGS)[title].split() and dtype != KINDS[kind]


@pytest.mark.parametrize(
    ("title", "kind", "dtype"),
    covering([*ROUNDINGS, *DORA_ROUNDINGS], KINDS, WIDE, never=rounds_in_the_wider_type),
)
def test_every_way_of_rounding_is_no_fault(tmp_path: Path, title: str, kind: str, dtype: torch.dtype) -> None:
    if rounds_in_the_wider_type(title, kind, dtype):
        pytest.skip("torch adds two types in the wider one")
    words = (ROUNDINGS | DORA_ROUNDINGS)[title].split()
    W = merged = weights(*SHAPE, dtype=dtype)
    base, adapters = write_model(tmp_path / "base", {"x.weight": W}), []
    for seed in range(2 if "apart" in words else 1):
        A, B, m = *factors(*SHAPE, 5, seed=seed), None
        is_dora = title in DORA_ROUNDINGS and not seed
        adapter = write_peft(tmp_path / str(seed), {"x": (A, B * 0.3)}, lora_alpha=7, use_dora=is_dora)
        if is_dora:
            m = W.float().norm(dim=1) * torch.linspace(0.97, 1.02, len(W))
            file = adapter / "adapter_model.safetensors"
            tensors = {**load_file(file), "base_model.model.x.lora_magnitude_vector": m}
            save_file(tensors, file, metadata={"format": "pt"})
        merged = merge_rounded(words, KINDS[kind], merged, A, B * 0.3, 7 / 5, m)
        adapters.append(adapter)
    report = loratool.verify(base, adapters, write_merged(tmp_path / "m", base, {"x.weight": merged}))
    assert report.status == "proven", report.tensors


@pytest.mark.parametrize(("family", "kind"), [*kinds_of_families()])
def test_every_kind_of_ours_is_exact(tmp_path: Path, family: str, kind: str) -> None:
    names = FAMILIES[family]
    pair = write_pair(tmp_path / "x", names.make(), **kinds(names)[kind])
    loratool.merge(pair.base, pair.adapter, tmp_path / "m")
    report = loratool.verify(pair.base, pair.adapter, tmp_path / "m")
    assert report.status == "proven" and report.rounded == report.wrong == 0, report.tensors
    assert loratool.verify(pair.base, pair.adapter, pair.base).status == "wrong"


Q, NORM = f"{NAMES[0]}.weight", f"{NAMES[0]}.norm.weight"


def skip_one(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    t[Q] = base[Q]


def scaled(factor: float) -> Callable[..., None]:
    def plant(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
        t[Q] = (base[Q].double() + factor * D(NAMES[0])).to(base[Q].dtype)

    return plant


def transpose(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    t[Q] = (base[Q].double() + D(NAMES[0]).T).to(base[Q].dtype)


def swap(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    other = f"{NAMES[1]}.weight"
    t[Q] = (base[Q].double() + D(NAMES[1])).to(base[Q].dtype)
    t[other] = (base[other].double() + D(NAMES[0])).to(base[Q].dtype)


def bump(steps: int) -> Callable[..., None]:
    def plant(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
        value = t[Q][5, 7]
        for _ in range(steps):
            value = torch.nextafter(value, torch.full_like(value, torch.inf))
        t[Q] = t[Q].clone()
        t[Q][5, 7] = value

    return plant


def norm(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    t[f"{NAMES[0]}.norm.weight"] = t[f"{NAMES[0]}.norm.weight"] * 1.5


def other_base(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    for name in t:
        t[name] = (t[name].double() + 0.02 * torch.randn(t[name].shape)).to(t[name].dtype)


def negate(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    scaled(-1.0)(t, base, D)


def swap_whole(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    other = f"{NAMES[1]}.weight"
    t[Q], t[other] = t[other], t[Q]


def all_nan(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    t[Q] = torch.full_like(t[Q], torch.nan)


def nan_in_norm(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
    t[NORM] = torch.where(torch.arange(len(t[NORM])) == 3, torch.nan, t[NORM]).to(t[NORM].dtype)


def one(value: float) -> Callable[..., None]:
    def plant(t: dict[str, Tensor], base: dict[str, Tensor], D: Callable[[str], Tensor]) -> None:
        t[Q] = t[Q].clone()
        t[Q][3, 4] = value

    return plant


FAULTS = {
    "nan": (one(torch.nan), "1 weight altered, inf or nan among them"),
    "inf": (one(torch.inf), "1 weight altered, inf or nan among them"),
    "-inf": (one(-torch.inf), "1 weight altered, inf or nan among them"),
    "nan in a norm": (nan_in_norm, "1 weight of an untouched tensor altered, inf or nan among them"),
    "all nan": (all_nan, "not this base"),
    "negated": (negate, "negated"),
    "swapped whole": (swap_whole, f"it is a copy of {NAMES[1]}.weight"),
    "skipped": (skip_one, "the delta is not applied"),
    "twice": (scaled(2.0), "applied twice, or its scale doubled"),
    "half": (scaled(0.5), "half its scale"),
    "sqrt": (scaled(3.0), r"alpha / sqrt\(r\), not alpha / r"),
    "1/sqrt": (scaled(1 / 3), r"alpha / r, not alpha / sqrt\(r\)"),
    "scale": (scaled(7.0), "7 times what it should be"),
    "transposed": (transpose, "transposed"),
    "swapped": (swap, f"the delta of {NAMES[1]}.weight"),
    "one step": (bump(1), "1 weight altered, by up to 1 ulp"),
    "two steps": (bump(2), "1 weight altered, by up to 2 ulps"),
    "norm": (norm, "an untouched tensor altered"),
    "base": (other_base, "another change|not this base"),
}


@pytest.mark.parametrize(("dtype", "sampled"), spread(product(WIDE, (False, True)), 2))
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_and_named(
    tmp_path: Path, fault: str, dtype: torch.dtype, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr("loratool.commands.verify.command._drawn", lambda plan: set())
    base, adapter = write_inputs(tmp_path, dtype, rank=9, square=fault == "transposed")
    loratool.merge(base, adapter, tmp_path / "m")
    tensors = load_model(tmp_path / "m")
    plant, message = FAULTS[fault]
    plant(tensors, load_model(base), lambda name: change(adapter, name))
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", tmp_path / "m", tensors))
    assert report.status == "wrong"
    wrong = [tensor for tensor in report.tensors if tensor.verdict == "wrong"]
    assert len(wrong) == {"swapped": 2, "swapped whole": 2, "base": len(tensors)}.get(fault, 1)
    named = next(t for t in wrong if t.name == (NORM if "norm" in fault else Q))
    assert re.search(message, named.detail), named.detail


@pytest.mark.parametrize("sampled", [False, True], ids=["in full", "sampled"])
@pytest.mark.parametrize("factor", [-1.0, 0.5, 2.0, 7.0])
def test_what_was_found_is_measured(
    tmp_path: Path, factor: float, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sums over all weights; a sample of rows of a wrong scale has nearly the same."""
    if sampled:
        monkeypatch.setattr("loratool.commands.verify.command._drawn", lambda plan: set())
    base, adapter = write_inputs(tmp_path, torch.float32)
    loratool.merge(base, adapter, tmp_path / "m")
    tensors, before = load_model(tmp_path / "m"), load_model(base)
    scaled(factor)(tensors, before, lambda name: change(adapter, name))
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", tmp_path / "m", tensors))
    (wrong,) = (tensor for tensor in report.tensors if tensor.verdict == "wrong")
    found = wrong.misfit
    assert found and found.scale == pytest.approx(factor, rel=1e-5)
    assert found.cosine == pytest.approx(math.copysign(1, factor), rel=1e-5)
    assert found.distance == pytest.approx(abs(factor - 1), rel=1e-5)
    right = load_model(tmp_path / "m")[Q]
    assert found.differing == pytest.approx(float((right != tensors[Q]).double().mean()))
    here, wanted = (x.view(torch.int32).long() for x in (tensors[Q], right))
    alike = (here < 0) == (wanted < 0)  # where the signs are equal, neighbors have neighboring bits
    assert found.steps is not None and found.steps >= int((here - wanted).abs()[alike].max())


@pytest.mark.parametrize(("arithmetic", "small", "dtype"), covering(ARITHMETIC, (2.0**-22, 2.0**-9, 1.0, 2.0**6), WIDE))
def test_no_way_of_rounding_is_ruled_out(
    tmp_path: Path, dtype: torch.dtype, arithmetic: str, small: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of factors, too, that fp16 holds with few bits, or as 0, and where no weight hides their errors."""
    monkeypatch.setattr(command, "_drawn", lambda plan: set())
    monkeypatch.setattr(command, "FEW", -1.0)
    seen = list[bool]()
    rule_out = Predictions.rule_out

    def ruled_out(*call: Any) -> bool:
        seen.append(rule_out(*call))
        return seen[-1]

    monkeypatch.setattr(Predictions, "rule_out", ruled_out)
    base, adapter = write_inputs(tmp_path, dtype)
    file = adapter / "adapter_model.safetensors"
    stored = {name: tensor * small for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    tensors = {
        name: W * (torch.arange(len(W)) % 2).to(W.dtype)[:, None] if W.dim() == 2 else W
        for name, W in load_model(base).items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for name in NAMES:
        A, B = (stored[f"base_model.model.{name}.lora_{role}.weight"] for role in "AB")
        tensors[f"{name}.weight"] = ARITHMETIC[arithmetic](tensors[f"{name}.weight"], A, B, 2.0)
    loratool.verify(base, adapter, write_merged(tmp_path / "m", base, tensors), allow="inconclusive")
    assert not any(seen)
    if small == 1 and "change" in arithmetic:
        assert seen


@pytest.mark.parametrize("sums", [Sums(1.0, 5e-324, 1.0, 1.0), Sums(math.inf, 1.0, math.nan, 1.0), Sums(1.0)])
def test_figures_that_json_cannot_hold_are_left_out(sums: Sums) -> None:
    assert sums.misfit(0.5, 1.0) is None


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)], ids=["bf16", "fp16"])
def test_few_differing_weights_are_judged_as_all_are(
    tmp_path: Path, dtype: torch.dtype, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One altered weight, by two steps and in a rounded merge too, tips both alike."""
    base, adapter = write_inputs(tmp_path, dtype, rank=64, relative=0.02)
    stored, tensors = load_file(adapter / "adapter_model.safetensors"), load_model(base)
    for name in NAMES:
        A, B = (stored[f"base_model.model.{name}.lora_{role}.weight"] for role in "AB")
        tensors[f"{name}.weight"] = ARITHMETIC[arithmetic](tensors[f"{name}.weight"], A, B, 2.0)
    bump(2)(tensors, {}, lambda name: torch.zeros(0))
    merged = write_merged(tmp_path / "m", base, tensors)
    calls = list[bool]()
    single = command.try_single_rounding
    monkeypatch.setattr(command, "FEW", 1.0)

    def tried(*call: Any) -> TrialOutcome:
        outcome = single(*call)
        calls.append(outcome.title is not None)
        return outcome

    monkeypatch.setattr(command, "try_single_rounding", tried)
    by_few = loratool.verify(base, adapter, merged)
    monkeypatch.setattr(command, "FEW", -1.0)
    by_all = loratool.verify(base, adapter, merged)
    assert by_few.tensors == by_all.tensors and len(calls) == len(NAMES) - by_all.exact
    assert by_all.status == "wrong"
    if arithmetic in ("fp32", "through double"):
        assert [*calls].count(True) == len(calls) - 1


def test_a_report_is_neither_true_nor_false(tmp_path: Path) -> None:
    base, adapter = write_inputs(tmp_path, torch.float32)
    loratool.merge(base, adapter, tmp_path / "m")
    right, wrong = loratool.verify(base, adapter, tmp_path / "m"), loratool.verify(base, adapter, base)
    assert right.ok and not wrong.ok
    right.check()
    with pytest.raises(loratool.CheckError, match=r"^wrong: .* is not .*") as raised:
        wrong.check()
    assert raised.value.message == text_of(wrong.document().verdict[-1])
    for report in (right, wrong, loratool.diff(base, tmp_path / "m")):
        with pytest.raises(TypeError, match=r"use \.ok"):
            bool(report)


@pytest.mark.parametrize("value", [0.0, 1e-42, -1e30, -3e38], ids=str)
def test_the_distance_of_a_weight_is_a_count_of_numbers_between(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    """However small the weight that is found, there are no more steps than its type has numbers; numpy counts them."""
    base, adapter = write_inputs(tmp_path, dtype)
    loratool.merge(base, adapter, tmp_path / "m")
    tensors = load_model(tmp_path / "m")
    expected = tensors[Q][3, 4].clone()
    one(value)(tensors, {}, lambda name: Tensor())
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", tmp_path / "m", tensors))
    (wrong,) = [each for each in report.tensors if each.verdict == "wrong"]
    found = re.fullmatch(r"1 weight altered, by up to ([\d.,e]+) ulps", wrong.detail)
    if not tensors[Q].isfinite().all():  # beyond float16
        assert wrong.detail == "1 weight altered, inf or nan among them"
        return
    assert found, wrong.detail
    numbers = [tensor.float() if dtype == torch.bfloat16 else tensor for tensor in (tensors[Q][3, 4], expected)]
    steps = float(np.max(np.testing.assert_array_max_ulp(*(each.numpy() for each in numbers), maxulp=2**33)))
    steps = steps / 2**16 if dtype == torch.bfloat16 else steps
    assert float(found[1].replace(",", "")) == pytest.approx(steps, rel=0.05)


def test_ulps_count_the_numbers_of_every_type() -> None:
    """All numbers of a type of 8 or 16 bits in their order, by their values alone, and of others numpy's count."""
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16):
        bits = torch.arange(256, dtype=torch.uint8) if kind.itemsize == 1 else torch.arange(-(2**15), 2**15).short()
        numbers = bits.view(kind).double()
        numbers = numbers[numbers.isfinite()].unique(sorted=True)
        at = torch.randint(0, len(numbers), (2, 500), generator=torch.Generator().manual_seed(1))
        for one_at, other_at in at.T.tolist():
            pair = numbers_of(numbers[[one_at]].to(kind)), numbers_of(numbers[[other_at]].to(kind))
            assert max_ulps_off(*pair, np.array([True])) == max(1, abs(one_at - other_at)), (kind, *pair)
    most, yes = np.array([np.finfo(np.float64).max]), np.array([True])
    ends, minus = Numbers.of(most), Numbers.of(-most)
    assert max_ulps_off(ends, Numbers.of(np.nextafter(most, 0.0)), yes) == 1
    assert max_ulps_off(minus, ends, yes) == 2 * float(0x7FEFFFFFFFFFFFFF)  # more than an int64 holds
    assert max_ulps_off(ends, ends, ~yes) == 0


@pytest.mark.parametrize("is_whole", [slow(False), True])
def test_the_one_of_many_that_a_tensor_was_swapped_with_is_named(tmp_path: Path, is_whole: bool) -> None:
    """Of 20 others only the nearest by their sketches are replayed."""
    names = [f"model.layers.{i}.q" for i in range(21)]
    tensors = {f"{name}.weight": weights(*SHAPE, seed=i, dtype=torch.bfloat16) for i, name in enumerate(names)}
    base = write_model(tmp_path / "base", tensors, {"model_type": "llama"})
    made = {name: factors(*SHAPE, 4, seed=100 + i) for i, name in enumerate(names)}
    adapter = write_peft(tmp_path / "adapter", made, lora_alpha=8)
    moved = {}
    for i, name in enumerate(names):
        at, other = f"{name}.weight", names[(i + 5) % len(names)]
        own = tensors[f"{other}.weight" if is_whole else at]
        moved[at] = (own.double() + change(adapter, other)).to(own.dtype)
    report = loratool.verify(base, adapter, write_merged(tmp_path / "m", base, moved))
    title = "it is a copy of {}.weight" if is_whole else "it has the delta of {}.weight"
    expected = {f"{name}.weight": title.format(names[(i + 5) % len(names)]) for i, name in enumerate(names)}
    assert {tensor.name: tensor.detail for tensor in report.tensors} == expected


SMALL = ["skipped", "twice", "half", "sqrt", "1/sqrt", "negated", "transposed", "swapped"]


@pytest.mark.parametrize("dtype", FEW_WIDE, ids=str)
@pytest.mark.parametrize("relative", few([1e-3, 1e-4], 1e-4))
@pytest.mark.parametrize("fault", SMALL)
def test_faults_are_named_where_rounding_leaves_little_of_them(
    tmp_path: Path, fault: str, relative: float, dtype: torch.dtype
) -> None:
    base, adapter = write_inputs(tmp_path, dtype, rank=9, square=fault == "transposed", relative=relative)
    loratool.merge(base, adapter, tmp_path / "m")
    tensors = load_model(tmp_path / "m")
    plant, message = FAULTS[fault]
    plant(tensors, load_model(base), lambda name: change(adapter, name))
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", tmp_path / "m", tensors))
    named = next(t for t in report.tensors if t.name == Q)
    assert named.verdict == "wrong" and re.search(message, named.detail), named.detail


@pytest.mark.parametrize("relative", few([1.0, 1e-1, 1e-2, 1e-3, 1e-4], 1e-2))
def test_one_step_anywhere_in_an_exact_tensor(tmp_path: Path, relative: float, dtype: torch.dtype) -> None:
    """A float32 weight next to a tie cannot be told from one that others round there."""
    base, adapter = write_inputs(tmp_path, dtype, relative=relative)
    loratool.merge(base, adapter, tmp_path / "m")
    merged, missed = load_model(tmp_path / "m"), 0
    for at in torch.randint(0, merged[Q].numel(), (12,), generator=torch.Generator().manual_seed(5)).tolist():
        tensors = {**merged, Q: merged[Q].clone()}
        flat = tensors[Q].view(-1)
        flat[at] = torch.nextafter(flat[at], torch.full_like(flat[at], torch.inf if at % 2 else -torch.inf))
        report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", tmp_path / "m", tensors))
        missed += report.status != "wrong"
    assert missed <= (1 if dtype == torch.float32 else 0)


def write_dora(folder: Path, dtype: torch.dtype, relative: float) -> tuple[Path, Path]:
    base, adapter = write_inputs(folder, dtype, relative=relative, use_dora=True)
    file, W = adapter / "adapter_model.safetensors", load_model(base)
    tensors = load_file(file)
    for i, name in enumerate(NAMES):
        norms = (W[f"{name}.weight"].double() + change(adapter, name)).norm(dim=1).float()
        noise = torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(i))
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = norms * (1 + relative * 0.3 * noise)
    save_file(tensors, file, metadata={"format": "pt"})
    return base, adapter


@pytest.mark.parametrize("dtype", FEW_WIDE, ids=str)
@pytest.mark.parametrize("relative", [1e-1, slow(1e-2), 1e-3])
def test_faults_of_dora(tmp_path: Path, relative: float, dtype: torch.dtype) -> None:
    base, adapter = write_dora(tmp_path, dtype, relative)
    loratool.merge(base, adapter, tmp_path / "m")
    W, merged = load_model(base), load_model(tmp_path / "m")
    plain = (W[Q].double() + change(adapter, NAMES[0])).to(dtype)
    planted = {
        "1 weight altered, by up to 1 ulp": 1,
        "1 weight altered, by up to 2 ulps": 2,
        "1 weight altered, by up to 4 ulps": 4,
        "the delta is not applied": W[Q],
        "the magnitudes of DoRA are ignored": plain,
        "1 weight altered": merged[Q].index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(torch.nan).to(dtype)),
    }
    for message, what in planted.items():
        tensors = dict(merged)
        if isinstance(what, int):
            bump(what)(tensors, {}, lambda name: Tensor())
        else:
            tensors[Q] = what
        report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", tmp_path / "m", tensors))
        (wrong,) = [t for t in report.tensors if t.verdict == "wrong"]
        assert wrong.detail.startswith(message), wrong.detail


@pytest.mark.parametrize(
    ("dtype", "weight"),
    [(torch.float32, 1.0), (torch.bfloat16, 0.5)]
    + [
        slow(*each)
        for each in ((torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 0.5), (torch.float32, 0.5))
    ],
    ids=str,
)
def test_float32_norms_of_long_rows_are_no_fault(tmp_path: Path, weight: float, dtype: torch.dtype) -> None:
    W = weights(128, 4096, dtype=dtype)
    A, B = factors(128, 4096, 8)
    base = write_model(tmp_path / "base", {"x.weight": W})
    adapter = write_peft(tmp_path / "adapter", {"x": (A, B)}, use_dora=True)
    m = (W.float() + B @ A).norm(dim=1) * torch.linspace(0.97, 1.02, 128)
    file = adapter / "adapter_model.safetensors"
    magnitudes = {"base_model.model.x.lora_magnitude_vector": m}
    save_file({**load_file(file), **magnitudes}, file, metadata={"format": "pt"})
    V = W.float() + B @ A
    full = (m / V.norm(dim=1)).view(-1, 1) * V
    moved = {"x.weight": (full if weight == 1 else W.float() + weight * (full - W.float())).to(dtype)}
    report = loratool.verify(base, (adapter, weight), write_merged(tmp_path / "m", base, moved))
    assert report.status == "proven", report.tensors


def test_rows_that_no_adapter_touches_are_the_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A tensor of which an adapter changes some rows, merged by others and altered in the rest."""
    from dataclasses import replace

    from loratool.commands.verify import command as module

    def plan_some(*args: Any, **options: Any) -> Any:
        plan = plan_merge(*args, **options)
        placements = {n: tuple(replace(p, stop=32) for p in found) for n, found in plan.placements.items()}
        return replace(plan, placements=placements)

    plan_merge = module.plan_merge
    monkeypatch.setattr(module, "plan_merge", plan_some)
    base, adapter = write_inputs(tmp_path, dtype)
    tensors = W = load_model(base)
    for name in NAMES:
        D = change(adapter, name).to(torch.bfloat16).to(dtype)
        tensors = {**tensors, f"{name}.weight": torch.cat([(W[f"{name}.weight"] + D)[:32], W[f"{name}.weight"][32:]])}
    right = loratool.verify(base, adapter, write_merged(tmp_path / "m", base, tensors))
    assert right.status == "proven" and right.rounded == len(NAMES), right.tensors
    tensors[Q][40, 3] += 1
    report = loratool.verify(base, adapter, write_merged(tmp_path / "m", base, tensors))
    assert [t.name for t in report.tensors if t.verdict == "wrong"] == [Q]


def test_a_copy_is_accepted_only_where_matrices_are_tied(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    tensors = {"model.embed_tokens.weight": weights(32, 16), "model.q.weight": weights(16, 16, seed=3)}
    base = write_model(tmp_path / "base", tensors, config)
    adapter = write_peft(tmp_path / "adapter", {"model.q": factors(16, 16, 2)})
    loratool.merge(base, adapter, tmp_path / "m")
    merged = load_model(tmp_path / "m")
    embedding, q = merged["model.embed_tokens.weight"], merged["model.q.weight"]
    for extra, value, status in (
        ("lm_head.weight", embedding.clone(), "proven"),
        ("lm_head.weight", embedding + 1, "wrong"),
        ("model.k.weight", q.clone(), "wrong"),
        ("model.other.weight", embedding.clone(), "wrong"),
    ):
        report = loratool.verify(base, adapter, write_merged(tmp_path / "x", base, {**merged, extra: value}))
        assert (report.status, report.extra) == (status, (extra,) if status == "wrong" else ())


def test_an_untouched_tensor_of_another_type_is_named(tmp_path: Path) -> None:
    base, adapter = write_inputs(tmp_path, torch.float32)
    loratool.merge(base, adapter, tmp_path / "m")
    merged = load_model(tmp_path / "m")
    norm_name = f"{NAMES[0]}.norm.weight"
    wider = {**merged, norm_name: merged[norm_name].double()}
    report = loratool.verify(base, adapter, write_merged(tmp_path / "x", base, wider))
    assert report.status == "proven" and f"{norm_name} is stored as F64, but as F32 in the base" in report.rounding
    tensors = {**load_model(base), norm_name: torch.full((64,), 1.0001)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    narrow = {**merged, norm_name: tensors[norm_name].bfloat16()}
    report = loratool.verify(base, adapter, write_merged(tmp_path / "x", base, narrow))
    (wrong,) = [t for t in report.tensors if t.verdict == "wrong"]
    assert (wrong.name, wrong.detail) == (norm_name, "an untouched tensor was rounded to BF16, but should be F32")
    loratool.merge(base, adapter, tmp_path / "half", dtype="bf16", undo=False)
    report = loratool.verify(base, adapter, tmp_path / "half")
    assert report.status == "proven" and report.rounding == ("stored as BF16, but as F32 in the base",)


@pytest.mark.parametrize("dtype", FEW_WIDE, ids=str)
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16 change", "fp16 change"])
@pytest.mark.parametrize("turned", [False, True])
def test_two_adapters_in_either_order(tmp_path: Path, arithmetic: str, turned: bool, dtype: torch.dtype) -> None:
    base, one = write_inputs(tmp_path, dtype)
    _, two = write_inputs(tmp_path / "two", dtype, rank=7)
    tensors = load_model(base)
    for adapter in (two, one) if turned else (one, two):
        stored = load_file(adapter / "adapter_model.safetensors")
        for name in NAMES:
            A, B = (stored[f"base_model.model.{name}.lora_{role}.weight"] for role in "AB")
            tensors[f"{name}.weight"] = ARITHMETIC[arithmetic](tensors[f"{name}.weight"], A, B, 2.0)
    report = loratool.verify(base, [one, two], write_merged(tmp_path / "m", base, tensors))
    assert report.status == "proven", report.tensors


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16 change", "fp16 change"])
def test_two_steps_in_anothers_merge(tmp_path: Path, arithmetic: str, dtype: torch.dtype) -> None:
    """One weight moved by two ulps beyond what the rounding allows."""
    base, adapter = write_inputs(tmp_path, dtype)
    stored, tensors = load_file(adapter / "adapter_model.safetensors"), load_model(base)
    for name in NAMES:
        A, B = (stored[f"base_model.model.{name}.lora_{role}.weight"] for role in "AB")
        tensors[f"{name}.weight"] = ARITHMETIC[arithmetic](tensors[f"{name}.weight"], A, B, 2.0)
    bump(64 if dtype == torch.float32 else 3)(tensors, {}, lambda name: Tensor())
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", base, tensors))
    assert [t.name for t in report.tensors if t.verdict == "wrong"] == [Q]


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    loratool.merge(base, adapter, tmp_path / "m")
    tensors = load_model(tmp_path / "m")
    gone = tensors.pop(f"{NAMES[0]}.norm.weight")
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", base, {**tensors, "new": gone[:3] + 1}))
    assert (report.status, report.missing, report.extra) == ("wrong", (f"{NAMES[0]}.norm.weight",), ("new",))


def test_a_change_below_half_a_step_cannot_be_told(tmp_path: Path, run: Callable[..., Any]) -> None:
    base = write_model(tmp_path / "base", {"x.weight": torch.ones(6, 4, dtype=torch.bfloat16)})
    A, B = factors(6, 4, 2)
    adapter = write_peft(tmp_path / "a", {"x": (A, B * 1e-4)})
    assert loratool.verify(base, adapter, base).status == "inconclusive"
    assert loratool.verify(base, adapter, base, allow=["inconclusive"]).status == "proven"
    result = run("verify", base, adapter, base)
    assert result.exit_code == 1 and "hint: --allow inconclusive" in result.stderr
    assert run("verify", base, adapter, base, "--allow", "inconclusive").exit_code == 0
    with pytest.raises(UsageError, match="allow: 'everything'"):
        loratool.verify(base, adapter, base, allow=["everything"])


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def write_float8(folder: Path, kind: torch.dtype) -> tuple[Path, Path]:
    """Write a base cast to 8 bits without scales, as ComfyUI's plain fp8 files are, and an adapter for some of it."""
    base, adapter = write_inputs(folder, torch.bfloat16)
    tensors = {name: W if "norm" in name else W.to(kind) for name, W in load_model(base).items()}
    tensors["model.layers.9.q.weight"] = weights(8, 8, seed=9).to(kind)
    return write_model(base, tensors, {"model_type": "llama"}), adapter


@pytest.mark.parametrize("target", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", FLOAT8)
def test_a_merge_onto_8_bits_into_a_wider_type(tmp_path: Path, kind: torch.dtype, target: str) -> None:
    base, adapter = write_float8(tmp_path, kind)
    loratool.merge(base, adapter, tmp_path / "m", dtype=target, undo=False)
    report = loratool.verify(base, adapter, tmp_path / "m")
    assert (report.status, report.exact, report.wrong) == ("proven", len(NAMES), 0), report.tensors
    merged = load_model(tmp_path / "m")
    merged[Q] = load_model(base)[Q].to(merged[Q].dtype)
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", base, merged))
    assert [t.detail for t in report.tensors if t.verdict == "wrong"] == ["the delta is not applied"]


@pytest.mark.parametrize("kind", FLOAT8)
def test_others_merges_in_and_out_of_8_bits(tmp_path: Path, kind: torch.dtype) -> None:
    base, adapter = write_float8(tmp_path, kind)
    W = load_model(base)
    loaded = {name: tensor.bfloat16() for name, tensor in W.items()}
    D = {f"{name}.weight": change(adapter, name).float() for name in NAMES}
    ways = {
        "stays": {**W, **{n: (W[n].float() + D[n]).to(kind) for n in D}},
        "loaded in bf16": {**loaded, **{n: loaded[n] + D[n].bfloat16() for n in D}},
        "all in float32": {n: W[n].float() + D[n] if n in D else W[n].float() for n in W},
    }
    for title, merged in ways.items():
        report = loratool.verify(base, adapter, write_merged(tmp_path / "m", base, merged))
        assert report.status == "proven", (title, report.tensors)
    for at, message in ((Q, "1 weight altered, by up to 1 ulp"), ("model.layers.9.q.weight", "untouched")):
        bad = {**ways["stays"], at: ways["stays"][at].clone()}
        bad[at].view(torch.uint8)[3, 4] ^= 1
        report = loratool.verify(base, adapter, write_merged(tmp_path / "m", base, bad))
        (wrong,) = [t for t in report.tensors if t.verdict == "wrong"]
        assert wrong.name == at and message in wrong.detail
    assert loratool.verify(base, adapter, base, allow=["inconclusive"]).status == "wrong"


def test_buffers_that_one_side_lacks_are_not_compared(tmp_path: Path, run: Callable[..., Any]) -> None:
    """Older transformers stored what newer ones compute, and either may have saved the base or the merge."""
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    loratool.merge(base, adapter, tmp_path / "m")
    buffers = {
        "embeddings.position_ids": torch.arange(8)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.bias": torch.ones(1, 1, 8, 8).tril().bool(),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    merged, W = load_model(tmp_path / "m"), load_model(base)
    for one, two in ((base, {**merged, **buffers}), (write_merged(tmp_path / "b", base, {**W, **buffers}), merged)):
        report = loratool.verify(one, adapter, write_merged(tmp_path / "x", base, two))
        assert (report.status, report.missing, report.extra) == ("proven", (), ())
        assert set(report.not_compared) == set(buffers)
        result = run("verify", one, adapter, tmp_path / "x")
        assert result.exit_code == 0 and result.stdout.splitlines()[-1].startswith("proven: ")
        told = " ".join(line for line in result.stdout.splitlines() if line.startswith("not compared: "))
        assert all(name.rpartition(".")[2] in told for name in buffers)
    for name, value in (("h.0.attn.bias", torch.ones(8)), ("model.layers.0.q.bias", torch.ones(8))):
        report = loratool.verify(base, adapter, write_merged(tmp_path / "x", base, {**merged, name: value}))
        assert (report.status, report.extra) == ("wrong", (name,))  # a parameter, and no mask


def test_heads_of_the_pretraining_are_not_compared(tmp_path: Path) -> None:
    """peft merges into the class of a task, which neither loads nor saves the others' heads."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    transformers.BertForPreTraining(config).save_pretrained(base)
    model = transformers.BertForMaskedLM.from_pretrained(base)
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(merged)
    report = loratool.verify(base, adapter, merged)
    assert report.status == "proven", (report.missing, report.tensors)
    assert {name.rsplit(".", 1)[0] for name in report.not_compared} == {"bert.pooler.dense", "cls.seq_relationship"}
    tensors = load_model(merged)
    del tensors["cls.predictions.transform.dense.weight"]  # which the class of the merged model has
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", merged, tensors))
    assert (report.status, report.missing) == ("wrong", ("cls.predictions.transform.dense.weight",))


@pytest.mark.parametrize("family", ["Albert", "Bert", "DebertaV2", "DistilBert", "Electra", "Roberta"])
def test_no_class_lacks_a_head_that_it_has(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    tasks = "PreTraining MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice"
    config = getattr(transformers, f"{family}Config")(num_hidden_layers=1)
    for name in [f"{family}Model", *(f"{family}For{task}" for task in tasks.split())]:
        with torch.device("meta"):
            tensors = getattr(transformers, name)(config).state_dict() if hasattr(transformers, name) else {}
        assert not [n for n, W in tensors.items() if is_optional(n, W.shape, name)]


def test_a_head_that_the_base_stores_twice_may_be_stored_once(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    tensors = {"model.embed_tokens.weight": weights(32, 16), "model.q.weight": weights(16, 16, seed=3)}
    base = write_model(tmp_path / "b", {**tensors, "lm_head.weight": weights(32, 16)}, config)
    for module in ("model.q", "model.embed_tokens"):
        adapter = write_peft(tmp_path / module, {module: factors(*tensors[f"{module}.weight"].shape, 2)})
        loratool.merge(base, adapter, tmp_path / f"m{module}", tied="share")
        merged = load_model(tmp_path / f"m{module}")
        del merged["lm_head.weight"]
        bad = write_model(tmp_path / f"x{module}", merged, config)
        assert loratool.verify(base, adapter, bad, tied="share").status == "proven"
        untied = write_model(tmp_path / f"y{module}", merged, {**config, "tie_word_embeddings": False})
        assert loratool.verify(base, adapter, untied, tied="share").missing == ("lm_head.weight",)


@pytest.mark.parametrize("rows, weight, B", [(8, 0.0, 1.0), (8, 1.0, 0.0), (0, 1.0, 1.0)])
def test_no_change_is_proven_by_the_base(
    tmp_path: Path, run: Callable[..., Any], rows: int, weight: float, B: float
) -> None:
    """A weight of 0, factors that are 0, a tensor without a number: nothing is below half an ulp."""
    base = write_model(tmp_path / "base", {"x.weight": weights(rows, 4), "y.weight": weights(2, 2)})
    adapter = write_peft(tmp_path / "a", {"x": (weights(2, 4), weights(rows, 2) * B)})
    result = run("verify", base, f"{adapter}:{weight}", base)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1].startswith("proven: ")
    assert "the delta is zero everywhere" in result.stderr
    other = write_model(tmp_path / "other", {"x.weight": weights(rows, 4), "y.weight": weights(2, 2) + 1})
    assert run("verify", base, f"{adapter}:{weight}", other).exit_code == 1


def test_the_last_line_is_the_verdict_and_the_counts_agree(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    loratool.merge(base, adapter, tmp_path / "m")
    merged = load_model(tmp_path / "m")
    less = {name: W for name, W in merged.items() if name != NORM}
    small = write_inputs(tmp_path / "small", torch.bfloat16, relative=1e-9)[1]
    cases = [
        (adapter, merged, "proven", 0, "4 of 4 tensors exact, 4 others unchanged"),
        (adapter, load_model(base), "wrong", 1, f"{tmp_path / 'x'} is not {base} + {adapter}, 4 unchanged"),
        (adapter, less, "wrong", 1, "4 exact, 1 missing, 3 unchanged"),
        (
            adapter,
            {**merged, "z": merged[NORM] + 1},
            "wrong",
            1,
            "4 exact, 1 extra, 4 unchanged",
        ),
        (
            small,
            load_model(base),
            "inconclusive",
            1,
            "the delta is below half an ulp of every weight; 4 exact, 4 unchanged",
        ),
    ]
    for given, tensors, verdict, code, counts in cases:
        result = run("verify", base, given, write_merged(tmp_path / "x", base, tensors))
        word, _, rest = result.stdout.splitlines()[-1].partition(": ")
        assert (word, result.exit_code) == (verdict, code) and rest.startswith(counts), rest


def test_the_wrong_order_of_arguments(tmp_path: Path) -> None:
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    with pytest.raises(InputError):
        loratool.verify(adapter, base, base)


SELECTIONS: dict[str, dict[str, Any]] = {
    "target": {"target": ["v", "re:layers.0.*q"]},
    "exclude": {"exclude": ["*.1.q"]},
    "layers": {"layers": "0"},
    "both": {"target": ["q"], "layers": "1"},
}


@pytest.mark.parametrize("chosen", SELECTIONS)
def test_a_selection_is_the_merges(tmp_path: Path, run: Callable[..., Any], chosen: str) -> None:
    """With it the merge is exact, without it what was left out is wrong; changed all the same it is wrong too."""
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    selection = SELECTIONS[chosen]
    report = loratool.merge(base, adapter, tmp_path / "m", **selection)
    judged = loratool.verify(base, adapter, tmp_path / "m", **selection)
    assert (judged.status, judged.exact) == ("proven", len(report.tensors))
    assert judged.exact + judged.untouched == len(load_model(base))
    bare = loratool.verify(base, adapter, tmp_path / "m")
    assert (bare.status, bare.wrong) == ("wrong", len(NAMES) - len(report.tensors))
    loratool.merge(base, adapter, tmp_path / "all")
    more = loratool.verify(base, adapter, tmp_path / "all", **selection)
    assert (more.status, more.wrong) == ("wrong", len(NAMES) - len(report.tensors))
    assert all("untouched tensor" in tensor.detail for tensor in more.tensors if tensor.verdict == "wrong")
    words = [[f"--{key}", value if key == "layers" else ",".join(value)] for key, value in selection.items()]
    options = [word for pair in words for word in pair]
    assert run("verify", base, adapter, tmp_path / "m", *options).exit_code == 0
    assert run("verify", base, adapter, tmp_path / "m").exit_code == 1


def test_a_selection_of_nothing_is_refused(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    assert run("verify", base, adapter, base, "--target", "nowhere").exit_code == 3
    assert run("verify", base, adapter, base, "--layers", "x").exit_code == 2
    assert run("verify", base, adapter, base, "--exclude", "re:(").exit_code == 2


def test_two_adapters_one_after_the_other(tmp_path: Path) -> None:
    """peft gives that if the second is merged into the rounded result of the first."""
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    loratool.merge(base, (adapter, 0.5), tmp_path / "one")
    loratool.merge(tmp_path / "one", (adapter, 0.25), tmp_path / "two")
    report = loratool.verify(base, [(adapter, 0.5), (adapter, 0.25)], tmp_path / "two")
    assert report.status == "proven" and report.rounding == ("one rounding of a float32 sum an adapter",)


def test_the_command(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    run("merge", base, adapter, "-o", tmp_path / "m")
    right = run("verify", base, adapter, tmp_path / "m")
    assert right.exit_code == 0 and "proven: 21 of 21 tensors exact" in right.stdout
    wrong = run("verify", base, f"{adapter}:0.5", tmp_path / "m")
    assert wrong.exit_code == 1 and "applied twice" in wrong.stdout
    assert wrong.stderr.splitlines()[-1] == f"hint: loratool verify {base} {adapter} {tmp_path / 'm'}"
    value = json.loads(run("verify", base, f"{adapter}:0.5", tmp_path / "m", "--json").stdout)
    assert (value["ok"], value["exit_code"], value["status"]) == (False, 1, "wrong")
    assert run("verify", base, adapter, tmp_path / "m", "--json").exit_code == 0
