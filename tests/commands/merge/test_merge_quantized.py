"""Merge into each format of codes in each way: the exact sum, rounded once; all else as it was; and undone.

The bases are the vectors of fixtures/coded, made by the formats' own software, with plain tensors beside them. The
numbers that codes mean are held to that software in tests/files/codecs/test_vectors.py; here they are the start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, bits, factors, load_model, run_command, slow, weights, write_peft
from lib.models.coded_models import (
    EACH,
    FRESH,
    LIKE,
    PLAIN,
    RANK,
    READ,
    VECTORS,
    files_of,
    numbers_of,
    sized,
    write_adapter,
    write_base,
    write_twins,
)
from lib.oracles.reference import change_reference, round_reference, to_longdouble
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool.binding.merge.coded_bases import COARSE, code_bits
from loratool.binding.merge.merge_plan import MergePlan, plan_merge
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.codecs import CODECS
from loratool.files.codecs.codec import CodeFormat
from loratool.files.codecs.scaled import ScaledCodes
from loratool.numerics.code_levels import Integers


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x.reshape(-1)), bits(y.reshape(-1)))


def is_nearest(found: Tensor, W: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether bfloat16 numbers are the nearest to W + 2 B A; fractions decide what longdouble does not."""
    guess = round_reference(to_longdouble(W) + change_reference(A, B, 2.0), torch.bfloat16)
    for i, j in np.argwhere((found.view(torch.int16) != guess.view(torch.int16)).numpy()):
        pairs = zip(B[i].tolist(), A[:, j].tolist(), strict=True)
        exact = Fraction(float(W[i, j])) + 2 * sum(Fraction(b) * Fraction(a) for b, a in pairs)
        mine, other = (abs(Fraction(float(x[i, j])) - exact) for x in (found, guess))
        if not (mine < other or (mine == other and int(found.view(torch.int16)[i, j]) % 2 == 0)):
            return False
    return True


# Of which `dequantize` takes another way than `mixed`
ALL_PLAIN = "comfy_scaled_fp8 fbgemm_fp8 gptq_v1_3bit torchao_int8".split()


@pytest.mark.parametrize(
    ("way", "vector"),
    [pytest.param("mixed", *each.values, marks=each.marks) for each in EACH]
    + [pytest.param("dequantize", name, marks=() if name in ALL_PLAIN else pytest.mark.slow) for name in READ],
)
def test_what_becomes_plain_is_the_exact_sum_rounded_once_and_comes_off(vector: str, way: str, tmp_path: Path) -> None:
    base = write_base(vector, tmp_path / "base")
    numbers = numbers_of(base)
    adapter, changes = write_adapter(tmp_path / "adapter", sized(numbers))
    if way == "dequantize" and any(float(W.abs().max()) > 3e38 for W in numbers.values()):
        with pytest.raises(InputError, match="become infinite in BF16"):
            loratool.merge(base, adapter, tmp_path / "out", quantized=way)
        return
    loratool.merge(base, adapter, tmp_path / "out", quantized=way)
    out, stored = load_model(tmp_path / "out"), load_model(base)
    for name, pair in changes.items():
        assert out[name].dtype == torch.bfloat16 and is_nearest(out[name], numbers[name], *pair), name
    kept = out.keys() & stored.keys() - changes.keys() - PLAIN.keys()
    assert way == "dequantize" or all(same(out[name], stored[name]) for name in kept)
    if way == "dequantize":
        assert out.keys() - PLAIN.keys() >= numbers.keys()
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert not config.keys() & {"quantization_config", "quantization"}
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


@pytest.mark.parametrize("way", ["mixed", "dequantize", "requantize"])
def test_what_each_way_would_weigh_is_what_it_weighs(way: str, tmp_path: Path) -> None:
    base, adapter = FIXTURES / "llama" / "fp8", FIXTURES / "llama" / "adapter"
    report = loratool.merge(base, adapter, tmp_path / "out", target=["q_proj"], quantized=way)
    weighed = sum(tensor.nbytes for tensor in load_model(tmp_path / "out").values())
    planned = [
        loratool.merge(base, adapter, tmp_path / "none", target=["q_proj"], quantized=each, dry_run=True).sizes[way]
        for each in ("mixed", "dequantize", "requantize")
    ]
    assert [report.sizes[way], *planned] == [weighed] * 4


