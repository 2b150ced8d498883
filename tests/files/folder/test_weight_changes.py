"""Refuse changes of weights in every command that opens a model or an adapter, and no model or adapter with them.

The files are made here as the programs make them (the sources are named in `weight_changes.DIALECTS`): compressed bytes
in frames of Zstandard (RFC 8878) that hold them as they are, zlib by Python.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_model, write_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratool import InputError
from loratool.adapters.formats import holds_adapter, open_adapter
from loratool.files.checkpoint import is_config_alone, open_checkpoint
from loratool.files.folder.weight_changes import DIALECTS

BASE = FIXTURES / "llama" / "base"
Q = "model.layers.0.self_attn.q_proj.weight"
NAMES = (Q, "model.embed_tokens.weight", "model.norm.weight")


def frame(data: bytes) -> bytes:
    """Return a frame of Zstandard with its content's size and raw blocks."""
    head = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(data))
    parts = [data[at : at + 65536] for at in range(0, len(data), 65536)] or [b""]
    return head + b"".join(
        struct.pack("<I", len(part) << 3 | (i == len(parts) - 1))[:3] + part for i, part in enumerate(parts)
    )


def as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def changed() -> dict[str, tuple[bytes, bytes]]:
    """Return the bytes of some tensors of the base, before and after a step."""
    base = {name: tensor for name, tensor in load_model(BASE).items() if name in NAMES}
    raw = {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in base.items()}
    return {name: (data, bytes([data[0] ^ 1]) + data[1:]) for name, data in raw.items()}


def xor(one: bytes, two: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, two, strict=True))


def overwrite(one: bytes, two: bytes) -> bytes:
    places = [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    return struct.pack(f"<{len(places) + 1}I", len(places), *places) + bytes(two[i] for i in places)


def disk_delta(
    folder: Path, encode: Callable[[bytes, bytes], bytes] = xor, digest: str = "0123456789abcdef" * 2
) -> Path:
    metadata = {
        "version": "000007",
        "base_version": "000006",
        "delta_encoding": encode.__name__,
        "compression_format": "zstd",
        "checksum_format": "xxh3-128",
    }
    name, deltas = "model-00000-of-00001.safetensors", changed()
    tensors = {key: as_bytes(frame(encode(*sides))) for key, sides in deltas.items()}
    save_file(tensors, folder / name, dict.fromkeys(tensors, digest))
    index = {"metadata": metadata, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def empty_disk_delta(folder: Path) -> Path:
    disk_delta(folder)
    (folder / "model-00000-of-00001.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weight_map": {}}))
    return folder


def fireworks(folder: Path, compress: Callable[[bytes], bytes] = zlib.compress) -> Path:
    """Write deltas under the names of the base's files, with its index copied."""
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    for path in folder.glob("*.safetensors"):
        raw = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_file(path).items()}
        sums = {name: str(zlib.adler32(data)) for name, data in raw.items()}
        save_file({name: as_bytes(compress(bytes(len(data)))) for name, data in raw.items()}, path, sums)
    return folder


def fireworks_arc3(folder: Path) -> Path:
    inner = pickle.dumps({"codec": "zstd", "data": b""})
    tensors = {name: as_bytes(b"ARC3_ENVELOPE\0" + inner) for name in NAMES}
    tensors[NAMES[0]] = as_bytes(b"\x08\0\0\0\0\0\0\0{}      ")  # one that fell back, itself a safetensors file
    save_file(tensors, folder / "model.safetensors")
    return folder


def skyrl(folder: Path, payloads: int = 1) -> Path:
    rows = []
    for i in range(payloads):
        file = f"payload-{i:05d}.safetensors"
        tensors = {f"{i}.{j}": as_bytes(frame(xor(*sides))) for j, sides in enumerate(changed().values())}
        save_file(tensors, folder / file)
        rows += [{"name": name, "payload_file": file, "payload_key": f"{i}.{j}"} for j, name in enumerate(changed())]
    manifest = {"version": 7, "base_version": 6, "payload_files": [], "tensors": rows}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def prime_rl(folder: Path, compressed: bool = False) -> Path:
    tensors = {
        f"tensor_{i}.{role}": value.clone()
        for i in range(2)
        for role, value in (("indices", torch.tensor([3, 5], dtype=torch.int32)), ("values", torch.ones(2).bfloat16()))
    }
    path = folder / "sparse_update.safetensors"
    save_file(tensors, path)
    if compressed:
        path.write_bytes(frame(path.read_bytes()))
    manifest = {"format": "prime-rl-sparse-update", "version": 1, "step": 4, "base_step": 3, "patch_file": path.name}
    (folder / "sparse_update_manifest.json").write_text(json.dumps(manifest))
    return folder


