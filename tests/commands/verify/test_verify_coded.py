"""Prove merges into weights of codes, and into codes; tell what others' codes keep, and what is wrong with codes.

Bases are the vectors of fixtures/coded, or coded here by hand. What others would write is worked out here in numpy.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import factors, load_model, run_command, slow, weights, write_model, write_peft
from lib.models.coded_models import EACH, RANK, numbers_of, sized, write_adapter, write_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.errors import InputError

Q, K, OUT = (f"model.layers.0.self_attn.{part}_proj" for part in "qko")
ROWS, COLUMNS = 24, 64
CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNELS}},
    "ignore": [],
}


def int8(W: Tensor, top: float = 127.0) -> tuple[Tensor, Tensor]:
    """Return the nearest codes of a matrix, and a scale for each row."""
    scale = (W.double().abs().amax(1, keepdim=True) / top).float()
    return (W.double() / scale.double()).round().clamp(-128, 127).to(torch.int8), scale


def write_int8(folder: Path, matrices: dict[str, Tensor], top: float = 127.0, shards: int = 1) -> Path:
    """Write matrices as int8 of compressed-tensors, with a plain norm beside them."""
    stored: dict[str, Tensor] = {"model.norm.weight": torch.ones(COLUMNS, dtype=torch.bfloat16)}
    for name, W in matrices.items():
        stored[f"{name}.weight"], stored[f"{name}.weight_scale"] = int8(W, top)
        stored[f"{name}.input_scale"] = torch.tensor([0.5])
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": INT8}
    return write_model(folder, stored, config, shards)


def change(folder: Path, edit: dict[str, Any]) -> Path:
    """Change tensors of a model of one file: `edit` maps a name to a function of the tensor; return the folder."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name, function in edit.items():
        tensors[name] = function(tensors[name].clone()).contiguous()
    save_file(tensors, file, metadata=metadata)
    return folder


def percent(share: Tensor) -> str:
    return f"{100 * share:.{0 if abs(share) > 0.0995 else 1}f} %".replace("-0.0 ", "0.0 ")


def details(report: Any) -> dict[str, tuple[str, str]]:
    return {t.name.removesuffix(".weight"): (t.verdict, t.detail) for t in report.tensors}


def write_pair(folder: Path, size: float = 1.0, shards: int = 1) -> tuple[Path, Path, dict[str, Tensor]]:
    """Write a base of int8 and a LoRA on q and o; return both, and what is added to each matrix."""
    base = write_int8(
        folder / "base", {n: weights(ROWS, COLUMNS, seed=i) for i, n in enumerate((Q, K, OUT))}, 127, shards
    )
    made = {n: factors(ROWS, COLUMNS, RANK, seed=i) for i, n in enumerate((Q, OUT))}
    made = {n: (A * size, B) for n, (A, B) in made.items()}
    adapter = write_peft(folder / "adapter", made, lora_alpha=2 * RANK)
    return base, adapter, {n: 2 * B.double() @ A.double() for n, (A, B) in made.items()}


@pytest.mark.parametrize("vector", EACH)
@pytest.mark.parametrize("way", ["mixed", slow("dequantize"), "requantize"])
def test_each_way_is_proven_in_each_format(vector: str, way: str, tmp_path: Path) -> None:
    base = write_base(vector, tmp_path / "base")
    numbers = numbers_of(base)
    touched = dict([*sized(numbers).items()][:1])  # others become numbers with it, or by themselves, or stay
    adapter, _ = write_adapter(tmp_path / "adapter", touched, 3.0)
    if way == "dequantize" and any(float(W.abs().max()) > 3e38 for W in numbers.values()):
        pytest.skip("bfloat16 does not hold its numbers")
    loratool.merge(base, adapter, tmp_path / "out", quantized=way, allow=["lossy"], undo=False)
    report: Any = loratool.verify(base, adapter, tmp_path / "out", allow=["inconclusive"])
    assert report.status == "proven" and {t.verdict for t in report.tensors} == {"exact"}, report.tensors
    assert not (report.missing or report.extra or report.not_compared)
    assert report.exact == len(numbers) if way == "dequantize" else report.exact >= 1


