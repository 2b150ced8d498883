"""verify: every planted fault is found and named, and no right merge is called wrong, whoever made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_model, write_peft
from safetensors.torch import load_file, save_file
from test_peft_kinds import FAMILIES, kinds, write_pair
from torch import Tensor

import loratool
from loratool.errors import InputError, UsageError

pytestmark = [pytest.mark.filterwarnings("ignore")]
SHAPE = (96, 64)
NAMES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("q", "v")]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def dtype(request: Any) -> torch.dtype:
    return request.param


def write_inputs(folder: Path, dtype: torch.dtype, rank: int = 4, square: bool = False) -> tuple[Path, Path]:
    """A base of a few matrices and norms, and an adapter whose change is some percent of them."""
    shape = (96, 96) if square else SHAPE
    tensors = {f"{name}.weight": weights(*shape, seed=i, dtype=dtype) for i, name in enumerate(NAMES)}
    tensors |= {f"{name}.norm.weight": torch.ones(64, dtype=dtype) for name in NAMES}
    base = write_model(folder / "base", tensors, {"model_type": "llama", "tie_word_embeddings": False})
    made = {}
    for i, name in enumerate(NAMES):
        A, B = factors(*shape, rank, seed=i)
        made[name] = A, B * 0.3
    return base, write_peft(folder / "adapter", made, lora_alpha=2 * rank)


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


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_own_merges(
    tmp_path: Path, family: str, factor_dtype: torch.dtype, safe: bool, dtype: torch.dtype
) -> None:
    peft = pytest.importorskip("peft")
    names = FAMILIES[family]
    pair = write_pair(tmp_path / "x", names.make(), target_modules=[*names.linear])
    for folder, kind in ((pair.base, dtype), (pair.adapter, factor_dtype)):
        for file in folder.glob("*.safetensors"):
            save_file({k: v.to(kind) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    model = pair.cls.from_pretrained(pair.base, dtype=dtype)
    for autocast in (False, True):
        wrapped = peft.PeftModel.from_pretrained(model, pair.adapter, autocast_adapter_dtype=autocast)
        merged = wrapped.merge_and_unload(safe_merge=safe)
        merged.save_pretrained(tmp_path / f"m{autocast}")
        report = loratool.verify(pair.base, pair.adapter, tmp_path / f"m{autocast}")
        assert report.status == "proven", report.tensors
        model = pair.cls.from_pretrained(pair.base, dtype=dtype)


@pytest.mark.parametrize("kind", kinds(FAMILIES["llama"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_ours_is_exact(tmp_path: Path, family: str, kind: str) -> None:
    names = FAMILIES[family]
    pair = write_pair(tmp_path / "x", names.make(), **kinds(names)[kind])
    loratool.merge(pair.base, pair.adapter, tmp_path / "m")
    report = loratool.verify(pair.base, pair.adapter, tmp_path / "m")
    assert report.status == "proven" and report.rounded == report.wrong == 0, report.tensors
    assert loratool.verify(pair.base, pair.adapter, pair.base).status == "wrong"


Q = f"{NAMES[0]}.weight"


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


FAULTS = {
    "skipped": (skip_one, "the change is not applied"),
    "twice": (scaled(2.0), "applied twice, or its scale doubled"),
    "half": (scaled(0.5), "half its scale"),
    "sqrt": (scaled(3.0), r"alpha / sqrt\(r\) and should be alpha / r"),
    "1/sqrt": (scaled(1 / 3), r"alpha / r and should be alpha / sqrt\(r\)"),
    "scale": (scaled(7.0), "7 times what it should be"),
    "transposed": (transpose, "transposed"),
    "swapped": (swap, f"the change of {NAMES[1]}.weight"),
    "one step": (bump(1), "1 weights were altered, by up to 1 steps"),
    "two steps": (bump(2), "1 weights were altered, by up to 2 steps"),
    "norm": (norm, "an untouched tensor were altered"),
    "base": (other_base, "another one|not this base"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_and_named(tmp_path: Path, fault: str, dtype: torch.dtype) -> None:
    base, adapter = write_inputs(tmp_path, dtype, rank=9, square=fault == "transposed")
    loratool.merge(base, adapter, tmp_path / "m")
    tensors = load_model(tmp_path / "m")
    plant, message = FAULTS[fault]
    plant(tensors, load_model(base), lambda name: change(adapter, name))
    report = loratool.verify(base, adapter, write_merged(tmp_path / "bad", tmp_path / "m", tensors))
    assert report.status == "wrong"
    wrong = [tensor for tensor in report.tensors if tensor.verdict == "wrong"]
    assert len(wrong) == {"swapped": 2, "base": len(tensors)}.get(fault, 1)
    import re

    named = next(t for t in wrong if t.name == (Q if fault != "norm" else f"{NAMES[0]}.norm.weight"))
    assert re.search(message, named.detail), named.detail


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16 change", "fp16 change"])
def test_two_steps_in_anothers_merge(tmp_path: Path, arithmetic: str, dtype: torch.dtype) -> None:
    """One weight moved by two steps beyond what the rounding allows."""
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
    assert result.exit_code == 1 and "--allow inconclusive" in result.stdout
    assert run("verify", base, adapter, base, "--allow", "inconclusive").exit_code == 0
    with pytest.raises(UsageError, match="allow 'everything'"):
        loratool.verify(base, adapter, base, allow=["everything"])


def test_the_wrong_order_of_arguments(tmp_path: Path) -> None:
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    with pytest.raises(InputError):
        loratool.verify(adapter, base, base)


def test_two_adapters_one_after_the_other(tmp_path: Path) -> None:
    """What peft gives if the second is merged into the rounded result of the first."""
    base, adapter = write_inputs(tmp_path, torch.bfloat16)
    loratool.merge(base, (adapter, 0.5), tmp_path / "one")
    loratool.merge(tmp_path / "one", (adapter, 0.25), tmp_path / "two")
    report = loratool.verify(base, [(adapter, 0.5), (adapter, 0.25)], tmp_path / "two")
    assert report.status == "proven" and report.rounding == ("one rounding of a float32 sum an adapter",)


def test_the_command(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, adapter = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
    run("merge", base, adapter, "-o", tmp_path / "m")
    right = run("verify", base, adapter, tmp_path / "m")
    assert right.exit_code == 0 and "21 tensors exact" in right.stdout and "proven" in right.stdout
    wrong = run("verify", base, f"{adapter}:0.5", tmp_path / "m")
    assert wrong.exit_code == 1 and "applied twice" in wrong.stdout
    value = json.loads(run("verify", base, f"{adapter}:0.5", tmp_path / "m", "--json").stdout)
    assert (value["ok"], value["exit_code"], value["status"]) == (False, 1, "wrong")
    assert run("verify", base, adapter, tmp_path / "m", "--json").exit_code == 0