def trl(folder: Path, roles: tuple[str, str] = ("idx", "val"), **metadata: str) -> Path:
    positions, values = roles
    tensors = {f"{Q}.{positions}": torch.tensor([1, 2], dtype=torch.int32), f"{Q}.{values}": torch.ones(2).bfloat16()}
    save_file(tensors, folder / "delta.safetensors", metadata or None)
    return folder


def trl_empty(folder: Path) -> Path:
    save_file({}, folder / "delta.safetensors", {"format": "sparse_weight_patch", "sparse": "True"})
    return folder


FIREWORKS, DISK, SKYRL, PRIME, TRL = (dialect.name for dialect in DIALECTS)

# what -> how it is written into a folder, the dialect that is named, and the versions
CHANGES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "disk delta, xor": (disk_delta, DISK, "version '000006' to '000007'"),
    "disk delta, overwrite": (lambda folder: disk_delta(folder, overwrite), DISK, "version '000006'"),
    "disk delta of nothing": (empty_disk_delta, DISK, "version '000006'"),
    "Fireworks, zlib": (fireworks, FIREWORKS, ""),
    "Fireworks, zstd": (lambda folder: fireworks(folder, frame), FIREWORKS, ""),
    "Fireworks, arc_v3": (fireworks_arc3, FIREWORKS, ""),
    "SkyRL": (skyrl, SKYRL, "version 6 to 7"),
    "SkyRL, two payloads": (lambda folder: skyrl(folder, 2), SKYRL, "version 6 to 7"),
    "prime-rl": (prime_rl, PRIME, "step 3 to 4"),
    "prime-rl, compressed": (lambda folder: prime_rl(folder, compressed=True), PRIME, "step 3 to 4"),
    "TRL": (lambda folder: trl(folder, format="sparse_weight_patch", sparse="True"), TRL, ""),
    "TRL, without metadata": (trl, TRL, ""),
    "TRL, first version": (lambda folder: trl(folder, ("indices", "values")), TRL, ""),
    "TRL, of nothing": (trl_empty, TRL, ""),
}

# Files of a change that are named without their folder
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "disk delta": (disk_delta, DISK),
    "disk delta, adler32": (lambda folder: disk_delta(folder, digest="0a1b2c3d"), DISK),
    "disk delta, blake3": (lambda folder: disk_delta(folder, digest="0a" * 32), DISK),
    "Fireworks": (fireworks, FIREWORKS),
    "SkyRL": (skyrl, SKYRL),
    "prime-rl": (prime_rl, PRIME),
    "TRL": (trl, TRL),
}

ADAPTER = FIXTURES / "llama" / "adapter"
COMMANDS = {
    "inspect": ["inspect", "{x}"],
    "inspect --base": ["inspect", str(ADAPTER), "--base", "{x}"],
    "diff": ["diff", "{x}", str(BASE)],
    "diff, the other": ["diff", str(BASE), "{x}"],
    "convert": ["convert", "{x}", "--to", "gguf", "-o", "{out}"],
    "count": ["count", "{x}"],
    "merge into it": ["merge", "{x}", str(ADAPTER), "-o", "{out}"],
    "merge it": ["merge", str(BASE), "{x}", "-o", "{out}"],
    "extract": ["extract", str(BASE), "{x}", "--rank", "2", "-o", "{out}"],
    "resize": ["resize", "{x}", "--rank", "2", "-o", "{out}"],
    "verify": ["verify", str(BASE), str(ADAPTER), "{x}"],
}