def test_siblings_become_numbers_without_a_change(tmp_path: Path) -> None:
    base, adapter, _ = write_pair(tmp_path)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, undo=False)
    report: Any = loratool.verify(base, adapter, out)
    assert (report.status, report.exact, report.untouched) == ("proven", 3, 1)
    assert details(report)[K] == ("exact", "dequantized to BF16, without a change")
    change(out, {f"{K}.weight": lambda W: W.index_put((torch.tensor([2]), torch.tensor([5])), W[2, 6])})
    wrong: Any = loratool.verify(base, adapter, out)
    assert wrong.status == "wrong" and details(wrong)[K][0] == "wrong"
    assert details(wrong)[K][1].startswith("1 weight of an untouched tensor altered")


def scale_of_two_roundings() -> float:
    """A float32 of which three times, in float32 and then in bfloat16, is not the nearest bfloat16."""
    for tie in (1 + k / 128 + 1 / 256 for k in range(128)):
        scale = np.nextafter(np.float32(tie / 3), np.float32(1))
        if np.float32(3) * scale == np.float32(tie) and 3 * float(scale) > tie:
            return float(scale)
    raise AssertionError("there is one")


def test_numbers_that_others_decoded_and_summed_are_right_with_another_rounding(tmp_path: Path) -> None:
    base, adapter, added = write_pair(tmp_path)
    change(
        base, {f"{K}.weight": lambda x: x.fill_(3), f"{K}.weight_scale": lambda x: x.fill_(scale_of_two_roundings())}
    )
    loratool.merge(base, adapter, tmp_path / "out", undo=False)
    stored = load_model(base)
    for numbers in (torch.float32, torch.bfloat16):
        decoded = {n: stored[f"{n}.weight"].float() * stored[f"{n}.weight_scale"] for n in (Q, K, OUT)}
        before = {n: W.to(numbers).float() for n, W in decoded.items()}
        sums = {n: (before[n] + added[n].float() if n in added else before[n]).bfloat16() for n in decoded}
        out = change(tmp_path / "out", {f"{n}.weight": lambda _, W=W: W for n, W in sums.items()})
        report: Any = loratool.verify(base, adapter, out)
        assert report.status == "proven", report.tensors
        assert details(report)[K] == ("rounding", "codes dequantized in float32, then rounded")


@pytest.mark.parametrize("way", ["mixed", "dequantize", "requantize"])
def test_shards_of_base_and_result_need_not_agree(tmp_path: Path, way: str) -> None:
    """A weight's codes and scales lie in two files."""
    base, adapter, _ = write_pair(tmp_path, shards=3)
    loratool.merge(base, adapter, tmp_path / "out", quantized=way, undo=False, max_shard_size=4000)
    report: Any = loratool.verify(base, adapter, tmp_path / "out")
    assert report.status == "proven" and report.wrong == 0 and not report.missing


@pytest.mark.parametrize("way", ["mixed", "dequantize", "requantize"])
def test_stacked_experts_are_proven_and_their_wrong_codes_named(tmp_path: Path, way: str) -> None:
    stack, size = "model.layers.0.mlp.experts.gate_up_proj", 8
    W = weights(3, 2 * size, COLUMNS)
    scale = W.abs().amax((1, 2), keepdim=True) / 448
    other = "model.layers.0.mlp.experts.down_proj"
    stored = {stack: (W / scale).to(torch.float8_e4m3fn), f"{stack}_scale_inv": scale}
    stored |= {other: stored[stack].mT.contiguous(), f"{other}_scale_inv": scale.clone()}
    declared = {"quant_method": "fp8", "weight_block_size": [2 * size, COLUMNS]}
    base = write_model(tmp_path / "base", stored, {"model_type": "qwen3_moe", "quantization_config": declared})
    A, B = factors(size, COLUMNS, RANK)
    made = {"model.layers.0.mlp.experts.1.up_proj": (A * 20, B)}
    adapter = write_peft(tmp_path / "adapter", made, lora_alpha=2 * RANK)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, quantized=way, undo=False)
    report: Any = loratool.verify(base, adapter, out)
    assert report.status == "proven" and details(report)[stack][0] == "exact"

    def alter(x: Tensor) -> Tensor:
        flat = x.view(torch.uint8) if x.itemsize == 1 else x.view(torch.int16)
        flat[2, 3, 7] ^= 2
        return x

    wrong: Any = loratool.verify(base, adapter, change(out, {stack: alter}))
    verdict, detail = details(wrong)[stack]
    assert verdict == "wrong"
    assert detail.startswith("1 code, in row 3, column 7 of matrix 2, is not" if way == "requantize" else "1 weight ")