@pytest.mark.parametrize("size", [3.0, slow(1e14)], ids=str)
@pytest.mark.parametrize("vector", EACH)
def test_requantized_codes_are_the_nearest_and_come_off(vector: str, size: float, tmp_path: Path) -> None:
    base = write_base(vector, tmp_path / "base")
    numbers = numbers_of(base)
    adapter, changes = write_adapter(tmp_path / "adapter", sized(numbers), size)
    report = loratool.merge(base, adapter, tmp_path / "out", quantized="requantize", allow=["lossy"])
    assert files_of(tmp_path / "out").keys() - {"README.md", "loratool.undo"} == files_of(base).keys()
    stored, out = load_model(base), load_model(tmp_path / "out")
    assert stored.keys() == out.keys()
    found = numbers_of(tmp_path / "out")
    checkpoint = open_checkpoint(base)
    codes = {checkpoint.weights[name].tensors[0] for name in changes}
    assert all(same(out[name], stored[name]) for name in stored.keys() - codes)
    for name, pair in changes.items():
        parts = checkpoint.parts_of(name)
        codec = parts.weight.codec
        assert isinstance(codec, CodeFormat)
        exact = to_longdouble(numbers[name]) + change_reference(*pair, 2.0)
        reached = all_numbers(codec, parts, len(exact))
        distance = np.abs(to_longdouble(found[name]) - exact)
        for numbers_of_a_code in reached:  # no code is nearer
            assert (distance <= np.abs(numbers_of_a_code - exact) * (1 + 1e-12)).all(), name
    checkpoint.close()
    assert {row.name for row in report.tensors} == set(changes) and all(row.kept is not None for row in report.tensors)
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def all_numbers(codec: CodeFormat, parts: Any, rows: int) -> list[np.ndarray]:
    """The numbers that all weights would have with each code in turn; nan is far from all."""
    assert isinstance(codec, ScaledCodes)
    levels, count, found = codec.levels(parts), 1 << parts.weight.detail.get("bits", codec.bits), []
    for code in range(levels.low, levels.high + 1) if isinstance(levels, Integers) else range(count):
        codes = np.full((rows, codec.width(parts)), code, codec.code)
        values = codec.values(parts, 0, codes).astype(np.longdouble)
        found.append(np.where(np.isnan(values), np.inf, values))
    return found


@pytest.mark.parametrize("vector", FRESH)
def test_like_writes_the_bytes_of_the_formats_own_software(vector: str, tmp_path: Path) -> None:
    original, adapter, quantized = write_twins(vector, tmp_path)
    loratool.merge(original, adapter, tmp_path / "out", like=quantized, undo=False)
    out, expected = load_model(tmp_path / "out"), load_model(quantized)
    assert out.keys() == expected.keys()
    for name, tensor in expected.items():
        if ".quant_state." in name:  # the same JSON, with blanks behind it
            found, own = (json.loads(bytes(x.tolist())) for x in (out[name], tensor))
            assert found.pop("nested_offset", 0.0) == pytest.approx(own.pop("nested_offset", 0.0), rel=1e-6)
            assert found == own
        else:
            assert same(out[name], tensor), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (quantized / "config.json").read_text()
    )


def test_what_cannot_be_written_like_another_says_so(tmp_path: Path) -> None:
    original, adapter, quantized = write_twins("bnb_nf4", tmp_path)
    out = tmp_path / "out"
    with pytest.raises(NeedsFlag, match="cannot be undone") as error:
        loratool.merge(original, adapter, out, like=quantized)
    assert error.value.remedy == "add --no-undo"
    with pytest.raises(InputError, match="is quantized itself"):
        loratool.merge(quantized, adapter, out, like=quantized, undo=False)
    with pytest.raises(InputError, match="no quantized weights"):
        loratool.merge(original, adapter, out, like=original, undo=False)
    with pytest.raises(UsageError, match="remove quantized"):
        loratool.merge(original, adapter, out, like=quantized, quantized="requantize", undo=False)
    for vector, why in (("gptq_v1_4bit", "calibration data"), ("torchao_int8", "layout that like does not write")):
        with pytest.raises(InputError, match=why):
            loratool.merge(original, adapter, out, like=write_base(vector, tmp_path / vector), undo=False)
    folder = write_base("bnb_nf4", tmp_path / "gpt2", model_type="gpt2")
    tensors = load_file(folder / "model.safetensors")
    turned = {n.replace("model.layers.0.self_attn.q_proj", "h.0.attn.c_attn"): t for n, t in tensors.items()}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="stores .in, out."):
        loratool.merge(original, adapter, out, like=folder, undo=False)
    other = write_base("bnb_fp4", tmp_path / "other")
    file = other / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="of different models") as error2:
        loratool.merge(original, adapter, out, like=other, undo=False)
    assert error2.value.culprit == "lm_head.weight"
    assert not out.exists()


