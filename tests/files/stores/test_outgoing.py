"""Send outputs to a store of S3 (moto's server): their bytes, what a failure leaves, what resuming sends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_command, write_model, write_peft
from files.stores.test_objects import contents, pair, s3

import loratool
from loratool.errors import LoratoolError, MachineError, NeedsFlag, UsageError
from loratool.files.stores import outgoing, uploads

__all__ = ["pair", "s3"]

MARKER = outgoing.MARKER

PART = 1 << 18


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let parts be of 256 KiB, and the store take such."""
    settings = pytest.importorskip("moto.settings")
    monkeypatch.setattr(outgoing, "PART", PART)
    monkeypatch.setattr(uploads, "PART", PART)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    assert settings


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 3 MiB, and an adapter of some of its weights."""
    folder, g = tmp_path_factory.mktemp("large"), torch.Generator().manual_seed(1)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    write_model(
        folder / "model", {f"{name}.weight": torch.randn(512, 256, generator=g).bfloat16() for name in names}, {}
    )
    factors = {name: (torch.randn(2, 256, generator=g), torch.randn(512, 2, generator=g)) for name in names[::2]}
    write_peft(folder / "adapter", factors, r=2, lora_alpha=2)
    return folder


def stored(s3: Any, path: str) -> dict[str, bytes]:
    s3.invalidate_cache()
    return {name.removeprefix(f"{path}/"): s3.cat(name) for name in s3.find(path)}


def unfinished(s3: Any) -> list[str]:
    return [each["Key"] for each in s3.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", ())]


def test_a_merge_into_a_store_has_the_bytes_of_one_here(s3: Any, pair: Path, tmp_path: Path, cache: Path) -> None:
    loratool.merge(pair / "model", pair / "adapter", tmp_path / "merged", digest=True)
    report = loratool.merge(pair / "model", pair / "adapter", "s3://bucket/joined", digest=True)
    assert report.out == "s3://bucket/joined" and report.undo == "s3://bucket/joined/loratool.undo"
    found = stored(s3, "bucket/joined")
    marker = json.loads(found.pop(MARKER))
    assert found == contents(tmp_path / "merged")
    assert marker["objects"] == {name: len(data) for name, data in found.items()}
    assert marker["digest"] == report.digests["s3://bucket/joined"]
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_an_adapter_and_a_single_file(s3: Any, pair: Path, large: Path, tmp_path: Path) -> None:
    loratool.resize(pair / "adapter", rank=1, out=tmp_path / "near")
    loratool.resize(pair / "adapter", rank=1, out="s3://bucket/small")
    found = stored(s3, "bucket/small")
    assert found.pop(MARKER) and found == contents(tmp_path / "near")
    for place in (tmp_path / "near.safetensors", "s3://bucket/far.safetensors"):
        loratool.merge(large / "model" / "model.safetensors", large / "adapter", place)
    for name in (".safetensors", ".undo"):
        assert s3.cat(f"bucket/far{name}") == (tmp_path / f"near{name}").read_bytes()


@pytest.mark.slow
def test_parts_are_released_when_they_are_sent(
    s3: Any, large: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, release = list[int](), outgoing.disk.release

    def noted(file: Any, offset: int, nbytes: int) -> None:
        released.append(nbytes)
        release(file, offset, nbytes)

    monkeypatch.setattr(outgoing.disk, "release", noted)
    loratool.merge(large / "model", large / "adapter", tmp_path / "near")
    loratool.merge(large / "model", large / "adapter", "s3://bucket/parts")
    found = stored(s3, "bucket/parts")
    assert found.pop(MARKER) and found == contents(tmp_path / "near")
    assert sum(released) >= PART and not unfinished(s3)


def test_what_exists_is_replaced_only_with_force(s3: Any, pair: Path, tmp_path: Path) -> None:
    link = "s3://bucket/twice"
    loratool.merge(pair / "model", pair / "adapter", link, max_shard_size="20kB")
    shards = [name for name in stored(s3, "bucket/twice") if name.endswith(".safetensors")]
    with pytest.raises(NeedsFlag, match="exists already"):
        loratool.merge(pair / "model", pair / "adapter", link)
    loratool.merge(pair / "model", pair / "adapter", link, max_shard_size="1GB", undo=False, force=True)
    found = stored(s3, "bucket/twice")
    assert len(shards) > 1 and set(found) == {*json.loads(found[MARKER])["objects"], MARKER}
    assert not {*shards} & {*found} and "loratool.undo" not in found
    s3.pipe("bucket/twice/diary.txt", b"mine")
    with pytest.raises(UsageError, match=r"holds diary.txt; force=True replaces a model's files"):
        loratool.merge(pair / "model", pair / "adapter", link, force=True)
    assert stored(s3, "bucket/twice") == {**found, "diary.txt": b"mine"}


def test_an_input_is_not_overwritten(s3: Any, pair: Path) -> None:
    s3.put(str(pair), "bucket/own", recursive=True)
    before = stored(s3, "bucket/own")
    with pytest.raises(UsageError, match="would overwrite an input"):
        loratool.merge("s3://bucket/own/model", pair / "adapter", "s3a://bucket/own/model", force=True)
    with pytest.raises(UsageError, match="would overwrite an input"):
        loratool.merge("s3://bucket/own/model", pair / "adapter", "s3://bucket/own/model", force=True)
    assert stored(s3, "bucket/own") == before and not unfinished(s3)


@pytest.mark.slow
def test_a_dry_run_sends_nothing(s3: Any, pair: Path) -> None:
    report = loratool.merge(pair / "model", pair / "adapter", "s3://bucket/dry", dry_run=True)
    assert report.out == "s3://bucket/dry" and not stored(s3, "bucket/dry")


def test_a_bad_input_leaves_nothing(s3: Any, large: Path, tmp_path: Path, small_parts: None, cache: Path) -> None:
    factors = {f"model.layers.{i}.mlp.up_proj": (torch.ones(2, 256), torch.ones(512, 2)) for i in range(12)}
    factors["model.layers.11.mlp.up_proj"] = (torch.full((2, 256), 1e25), torch.full((512, 2), 1e25))
    adapter = write_peft(tmp_path / "adapter", factors, r=2, lora_alpha=2)
    with pytest.raises(LoratoolError, match="become infinite"):
        loratool.merge(large / "model", adapter, "s3://bucket/bad")
    assert not stored(s3, "bucket/bad") and not unfinished(s3)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_resuming_sends_only_what_the_store_lacks(
    s3: Any, large: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = list[int](), uploads.S3Upload.send

    def failing(self: uploads.S3Upload, number: int, data: Any) -> None:
        if len(sent) == 5:
            raise MachineError("the store is away", culprit="s3://bucket/again")
        send(self, number, data)
        sent.append(number)

    monkeypatch.setattr(uploads.S3Upload, "send", failing)
    with pytest.raises(MachineError, match="the store is away"):
        loratool.merge(large / "model", large / "adapter", "s3://bucket/again")
    assert not stored(s3, "bucket/again") and unfinished(s3) == ["again/model.safetensors"]
    before = [*sent]

    def noted(self: uploads.S3Upload, number: int, data: Any) -> None:
        sent.append(number)
        send(self, number, data)

    sent.clear()
    monkeypatch.setattr(uploads.S3Upload, "send", noted)
    loratool.merge(large / "model", large / "adapter", "s3://bucket/again", resume=True)
    loratool.merge(large / "model", large / "adapter", tmp_path / "near")
    found = stored(s3, "bucket/again")
    assert found.pop(MARKER) and found == contents(tmp_path / "near")
    model = -(-len(found["model.safetensors"]) // PART)
    assert sorted(sent[: model - len(before)]) == sorted({*range(model)} - {*before})
    assert not unfinished(s3)


@pytest.mark.slow
def test_beginning_anew_removes_what_a_run_that_died_had_sent(
    s3: Any, large: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: uploads.S3Upload, number: int, data: Any) -> None:
        raise MachineError("the store is away", culprit="s3://bucket/anew")

    with monkeypatch.context() as patched:
        patched.setattr(uploads.S3Upload, "send", failing)
        with pytest.raises(MachineError):
            loratool.merge(large / "model", large / "adapter", "s3://bucket/anew")
    assert unfinished(s3)
    loratool.merge(large / "model", large / "adapter", "s3://bucket/anew")
    assert not unfinished(s3) and MARKER in stored(s3, "bucket/anew")


@pytest.fixture
def memory() -> Iterator[Any]:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.mark.slow
def test_a_store_that_takes_parts_only_in_order(memory: Any, large: Path, tmp_path: Path, small_parts: None) -> None:
    loratool.merge(large / "model", large / "adapter", tmp_path / "near")
    loratool.merge(large / "model", large / "adapter", "memory://out/merged")
    found = {name.removeprefix("/out/merged/"): memory.cat(name) for name in memory.find("/out/merged")}
    assert found.pop(MARKER) and found == contents(tmp_path / "near")


@pytest.mark.slow
def test_what_was_sent_is_verified_and_undone(memory: Any, pair: Path, tmp_path: Path) -> None:
    loratool.merge(pair / "model", pair / "adapter", "memory://out/merged")
    assert loratool.verify(pair / "model", pair / "adapter", "memory://out/merged").said_no is None
    loratool.unmerge("memory://out/merged", pair / "adapter", tmp_path / "model")
    assert contents(tmp_path / "model") == contents(pair / "model")


@pytest.mark.slow
def test_every_command_that_writes_a_model(memory: Any, large: Path, tmp_path: Path, small_parts: None) -> None:
    base, adapter, merged = large / "model", large / "adapter", tmp_path / "merged"
    loratool.merge(base, adapter, merged)
    loratool.patch(base, merged, tmp_path / "change.patch")
    commands: dict[str, Callable[[Any], Any]] = {
        "unmerge": lambda out: loratool.unmerge(merged, adapter, out),
        "apply": lambda out: loratool.apply(base, tmp_path / "change.patch", out=out),
        "apply back": lambda out: loratool.apply(merged, tmp_path / "change.patch", out=out, reverse=True),
        "convert": lambda out: loratool.convert_model(merged, out=out, dtype="fp32"),
        "shards": lambda out: loratool.merge(base, adapter, out, max_shard_size="1MB"),
        "torch": lambda out: loratool.convert_model(merged, out=out, to="torch"),
    }
    for name, command in commands.items():
        command(tmp_path / name)
        command(f"memory://written/{name}")
        root = f"/written/{name}/"
        found = {path.removeprefix(root): memory.cat(path) for path in memory.find(root)}
        found.pop(MARKER)
        assert found == contents(tmp_path / name), name


def test_a_statement_needs_files(s3: Any, pair: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a statement needs the files of the output"):
        loratool.merge(pair / "model", pair / "adapter", "s3://bucket/said", attest=tmp_path / "said.intoto.json")
    assert not os.path.exists(tmp_path / "said.intoto.json")


@pytest.mark.slow
def test_a_recipe_whose_steps_read_what_was_sent(s3: Any, memory: Any, pair: Path, tmp_path: Path) -> None:
    model, adapter, merged = f"{pair}/model", f"{pair}/adapter", "s3://bucket/step/1"
    steps = [
        {"command": "merge", "base": model, "adapters": [adapter], "out": merged},
        {"command": "convert", "source": merged, "dtype": "fp32", "out": "memory://step/2"},
    ]
    place = tmp_path / "recipe.json"
    place.write_text(json.dumps({"steps": steps}))
    loratool.run(place, lock=True)
    assert MARKER in stored(s3, "bucket/step/1")
    loratool.merge(model, adapter, tmp_path / "1")
    loratool.convert_model(tmp_path / "1", out=tmp_path / "2", dtype="fp32")
    found = {name.removeprefix("/step/2/"): memory.cat(name) for name in memory.find("/step/2")}
    weights = [name for name in found if name.endswith(".safetensors")]
    assert len(weights) == 2 and all(found[name] == (tmp_path / "2" / name).read_bytes() for name in weights)
    lock = (tmp_path / "recipe.lock.json").read_text()
    assert merged in lock and "outgoing" not in lock


def test_a_tokenizer_of_a_store_is_no_copy_by_its_stand_in(memory: Any, pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "own")
    (tmp_path / "own" / "model" / "tokenizer.json").write_text('{"added_tokens": [], "of": "the base...."}')
    (tmp_path / "own" / "adapter" / "tokenizer.json").write_text('{"added_tokens": [], "of": "the adapter"}')
    memory.put(str(tmp_path / "own"), "/own", recursive=True)
    for root, out in ((str(tmp_path / "own"), tmp_path / "near"), ("memory://own", tmp_path / "far")):
        loratool.merge(f"{root}/model", f"{root}/adapter", out, tokenizer="adapter")
    assert b"the adapter" in (tmp_path / "near" / "tokenizer.json").read_bytes()
    assert (tmp_path / "far" / "tokenizer.json").read_bytes() == (tmp_path / "near" / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_the_command_of_the_page(s3: Any, pair: Path, tmp_path: Path) -> None:
    text = (ROOT / "loratool" / "guides" / "stores.md").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("loratool ")]
    for name, folder in (("model", "base"), ("adapter", "adapter")):
        s3.put(f"{pair}/{name}/", f"bucket/{folder}/", recursive=True)
    done = run_command(*shlex.split(command)[1:])
    assert done.exit_code == 0 and "wrote s3://bucket/merged" in done.stdout
    assert MARKER in stored(s3, "bucket/merged")