def test_stacked_experts_like_another_model_are_proven(tmp_path: Path) -> None:
    stack, size = "model.layers.0.mlp.experts.gate_up_proj", 16
    W = weights(3, 2 * size, COLUMNS).bfloat16()
    W[2, 3, 7] = 0.03
    scale = W.float().abs().reshape(3, 2, size, 2, -1).amax((2, 4)) / 448
    spread = scale.repeat_interleave(size, 1).repeat_interleave(COLUMNS // 2, 2)
    declared = {"quant_method": "fp8", "weight_block_size": [size, COLUMNS // 2]}
    stored = {stack: (W / spread).to(torch.float8_e4m3fn), f"{stack}_scale_inv": scale}
    like = write_model(tmp_path / "like", stored, {"model_type": "qwen3_moe", "quantization_config": declared})
    base = write_model(tmp_path / "base", {stack: W}, {"model_type": "qwen3_moe", "dtype": "bfloat16"})
    A, B = factors(size, COLUMNS, RANK)
    adapter = write_peft(tmp_path / "adapter", {"model.layers.0.mlp.experts.1.up_proj": (A * 20, B)})
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, like=like, undo=False)
    report: Any = loratool.verify(base, adapter, out)
    assert report.status == "proven" and details(report)[stack] == ("exact", "quantized again as fp8")

    def alter(x: Tensor) -> Tensor:
        x.view(torch.uint8)[2, 3, 7] ^= 0x80
        return x

    report = loratool.verify(base, adapter, change(out, {stack: alter}))
    told = "quantized as fp8: 1 code, in row 3, column 7 of matrix 2, was altered"
    assert details(report)[stack] == ("wrong", told)


def test_requantized_codes_are_exact_and_the_share_that_they_keep_is_told(tmp_path: Path) -> None:
    base, adapter, added = write_pair(tmp_path, 0.006)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, quantized="requantize", undo=False)
    report: Any = loratool.verify(base, adapter, out)
    stored, found = load_model(base), load_model(out)
    asked = kept = 0.0
    for name, D in added.items():
        steps = found[f"{name}.weight"].double() - stored[f"{name}.weight"].double()
        parts = (steps * stored[f"{name}.weight_scale"].double() * D).sum(), (D * D).sum()
        told = f"the nearest codes with the base's scales: keeps {percent(parts[0] / parts[1])} of the delta"
        assert details(report)[name] == ("exact", told)
        kept, asked = kept + float(parts[0]), asked + float(parts[1])
    assert report.status == "proven" and kept < 0.5 * asked
    assert [line for line in report.warnings if "% of the delta" in line and "--quantized mixed" in line]


def at(row: int, column: int, by: int) -> Any:
    def function(codes: Tensor) -> Tensor:
        codes[row, column] += by if codes[row, column] < 100 else -by
        return codes

    return function


def test_codes_that_others_rounded_with_the_bases_scales_are_right(tmp_path: Path) -> None:
    scale = 2.0**-10
    codes = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 255 - 127
    codes[:, 0], codes[2, 5] = 127, 100  # the first gives each row this scale
    base = write_int8(tmp_path / "base", {Q: codes * scale})
    assert torch.equal(load_model(base)[f"{Q}.weight"], codes.to(torch.int8))
    A, B = torch.zeros(1, COLUMNS), torch.zeros(ROWS, 1)
    A[0, 5], B[2, 0] = 1.0, scale / 2 * (1 + 2.0**-22)  # just above the middle of two codes, which float32 rounds to
    adapter = write_peft(tmp_path / "tie", {Q: (A, B)})
    out = shutil.copytree(base, tmp_path / "out")
    report: Any = loratool.verify(base, adapter, out, allow=["inconclusive"])
    assert details(report)[Q] == ("rounding", "the nearest codes to a float32 sum")
    A, B = factors(ROWS, COLUMNS, RANK)
    adapter = write_peft(tmp_path / "adapter", {Q: (A, B * 10)})
    for kind, told in ((torch.float64, "the nearest codes with"), (torch.bfloat16, "the nearest codes to a sum of 16")):
        total = ((codes * scale).to(kind) + (10 * B.double() @ A.double()).to(kind)).double()
        made = (total / scale).round().clamp(-128, 127).to(torch.int8)
        report = loratool.verify(base, adapter, change(out, {f"{Q}.weight": lambda _, made=made: made}))
        assert report.status == "proven" and details(report)[Q][1].startswith(told), report.tensors


def test_codes_that_no_change_moves_under_scales_of_others_are_requantized(tmp_path: Path) -> None:
    """Scales that are computed again may be a float32 apart."""
    base, adapter, _ = write_pair(tmp_path, 1e-6)
    out = shutil.copytree(base, tmp_path / "out")
    change(out, {f"{n}.weight_scale": lambda x: torch.nextafter(x, torch.ones(1)) for n in (Q, K, OUT)})
    report: Any = loratool.verify(base, adapter, out)
    assert report.status == "inconclusive" and {verdict for verdict, _ in details(report).values()} == {"requantized"}


EDITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "code": ({f"{Q}.weight": at(2, 5, 3)}, Q, "1 code, in row 2, column 5, is not the nearest to the merge"),
    "codes": (
        {f"{Q}.weight": lambda x: at(7, 1, 1)(at(2, 5, 3)(x))},
        Q,
        "2 codes, the first in row 2, column 5, are not the nearest to the merge",
    ),
    "code of another": ({f"{K}.weight": at(3, 4, 1)}, K, "1 code, in row 3, column 4, is not the base's"),
    "scale": ({f"{Q}.weight_scale": lambda x: x * 1.25}, Q, f"not the base's: {Q}.weight_scale"),
    "scale of another": ({f"{K}.weight_scale": lambda x: x * 1.25}, K, f"not the base's: {K}.weight_scale"),
    "scale of inputs": ({f"{K}.input_scale": lambda x: x * 2}, K, f"not the base's: {K}.input_scale"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_altered_in_a_requantized_model_is_named(tmp_path: Path, edit: str) -> None:
    base, adapter, _ = write_pair(tmp_path)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, quantized="requantize", undo=False)
    edits, name, detail = EDITS[edit]
    report: Any = loratool.verify(base, adapter, change(out, edits))
    assert report.status == "wrong" and report.wrong == 1
    assert details(report)[name] == ("wrong", detail)


@pytest.mark.parametrize("scale", [0, 2, -1])
def test_a_wrong_scale_of_the_change_is_named_in_codes_too(tmp_path: Path, scale: int) -> None:
    base, adapter, _ = write_pair(tmp_path)
    out = tmp_path / "out"
    if scale:
        loratool.merge(base, [(adapter, float(scale))], out, quantized="requantize", undo=False)
    report: Any = loratool.verify(base, adapter, out if scale else base)
    words = {0: "is not applied", 2: "twice", -1: "negated"}[scale]
    assert report.status == "wrong"
    assert all(details(report)[name][0] == "wrong" and words in details(report)[name][1] for name in (Q, OUT))


def test_zeros_of_another_sign_are_the_same_numbers(tmp_path: Path) -> None:
    W = weights(ROWS, COLUMNS)
    W[3, 7] = 0.0
    scale = W.abs().amax(1, keepdim=True) / 448
    stored = {f"{Q}.weight": (W / scale).to(torch.float8_e4m3fn), f"{Q}.weight_scale": scale}
    declared = {**INT8, "format": "float-quantized"}
    base = write_model(tmp_path / "base", stored, {"model_type": "llama", "quantization_config": declared})
    A, B = factors(ROWS, COLUMNS, RANK)
    B[3] = 0.0
    adapter = write_peft(tmp_path / "adapter", {Q: (A, B)})
    loratool.merge(base, adapter, tmp_path / "out", quantized="requantize", undo=False)

    def negate(codes: Tensor) -> Tensor:
        codes.view(torch.uint8)[3, 7] ^= 0x80
        return codes

    report: Any = loratool.verify(base, adapter, change(tmp_path / "out", {f"{Q}.weight": negate}))
    assert report.status == "proven" and details(report)[Q] == ("rounding", "other codes of the same numbers")


def requantize_anew(base: Path, folder: Path, added: dict[str, Tensor], top: float = 125.0) -> tuple[Path, Any]:
    """Requantize all matrices of an int8 base with scales of our own; return the folder, and W, X and W' of each."""
    stored = load_model(base)
    old = {n: stored[f"{n}.weight"].double() * stored[f"{n}.weight_scale"].double() for n in (Q, K, OUT)}
    sums = {n: old[n] + added.get(n, 0.0) for n in old}
    write_int8(folder, sums, top)
    new = load_model(folder)
    made = {n: new[f"{n}.weight"].double() * new[f"{n}.weight_scale"].double() for n in old}
    return folder, {n: (old[n], sums[n], made[n]) for n in old}


@pytest.mark.parametrize("size", [1.0, 0.02])
def test_scales_of_others_prove_nothing_and_the_kept_share_is_told(tmp_path: Path, size: float) -> None:
    base, adapter, added = write_pair(tmp_path, size)
    out, numbers = requantize_anew(base, tmp_path / "out", added)
    report: Any = loratool.verify(base, adapter, out)
    assert report.status == "inconclusive" and not report.wrong
    for name, D in added.items():
        W, _, made = numbers[name]
        told = f"requantized with fresh scales: keeps {percent(((made - W) * D).sum() / (D * D).sum())} of the delta"
        assert details(report)[name] == ("requantized", told)
    W, _, made = numbers[K]
    told = f"requantized with fresh scales: {percent((made - W).norm() / W.norm())} away from the base's numbers"
    assert details(report)[K] == ("requantized", told)


def test_what_is_wrong_in_codes_with_scales_of_others_is_found(tmp_path: Path) -> None:
    base, adapter, added = write_pair(tmp_path)
    out, _ = requantize_anew(base, tmp_path / "altered", added)
    report: Any = loratool.verify(base, adapter, change(out, {f"{Q}.weight": at(4, 9, 20)}))
    assert report.status == "wrong"
    assert details(report)[Q] == ("wrong", "requantized with fresh scales: 1 code, in row 4, column 9, was altered")
    out, _ = requantize_anew(base, tmp_path / "twice", {n: 2 * D for n, D in added.items()})
    report = loratool.verify(base, adapter, out)
    assert details(report)[Q][0] == "wrong" and "applied twice" in details(report)[Q][1]
    out, _ = requantize_anew(base, tmp_path / "none", {})
    assert "is not applied" in details(loratool.verify(base, adapter, out))[OUT][1]
    small = tmp_path / "small"
    small.mkdir()
    same, tiny, _ = write_pair(small, 0.02)  # less than half a step
    out, _ = requantize_anew(same, small / "none", {})
    assert "is not applied" in details(loratool.verify(same, tiny, out))[OUT][1]
    out = write_int8(tmp_path / "other", {n: weights(ROWS, COLUMNS, seed=50 + i) for i, n in enumerate((Q, K, OUT))})
    report = loratool.verify(base, adapter, out)
    assert {details(report)[n][0] for n in (Q, K, OUT)} == {"wrong"}
    assert "times as far from the merge" in details(report)[Q][1]


def write_plain(folder: Path, size: float = 1.0) -> tuple[Path, Path, dict[str, tuple[Tensor, Tensor]]]:
    """Write a 16-bit base and a LoRA on two of its matrices; return both, and W and D of each matrix."""
    plain = {n: weights(ROWS, COLUMNS, seed=i).bfloat16() for i, n in enumerate((Q, K, OUT))}
    stored = {f"{n}.weight": W for n, W in plain.items()}
    stored["model.norm.weight"] = torch.ones(COLUMNS, dtype=torch.bfloat16)
    base = write_model(folder / "base", stored, {"model_type": "llama", "dtype": "bfloat16"})
    made = {n: factors(ROWS, COLUMNS, RANK, seed=i) for i, n in enumerate((Q, OUT))}
    made = {n: (A * size, B) for n, (A, B) in made.items()}
    adapter = write_peft(folder / "adapter", made, lora_alpha=2 * RANK)
    added = {n: 2 * B.double() @ A.double() for n, (A, B) in made.items()}
    return base, adapter, {n: (W.double(), added.get(n, torch.zeros_like(W.double()))) for n, W in plain.items()}


def test_a_merge_that_others_quantized_is_told_by_the_kept_share(tmp_path: Path) -> None:
    base, adapter, parts = write_plain(tmp_path, 0.3)
    out = write_int8(tmp_path / "out", {n: W + D for n, (W, D) in parts.items()}, 120.0)
    change(out, {f"{n}.input_scale": lambda x: x for n in parts})
    report: Any = loratool.verify(base, adapter, out)
    assert report.status == "inconclusive" and not (report.missing or report.extra)
    stored = load_model(out)
    for name in (Q, OUT):
        W, D = parts[name]
        made = stored[f"{name}.weight"].double() * stored[f"{name}.weight_scale"].double()
        told = f"quantized as int-quantized: keeps {percent(((made - W) * D).sum() / (D * D).sum())} of the delta"
        assert details(report)[name] == ("requantized", told)
    assert details(report)[K][1].endswith("% away from the base's numbers")


def test_another_format_than_the_bases_is_told_by_the_kept_share(tmp_path: Path) -> None:
    base, adapter, added = write_pair(tmp_path)
    _, numbers = requantize_anew(base, tmp_path / "same", added)
    stored = {"model.norm.weight": torch.ones(COLUMNS, dtype=torch.bfloat16)}
    for name, (_, X, _) in numbers.items():
        scale = (X.abs().amax(1, keepdim=True) / 400).float()
        codes = (X.float() / scale).to(torch.float8_e4m3fn)
        stored |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    declared = {**INT8, "format": "float-quantized"}
    out = write_model(tmp_path / "out", stored, {"model_type": "llama", "quantization_config": declared})
    report: Any = loratool.verify(base, adapter, out)
    assert report.status == "inconclusive"
    assert details(report)[Q][1].startswith("requantized as fp8: keeps ")


# Vectors of formats that are written anew
FRESH = "fp8_blocks ct_int8_channel_asym bnb_nf4_nested bnb_int8 mlx_affine4_64".split()


def write_twins(vector: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path, Path]:
    """Write a model of codes, one of plain numbers with the same names, and a LoRA on its matrices."""
    like = write_base(vector, folder / "like")
    shapes = {name: tuple(W.shape) for name, W in numbers_of(like).items()}
    stored = load_model(like)
    plain = {n: weights(*shape, seed=i).to(dtype) for i, (n, shape) in enumerate(shapes.items())}
    plain |= {n: stored[n] for n in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")}
    base = write_model(folder / "base", plain, {"model_type": "llama", "dtype": "bfloat16"})
    made = {n.removesuffix(".weight"): factors(*shape, RANK, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    return base, like, write_peft(folder / "adapter", made, lora_alpha=2 * RANK)


@pytest.mark.parametrize("vector", FRESH)
def test_a_merge_like_another_model_is_proven(tmp_path: Path, vector: str) -> None:
    base, like, adapter = write_twins(vector, tmp_path)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, like=like, undo=False)
    report: Any = loratool.verify(base, adapter, out)
    assert report.status == "proven" and not (report.missing or report.extra), report.tensors
    assert all(t.verdict == "exact" and t.detail.startswith("quantized again as ") for t in report.tensors)
    alone = tmp_path / "alone"
    loratool.merge(base, [(adapter, 0.0)], alone, like=like, undo=False)
    shown: Any = loratool.verify(base, adapter, alone)
    assert shown.status != "proven" and not shown.exact


def test_the_type_before_codes_is_found(tmp_path: Path) -> None:
    base, like, adapter = write_twins("bnb_nf4_nested", tmp_path, torch.float32)
    loratool.merge(base, adapter, tmp_path / "out", like=like, dtype="fp16", undo=False)
    report: Any = loratool.verify(base, adapter, tmp_path / "out")
    coded = [t for t in report.tensors if t.detail.startswith("quantized")]
    assert report.status == "proven" and coded
    assert all(t.detail.endswith(", rounded to float16 first") for t in coded)


def test_a_change_below_all_codes_proves_nothing(tmp_path: Path) -> None:
    """What is encoded anew may have the base's bytes, as all requantized codes may be the base's."""
    base, like, _ = write_twins("bnb_int8", tmp_path)
    name = next(n for n in numbers_of(like) if n.endswith("q_proj.weight"))
    A, B = factors(*load_model(base)[name].shape, RANK)
    A[:, 1:] = B[1:] = 0.0  # in one place
    adapter = write_peft(tmp_path / "one", {name.removesuffix(".weight"): (A * 1e-9, B)})
    loratool.merge(base, adapter, tmp_path / "out", like=like, undo=False)
    assert loratool.verify(base, adapter, tmp_path / "out").status == "inconclusive"
    coded, tiny, _ = write_pair(tmp_path / "pair", 1e-6)
    loratool.merge(coded, tiny, tmp_path / "same", quantized="requantize", undo=False)
    assert loratool.verify(coded, tiny, tmp_path / "same").status == "inconclusive"
    assert loratool.verify(coded, tiny, tmp_path / "same", allow=["inconclusive"]).status == "proven"


def test_an_altered_code_of_a_merge_like_another_model_is_found(tmp_path: Path) -> None:
    base, like, adapter = write_twins("bnb_int8", tmp_path)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, like=like, undo=False)
    name = next(n for n in numbers_of(like) if n.endswith("q_proj.weight"))
    report: Any = loratool.verify(base, adapter, change(out, {name: at(1, 3, 9)}))
    verdict, detail = details(report)[name.removesuffix(".weight")]
    assert (report.status, verdict) == ("wrong", "wrong")
    assert detail == "quantized as bitsandbytes-int8: 1 code, in row 1, column 3, was altered"


def test_what_no_codec_reads_is_refused_by_name(tmp_path: Path) -> None:
    base, adapter, parts = write_plain(tmp_path)
    stored = {f"{n}.W_q": W.to(torch.uint8) for n, (W, _) in parts.items()}
    stored |= {f"{n}.{end}": torch.ones(ROWS, 1) for n in parts for end in ("scale", "zero")}
    out = write_model(tmp_path / "hqq", stored, {"model_type": "llama"})
    with pytest.raises(InputError, match="is quantized"):
        loratool.verify(base, adapter, out)


def test_codes_without_their_scales_are_refused_by_name(tmp_path: Path) -> None:
    base = write_base("bnb_nf4", tmp_path / "base")
    numbers = sized(numbers_of(base))
    adapter, _ = write_adapter(tmp_path / "adapter", numbers, 3.0)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, quantized="requantize", allow=["lossy"], undo=False)
    name = next(iter(numbers))
    tensors = load_file(out / "model.safetensors")
    del tensors[f"{name}.quant_map"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot be read in .*quant_map is missing"):
        loratool.verify(base, adapter, out)


@pytest.mark.parametrize("nested", [False, True])
def test_pefts_own_merge_into_codes_is_told_by_the_kept_share(tmp_path: Path, nested: bool) -> None:
    """peft's Linear4bit decodes, adds and encodes with scales of its own; so does transformers, of a merged model."""
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from bitsandbytes.nn import Linear4bit

    def linear(W: Tensor) -> Any:
        layer = Linear4bit(*reversed(W.shape), bias=False, compress_statistics=nested, quant_type="nf4")
        layer.load_state_dict({"weight": W})
        return layer.to("cpu")

    def write(folder: Path, modules: dict[str, Any]) -> Path:
        stored = {f"{n}.{k}": v.contiguous() for n, m in modules.items() for k, v in m.state_dict().items()}
        method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        return write_model(folder, stored, {"model_type": "llama", "quantization_config": method})

    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]
    modules = {n: linear(weights(128, 256, seed=i).bfloat16()) for i, n in enumerate(names)}
    base = write(tmp_path / "base", modules)
    made = {n: factors(128, 256, 8, seed=i) for i, n in enumerate(names)}
    for size, low, high in ((1.0, 0.8, 1.2), (0.005, -0.2, 0.3)):
        adapter = write_peft(tmp_path / f"adapter {size}", {n: (A * size, B) for n, (A, B) in made.items()})
        model = torch.nn.Module()
        model.is_loaded_in_4bit = True
        model.q_proj, model.o_proj = (linear(weights(128, 256, seed=i).bfloat16()) for i in range(2))
        wrapped = peft.inject_adapter_in_model(
            peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "o_proj"]), model
        )
        merged = {}
        for name, (A, B) in made.items():
            layer = getattr(wrapped, name.rpartition(".")[2])
            layer.lora_A["default"].weight.data.copy_(A * size)
            layer.lora_B["default"].weight.data.copy_(B)
            layer.merge()
            merged[name] = layer.base_layer
        out = write(tmp_path / f"out {size}", merged)
        report: Any = loratool.verify(base, adapter, out)
        assert report.status == "inconclusive" and not report.wrong, report.tensors
        for name, (A, B) in made.items():
            D = B.double() @ A.double() * size
            old, new = (decode_nf4(functional, load_model(folder), name) for folder in (base, out))
            share = float(((new - old) * D).sum() / (D * D).sum())
            told = details(report)[name][1]
            assert low < share < high
            assert told.startswith("requantized with fresh scales: keeps ")
            assert float(told.split()[-5]) / 100 == pytest.approx(share, abs=0.006)


