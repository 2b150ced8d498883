"""Hold `unmerge` against undo files that lie: what it writes is the base, byte for byte, or nothing at all.

Most lies have the hash of the index written anew, as a forger would. No lie is told of `new_side`, which names the
files that the merge added: once the index's hash is forged too, nothing else tells whether the base had such a file.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, write_peft
from damages import damaged_bytes
from fuzzing import Case, Fuzzer, Ran
from gguf_lies import build, fields, tensors
from lib.files.undo_bytes import hashes_of, join_undo, split_undo, table_of, with_blob, with_table
from lib.models.undo_models import write_mixed, write_replaced_codes, write_resized, write_torch
from lies import lie
from safetensors.torch import load_file
from valid_files import adapter, model, sharded

import loratool

pytestmark = pytest.mark.fuzz

FIRST = 16  # bytes that say what the file is


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_ggml(folder: Path) -> Path:
    folder.mkdir()
    (folder / "base.gguf").write_bytes(build(fields(), tensors()))
    names = {"self_attn.v_proj": (16, 32), "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32)}
    write_peft(folder / "adapter", {f"model.layers.0.{name}": factors(*shape, 2) for name, shape in names.items()})
    return folder


# What is merged -> what writes it into a folder, the base's name, the output's, and how codes are merged
MODELS: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "mixed": (write_mixed, "base", "merged", "mixed"),
    "dora": (partial(write_mixed, dora=True), "base", "merged", "mixed"),
    "one file": (write_mixed, "base/model.safetensors", "merged.safetensors", "mixed"),
    "llama": (lambda folder: write(folder, {**model("base"), **adapter("adapter")}), "base", "merged", "mixed"),
    "shards": (lambda folder: write(folder, {**sharded("base"), **adapter("adapter")}), "base", "merged", "mixed"),
    "resized": (write_resized, "base", "merged", "mixed"),
    "torch": (write_torch, "base", "merged", "mixed"),
    "gguf": (write_ggml, "base.gguf", "merged.gguf", "requantize"),
    "numbers of gguf": (write_ggml, "base.gguf", "merged.gguf", "mixed"),
    "replaced codes": (write_replaced_codes, "base", "merged", "mixed"),
    "codes": (lambda folder: write(folder, read(FIXTURES / "llama", "")), "fp8", "merged", "requantize"),
    "decoded": (lambda folder: write(folder, read(FIXTURES / "llama", "")), "fp8", "merged", "mixed"),
}


def read(folder: Path, prefix: str) -> dict[str, bytes]:
    """Return the files of a folder, or a file."""
    if folder.is_file():
        return {prefix: folder.read_bytes()}
    start = f"{prefix}/" if prefix else ""
    return {f"{start}{p.relative_to(folder)}": p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@cache
def merged(name: str) -> dict[str, bytes]:
    """Return a working folder with `base`, `adapter` and `merged`, the undo file with it."""
    make, base, out, way = MODELS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "made")
        make(folder)
        loratool.merge(folder / base, folder / "adapter", folder / out, quantized=way, workers=1)
        undo = read(folder / "merged.undo", "merged.undo") if (folder / "merged.undo").exists() else {}
        return {
            **read(folder / base, "base" + Path(base).suffix),
            **read(folder / "adapter", "adapter"),
            **read(folder / out, out),
            **undo,
        }


@cache
def twice() -> dict[str, bytes]:
    """Return a working folder with a merge of a merge, whose undo files are `loratool.undo` and `loratool.undo.1`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_mixed(Path(temporary, "made"))
        write_peft(folder / "other", {"bf16": factors(6, 20, 2, seed=3)})
        loratool.merge(folder / "base", folder / "adapter", folder / "first", workers=1)
        loratool.merge(folder / "first", folder / "other", folder / "merged", workers=1)
        return read(folder, "")


def name_of_undo(files: dict[str, bytes]) -> str:
    return next(name for name in files if name.endswith(".undo"))


def forged(undo: bytes, rng: random.Random) -> bytes:
    """Return an undo file that lies, with the hash of its index written anew."""
    body, index = split_undo(undo)
    match rng.randrange(8):
        case 0:
            return damaged_bytes(rng, undo)
        case 1:
            return undo[: rng.randrange(len(undo))]
        case 2:
            return join_undo(body[:FIRST] + damaged_bytes(rng, body[FIRST:]), index)
        case 3:
            return tampered(body, index, rng)
        case _:
            new = index.pop("new_side")
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                index = lie(index, rng)
            return join_undo(body, {**index, "new_side": new})


def tampered(body: bytes, index: dict[str, Any], rng: random.Random) -> bytes:
    """Return an undo file whose table or hashes lie: rows, lengths, sums or hashes stand for each other, or others."""
    rows = [list(row[1:]) for row in table_of(body, index)] or [[0, 0]]
    one, other = (rng.choice(rows) for _ in range(2))
    match rng.randrange(5):
        case 0:
            one[0] = rng.choice((0, 1, one[0] + 1, 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1))
        case 1:
            one[1] = rng.choice((0, 1, one[1] ^ 1 << rng.randrange(64)))
        case 2:
            rng.shuffle(rows)
        case 3:
            hashes = hashes_of(body, index)
            each = [hashes[at : at + 32] for at in range(0, len(hashes), 32)]
            first, last = (rng.randrange(len(each)) for _ in range(2))
            each[first], each[last] = each[last], rng.choice((each[first], rng.randbytes(32)))
            each = rng.choice((each, each, each[1:], [*each, each[-1]]))
            return join_undo(*with_blob(body, index, "hashes", b"".join(each)))
        case _:
            first, last = rng.choice(((0, 2), (0, 1), (1, 2)))
            one[first:last], other[first:last] = other[first:last], one[first:last]
    rows = rng.choice((rows, rows, rows, rows[1:], [*rows, rows[-1]]))
    return join_undo(*with_table(body, index, [tuple(row) for row in rows]))


