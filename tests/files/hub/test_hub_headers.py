"""Inspect models of a hub on this machine by their headers: what is asked for, and that it is the same report."""

from __future__ import annotations

import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, write_model, write_peft
from files.hub.test_hub_download import FACTORS, hub
from lib.harness.hub_server import HubServer, files_in
from safetensors.torch import save_file

import loratool
from loratool.errors import InputError, MachineError

__all__ = ["hub"]

NAME = "model.layers.0.self_attn.q_proj.weight"
TENSORS = {NAME: torch.ones(8, 8), "model.embed_tokens.weight": torch.zeros(300, 300)}


def told(path: Path | str, **more: Any) -> dict[str, Any]:
    report: Any = loratool.inspect(path, **more)
    return {key: value for key, value in asdict(report).items() if key not in ("path", "sha256")}


def ranges(hub: HubServer) -> list[tuple[str, str]]:
    return [(path.rpartition("/")[2], span) for method, path, span in hub.log if method == "GET" and span]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_is_inspected_by_its_headers(hub: HubServer, tmp_path: Path, shards: int) -> None:
    folder = write_model(tmp_path / "model", TENSORS, {"model_type": "llama"}, shards=shards)
    hub.add("org/name", {**files_in(folder), "tokenizer.json": b"{}"})
    assert told("org/name") == told(folder)
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(name for name, span in ranges(hub) if span != "bytes=0-0") == weights
    assert hub.fetched() - {*weights} == {path.name for path in folder.glob("*.json")}
    assert not [*tmp_path.glob("cache/**/*.safetensors")]


def test_a_long_header_takes_a_second_request(hub: HubServer, tmp_path: Path) -> None:
    save_file({f"model.layers.{i}.mlp.up_proj.weight": torch.ones(2) for i in range(3000)}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    hub.add("org/name", {"m.safetensors": data})
    assert told("org/name/m.safetensors") == told(tmp_path / "m.safetensors")
    assert ranges(hub) == [
        ("m.safetensors", "bytes=0-0"),
        ("m.safetensors", "bytes=0-262143"),
        ("m.safetensors", f"bytes=262144-{len(data) - 1}"),
    ]


def test_what_is_in_the_cache_is_used(hub: HubServer, tmp_path: Path) -> None:
    from loratool.files.hub.cache import resolve

    hub.add("org/name", files_in(write_model(tmp_path / "model", TENSORS, {})))
    resolve("org/name")
    hub.log.clear()
    told("org/name")
    assert hub.log == []


def test_an_adapter_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter", FACTORS, r=2, lora_alpha=2)
    hub.add("org/adapter", files_in(adapter))
    assert told("org/adapter") == told(adapter)
    assert [*tmp_path.glob("cache/**/adapter_model.safetensors")]


def test_a_digest_takes_the_whole(hub: HubServer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", TENSORS, {})
    hub.add("org/name", files_in(folder))
    assert told("org/name", digest=True) == told(folder, digest=True)
    assert ranges(hub) == []


def test_from_a_server_without_ranges_all_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", TENSORS, {})
    hub.add("org/name", files_in(folder), rangeless={"model.safetensors"})
    assert told("org/name") == told(folder) and [*tmp_path.glob("cache/**/model.safetensors")]


def test_a_part_of_another_length(hub: HubServer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", TENSORS, {})
    hub.add("org/name", files_in(folder), other_ranges={"model.safetensors"})
    with pytest.raises(MachineError, match=r"does not send the bytes 0 to \d+ of model.safetensors"):
        loratool.inspect("org/name")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (struct.pack("<Q", 1 << 60) + b"\0" * 100, "not a safetensors file|neither safetensors nor GGUF"),
        (struct.pack("<Q", 90) + b"{" * 100, "not valid JSON"),
        (b"\0" * 4, "neither safetensors nor GGUF"),
    ],
)
def test_broken_headers(hub: HubServer, data: bytes, match: str) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": data})
    with pytest.raises((InputError, MachineError), match=match):
        loratool.inspect("org/name")


def test_a_dry_run_reads_little(hub: HubServer, tmp_path: Path) -> None:
    size = 4000
    name = "model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.weight": torch.ones(size, size, dtype=torch.bfloat16), "lm_head.weight": torch.ones(8, size)}
    folder = write_model(tmp_path / "model", tensors, {"model_type": "llama"})
    (folder / "tokenizer.json").write_text("{}")
    adapter = write_peft(tmp_path / "adapter", {name: (torch.ones(2, size), torch.ones(size, 2))}, r=2, lora_alpha=2)
    hub.add("org/name", files_in(folder))
    near, far = (loratool.merge(base, adapter, "merged", dry_run=True) for base in (folder, "org/name"))
    taken = sum(int(last) - int(first) + 1 for _, span in ranges(hub) for first, last in [span[6:].split("-")])
    assert taken < 1 << 20 and not [*tmp_path.glob("cache/**/*.safetensors")]
    assert asdict(near) | {"base": "", "free_bytes": 0} == asdict(far) | {"base": "", "free_bytes": 0}


def test_the_base_of_an_adapter_is_read_by_its_headers(hub: HubServer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", TENSORS, {"model_type": "llama"})
    adapter = write_peft(tmp_path / "adapter", FACTORS, r=2, lora_alpha=2)
    hub.add("org/name", files_in(folder))
    near, far = (told(adapter, base=base) for base in (folder, "org/name"))
    assert near.pop("coverage") == {**far.pop("coverage"), "base": str(folder)} and near == far
    assert not [*tmp_path.glob("cache/**/*.safetensors")]


@pytest.mark.parametrize(("runtime", "fixture"), [("vllm", "llama"), ("comfyui", "sdxl")])
def test_what_a_program_does_is_read_from_headers(hub: HubServer, tmp_path: Path, runtime: str, fixture: str) -> None:
    base, adapter = (sorted((FIXTURES / fixture).glob(f"{name}*"))[0] for name in ("base", "adapter"))
    hub.add("org/base", files_in(base) if base.is_dir() else {"m.safetensors": base.read_bytes()})
    far = "org/base" if base.is_dir() else "org/base/m.safetensors"
    near, told = (loratool.inspect_for(adapter, runtime=runtime, base=each) for each in (base, far))
    assert replace(told, base=near.base) == near
    assert ranges(hub) and not [*tmp_path.glob("cache/**/*.safetensors")]