def decode_nf4(functional: Any, stored: dict[str, Tensor], name: str) -> Tensor:
    parts = {k.removeprefix(f"{name}.weight."): v for k, v in stored.items() if k.startswith(f"{name}.weight.")}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    found: Tensor = functional.dequantize_4bit(stored[f"{name}.weight"], state)
    return found.double()


def test_what_only_quantized_models_have_beside_weights_is_not_compared(tmp_path: Path) -> None:
    base, adapter, parts = write_plain(tmp_path)
    out = write_int8(tmp_path / "out", {n: W + D for n, (W, D) in parts.items()}, 120.0)
    cache = f"{K}.k_scale"
    stored = load_model(out) | {cache: torch.ones(1)}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    report: Any = loratool.verify(base, adapter, out)
    assert report.not_compared == (cache,) and report.status == "inconclusive"


def test_the_terminal_says_what_is_not_proven(tmp_path: Path) -> None:
    base, adapter, added = write_pair(tmp_path)
    out, _ = requantize_anew(base, tmp_path / "out", added)
    shown = run_command("verify", base, adapter, out)
    lines = shown.stdout.splitlines()
    assert shown.exit_code == 1 and lines[-1] == (
        "inconclusive: another program chose the codes, which prove nothing; 3 requantized, 1 unchanged"
    )
    assert any(re.match(r"self_attn\.q_proj +.*requantized with fresh scales: keeps [\d.]+ %", line) for line in lines)
    told = json.loads(run_command("verify", base, adapter, out, "--json").stdout)
    assert (told["exit_code"], told["status"]) == (1, "inconclusive")
    assert {t["verdict"] for t in told["report"]["tensors"]} == {"requantized"}
    small = tmp_path / "small"
    small.mkdir()
    base, adapter, _ = write_pair(small, 0.006)
    loratool.merge(base, adapter, small / "out", quantized="requantize", undo=False)
    shown = run_command("verify", base, adapter, small / "out")
    assert shown.exit_code == 0 and shown.stdout.splitlines()[-1].startswith("proven")
    assert "the codes are right, but keep" in shown.stderr


