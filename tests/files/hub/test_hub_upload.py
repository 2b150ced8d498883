"""Commit outputs to a hub on this machine, whose API huggingface_hub uses as the real one's."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from conftest import FIXTURES, ROOT, run_command
from files.hub.test_hub_download import hub
from lib.harness.hub_server import HubServer, files_in

import loratool
from loratool.errors import InputError, MachineError, NeedsFlag

__all__ = ["hub"]

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)


def last(hub: HubServer, name: str) -> dict[str, bytes]:
    own = hub.repositories[name]
    return own.commits[own.refs["main"]]


def test_a_merged_model_is_one_commit_of_a_new_private_repository(hub: HubServer, tmp_path: Path) -> None:
    loratool.merge(BASE, ADAPTER, tmp_path / "merged")
    report = loratool.merge(BASE, ADAPTER, "hf://org/merged")
    assert report.out == "hf://org/merged" and last(hub, "org/merged") == files_in(tmp_path / "merged")
    assert hub.repositories["org/merged"].private and len(hub.repositories["org/merged"].commits) == 1
    assert not [path for path in (tmp_path / "own").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_what_is_there_is_replaced_with_force(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/merged", {"model-00001-of-00002.safetensors": b"\0", "picture.png": b"\0png", ".gitattributes": b"a"})
    with pytest.raises(NeedsFlag, match="hf://org/merged: exists already"):
        loratool.merge(BASE, ADAPTER, "hf://org/merged")
    loratool.merge(BASE, ADAPTER, "hf://org/merged", force=True)
    loratool.merge(BASE, ADAPTER, tmp_path / "merged")
    kept = {"picture.png": b"\0png", ".gitattributes": b"a"}
    assert last(hub, "org/merged") == {**files_in(tmp_path / "merged"), **kept}


@pytest.mark.slow
def test_a_file_in_a_folder(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/loras", {"README.md": b"mine", "loras/other.safetensors": b"\0"})
    loratool.convert(ADAPTER, out="hf://org/loras/loras/mine.safetensors", to="mlx")
    loratool.convert(ADAPTER, out=tmp_path / "mine.safetensors", to="mlx")
    found = last(hub, "org/loras")
    assert found["loras/mine.safetensors"] == (tmp_path / "mine.safetensors").read_bytes()
    assert found["README.md"] == b"mine" and found["loras/other.safetensors"] == b"\0"


def test_a_dry_run_asks_and_sends_nothing(hub: HubServer) -> None:
    report = loratool.merge(BASE, ADAPTER, "hf://org/merged", dry_run=True)
    assert report.out == "hf://org/merged"
    assert not [each for each in hub.log if each[0] == "POST"] and not hub.repositories


@pytest.mark.slow
def test_another_commit_meanwhile(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratool.files.hub import upload

    hub.add("org/merged", {"README.md": b"a"})
    send = upload.HubTarget.send

    def late(self: upload.HubTarget, *arguments: object) -> str:
        hub.add("org/merged", {"README.md": b"b"})
        return send(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(upload.HubTarget, "send", late)
    with pytest.raises(InputError, match="has another commit since this run began"):
        loratool.merge(BASE, ADAPTER, "hf://org/merged")
    assert last(hub, "org/merged") == {"README.md": b"b"}


def test_a_card_that_is_there_stays(hub: HubServer) -> None:
    hub.add("org/merged", {"README.md": b"mine"})
    loratool.merge(BASE, ADAPTER, "hf://org/merged")
    assert last(hub, "org/merged")["README.md"] == b"mine" and len(last(hub, "org/merged")) > 2


def test_a_hub_that_takes_nothing(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/merged", {"README.md": b"a"})
    hub.full = True
    with pytest.raises(MachineError) as refusal:
        loratool.merge(BASE, ADAPTER, "hf://org/merged")
    assert "x" * 30 not in str(refusal.value) and last(hub, "org/merged") == {"README.md": b"a"}
    assert "new repository" not in str(refusal.value)
    kept = Path(str(refusal.value.remedy).rpartition("hf upload org/merged ")[2])
    loratool.merge(BASE, ADAPTER, tmp_path / "merged")
    assert files_in(kept) == files_in(tmp_path / "merged")


def test_a_new_repository_that_stays_empty(hub: HubServer) -> None:
    hub.full = True
    with pytest.raises(MachineError, match="the new repository is there, private and empty"):
        loratool.convert(ADAPTER, "hf://org/new", to="mlx")
    assert hub.repositories["org/new"].private and not hub.repositories["org/new"].commits
    hub.full = False
    hub.add("org/new", {".gitattributes": b""})  # which the real hub begins a repository with
    loratool.convert(ADAPTER, "hf://org/new", to="mlx")
    assert "adapters.safetensors" in last(hub, "org/new")


def test_a_branch_of_no_repository(hub: HubServer) -> None:
    with pytest.raises(InputError, match="org/new@v1: .* the hub has no such model"):
        loratool.convert(ADAPTER, "hf://org/new@v1", to="mlx")
    assert not hub.repositories and not [each for each in hub.log if each[0] == "POST"]


def test_the_command_of_the_page(hub: HubServer) -> None:
    text = (ROOT / "loratool" / "guides" / "hub.md").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("loratool ") and "-o hf://" in line]
    hub.add("Qwen/Qwen3-0.6B", files_in(BASE))
    hub.add("org/adapter", files_in(ADAPTER))
    done = run_command(*shlex.split(command)[1:])
    assert done.exit_code == 0 and "wrote hf://org/merged" in done.stdout and last(hub, "org/merged")
