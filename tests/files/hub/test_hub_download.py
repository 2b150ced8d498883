"""Download by names from a hub on this machine: only what is needed, whole or not at all, and never unasked.

What is downloaded is found again as huggingface_hub finds it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, write_model, write_peft
from lib.harness.hub_server import HubServer, Repository, files_in, serve_hub

import loratool
from loratool.errors import InputError, LoratoolError, MachineError
from loratool.files.checkpoint import is_config_alone, open_checkpoint, read_config
from loratool.files.hub.cache import resolve

REASON = "needs huggingface_hub, which is in the extra `hub`"

MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"\0" + Random(0).randbytes(7999),
    "pytorch_model.bin": b"copy\0",
    "onnx/model.onnx": b"copy\0",
}
FACTORS = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 8), torch.ones(8, 2))}

TAKEN = {"config.json", "tokenizer.json", "model.safetensors"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that this process asks, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason=REASON)
    from huggingface_hub import file_download

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.chdir(tmp_path)
    with serve_hub() as served:
        template = f"{served.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for home in (constants, file_download):  # before version 1 the second has copies
            monkeypatch.setattr(home, "ENDPOINT", served.endpoint, raising=False)
            monkeypatch.setattr(home, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield served


def test_a_name_is_downloaded_once_and_no_more_than_needed(hub: HubServer) -> None:
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    commit = hub.add("org/name", MODEL)
    found = resolve("org/name")
    assert hub.fetched() == TAKEN and files_in(found) == {name: MODEL[name] for name in TAKEN}
    cache = found.parent.parent.parent
    theirs = snapshot_download("org/name", cache_dir=cache, local_files_only=True, allow_patterns=[*TAKEN])
    assert (found.name, str(found)) == (commit, theirs)
    assert try_to_load_from_cache("org/name", "config.json", cache) == str(found / "config.json")
    hub.log.clear()
    for name in ("", "@main", f"@{commit}", f"@{commit[:7]}", "/model.safetensors", "/config.json"):
        again = resolve(f"org/name{name}")
        assert again == found / name.partition("/")[2]
    assert resolve("hf://org/name") == resolve("https://huggingface.co/org/name/tree/main") == found
    assert hub.log == []


def test_revisions_are_branches_tags_and_hashes(hub: HubServer) -> None:
    old = hub.add("org/name", {"old.safetensors": b"old"})
    new = hub.add("org/name", {"new.safetensors": b"new"})
    hub.repositories["org/name"].refs |= {"v1": old, "feature/x": new, "refs/pr/1": old}
    for revision, commit in (("v1", old), ("feature%2Fx", new), ("refs/pr/1", old), (old[:8], old), (new, new)):
        found = resolve(f"org/name@{revision}")
        assert found.name == commit and resolve(f"org/name@{revision}") == found
    assert resolve("org/name").name == new
    with pytest.raises(InputError, match="org/name has no revision v2 on the hub"):
        resolve("org/name@v2")
    with pytest.raises(InputError, match="no revision 0000000 on the hub"):
        resolve("org/name@0000000")


def test_a_pinned_commit_is_that_commit(hub: HubServer) -> None:
    """Nothing is taken from a server that answers with another one."""
    hub.add("org/name", {"new.safetensors": b"new"})
    pinned = "0123456789abcdef" * 2 + "01234567"
    hub.repositories["org/name"].refs[pinned] = hub.repositories["org/name"].refs["main"]
    with pytest.raises(MachineError, match="the hub answers with the commit"):
        resolve(f"org/name@{pinned}")
    assert not hub.fetched()


def test_folders_and_files_of_a_repository(hub: HubServer) -> None:
    files = {"a/adapter_config.json": b"{}", "a/adapter_model.safetensors": b"a\0", "x.safetensors": b"x\0"}
    hub.add("org/name", {**files, "y.safetensors": b"y\0", "a/checkpoint-1/adapter_model.safetensors": b"b\0"})
    found = resolve("org/name/a")
    assert files_in(found) == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a\0"}
    assert resolve("org/name/x.safetensors").read_bytes() == b"x\0"
    assert resolve("https://huggingface.co/org/name/blob/main/y.safetensors").read_bytes() == b"y\0"
    assert "a/checkpoint-1/adapter_model.safetensors" not in hub.fetched()
    with pytest.raises(InputError, match=r"(?s)several files of weights.*org/name/x.safetensors, org/name/y.safetens"):
        resolve("org/name")
    with pytest.raises(InputError, match="no such folder or file"):
        resolve("org/name/b")


def test_the_only_file_in_the_cache_is_not_taken_for_the_only_one(hub: HubServer) -> None:
    """One of a repository's many files was downloaded by its name: the repository's name must not become its."""
    hub.add("org/styles", {"a.safetensors": b"a\0", "b.safetensors": b"b\0"})
    found = resolve("org/styles/a.safetensors")
    with pytest.raises(InputError, match="several files of weights"):
        resolve("org/styles")
    for tree in found.parent.parent.parent.glob("trees/*"):  # as versions before 2 leave it
        tree.unlink()
    with pytest.raises(InputError, match="several files of weights"):
        resolve("org/styles")


def test_a_config_is_read_without_the_weights(hub: HubServer) -> None:
    hub.add("org/name", MODEL)
    assert read_config("org/name") == {"model_type": "llama"} and not is_config_alone("org/name")
    assert hub.fetched() == TAKEN - {"model.safetensors"}
    assert is_config_alone("org/name/config.json") and is_config_alone(resolve("org/name/config.json"))
    resolve("org/name")
    assert hub.fetched() == TAKEN


def test_shards_are_those_of_the_index(hub: HubServer, tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    files = files_in(write_model(tmp_path / "model", tensors, {}, shards=2))
    hub.add("org/name", {**files, "model-00001-of-00009.safetensors": b"of another index\0"})
    assert dict(open_checkpoint("org/name").specs) == dict(open_checkpoint(tmp_path / "model").specs)
    assert hub.fetched() == {*files}
    del files["model-00002-of-00002.safetensors"]
    hub.add("org/cut", files)
    with pytest.raises(InputError, match="incomplete on the hub: model-00002-of-00002.safetensors is missing"):
        resolve("org/cut")


def test_a_dropped_connection_is_resumed(hub: HubServer) -> None:
    hub.add("org/name", MODEL, cut={"model.safetensors"})
    with suppress(MachineError):  # version 1.0 leaves it to the next run
        resolve("org/name")
    assert files_in(resolve("org/name")) == {name: MODEL[name] for name in TAKEN}
    assert [span for method, path, span in hub.log if span] == ["bytes=4000-"]


def test_a_short_hash_is_found_among_the_commits(hub: HubServer) -> None:
    old = hub.add("org/name", {"old.safetensors": b"old"})
    hub.add("org/name", {"new.safetensors": b"new"})
    found = resolve(f"org/name@{old[:9]}")
    assert found.name == old and files_in(found) == {"old.safetensors": b"old"}


def test_what_comes_broken_without_links_is_removed_too(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no links can be made, as on Windows, huggingface_hub has the files themselves in the snapshot."""
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_, **__: False)
    commit = hub.add("org/name", MODEL, damaged={"model.safetensors"})
    place = Path("cache", "models--org--name", "snapshots", commit)
    with pytest.raises(MachineError, match="is not as the hub lists it"):
        resolve("org/name")
    assert not (place / "model.safetensors").exists() and not (place / "config.json").is_symlink()
    hub.repositories["org/name"] = Repository(**{**vars(hub.repositories["org/name"]), "damaged": set()})
    assert files_in(resolve("org/name")) == {name: MODEL[name] for name in TAKEN}