def test_many_tensors_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(30)]
    base = write_int8(tmp_path / "base", {n: weights(ROWS, COLUMNS, seed=i) for i, n in enumerate(names)})
    made = {n: factors(ROWS, COLUMNS, RANK, seed=i) for i, n in enumerate(names)}
    made = {n: (A * 0.002 * (i + 1), B) for i, (n, (A, B)) in enumerate(made.items())}
    adapter = write_peft(tmp_path / "adapter", made)
    out = tmp_path / "out"
    shutil.copytree(base, out)
    stored = load_model(base)
    sums = {}
    for name, (A, B) in made.items():
        sums[name] = stored[f"{name}.weight"].double() * stored[f"{name}.weight_scale"].double()
        sums[name] += B.double() @ A.double()
    write_int8(out, sums, 126.0)
    lines = run_command("verify", base, adapter, out).stdout.splitlines()
    assert len(lines) <= 25 and "30 requantized" in lines[-1]
    assert any(re.search(r"keeps -?[\d.]+\.\.[\d.]+ %", line) for line in lines), "one line, with the range of shares"


def test_numbers_that_bfloat16_cannot_hold_are_not_the_merges(tmp_path: Path) -> None:
    """A stack without placements is read row by row; inf where the base has a number is wrong."""
    base, adapter, _ = write_pair(tmp_path)
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, quantized="dequantize", undo=False)
    change(out, {f"{K}.weight": lambda W: torch.where(torch.from_numpy(np.eye(ROWS, COLUMNS) > 0), torch.inf, W)})
    report: Any = loratool.verify(base, adapter, out)
    assert details(report)[K][0] == "wrong"