def test_each_dialect_has_a_file() -> None:
    assert {name for _, name, _ in CHANGES.values()} == {dialect.name for dialect in DIALECTS}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_refused_by_name(what: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    make, name, versions = CHANGES[what]
    (folder := tmp_path / "change").mkdir()
    make(folder)
    for command, words in COMMANDS.items():
        result = run(*(word.format(x=folder, out=tmp_path / "out") for word in words))
        if command == "inspect":  # which reads it, if it is whole
            told = result.stdout if result.exit_code == 0 else result.stderr
            assert result.exit_code in (0, 3) and str(folder) in told.splitlines()[0], told
            assert result.exit_code or ": a patch" in told
            continue
        first, hint = result.stderr.splitlines()
        assert result.exit_code == 3 and not result.stdout, command
        assert "a change of a model's weights" in first and f"({name})" in first and versions in first, command
        assert str(folder) in first and hint.startswith("hint: apply it to the model"), command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_a_change_is_refused_by_name(what: str, tmp_path: Path) -> None:
    """Also under another name, without an index or manifest beside it."""
    make, name = FILES[what]
    (folder := tmp_path / "change").mkdir()
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    shutil.copy(sorted(make(folder).glob("*.safetensors"))[0], alone)
    for path in (alone, alone.parent):
        for opened in (open_checkpoint, open_adapter, holds_adapter):
            with pytest.raises(InputError, match="a change of a model's weights") as error:
                opened(path)
            assert f"({name})" in str(error.value)


def test_a_manifest_named_by_itself(tmp_path: Path) -> None:
    for make, name in ((skyrl, SKYRL), (prime_rl, PRIME)):
        (folder := tmp_path / make.__name__).mkdir()
        (manifest,) = make(folder).glob("*.json")
        with pytest.raises(InputError) as error:
            open_checkpoint(manifest)
        assert f"({name})" in str(error.value)


def test_a_config_beside_a_change_does_not_make_it_a_config_alone(tmp_path: Path) -> None:
    shutil.copy(BASE / "config.json", tmp_path)
    with pytest.raises(InputError, match="a change of a model's weights"):
        is_config_alone(skyrl(tmp_path))


BYTES = as_bytes(frame(b"1234"))[4:]
DECOYS: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
    "a full version, or an anchor": ({Q: weights(4, 4)}, {"format": "sparse_weight_patch", "sparse": "False"}),
    "hashes of numbers": ({Q: weights(4, 4)}, {Q: "0123abcd" * 4}),
    "bytes without checksums": ({"a": BYTES.clone(), "b": BYTES.clone()}, {"format": "pt"}),
    "bytes, one with a checksum": ({"a": BYTES.clone(), "b": BYTES.clone()}, {"a": "0123abcd" * 4}),
    "bytes in rows": ({"a": as_bytes(frame(b"1" * 7))[None]}, {"a": "0123abcd" * 4}),
    "state of bitsandbytes": ({f"{Q}.quant_state.bitsandbytes__nf4": as_bytes(b'{"quant_type": "nf4"}')}, {}),
    "pairs beside a matrix": ({"a.indices": torch.arange(3), "a.values": torch.ones(3), Q: weights(4, 4)}, {}),
    "a pair of other lengths": ({"a.indices": torch.arange(6), "a.values": torch.ones(3)}, {}),
    "a matrix of coordinates": ({"a.indices": torch.ones(2, 3).int(), "a.values": torch.ones(3)}, {}),
    "positions that are floats": ({"a.idx": torch.ones(3), "a.val": torch.ones(3)}, {}),
    "a pair of no name": ({"idx": torch.arange(3), "val": torch.ones(3)}, {}),
    "positions alone": ({"a.idx": torch.arange(3), "b.idx": torch.arange(3)}, {}),
    "no tensor": ({}, {"format": "pt"}),
}


@pytest.mark.parametrize("what", DECOYS)
def test_no_model_is_taken_for_a_change(what: str, tmp_path: Path) -> None:
    tensors, metadata = DECOYS[what]
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    open_checkpoint(tmp_path / "model.safetensors").close()


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "no JSON",
        '{"base_version": 1, "tensors": []}',
        '{"base_version": 1, "tensors": [{}]}',
        '{"format": "prime", "icons": []}',
    ],
)
def test_a_manifest_of_another_program_is_nothing(manifest: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {Q: weights(4, 4)})
    adapter = write_peft(tmp_path / "a", {"model.layers.0.self_attn.q_proj": factors(4, 4, 2)})
    for each in (folder, adapter):
        for name in ("manifest.json", "sparse_update_manifest.json"):
            (each / name).write_text(manifest)
    open_checkpoint(folder).close()
    open_adapter(adapter).file.close()


@pytest.mark.parametrize(
    "metadata", [{"version": "000007", "total_size": 1}, {"delta_encoding": None}, [], None, "xor"]
)
def test_an_index_of_a_full_version_is_a_model(metadata: object, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {Q: weights(4, 4), "b": weights(4)}, shards=2)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    open_checkpoint(folder).close()


def test_every_fixture_is_what_it_was() -> None:
    opened = 0
    for path in sorted(FIXTURES.rglob("*.safetensors")):
        open_checkpoint(path).close()
        opened += 1
    assert opened > 5