@pytest.mark.parametrize("way", ["mixed", "dequantize"])
def test_an_untied_head_of_coded_words_has_the_type_of_plain_weights(way: str, tmp_path: Path) -> None:
    """Also where an adapter has the words' weights, of another type, under its LoRA, as peft stores them."""
    base = write_base("mlx_affine4_64", tmp_path / "base", tie_word_embeddings=True)
    tensors = {n.replace(Q, "model.embed_tokens"): t for n, t in load_file(base / "model.safetensors").items()}
    tensors = {n: t for n, t in tensors.items() if n != "lm_head.weight" and (n not in PLAIN or "embed" not in n)}
    coded = {n.replace(Q, "model.embed_tokens"): t for n, t in load_model(base).items() if n.startswith(Q)}
    save_file({**tensors, **coded}, base / "model.safetensors", metadata={"format": "pt"})
    words, width = numbers_of(base)["model.embed_tokens.weight"].shape
    A, B = factors(width, words, RANK)
    path = "base_model.model.model.embed_tokens"
    own = weights(words, width)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    keys = {f"{path}.lora_embedding_A": A, f"{path}.lora_embedding_B": B, f"{path}.base_layer.weight": own}
    save_file(keys, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["embed_tokens"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    loratool.merge(base, adapter, tmp_path / "out", quantized=way)
    out = load_model(tmp_path / "out")
    assert same(out["lm_head.weight"], own.bfloat16()) and out["model.embed_tokens.weight"].dtype == torch.bfloat16
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


@pytest.mark.parametrize("way", ["mixed", "dequantize", "requantize"])
def test_older_versions_of_comfyui_cast_plain_weights_of_a_scaled_file(way: str, tmp_path: Path) -> None:
    base = write_base("comfy_scaled_fp8", tmp_path / "base")
    adapter, _ = write_adapter(tmp_path / "adapter", sized(numbers_of(base)))
    notes = loratool.merge(base, adapter, tmp_path / "out", quantized=way).warnings
    assert any("older versions of ComfyUI" in note for note in notes) == (way != "requantize")
    assert not any("scaled_fp8" in note and "keep their dtype" in note for note in notes)


def test_the_guides_table_is_true(tmp_path: Path) -> None:
    guide = (ROOT / "loratool" / "guides" / "quantized.md").read_text()
    lines = (line.strip("|").split(" | ") for line in guide.splitlines() if line.startswith("| `"))
    rows = ([cell.strip() for cell in line] for line in lines)
    told = {row[0].strip("`"): row[2:] for row in rows if row[0].strip("`") in CODECS}
    assert told.keys() == {key for key, codec in CODECS.items() if isinstance(codec, CodeFormat)}
    for vector in READ:
        checkpoint = open_checkpoint(write_base(vector, tmp_path / vector))
        for name, weight in checkpoint.weights.items():
            assert isinstance(weight.codec, CodeFormat)
            requantized, like = told[weight.codec.key]
            is_fine = code_bits(weight) >= COARSE
            assert requantized == "8 bits" or is_fine == (requantized == "yes"), (vector, name)
            is_written = weight.codec.quantizer(checkpoint.parts_of(name)) is not None
            assert "but for" in like or is_written == (like == "yes"), (vector, name)
        checkpoint.close()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def test_the_config_of_a_model_like_another_tells_of_its_own_plain_numbers(tmp_path: Path) -> None:
    original, adapter, quantized = write_twins("bnb_nf4", tmp_path)
    out, wide = tmp_path / "out", tmp_path / "wide"
    report = loratool.merge(original, adapter, out, like=quantized, undo=False)
    assert not any("config" in note for note in report.warnings)
    loratool.merge(original, adapter, wide, like=quantized, undo=False, dtype="fp32")
    assert {load_model(wide)[name].dtype for name in PLAIN} == {torch.float32}
    assert config_of(wide) == {**config_of(out), "dtype": "float32"}
    for folder, theta, dtype in ((original, 10000.0, "bfloat16"), (quantized, 5000.0, "float16")):
        fields = {"rope_theta": theta, "text_config": {"dtype": dtype}}
        (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))
    report = loratool.merge(original, adapter, out, like=quantized, undo=False, force=True)
    assert any("another rope_theta than" in note for note in report.warnings)
    assert config_of(out)["rope_theta"] == 5000.0


def test_a_model_like_a_file_without_a_config_keeps_its_own(tmp_path: Path) -> None:
    original, adapter, quantized = write_twins("fp8_blocks", tmp_path)
    (quantized / "config.json").unlink()
    report = loratool.merge(original, adapter, tmp_path / "out", like=quantized, undo=False)
    assert any("has no config" in note for note in report.warnings)
    assert config_of(tmp_path / "out") == config_of(original)


def test_an_adapters_own_values_are_rounded_to_the_originals_type_before_they_are_codes(tmp_path: Path) -> None:
    original, _, quantized = write_twins("bnb_nf4", tmp_path)
    name = next(name for name, weight in VECTORS["bnb_nf4"]["weights"].items() if "source" in weight)
    module, own = name.removesuffix(".weight"), load_model(original)[name].float()
    saved = {}
    for precision, values in (("wide", own * (1 + 2**-9)), ("narrow", (own * (1 + 2**-9)).bfloat16().float())):
        adapter = tmp_path / precision
        adapter.mkdir()
        save_file({f"base_model.model.{name}": values}, adapter / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["x"]}
        fields["modules_to_save"] = [module.rpartition(".")[2]]
        (adapter / "adapter_config.json").write_text(json.dumps(fields))
        loratool.merge(original, adapter, tmp_path / f"out-{precision}", like=quantized, undo=False)
        saved[precision] = load_model(tmp_path / f"out-{precision}")
    assert all(same(tensor, saved["narrow"][key]) for key, tensor in saved["wide"].items())


def test_an_untied_head_has_no_place_in_a_model_like_a_tied_one(tmp_path: Path) -> None:
    original, _, quantized = write_twins("bnb_nf4", tmp_path)
    for folder in (original, quantized):
        tensors = load_model(folder)
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**config_of(folder), "tie_word_embeddings": True}))
    words, width = PLAIN["model.embed_tokens.weight"]
    A, B = factors(width, words, RANK)  # of the transposed embedding, as peft has it
    adapter = tmp_path / "on-embedding"
    adapter.mkdir()
    stored = {"embedding_A": A, "embedding_B": B}
    keys = {f"base_model.model.model.embed_tokens.lora_{key}": tensor for key, tensor in stored.items()}
    save_file(keys, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["embed_tokens"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="is tied to the embedding") as error:
        loratool.merge(original, adapter, tmp_path / "out", like=quantized, undo=False)
    assert error.value.culprit == "lm_head.weight" and "--tied share" in str(error.value.remedy)
    loratool.merge(original, adapter, tmp_path / "out", like=quantized, undo=False, tied="share")
    assert load_model(tmp_path / "out").keys() == load_model(quantized).keys()


@pytest.mark.parametrize("way", ["mixed", "dequantize", "requantize", "like"])
def test_a_single_file_says_that_the_config_beside_the_base_is_wrong_for_it(way: str, tmp_path: Path) -> None:
    original, adapter, quantized = write_twins("fp8_blocks", tmp_path)
    out = tmp_path / "out.safetensors"
    if way == "like":
        report = loratool.merge(original, adapter, out, like=quantized, undo=False)
    else:
        report = loratool.merge(quantized, adapter, out, quantized=way)
    assert any("name a folder" in note for note in report.warnings) == (way != "requantize")
    if way == "dequantize":
        converted = loratool.convert_model(quantized, tmp_path / "plain.safetensors", dtype="bf16")
        assert any("name a folder" in note for note in converted.warnings)
        assert loratool.convert_model(quantized, tmp_path / "same.safetensors").warnings == ()


def test_requantize_says_when_it_has_nothing_to_do(tmp_path: Path) -> None:
    original, adapter, _ = write_twins("fp8_blocks", tmp_path)
    report = loratool.merge(original, adapter, tmp_path / "out", quantized="requantize")
    assert any("nothing to do" in note for note in report.warnings) and report.quantized is None


@pytest.mark.parametrize("vector", ["fp8_blocks", "bnb_nf4", "awq_gemm"])
def test_codes_of_few_bits_are_requantized_only_if_asked_for(vector: str, tmp_path: Path) -> None:
    base = write_base(vector, tmp_path / "base")
    adapter, _ = write_adapter(tmp_path / "adapter", sized(numbers_of(base)))
    told = run_command("merge", base, adapter, "-o", tmp_path / "out", "--quantized", "requantize")
    if vector == "fp8_blocks":
        assert told.exit_code == 0 and "missed" in told.stdout
    else:
        assert told.exit_code == 4 and "--allow lossy" in told.stderr and not (tmp_path / "out").exists()
        again = run_command(
            "merge", base, adapter, "-o", tmp_path / "out", "--quantized", "requantize", "--allow", "lossy"
        )
        assert again.exit_code == 0 and "use --quantized mixed" in again.stderr


@pytest.mark.parametrize("way", ["mixed", "dequantize", "requantize"])
def test_stacks_of_experts(way: str, tmp_path: Path) -> None:
    """Of gpt-oss, whose numbers bfloat16 holds: so the same merge into its plain twin is known to be right."""
    base = write_base("mxfp4_gpt_oss", tmp_path / "base", model_type="gpt_oss")
    tensors = load_file(base / "model.safetensors")
    tensors |= {name: scales.clamp(100, 150) for name, scales in tensors.items() if name.endswith("_scales")}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    numbers = numbers_of(base)
    plain = {name: W.bfloat16() for name, W in numbers.items()}
    assert all(torch.equal(plain[name].double(), W) for name, W in numbers.items())
    stack = "model.layers.0.mlp.experts"
    A, B = {}, {}
    for at, kind in enumerate(("gate_up_proj", "down_proj")):
        W = numbers[f"{stack}.{kind}"]
        experts, rows, columns = W.shape
        A[kind], B[kind] = factors(columns, rows, RANK * experts, seed=at)
    keys = {f"{stack}.base_layer.lora_{side}.weight": of["gate_up_proj"] for side, of in (("A", A), ("B", B))}
    keys |= {f"{stack}.lora_{side}.weight": of["down_proj"] for side, of in (("A", A), ("B", B))}
    (tmp_path / "adapter").mkdir()
    stored = {f"base_model.model.{key}": (value * 0.05).contiguous() for key, value in keys.items()}
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [], "peft_version": "0.19.0"}
    fields["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    twin = tmp_path / "twin"
    twin.mkdir()
    rest = {n: t for n, t in load_model(base).items() if n in PLAIN or n.endswith("_bias")}
    save_file(plain | rest, twin / "model.safetensors", metadata={"format": "pt"})
    (twin / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "dtype": "bfloat16"}))
    loratool.merge(twin, tmp_path / "adapter", tmp_path / "expected")
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out", quantized=way, allow=["lossy"])
    if way == "requantize":
        assert load_model(tmp_path / "out").keys() == load_model(base).keys()
    else:
        out, expected = load_model(tmp_path / "out"), load_model(tmp_path / "expected")
        assert out.keys() == expected.keys() and all(same(out[name], expected[name]) for name in out)
    loratool.unmerge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def damaged(vector: str, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> tuple[Path, Path]:
    """Return a base that was damaged after its adapter was made."""
    base = write_base(vector, folder / "base")
    adapter, _ = write_adapter(folder / "adapter", sized(numbers_of(base)))
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base, adapter


Q = "model.layers.0.self_attn.q_proj"


def fill(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)  # type: ignore[func-returns-value]


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.pop(name)  # type: ignore[func-returns-value]


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    return change


STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("vector", "change", "culprit"),
    [
        ("fp8_blocks", fill(f"{Q}.weight_scale_inv", float("nan")), f"{Q}.weight_scale_inv"),
        ("fp8_blocks", fill(f"{Q}.weight_scale_inv", float("inf")), f"{Q}.weight_scale_inv"),
        ("fp8_blocks", cut(f"{Q}.weight_scale_inv"), f"{Q}.weight"),
        ("ct_nvfp4", fill(f"{Q}.weight_global_scale", 0.0), f"{Q}.weight_global_scale"),
        ("ct_nvfp4", drop(f"{Q}.weight_global_scale"), f"{Q}.weight"),
        ("bnb_nf4", drop(f"{Q}.weight.quant_map"), f"{Q}.weight"),
        ("bnb_nf4", cut(STATE), f"{Q}.weight"),
        ("bnb_nf4", fill(f"{Q}.weight.absmax", float("nan")), f"{Q}.weight.absmax"),
        ("gptq_v1_4bit_act_order", fill(f"{Q}.g_idx", 1 << 20), f"{Q}.g_idx"),
        ("gptq_v1_4bit_act_order", drop(f"{Q}.scales"), f"{Q}.weight"),
        ("awq_gemm", cut(f"{Q}.scales"), f"{Q}.weight"),
        ("ct_pack4_group", drop(f"{Q}.weight_shape"), f"{Q}.weight"),
        ("mlx_affine4_64", fill(f"{Q}.biases", float("inf")), f"{Q}.biases"),
    ],
)
@pytest.mark.parametrize("way", ["mixed", "requantize"])
def test_a_damaged_base_is_refused_by_name_before_the_first_byte(
    vector: str, change: Callable[[dict[str, Tensor]], None], culprit: str, way: str, tmp_path: Path
) -> None:
    base, adapter = damaged(vector, tmp_path, change)
    told = run_command("merge", base, adapter, "-o", tmp_path / "out", "--quantized", way, "--allow", "lossy")
    assert told.exit_code == 3 and culprit in told.stderr, told.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(("rows", "whole"), [(slice(0, 8), True), (slice(8, 12), False), (slice(4, 32), False)])