@pytest.mark.parametrize("fault", ["shortened", "damaged", "untagged"])
def test_what_comes_broken_is_not_used(hub: HubServer, fault: str) -> None:
    hub.add("org/name", MODEL, **{fault: {"model.safetensors"}})
    for _ in range(2):  # nothing of it is left for the next run
        with pytest.raises(MachineError) as caught:
            resolve("org/name")
        assert caught.value.culprit == "org/name" and "run the command again" in str(caught.value.remedy)
    hub.repositories["org/name"] = Repository(**{**vars(hub.repositories["org/name"]), fault: set()})
    assert files_in(resolve("org/name")) == {name: MODEL[name] for name in TAKEN}


def test_a_wrong_etag(hub: HubServer) -> None:
    """huggingface_hub keeps a file by its ETag: one that is wrong does no harm, and two that are alike are refused."""
    hub.add("org/one", MODEL, mistagged={"model.safetensors"})
    assert files_in(resolve("org/one")) == {name: MODEL[name] for name in TAKEN}
    hub.add("org/two", MODEL, mistagged={"model.safetensors", "tokenizer.json"})
    for _ in range(2):
        with pytest.raises(MachineError, match="is not as the hub lists it"):
            resolve("org/two")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "GatedRepo"), r"is gated.*\naccept them at http.*/org/name, and log in with `hf auth login`"),
        ((403, "GatedRepo"), r"is gated.*\naccept them at http.*/org/name, and log in with `hf auth login`"),
        ((401, "RepoNotFound"), r"no such file or folder, and the hub has no such model, or keeps it private\n.*login"),
        ((404, "RepoNotFound"), r"no such file or folder, and the hub has no such model, or keeps it private\n.*login"),
        ((401, ""), r"(refuses it \(401\)|no such model, or keeps it private)\n.*log in with `hf auth login`"),
        ((403, ""), r"refuses it \(403\)\nlog in with `hf auth login`"),
    ],
)
def test_what_is_not_shown_says_how_to_log_in(hub: HubServer, refusal: tuple[int, str], message: str) -> None:
    hub.add("org/name", MODEL, refusal=refusal)
    with pytest.raises(InputError, match=message):
        resolve("org/name")


