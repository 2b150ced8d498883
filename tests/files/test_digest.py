"""Hold digests against an independent computation, the guide's test vectors, and other divisions into files."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch import Tensor

import loratool
from loratool.files.digest import PIECE
from loratool.numerics.passes.native import NATIVE


def computed(*files: Path) -> str:
    """Return the digest by hashlib alone."""
    lines = []
    for file in files:
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            content = data[8 + size + begin : 8 + size + end]
            hashes = [hashlib.sha256(content[k : k + PIECE]).digest() for k in range(0, len(content), PIECE)]
            shape = ",".join(map(str, entry["shape"]))
            value = hashlib.sha256(b"".join(hashes)).hexdigest()
            lines.append((name.encode(), f"{name}\t{entry['dtype']}\t{shape}\t{value}\n".encode()))
    return hashlib.sha256(b"".join(line for _, line in sorted(lines))).hexdigest()


def digest(path: Path) -> str | None:
    return loratool.inspect(path, digest=True).digest


# The guide's vectors: a file's tensors. arange counts from 0.
VECTORS: dict[str, dict[str, Tensor]] = {
    "`w`: F32, shape 2,3, 0 to 5": {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3)},
    "the same in BF16": {"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)},
    "`a`: F32, shape 0; `b`: F16 scalar 1": {"a": torch.zeros(0), "b": torch.ones((), dtype=torch.float16)},
    "`w`: U8, shape 16777217, zeros": {"w": torch.zeros(PIECE + 1, dtype=torch.uint8)},
}


@pytest.mark.parametrize("title", VECTORS)
def test_the_guides_vectors(tmp_path: Path, title: str) -> None:
    save_file(VECTORS[title], tmp_path / "model.safetensors")
    guide = (ROOT / "loratool" / "guides" / "digest.md").read_text()
    vectors = guide.partition("## Test vectors")[2]
    listed = dict(re.findall(r"^- (.+): `(\w{64})`$", vectors, re.MULTILINE))
    assert listed.keys() == {"No tensor", *VECTORS} and listed["No tensor"] == hashlib.sha256().hexdigest()
    found = digest(tmp_path / "model.safetensors")
    assert found == listed[title] == computed(tmp_path / "model.safetensors")


@pytest.mark.parametrize("native", ["0", ""])
def test_files_and_their_order_do_not_matter(tmp_path: Path, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NATIVE, native)
    g = torch.Generator().manual_seed(0)
    sizes = {"big": (PIECE // 2 + 3,), "é": (5, 7), "z.10": (3,), "z.9": (4,), "one": ()}
    tensors = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in sizes.items()}
    one, folder = tmp_path / "one.safetensors", tmp_path / "sharded"
    save_file(tensors, one, metadata={"format": "pt", "note": "x"})
    loratool.convert_model(one, folder, max_shard_size="1MB")
    assert len([*folder.glob("*.safetensors")]) > 1
    loratool.convert_model(one, tmp_path / "model.bin", to="torch")
    assert digest(one) == digest(folder) == digest(tmp_path / "model.bin") == computed(one)
    assert computed(*folder.glob("*.safetensors")) == digest(folder)
    tensors["é"][2, 3] = torch.nextafter(tensors["é"][2, 3], torch.tensor(9.0, dtype=torch.bfloat16))
    save_file(tensors, one)
    assert digest(one) == computed(one) != digest(folder)


def test_names_that_share_their_bytes_count_once(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    torch.save({"b": weight, "a": weight, "c": weight.clone()}, tmp_path / "tied.bin")
    save_file({"a": weight, "c": weight.clone()}, tmp_path / "once.safetensors")
    assert digest(tmp_path / "tied.bin") == digest(tmp_path / "once.safetensors")


@pytest.mark.parametrize("name", ["a\tb", "a\nb"])
def test_a_name_that_would_be_another_line_is_refused(tmp_path: Path, name: str, run: Callable[..., Any]) -> None:
    save_file({name: torch.zeros(2)}, tmp_path / "model.safetensors")
    done = run("inspect", tmp_path / "model.safetensors", "--digest")
    assert done.exit_code == 3 and not done.stdout and "tab or a line break" in done.stderr


def test_adapters_and_the_outputs_of_other_methods_have_one(tmp_path: Path, run: Callable[..., Any]) -> None:
    adapter = ROOT / "fixtures" / "llama" / "adapter"
    found = computed(adapter / "adapter_model.safetensors")
    assert digest(adapter) == found
    done = run("inspect", adapter, "--digest")
    assert done.exit_code == 0 and f"digest: sha256:{found}\n" in done.stdout
    assert "digest:" not in run("inspect", adapter).stdout
    assert run("inspect", adapter, "--digest", "--spectra").exit_code == 2