def make_forged(rng: random.Random) -> Case:
    files = dict(merged(rng.choice([*MODELS])))
    undo = name_of_undo(files)
    files[undo] = forged(files[undo], rng)
    out = next(name.partition("/")[0] for name in files if name.startswith("merged") and name != undo)
    back = "back" + Path(out).suffix
    more = rng.choice(((), (), (), ("--json",), ("--device", "cpu"), ("--dry-run",)))
    return Case(files, ("unmerge", out, "adapter", "-o", back, *more), (back,))


def make_read(rng: random.Random) -> Case:
    """Read or replace what a lying undo file stands beside."""
    files = dict(merged(rng.choice(("mixed", "llama", "one file", "resized"))))
    undo = name_of_undo(files)
    files[undo] = forged(files[undo], rng)
    out = next(name.partition("/")[0] for name in files if name.startswith("merged") and name != undo)
    base, more = "base" + Path(out).suffix, ("more", "more.safetensors", "more.undo", "more.undo.1")
    argv, outputs = rng.choice(
        (
            (("inspect", out), ()),
            (("inspect", undo), ()),
            (("verify", base, "adapter", out), ()),
            (("merge", base, "adapter", "-o", out, "--force"), (out, "merged.undo")),
            (("merge", out, "adapter", "-o", "more" + Path(out).suffix), more),
            (("convert", out, "-o", "more"), ("more",)),
            (("diff", base, out), ()),
        )
    )
    return Case(files, argv, outputs)


def make_chain(rng: random.Random) -> Case:
    """Exchange the undo files of a merge of a merge, or take one away, or damage the one that is not used yet."""
    files = dict(twice())
    one, other = "merged/loratool.undo", "merged/loratool.undo.1"
    match rng.randrange(6):
        case 0:
            files[one], files[other] = files[other], files[one]
        case 1:
            del files[other]
        case 2:
            files[one] = files.pop(other)
        case 3:
            files[other] = forged(files[other], rng)
        case 4:
            files[other] = merged("mixed")["merged/loratool.undo"]
            files["merged/loratool.undo.2"] = files[other]
        case 5:
            files[one] = merged("llama")["merged/loratool.undo"]
    files = {name: data for name, data in files.items() if not name.startswith("base/")}
    files |= {f"base/{name.removeprefix('first/')}": data for name, data in files.items() if name.startswith("first/")}
    which = rng.choice(("other", "other", "adapter"))
    return Case(files, ("unmerge", "merged", which, "-o", "back"), ("back",))


def is_base(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Tell what else than the base came back."""
    out = case.outputs[0]
    if ran.code:
        return
    if "--dry-run" in case.argv:
        if (work / out).exists():
            yield "a dry run wrote"
        return
    base, back = read(work / f"base{Path(out).suffix}", "base"), read(work / out, "base")
    is_torch = "base/pytorch_model.bin" in base
    if is_torch:
        tensors = torch.load(work / "base" / "pytorch_model.bin")
        found = load_file(work / "back" / "model.safetensors")
        if tensors.keys() != found.keys() or not all(torch.equal(tensors[name], found[name]) for name in tensors):
            yield "a tensor of the torch file is another"
        del base["base/pytorch_model.bin"], back["base/model.safetensors"]
    back = {name: data for name, data in back.items() if ".undo" not in name}
    base = {name: data for name, data in base.items() if ".undo" not in name}
    wrong = sorted(name for name in {*base, *back} if base.get(name) != back.get(name))
    if wrong:
        yield f"these are not the base's: {wrong}"


def test_undo_unmerge(fuzz: Fuzzer) -> None:
    fuzz(make_forged, 3, is_base)


def test_undo_beside(fuzz: Fuzzer) -> None:
    fuzz(make_read, 3)


def test_undo_chains(fuzz: Fuzzer) -> None:
    fuzz(make_chain, 3, is_base)


def test_undo_cut_anywhere(fuzz: Fuzzer) -> None:
    """Cut a small file, or flip a bit of it, at one byte after the other."""
    files = merged("one file")
    undo = files["merged.undo"]

    def make(rng: random.Random) -> Case:
        at = rng.randrange(len(undo))
        flipped = undo[:at] + bytes([undo[at] ^ 1 << rng.randrange(8)]) + undo[at + 1 :]
        data = undo[:at] if rng.randrange(2) else flipped
        argv = ("unmerge", "merged.safetensors", "adapter", "-o", "back.safetensors")
        return Case({**files, "merged.undo": data}, argv, ("back.safetensors",))

    def refused(case: Case, ran: Ran, work: Path) -> Iterator[str]:
        if ran.code != 3:
            yield "a damaged file is taken"

    fuzz(make, 4, refused)