def test_gated_files_of_a_model_that_is_listed(hub: HubServer) -> None:
    """As the hub does it: whoever asks may see the list, and not the files."""
    hub.add("org/name", MODEL, gated=True)
    with pytest.raises(InputError, match="is gated"):
        resolve("org/name")


def test_a_hub_that_is_not_reached(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", MODEL, refusal=(500, ""))
    with pytest.raises(MachineError, match="is not here, and could not be downloaded: .*500"):
        resolve("org/name")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint.replace("://", "://user:secret@"))
    for refusal in ((500, ""), (403, "")):
        hub.add("org/name", MODEL)
        hub.repositories["org/name"].refusal = refusal
        with pytest.raises(LoratoolError) as caught:
            resolve("org/name")
        assert hub.endpoint in str(caught.value) and "secret" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="is not here, and could not be downloaded: .*refused"):
        resolve("org/name")


def test_a_list_does_not_lead_out_of_the_cache(hub: HubServer, tmp_path: Path) -> None:
    names = ("../../../victim.json", "/victim.json", "a/../../victim.json")
    (tmp_path / "cache" / "models--org--name").mkdir(parents=True)
    (tmp_path / "cache" / "victim.json").write_text("kept")
    hub.add("org/name", {**MODEL, **dict.fromkeys(names, b"{}")})
    resolve("org/name")
    assert hub.fetched() == TAKEN and (tmp_path / "cache" / "victim.json").read_text() == "kept"


@pytest.mark.parametrize(
    "answer",
    [
        *({"sha": sha} for sha in ("..", "a/b", "", "main", "a" * 5000)),
        *({"siblings": [{"rfilename": "config.json", "size": size}]} for size in ("12", [1], 1.5)),
        *({"siblings": [{"rfilename": name, "size": 1}]} for name in (5, None, "\ud800.json", "a" * 5000 + ".json")),
    ],
)
def test_a_list_of_another_form_is_refused(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: dict[str, Any]
) -> None:
    from huggingface_hub.hf_api import ModelInfo

    commit = hub.add("org/name", MODEL)
    whole = {"id": "org/name", "sha": commit, "siblings": [], "tags": [], **answer}
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: ModelInfo(**whole))
    with pytest.raises(LoratoolError):
        resolve("org/name")
    assert hub.fetched() == set() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("linked", ["model.safetensors", "blob"])
def test_a_file_that_the_cache_links_to_is_not_removed(hub: HubServer, tmp_path: Path, linked: str) -> None:
    """A link of the user's in the place of a file or of its blob, to other bytes: the link goes, and not the file."""
    hub.add("org/name", MODEL)
    found, own = resolve("org/name"), tmp_path / "own"
    own.write_bytes(b"own")
    link = found / linked if linked != "blob" else (found / "model.safetensors").resolve()
    link.unlink()
    link.symlink_to(own)
    with suppress(MachineError):
        resolve("org/name")
    assert files_in(resolve("org/name")) == {name: MODEL[name] for name in TAKEN} and own.read_bytes() == b"own"


