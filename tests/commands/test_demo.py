"""`demo`: the same bytes everywhere, models and adapters that the other commands and the oracles take, nothing lost."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loratool
from loratool.commands.demo.files import PARTS

Run = Callable[..., Any]

# file -> the first digits of its sha256
PINNED = {
    "adapter/adapter_model.safetensors": "ce620cf28653528b",
    "base/model-00001-of-00002.safetensors": "cc84f5954d95ca20",
    "base/model-00002-of-00002.safetensors": "f1b3e0de8a4024c5",
    "fp8/model.safetensors": "3c8482deb22d2e87",
    "gpt2/adapter/adapter_model.safetensors": "cef1d8f0e7db51e7",
    "gpt2/base/model.safetensors": "299265616ff4397f",
    "gpt2/tuned/model.safetensors": "ab5bb4b8e4e4eff5",
    "sdxl/adapter.safetensors": "4db9d321766fcb9a",
    "sdxl/base.safetensors": "75b38bac698e3f2a",
    "style/adapter_model.safetensors": "8120f6daab3c2eb4",
    "tuned/model-00001-of-00002.safetensors": "471d64958b04294b",
    "tuned/model-00002-of-00002.safetensors": "8037df32ccbc66d2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    loratool.demo(folder)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_bytes_are_the_same_everywhere(folder: Path) -> None:
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in PINNED}
    assert found == PINNED
    assert {name for name in names_in(folder) if name.endswith(".safetensors")} == set(PINNED)


def test_it_is_small_and_the_report_has_all_of_it(folder: Path, tmp_path: Path) -> None:
    report = loratool.demo(tmp_path / "again", dry_run=True)
    sizes = {name: (folder / name).stat().st_size for name in names_in(folder)}
    assert sum(sizes.values()) == pytest.approx(report.nbytes, abs=200) and report.nbytes < 2_000_000
    assert not (tmp_path / "again").exists() and not report.exists
    assert [part.path for part in report.parts] == list(PARTS)
    assert all((folder / part.path).exists() for part in report.parts)
    assert report.nbytes - sum(part.nbytes for part in report.parts) == sizes["README.md"]


@pytest.mark.parametrize(
    ("base", "adapter"),
    [("base", "adapter"), ("base", "style"), ("fp8", "adapter"), ("gpt2/base", "gpt2/adapter")]
    + [("sdxl/base.safetensors", "sdxl/adapter.safetensors")],
)
def test_a_merge_is_proven_and_undone(base: str, adapter: str, folder: Path, tmp_path: Path) -> None:
    assert loratool.inspect(folder / adapter, base=folder / base).problems == ()  # type: ignore[union-attr]
    out = tmp_path / ("merged.safetensors" if base.endswith("tensors") else "merged")
    report = loratool.merge(folder / base, folder / adapter, out)
    assert report.kept > 0.98
    assert loratool.verify(folder / base, folder / adapter, out).said_no is None
    loratool.unmerge(out, folder / adapter, again := out.with_name("again" + out.suffix))
    pairs = [(again, folder / base)]
    if again.is_dir():
        pairs = [(file, folder / base / file.name) for file in again.glob("*.safetensors")]
    assert all(restored.read_bytes() == former.read_bytes() for restored, former in pairs)


@pytest.mark.parametrize("model", ["", "gpt2/"])
def test_the_fine_tune_has_a_change_of_few_directions(model: str, folder: Path, tmp_path: Path) -> None:
    base, tuned = folder / f"{model}base", folder / f"{model}tuned"
    few, more = (loratool.extract(base, tuned, tmp_path / str(rank), rank=rank).kept for rank in (4, 8))
    assert 0.5 < few < more < 0.999


@pytest.mark.parametrize("model", ["", "gpt2/"])
def test_peft_and_transformers_load_it(model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is missing, and nothing left over."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base, said = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{model}base", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    adapted = peft.PeftModel.from_pretrained(base, folder / f"{model}adapter")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            assert torch.isfinite(logits).all() and not torch.equal(logits, adapted(input_ids=ids).logits)
    tensors = loratool.open_adapter(folder / f"{model}adapter")
    count = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert count == sum(module.A.numel() + module.B.numel() for module in tensors.values())


def test_an_adapter_names_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loratool.demo("a demo/")
    fields = json.loads(Path("a demo", "style", "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "a demo/base"


class TestPlace:
    def test_force_replaces_a_demo(self, tmp_path: Path, run: Run) -> None:
        assert run("demo", tmp_path / "demo").exit_code == 0
        result = run("demo", tmp_path / "demo")
        assert result.exit_code == 4 and "add --force to replace it, or choose another folder" in result.stderr
        assert run("demo", tmp_path / "demo", "--dry-run").stdout.startswith("small models and adapters -> ")
        (tmp_path / "demo" / "base" / "config.json").write_text("{}")
        assert run("demo", tmp_path / "demo", "--force").exit_code == 0
        assert len((tmp_path / "demo" / "base" / "config.json").read_text()) > 100

    @pytest.mark.parametrize("name", ["x", "base/x", "empty/"])
    def test_what_a_demo_has_not_is_kept(self, name: str, tmp_path: Path, run: Run) -> None:
        loratool.demo(tmp_path / "demo")
        path = tmp_path / "demo" / name
        path.mkdir() if name.endswith("/") else path.write_text("mine")
        before = names_in(tmp_path)
        for options in ((), ("--force",), ("--dry-run",)):
            result = run("demo", tmp_path / "demo", *options)
            assert result.exit_code == 2 and f"holds {name.rstrip('/')}; --force" in result.stderr
        assert names_in(tmp_path) == before

    def test_a_model_is_no_demo(self, tmp_path: Path, run: Run) -> None:
        """Also if it has no other names."""
        (tmp_path / "mine" / "base").mkdir(parents=True)
        (tmp_path / "mine" / "base" / "model.safetensors").write_bytes(b"mine")
        assert run("demo", tmp_path / "mine", "--force").exit_code == 2
        (tmp_path / "empty").mkdir()
        assert run("demo", tmp_path / "empty").exit_code == 0

    def test_remedies_name_no_option_that_it_does_not_have(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "link").symlink_to(tmp_path)
        told = run("demo", tmp_path / "link")
        assert told.exit_code == 2 and f"hint: {tmp_path / 'link' / 'demo'} writes into it" in told.stderr
        monkeypatch.setattr("loratool.durable.fileio.free_bytes", lambda folder: 1000)
        told = run("demo", tmp_path / "out")
        assert told.exit_code == 5 and "hint: free some space, or choose another folder" in told.stderr
        assert not (tmp_path / "out").exists()

    def test_the_commands_that_it_names_run(self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        lines = run("demo", "a b/").stdout.splitlines()
        commands = [line.partition("loratool ")[2] for line in lines if "loratool " in line]
        assert [command.split()[0] for command in commands] == ["inspect", "merge", "verify"]
        assert all(run(*shlex.split(command)).exit_code == 0 for command in commands)
