"""Read and write the dialects of weight patches a second time, whole models in memory, from their programs' sources.

By PyPI's zstandard, xxhash, blake3 and safetensors; nothing of loratool. A model is a mapping from names to tensors.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
import xxhash
import zstandard
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

Model = dict[str, Tensor]

SUMS: dict[str, Callable[[bytes], str]] = {
    "xxh3-128": lambda data: xxhash.xxh3_128_hexdigest(data),
    "blake3": lambda data: blake3.blake3(data).hexdigest(),
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
}


def raw(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def as_tensor(data: bytes) -> Tensor:
    return torch.tensor(np.frombuffer(data, np.uint8).copy())


def like(data: bytes, x: Tensor) -> Tensor:
    return as_tensor(data).view(x.dtype).reshape(x.shape) if len(data) else x.clone()


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def xor(old: bytes, new: bytes) -> bytes:
    return (np.frombuffer(old, np.uint8) ^ np.frombuffer(new, np.uint8)).tobytes()


def overwrite(old: bytes, new: bytes) -> bytes:
    places = [i for i in range(len(old)) if old[i] != new[i]]
    return struct.pack(f"<{len(places) + 1}I", len(places), *places) + bytes(new[i] for i in places)


def unoverwrite(old: bytes, delta: bytes) -> bytes:
    count = struct.unpack_from("<I", delta)[0]
    out = bytearray(old)
    for place, value in zip(struct.unpack_from(f"<{count}I", delta, 4), delta[4 + 4 * count :], strict=True):
        out[place] = value
    return bytes(out)


def write_disk_delta(
    folder: Path, base: Model, target: Model, version: int = 1, encoding: str = "xor", checksum: str = "xxh3-128"
) -> Path:
    """Write two files, as two ranks do."""
    folder.mkdir(parents=True)
    changed = [name for name in target if raw(base[name]) != raw(target[name])]
    ranks = [each for each in (changed[::2], changed[1::2]) if each]
    weight_map = {}
    for i, names in enumerate(ranks):
        encode = {"xor": xor, "overwrite": overwrite}[encoding]
        frames = {
            n: as_tensor(zstandard.ZstdCompressor(level=1).compress(encode(raw(base[n]), raw(target[n]))))
            for n in names
        }
        file = f"model-{i:05d}-of-{len(ranks):05d}.safetensors"
        save_file(frames, folder / file, {n: SUMS[checksum](raw(target[n])) for n in names})
        weight_map.update(dict.fromkeys(names, file))
    metadata = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return folder


def read_disk_delta(folder: Path, base: Model) -> Model:
    metadata = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["compression_format"] == "zstd"
    assert int(metadata["version"]) == int(metadata["base_version"]) + 1
    out = dict(base)
    for path in sorted(folder.glob("*.safetensors")):
        sums = metadata_of(path)
        for name, frame in load_file(path).items():
            delta = zstandard.ZstdDecompressor().decompress(raw(frame))
            new = {"xor": xor, "overwrite": unoverwrite}[metadata["delta_encoding"]](raw(base[name]), delta)
            assert SUMS[metadata["checksum_format"]](new) == sums[name]
            out[name] = like(new, base[name])
    return out


def write_skyrl(folder: Path, base: Model, target: Model, version: int = 1, checksum: str = "xxh3-128") -> Path:
    folder.mkdir(parents=True)
    rows = []
    for i, name in enumerate(name for name in target if raw(base[name]) != raw(target[name])):
        frame = zstandard.ZstdCompressor(level=1).compress(xor(raw(base[name]), raw(target[name])))
        file = f"delta-rank00000-file{i:06d}.safetensors"
        save_file({f"key{i}": as_tensor(frame)}, folder / file)
        row = {
            "name": name,
            "dtype": str(target[name].dtype).removeprefix("torch."),
            "shape": list(target[name].shape),
            "uncompressed_num_bytes": target[name].nbytes,
            "compressed_num_bytes": len(frame),
            "payload_file": file,
            "payload_key": f"key{i}",
        }
        digest = SUMS[checksum](raw(target[name]))
        is_old = checksum == "sha256"
        rows.append(row | ({"sha256": digest} if is_old else {"checksum": digest, "checksum_algorithm": checksum}))
    manifest = {
        "version": version,
        "base_version": version - 1,
        "tensors": rows,
        "payload_files": [row["payload_file"] for row in rows],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def read_skyrl(folder: Path, base: Model) -> Model:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == manifest["base_version"] + 1
    out = dict(base)
    for row in manifest["tensors"]:
        assert row["payload_file"] in manifest["payload_files"]
        frame = raw(load_file(folder / row["payload_file"])[row["payload_key"]])
        assert len(frame) == row["compressed_num_bytes"]
        delta = zstandard.ZstdDecompressor().decompress(frame, max_output_size=row["uncompressed_num_bytes"])
        old = base[row["name"]]
        new = xor(raw(old), delta)
        assert row["dtype"] == str(old.dtype).removeprefix("torch.") and tuple(row["shape"]) == tuple(old.shape)
        assert SUMS[row["checksum_algorithm"]](new) == row["checksum"]
        out[row["name"]] = like(new, old)
    return out


def write_fireworks(folder: Path, base: Model, target: Model, compress: str = "zstd", shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    press = {"zstd": zstandard.ZstdCompressor(level=3).compress, "zlib": zlib.compress}[compress]
    names = list(target)
    for i in range(shards):
        part = {n: as_tensor(press(xor(raw(base[n]), raw(target[n])))) for n in names[i::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, {n: str(zlib.adler32(raw(target[n]))) for n in part})
    return folder


def read_fireworks(folder: Path, base: Model) -> Model:
    out = {}
    for path in folder.glob("*.safetensors"):
        sums = metadata_of(path)
        for name, frame in load_file(path).items():
            new = xor(raw(base[name]), zstandard.ZstdDecompressor().decompress(raw(frame)))
            assert str(zlib.adler32(new)) == sums[name]
            out[name] = like(new, base[name])
    assert set(out) == set(base)
    return out


def _changed(old: Tensor, new: Tensor) -> Tensor:
    width = old.element_size()
    rows = [as_tensor(raw(each)).reshape(-1, width) for each in (old, new)]
    return (rows[0] != rows[1]).any(1).nonzero().reshape(-1)


def write_prime_rl(folder: Path, base: Model, target: Model, step: int = 1, compress: bool = False) -> Path:
    folder.mkdir(parents=True)
    tensors, rows = {}, []
    for i, (name, new) in enumerate(target.items()):
        places = _changed(base[name], new).to(torch.int32)
        if not len(places):
            continue
        values = new.reshape(-1)[places.long()].contiguous()
        keys = {"indices": f"tensor_{i}.indices", "values": f"tensor_{i}.values"}
        tensors |= {keys["indices"]: places, keys["values"]: values}
        row: dict[str, Any] = {"name": name, "shape": list(new.shape), "numel": new.numel(), **keys}
        row |= {"dtype": str(new.dtype).removeprefix("torch."), "changed_numel": len(places)}
        rows.append(row | {"checksum": torch.hash_tensor(places).item() ^ torch.hash_tensor(values).item()})
    file = "sparse_update_patch.safetensors"
    if tensors:
        data = save(tensors, {"format": "pt"})
        (folder / file).write_bytes(zstandard.ZstdCompressor().compress(data) if compress else data)
    manifest = {"format": "prime-rl-sparse-update", "version": 1, "step": step, "base_step": step - 1}
    manifest |= {"compute_dtype": None, "compressed": compress, "patch_file": file if tensors else None}
    (folder / "sparse_update_manifest.json").write_text(json.dumps(manifest | {"tensors": rows}))
    return folder


def read_prime_rl(folder: Path, base: Model) -> Model:
    manifest = json.loads((folder / "sparse_update_manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("prime-rl-sparse-update", 1)
    out = {name: x.clone() for name, x in base.items()}
    tensors = load((folder / manifest["patch_file"]).read_bytes()) if manifest["patch_file"] else {}
    for row in manifest["tensors"]:
        places, values = tensors[row["indices"]].long(), tensors[row["values"]]
        assert row["checksum"] == torch.hash_tensor(places).item() ^ torch.hash_tensor(values).item()
        old = out[row["name"]]
        assert str(values.dtype) == f"torch.{row['dtype']}" and list(old.shape) == row["shape"]
        old.reshape(-1).index_copy_(0, places, values)
    return out


def write_trl(file: Path, base: Model, target: Model, version: int = 1, encoding: str = "gap_delta") -> Path:
    """`first` is the encoding of its first version."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, new in target.items():
        places = _changed(base[name], new)
        if not len(places):
            continue
        keys = (f"{name}.indices", f"{name}.values") if encoding == "first" else (f"{name}.idx", f"{name}.val")
        tensors[keys[1]] = new.reshape(-1)[places].contiguous()
        gaps = torch.diff(places, prepend=torch.tensor([-1])) - 1
        wide = torch.uint16 if int(gaps.max()) <= 0xFFFF else torch.uint32
        tensors[keys[0]] = gaps.to(wide) if encoding == "gap_delta" else places.to(torch.int32)
    metadata = {"format": "sparse_weight_patch", "version": "1", "sparse": "True", "model_version": str(version)}
    metadata |= {"prev_model_version": str(version - 1)} if encoding == "first" else {"encoding": encoding}
    save_file(tensors, file, metadata)
    return file


def read_trl(file: Path, base: Model) -> Model:
    metadata, tensors = metadata_of(file), load_file(file)
    out = {name: x.clone() for name, x in base.items()}
    for name in {key.removesuffix(".val") for key in tensors if key.endswith(".val")}:
        stored = tensors[f"{name}.idx"].long()
        places = torch.cumsum(stored + 1, 0) - 1 if metadata["encoding"] == "gap_delta" else stored
        out[name].reshape(-1)[places] = tensors[f"{name}.val"]
    return out


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(raw(one[n]) == raw(two[n]) for n in one)