def test_no_space(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", MODEL)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(MachineError, match=r"has 8.0\d kB to download, and 10 B are free in .*cache"):
        resolve("org/name")
    assert hub.fetched() == set()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_means_that_nothing_is_asked(hub: HubServer, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    hub.add("org/name", MODEL)
    monkeypatch.setenv(variable, "yes")
    with pytest.raises(InputError, match=r"(?s)HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE.*hf download org/name"):
        resolve("org/name")
    assert hub.log == []


def test_without_the_extra(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/name", MODEL)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "loratool.files.hub.download", raising=False)
    with pytest.raises(MachineError) as caught:
        resolve("org/name")
    assert caught.value.remedy == "pip install '.[hub]' in a clone of loratool" and hub.log == []


def test_a_variable_that_huggingface_hub_does_not_take(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises when it is imported, of HF_ENDPOINT=http://[x or HF_HUB_DOWNLOAD_TIMEOUT=x."""

    class Refusing(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise ValueError("Invalid IPv6 URL")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Refusing("huggingface_hub"))
    monkeypatch.delitem(sys.modules, "loratool.files.hub.download", raising=False)
    with pytest.raises(MachineError, match="does not start: Invalid IPv6 URL\nlook at HF_ENDPOINT"):
        resolve("org/name")


def test_mistyped_paths_are_not_downloaded(hub: HubServer, tmp_path: Path) -> None:
    """A word, a name of a weights file, and what begins with a folder that is here are paths."""
    for name in ("models/llama", "word", "models/style.safetensors"):
        hub.add(name, MODEL)
    (tmp_path / "models").mkdir()
    for name in ("models/llama", "word", "models/style.safetensors", "lama/model.safetensors", "./org/name"):
        with pytest.raises(InputError, match="no such file or folder"):
            resolve(name)
    assert hub.log == []
    assert resolve("hf://models/llama").is_dir() and resolve("hf://word").is_dir()
    assert resolve("word") == resolve("hf://word")  # once it is in the cache


def test_a_path_wins(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/name", MODEL)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name") and hub.log == []


def test_incomplete_snapshots_are_completed(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline they are named."""
    hub.add("org/name", MODEL)
    found = resolve("org/name")
    (found / "model.safetensors").resolve().unlink()
    (found.parent.parent / "blobs" / "abc.incomplete").write_bytes(b"w")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="interrupted: model.safetensors is missing, and HF_HUB_OFFLINE is set"):
        resolve("org/name")
    assert resolve("org/name/config.json").is_file()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert files_in(resolve("org/name")) == {name: MODEL[name] for name in TAKEN}


def environment(hub: HubServer, folder: Path) -> dict[str, str]:
    """Return the environment of a process of its own that asks the hub, with an empty cache."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return own | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}


def test_a_merge_by_names_gives_the_bytes_of_a_merge_of_folders(
    hub: HubServer, tmp_path: Path, run: Callable[..., Any]
) -> None:
    """In a process of its own: the command tells huggingface_hub to show no progress before it is loaded."""
    weights = {f"model.layers.0.self_attn.{name}_proj.weight": torch.randn(8, 8) for name in "qv"}
    base = write_model(tmp_path / "base", weights, {"model_type": "llama"}, shards=2)
    adapter = write_peft(tmp_path / "adapter", FACTORS)
    hub.add("org/base", files_in(base))
    hub.add("org/runs", {f"adapter/{name}": data for name, data in files_in(adapter).items()})
    words = "-m loratool merge org/base org/runs/adapter:0.5 -o named --no-card --json".split()
    own = environment(hub, tmp_path)
    named = subprocess.run([sys.executable, *words], cwd=tmp_path, env=own, capture_output=True, text=True, timeout=100)
    assert (named.returncode, named.stderr) == (0, "") and json.loads(named.stdout)["ok"]
    assert run("merge", "base", "adapter:0.5", "-o", "local", "--no-card").exit_code == 0
    assert files_in(tmp_path / "named") == files_in(tmp_path / "local")


def test_a_second_merge_needs_no_hub(
    hub: HubServer, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8)}
    hub.add("org/base", files_in(write_model(tmp_path / "base", weights, {"model_type": "llama"})))
    hub.add("org/adapter", files_in(write_peft(tmp_path / "adapter", FACTORS)))
    assert run("merge", "org/base", "hf://org/adapter:0.5", "-o", "first").exit_code == 0
    hub.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("merge", "org/base", "org/adapter:0.5", "-o", "second").exit_code == 0
    assert files_in(tmp_path / "first") == files_in(tmp_path / "second") and hub.log == []


def test_names_in_files_are_not_downloaded(hub: HubServer, tmp_path: Path) -> None:
    weights = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8)}
    base = write_model(tmp_path / "base", weights, {"model_type": "llama", "_name_or_path": "org/base"})
    adapter = write_peft(tmp_path / "adapter", FACTORS)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    loratool.merge(base, [adapter], tmp_path / "out")
    loratool.inspect(adapter)
    assert hub.log == []


def test_every_error_is_one_of_ours(hub: HubServer) -> None:
    hub.add("org/name", {"config.json": b"not json", "model.safetensors.index.json": b"[]", "a/model_index.json": b"{"})
    for name in ("org/name", "org/name/a", "org/name/none", "hf://a/b/c", "https://huggingface.co/x"):
        with pytest.raises(LoratoolError):
            open_checkpoint(name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_download_at_once(hub: HubServer, tmp_path: Path, number: signal.Signals) -> None:
    hub.add("org/name", MODEL, stalled={"model.safetensors"})
    words = ["-m", "loratool", "inspect", "org/name", "--digest"]
    with subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=environment(hub, tmp_path)) as process:
        while "model.safetensors" not in hub.fetched():
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
