"""The metadata of image adapters: shown, kept by every command that writes adapters, edited, never stale."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import FIXTURES, run_command, write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.commands.convert.command import convert

INK = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_network_args": "{}",
    "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
    "ss_tag_frequency": json.dumps({"10_inkwash": {"ink": 3}}),
    "ss_seed": "7",
    "modelspec.title": "Inkwash",
    "modelspec.trigger_phrase": "inkwash style",
}


def precalculated(tensors: dict[str, Any], metadata: dict[str, str]) -> dict[str, str]:
    """sd-scripts' hashes: of the tensors, and of 64 KiB from 1 MiB on, of a file with the keys ss_* alone."""
    data = safetensors.torch.save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    (length,) = struct.unpack("<Q", data[:8])
    part = hashlib.sha256(data[0x100000:0x110000]).hexdigest()
    return {"sshs_model_hash": hashlib.sha256(data[8 + length :]).hexdigest(), "sshs_legacy_hash": part[:8]}


def after_header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + struct.unpack("<Q", data[:8])[0] :]


def said(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    tensors = load_file(FIXTURES / "sdxl" / "adapter.safetensors")
    metadata = {**INK, **precalculated(tensors, INK), "modelspec.hash_sha256": "0x00"}
    save_file(tensors, tmp_path / "ink.safetensors", metadata)
    return tmp_path / "ink.safetensors"


TRAINING = {key: INK[key] for key in INK if not key.startswith("ss_network")}

# What is run, and what its output says of the network
WRITERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "kohya": (
        ["convert", "--to", "kohya"],
        {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_args": "{}"},
    ),
    "comfy": (
        ["convert", "--to", "comfy"],
        {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_args": "{}"},
    ),
    "diffusers": (["convert", "--to", "diffusers"], {"ss_network_args": "{}"}),
    "resize": (["resize", "--rank", "2"], {"ss_network_dim": "2", "ss_network_alpha": "2.0"}),
    "combine": (["combine"], {"ss_network_dim": "4", "ss_network_alpha": "4.0"}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_metadata_is_kept_and_never_stale(name: str, ink: Path, tmp_path: Path) -> None:
    (command, *options), network = WRITERS[name]
    assert run_command(command, ink, *options, "-o", tmp_path / "out.safetensors").exit_code == 0
    found = said(tmp_path / "out.safetensors")
    own = {"ss_base_model_version", "format", "lora_adapter_metadata", "loratool"}
    assert {key: value for key, value in found.items() if key not in own} == {
        **TRAINING,
        "ss_network_module": "networks.lora",
        **network,
    }


@pytest.mark.parametrize("out", ["peft", "peft.safetensors"])
def test_metadata_through_peft_and_back(out: str, ink: Path, tmp_path: Path) -> None:
    tensors = {k: v for k, v in load_file(ink).items() if k.startswith("lora_te1")}
    save_file(tensors, tmp_path / "te.safetensors", {**INK, "other": "x"})
    loratool.convert(tmp_path / "te.safetensors", tmp_path / out, to="peft")
    file = tmp_path / out if out.endswith(".safetensors") else tmp_path / out / "adapter_model.safetensors"
    assert said(file).items() >= TRAINING.items() and said(file)["format"] == "pt"
    loratool.resize(tmp_path / out, tmp_path / "small.safetensors", rank=1)
    assert said(tmp_path / "small.safetensors").items() >= TRAINING.items()
    loratool.convert(tmp_path / out, tmp_path / "back.safetensors", to="kohya")
    assert said(tmp_path / "back.safetensors").items() >= TRAINING.items()


def test_metadata_of_a_language_models_adapter(tmp_path: Path) -> None:
    """Of every format with a safetensors file; trainers of image models are not the only ones that write the keys."""
    folder = FIXTURES / "llama" / "adapter"
    said_before = {"modelspec.title": "T", "ss_seed": "1", "sshs_model_hash": "0", "own": "x", "format": "pt"}
    (tmp_path / "adapter").mkdir()
    shutil.copy(folder / "adapter_config.json", tmp_path / "adapter")
    save_file(
        load_file(folder / "adapter_model.safetensors"), tmp_path / "adapter/adapter_model.safetensors", said_before
    )
    for to, name in (("peft", "adapter_model.safetensors"), ("mlx", "adapters.safetensors")):
        loratool.convert(tmp_path / "adapter", tmp_path / to, to=to, plain=to == "peft", force=True)
        found = said(tmp_path / to / name)
        assert {key: found[key] for key in found if key != "format"} == {"modelspec.title": "T", "ss_seed": "1"}


def test_a_network_of_another_kind_is_not_said(ink: Path, tmp_path: Path) -> None:
    """LyCORIS' arguments are of factors that plain LoRA does not have."""
    save_file(load_file(ink), ink, {**INK, "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}'})
    loratool.convert(ink, tmp_path / "a.safetensors", to="diffusers")
    loratool.resize(ink, tmp_path / "b.safetensors", rank=1)
    for name in "ab":
        assert "ss_network_args" not in said(tmp_path / f"{name}.safetensors")
        assert "ss_network_module" not in said(tmp_path / f"{name}.safetensors")


def test_several_keep_what_they_agree_on(ink: Path, tmp_path: Path) -> None:
    other = {**INK, "ss_seed": "8", "modelspec.trigger_phrase": "sumi", "modelspec.title": "Sumi", "ss_clip_skip": "2"}
    save_file(load_file(ink), tmp_path / "other.safetensors", other)
    report = loratool.combine([ink, tmp_path / "other.safetensors"], tmp_path / "out.safetensors")
    assert report.metadata_left_out == ("modelspec.title", "ss_seed")
    found = said(tmp_path / "out.safetensors")
    assert found["modelspec.trigger_phrase"] == "inkwash style, sumi" and found["ss_clip_skip"] == "2"
    assert json.loads(found["ss_tag_frequency"]) == {"10_inkwash": {"ink": 3}}
    assert not found.keys() & {"ss_seed", "modelspec.title", "sshs_model_hash", "ss_network_args"}


def test_inspect_shows_it(ink: Path) -> None:
    report = loratool.inspect(ink)
    assert isinstance(report, loratool.AdapterInspection)
    assert report.metadata == said(ink) and report.trigger_words == ("inkwash style",)
    shown = run_command("inspect", ink).stdout
    assert "trigger words: inkwash style\n" in shown and "frequent tags: ink 3\n" in shown
    assert "trained: on sd_xl_base_1.0.safetensors\n" in shown and "ss_seed" not in shown
    every = run_command("inspect", ink, "--metadata").stdout
    assert all(f"\n{key}: {value}\n" in every for key, value in said(ink).items())
    assert json.loads(run_command("inspect", ink, "--json").stdout)["report"]["metadata"] == said(ink)


def test_a_model_shows_all_of_its_metadata(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"x": torch.ones(2, 2)}, {}, metadata={"modelspec.title": "T"})
    assert "modelspec.title: T\n" in run_command("inspect", base, "--metadata").stdout


def test_hostile_metadata_breaks_nothing(ink: Path) -> None:
    tags = '{"1_' + "\\u001b[31m" * 50 + "x" * 200 + '": {"' + "\\u0007" * 10 + '": 3}}'
    metadata = {"ss_tag_frequency": tags, "ss_sd_model_name": "\x1b]0;x\x07\n" + "y" * 500, "\x1b[2J": "z" * 10_000_000}
    save_file(load_file(ink), ink, metadata)
    for options in ((), ("--metadata",), ("--json",), ("-v",)):
        run = run_command("inspect", ink, *options)
        assert run.exit_code == 0 and not {"\x1b", "\x07"} & set(run.stdout)
    lines = run_command("inspect", ink).stdout.splitlines()
    assert max(map(len, lines)) < 400


def test_edits_touch_no_tensor(ink: Path, tmp_path: Path) -> None:
    run = run_command(
        "convert", ink, "--set", "modelspec.title=A = b\n", "--set", "mine=ü", "--unset", "modelspec.author"
    )
    assert run.exit_code == 2 and "modelspec.author" in run.stderr
    out = tmp_path / "out.safetensors"
    run = run_command("convert", ink, "--set", "modelspec.title=A = b\n", "--set", "mine=ü", "-o", out)
    assert run.exit_code == 0
    assert said(out) == {**said(ink), "modelspec.title": "A = b\n", "mine": "ü"}
    assert after_header(out) == after_header(ink) and list(load_file(out)) == list(load_file(ink))
    assert said(out)["sshs_model_hash"] == hashlib.sha256(after_header(out)).hexdigest()
    again = run_command(
        "convert", out, "--set", "modelspec.title=Inkwash", "--unset", "mine", "-o", tmp_path / "b.safetensors"
    )
    assert again.exit_code == 0 and said(tmp_path / "b.safetensors") == said(ink)


def test_the_legacy_hash_goes_with_the_keys_that_it_is_of(ink: Path, tmp_path: Path) -> None:
    report = loratool.edit_metadata(ink, tmp_path / "out.safetensors", set={"ss_seed": "8"}, unset="ss_tag_frequency")
    found = said(tmp_path / "out.safetensors")
    expected = {key: value for key, value in said(ink).items() if key not in ("ss_tag_frequency", "sshs_legacy_hash")}
    assert found == {**expected, "ss_seed": "8"}
    assert found["sshs_model_hash"] == precalculated(load_file(tmp_path / "out.safetensors"), found)["sshs_model_hash"]
    assert [change.key for change in report.changes] == ["ss_seed", "ss_tag_frequency", "sshs_legacy_hash"]


REFUSED = {
    "format": "describes the tensors",
    "loratool": "describes the tensors",
    "lora_adapter_metadata": "describes the tensors",
    "sshs_model_hash": "is a hash of the tensors",
    "modelspec.hash_sha256": "is a hash of the tensors",
    "half \udcff": "is not valid UTF-8",
}


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_are_not_set(key: str, ink: Path, tmp_path: Path) -> None:
    with pytest.raises(loratool.UsageError, match=REFUSED[key]):
        loratool.edit_metadata(ink, tmp_path / "out.safetensors", set={key: "x"})
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_refused_by_name(ink: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    for keywords, why in (
        ({"unset": "ss_see"}, "ss_see: is not a key of the metadata.*did you mean ss_seed"),
        ({"set": {"a": "1"}, "unset": "a"}, "is both set and unset"),
        ({"set": {"a": "1"}, "to": "peft"}, "to does not go with set"),
        ({"set": {"a": "1"}, "dtype": "fp16"}, "dtype does not go with set"),
        ({"set": {"a": "1"}, "runtime": "vllm"}, "runtime does not go with set"),
        ({"set": {"a": "1"}, "from_format": "kohya"}, "from_format does not go with set"),
        ({"set": {"a": "1"}, "card": False}, "card=False does not go with set"),
        ({"set": {"another": next(iter(load_file(ink)))}}, "names a tensor"),
    ):
        with pytest.raises(loratool.UsageError, match=f"(?s){why}"):
            convert(ink, out, **keywords)  # what the command calls
    with pytest.raises(loratool.UsageError, match="is the name of a folder"):
        loratool.edit_metadata(ink, tmp_path / "folder", set={"a": "1"})
    with pytest.raises(loratool.UsageError, match="would overwrite an input"):
        loratool.edit_metadata(ink, ink, set={"a": "1"})
    with pytest.raises(loratool.InputError, match="holds 2 safetensors files"):
        loratool.edit_metadata(FIXTURES / "llama" / "base", out, set={"a": "1"})
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(loratool.InputError, match="is not a safetensors file"):
        loratool.edit_metadata(tmp_path / "x.bin", out, set={"a": "1"})
    assert not out.exists()
    report = loratool.edit_metadata(ink, out, set={"a": "1"}, dry_run=True)
    assert report.dry_run and not report.exists and not out.exists()
    out.write_bytes(ink.read_bytes())
    assert (
        loratool.edit_metadata(ink, out, set={"a": "1"}, dry_run=True).exists and out.read_bytes() == ink.read_bytes()
    )


def test_a_model_and_an_adapters_folder(tmp_path: Path) -> None:
    """One file of a model, and the only one of a folder."""
    for source in (FIXTURES / "sdxl" / "base.safetensors", FIXTURES / "llama" / "adapter"):
        out = tmp_path / "out.safetensors"
        loratool.edit_metadata(source, out, set={"modelspec.title": "T"}, force=True)
        file = source if source.is_file() else source / "adapter_model.safetensors"
        assert after_header(out) == after_header(file) and said(out) == {**said(file), "modelspec.title": "T"}