def test_rows_whose_codes_share_bytes(
    rows: slice, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWQ has eight rows a word. An adapter of a part of a fused layer can change fewer."""
    base = write_base("awq_gemm", tmp_path / "base")
    numbers = sized(numbers_of(base))
    adapter, changes = write_adapter(tmp_path / "adapter", numbers)

    def of_some_rows(*args: Any) -> MergePlan:
        plan = plan_merge(*args)
        part = {"start": rows.start, "stop": rows.stop, "skip": rows.start}
        cut = {n: tuple(replace(p, **part) for p in found) for n, found in plan.placements.items()}
        return replace(plan, placements=cut)

    monkeypatch.setattr("loratool.commands.merge.command.plan_merge", of_some_rows)
    for way, flags in (("requantize", "--quantized mixed --no-undo"), ("mixed", "--no-undo")):
        if whole:
            loratool.merge(base, adapter, tmp_path / way, quantized=way, allow=["lossy"])
            loratool.unmerge(tmp_path / way, adapter, tmp_path / f"{way}-back")
            assert files_of(tmp_path / f"{way}-back") == files_of(base)
        else:
            with pytest.raises(NeedsFlag, match="8 rows of its codes share bytes") as error:
                loratool.merge(base, adapter, tmp_path / way, quantized=way, allow=["lossy"])
            assert error.value.remedy == f"add {flags}" and not (tmp_path / way).exists()
    loratool.merge(base, adapter, tmp_path / "out", undo=False)
    out = load_model(tmp_path / "out")
    for name, (A, B) in changes.items():
        kept = torch.zeros_like(B)
        kept[rows] = B[rows]
        assert is_nearest(out[name], numbers[name], A, kept)


def test_a_shard_of_scales_alone_is_gone_with_them(tmp_path: Path) -> None:
    """Of an empty file no index tells, so that the merge after it would lose it, and unmerge with it."""
    base, shards = write_base("ct_fp8_channel", tmp_path / "base"), ("one.safetensors", "two.safetensors")
    tensors = load_file(base / "model.safetensors")
    adapter, _ = write_adapter(tmp_path / "adapter", sized(numbers_of(base)))
    (base / "model.safetensors").unlink()
    weight_map = {name: shards[name.endswith("_scale")] for name in tensors}
    for shard in shards:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, base / shard, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loratool.merge(base, adapter, tmp_path / "once", quantized="dequantize")
    loratool.merge(tmp_path / "once", adapter, tmp_path / "twice")
    assert [path.name for path in (tmp_path / "twice").glob("*.safetensors")] == ["one.safetensors"]
    loratool.unmerge(tmp_path / "twice", adapter, tmp_path / "once-again")
    assert files_of(tmp_path / "once-again") == files_of(tmp_path / "once")
    loratool.unmerge(tmp_path / "once-again", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def test_a_merge_that_touches_plain_tensors_runs_on_any_checkpoint(tmp_path: Path) -> None:
    """Codes of an unknown format are copied, and the config stays; only an update of theirs is refused."""
    coded = {"model.layers.0.mlp.up_proj.W_q": torch.randint(0, 255, (8, 16), dtype=torch.uint8)}
    coded |= {"model.layers.0.mlp.up_proj.scale": torch.rand(4, 1), "model.layers.0.mlp.up_proj.zero": torch.rand(4, 1)}
    W = weights(16, 8).bfloat16()
    base = tmp_path / "base"
    base.mkdir()
    save_file({**coded, f"{Q}.weight": W}, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    adapter, changes = write_adapter(tmp_path / "adapter", {f"{Q}.weight": W.double()})
    loratool.merge(base, adapter, tmp_path / "out")
    out = load_model(tmp_path / "out")
    assert all(same(out[name], tensor) for name, tensor in coded.items())
    assert is_nearest(out[f"{Q}.weight"], W.double(), *changes[f"{Q}.weight"])
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    touching, _ = write_adapter(tmp_path / "touching", {"model.layers.0.mlp.up_proj.weight": weights(16, 8).double()})
    with pytest.raises(InputError, match="HQQ") as error:
        loratool.merge(base, touching, tmp_path / "other")
    assert "model.layers.0.mlp.up_proj" in str(error.value.culprit)
    with pytest.raises(InputError, match="HQQ"):
        loratool.merge(base, adapter, tmp_path / "other", quantized="dequantize")


def test_codes_of_a_layer_that_stores_in_by_out_are_refused(tmp_path: Path) -> None:
    """Quantizers put linear layers in the place of GPT-2's Conv1D; a square matrix does not tell which it is."""
    name = "transformer.h.0.attn.c_proj"
    tensors = {f"{name}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), f"{name}.weight_scale": torch.ones(1)}
    for model_type in ("gpt2", "llama"):
        base = tmp_path / model_type
        base.mkdir()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        (base / "config.json").write_text(json.dumps({"model_type": model_type}))
        adapter, _ = write_adapter(tmp_path / "adapter", {f"{name}.weight": torch.ones(4, 4).double()})
        told = run_command("merge", base, adapter, "-o", tmp_path / f"out-{model_type}")
        assert told.exit_code == (3 if model_type == "gpt2" else 0), told.stderr
        assert model_type == "llama" or (f"{name}.weight" in told.stderr and "stores (in, out)" in told.stderr)


@pytest.mark.parametrize("vector", ["fp8_blocks", "bnb_nf4_nested", "awq_gemm"])
def test_the_plan_says_what_each_way_weighs(vector: str, tmp_path: Path) -> None:
    base = write_base(vector, tmp_path / "base")
    adapter, _ = write_adapter(tmp_path / "adapter", sized(numbers_of(base)))
    plan = loratool.merge(base, adapter, tmp_path / "out", dry_run=True)
    assert plan.quantized == "mixed" and plan.base_nbytes == sum(t.nbytes for t in load_model(base).values())
    assert plan.undo_bytes is not None
    for way, size in plan.sizes.items():
        planned = loratool.merge(base, adapter, tmp_path / way, quantized=way, allow=["lossy"], dry_run=True)
        report = loratool.merge(base, adapter, tmp_path / way, quantized=way, allow=["lossy"])
        assert sum(t.nbytes for t in load_model(tmp_path / way).values()) == size
        assert report.undo_bytes is not None and planned.undo_bytes is not None
        assert report.undo_bytes <= planned.undo_bytes and report.nbytes == planned.nbytes
    assert list(plan.sizes) == ["mixed", "dequantize", "requantize"]


def test_one_expert_that_makes_a_layer_plain_is_told_with_a_better_way(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for expert in range(6):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{kind}"
            tensors[f"{name}.weight"] = weights(16, 16, seed=expert).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale_inv"] = torch.ones(1, 1)
    base = tmp_path / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "qwen3_moe", "dtype": "bfloat16", "quantization_config": quantized}
    (base / "config.json").write_text(json.dumps(config))
    one = "model.layers.0.mlp.experts.2.up_proj.weight"
    adapter, _ = write_adapter(tmp_path / "adapter", {one: numbers_of(base)[one]})
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert report.decoded == 17 and not open_checkpoint(tmp_path / "out").weights
    (note,) = [line for line in report.warnings if "unchanged weights" in line]
    assert note.startswith("17 unchanged weights") and note.endswith("--quantized requantize keeps their size")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)
    assert loratool.verify(base, adapter, tmp_path / "out").status == "proven"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_largest_weight(tmp_path: Path) -> None:
    """Of rows that are decoded, merged, recorded and written a few at a time: not a matrix of half a gigabyte."""
    rows, columns = 1 << 13, 1 << 14
    codes = torch.randint(0, 120, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    name = "model.layers.0.mlp.down_proj"
    base = tmp_path / "base"
    base.mkdir()
    tensors = {f"{name}.weight": codes, f"{name}.weight_scale": torch.full((rows, 1), 1e-3)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    A, B = factors(rows, columns, RANK)
    adapter = write_peft(tmp_path / "adapter", {name: (A * 1e-2, B)})
    code = f"""
import resource, loratool
for way in ("mixed", "requantize"):
    loratool.merge({str(base)!r}, {str(adapter)!r}, {str(tmp_path)!r} + "/" + way, quantized=way, workers=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 700


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("vector", FRESH)
def test_no_codes_are_made_of_what_is_not_finite(vector: str, value: float, tmp_path: Path) -> None:
    """One such number would be the scale of its whole group."""
    original, adapter, quantized = write_twins(vector, tmp_path)
    tensors = load_file(original / "model.safetensors")
    name = next(name for name in tensors if name not in PLAIN)
    tensors[name].view(-1)[3] = value
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    told = run_command("merge", original, adapter, "-o", tmp_path / "out", "--like", quantized, "--no-undo")
    assert told.exit_code == 3 and f"{name}: holds inf or nan" in told.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"original", "adapter", "quantized"}


@pytest.mark.parametrize("vector", LIKE)
def test_no_codes_are_made_of_a_merge_that_overflows(vector: str, tmp_path: Path) -> None:
    original, _, quantized = write_twins(vector, tmp_path)
    tensors = load_file(original / "model.safetensors")
    tensors = {name: W if name in PLAIN else W.clamp(-6e4, 6e4).half() for name, W in tensors.items()}
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    name = next(name for name in tensors if name not in PLAIN)
    A, B = factors(*tensors[name].shape, RANK)
    adapter = write_peft(tmp_path / "large", {name.removesuffix(".weight"): (A * 1e4, B * 1e4)})
    told = run_command("merge", original, adapter, "-o", tmp_path / "out", "--like", quantized, "--no-undo")
    assert told.exit_code == 4 and "become infinite in float16, before they are encoded" in told.stderr
    assert "add --dtype fp32" in told.stderr and not (tmp_path / "out").exists()
    wider = run_command(
        "merge", original, adapter, "-o", tmp_path / "out", "--like", quantized, "--no-undo", "--dtype", "fp32"
    )
    # bitsandbytes' int8 and scales of 16 bits have no room for them either, and say so
    assert wider.exit_code == 0 or (wider.exit_code == 3 and "too large" in wider.stderr), wider.stderr
