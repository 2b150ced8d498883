"""Every command with its inputs in a store does the same as with them here: files, reports, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import run_command
from lib.harness.stores import s3_at, s3_server, served
from scenarios import SCENARIOS, done, files_of, make_stage

import loratool

# Calls that write nothing beside what they say
READING = (
    "inspect base", "inspect base.gguf", "inspect base.bin", "inspect adapter", "inspect adapter --base base",
    "inspect pipe", "inspect once.patch", "inspect base --digest", "inspect adapter --for vllm --base base",
    "inspect adapter --spectra", "inspect once --digest --files", "inspect sdxl.safetensors",
    "diff adapter other", "diff adapter other --base base", "diff base once", "diff base once --spectra",
    "verify base adapter once", "verify base.safetensors adapter once.safetensors",
    "verify base adapter:2 once", "count base --rank 2", "count base/config.json --rank 2",
    "merge base adapter --dry-run", "unmerge once adapter --dry-run", "extract base once --rank 1 -o out --dry-run",
    "apply base once.patch --dry-run", "merge base.gguf llama --like base.gguf --dry-run",
    "convert base.gguf --dtype bf16 --tokenizer base -o out",
    "convert adapter --for vllm --base base -o out", "convert adapter --to peft --plain --initial other -o out",
    "merge base adapter --initial other -o out", "unmerge once.safetensors adapter --undo once.undo -o out",
    "merge base adapter -o out --attest attested.json", "verify --attestation statement.json base adapter again",
    "apply base deltas --step 1 -o out", "inspect deltas/step_1",
    "merge base adapter -o out --save-recipe kept.json --html kept.html",
    "merge base nothing -o out", "merge nothing adapter", "inspect notes.txt",
)  # fmt: skip

CALLS = {scenario.new: scenario.new for scenario in SCENARIOS.values() if "run " not in scenario.new} | {
    call: call for call in READING
}

FAILING = {
    "merge base nothing -o out", "merge nothing adapter", "inspect notes.txt",
    "merge base.gguf llama --like base.gguf --dry-run",
    *(scenario.new for scenario in SCENARIOS.values() if scenario.fails),
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere") / "stage"
    before = os.getcwd()
    make_stage(folder)
    done("inspect adapter --html page.html")
    Path("deltas").mkdir()
    done("patch base once --to skyrl --step 1 -o deltas/step_1")
    done("merge base adapter -o again --attest statement.json")
    os.chdir(before)
    return folder


@pytest.fixture(scope="module", params=["memory", "s3", "http"])
def link(request: pytest.FixtureRequest, stage: Path) -> Iterator[str]:
    """The link to the stage in a store; to a folder there ends with a slash on the web."""
    with ExitStack() as opened:
        if request.param == "http":
            yield opened.enter_context(served(stage))
            return
        if request.param == "s3":
            system: Any = opened.enter_context(s3_at(f"http://{opened.enter_context(s3_server())}"))
            system.mkdir("stage")
            system.put(f"{stage}/", "stage/", recursive=True)
            yield "s3://stage"
            return
        system = pytest.importorskip("fsspec").filesystem("memory")
        system.put(str(stage), "/stage", recursive=True)
        yield "memory://stage"


def there(word: str, stage: Path, link: str) -> str:
    """Return an argument with a link for each path of the stage."""
    path, colon, weight = word.partition(":")
    if word.startswith("-") or not (stage / path).exists():
        return word
    slash = "/" if link.startswith("http") and (stage / path).is_dir() else ""
    return f"{link}/{path}{slash}{colon}{weight}"


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_command_does_the_same(
    call: str, link: str, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, work = {}, tmp_path / "work"
    for name in ("near", "far"):
        shutil.copytree(stage, work) if name == "near" else work.mkdir()
        monkeypatch.chdir(work)
        words = [there(word, stage, link) for word in call.split()]
        words = [word.removeprefix(f"{link}/") for word in words] if name == "near" else words
        result = run_command(*words, "--json")
        written = {key: data for key, data in files_of(work).items() if not (stage / key).exists()}
        found[name] = (
            result.exit_code,
            _without(link, result.stdout),
            {key: _plain(link, key, data) for key, data in written.items()},
        )
        work.rename(tmp_path / name)
    assert found["far"][0] == found["near"][0], (found["far"][1], found["near"][1])
    assert (found["near"][0] in (0, 1)) is (call not in FAILING), found["near"][1]
    assert found["far"][2].keys() == found["near"][2].keys()
    differing = [key for key, content in found["near"][2].items() if found["far"][2][key] != content]
    assert not differing, [(name, key, found[name][2][key]) for name in found for key in differing]
    said = {name: _flat(found[name][1]) for name in found}
    if "--for ollama" in call:  # which builds from a base on its own machine
        assert not said["far"].pop("/report/next") and said["near"].pop("/report/next")
    assert said["far"] == said["near"]


def _plain(link: str, key: str, data: bytes) -> object:
    """Return a file's content without the links before the paths in it, and what follows from their length."""
    if key.endswith(".safetensors"):
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end].replace(f"{link}/".encode(), b"")), data[end:]
    if key.endswith("Modelfile"):
        return data.splitlines()[-1]  # before it is FROM, where Ollama takes a path on its own machine
    text = data.replace(f"{link}/".encode(), b"").replace(b"./", b"")  # ./ tells a path from a name on the hub
    return re.sub(rb"<!-- loratool \w+ -->", b"", text)  # the digest of a card


@pytest.mark.slow
def test_a_page_of_a_report_is_read_again(link: str, stage: Path) -> None:
    assert loratool.read_report(f"{link}/page.html") == loratool.read_report(stage / "page.html")


def _flat(value: Any, place: str = "") -> dict[str, object]:
    """Return the values of a report by their places, so that a difference is short."""
    if not isinstance(value, dict | list):
        return {place: value}
    if isinstance(value, dict):  # a file's folder is not searched in a store
        value = {
            name: inner for name, inner in value.items() if name not in ("free_bytes", "not_copied", "left_behind")
        }
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: each for name, inner in items for key, each in _flat(inner, f"{place}/{name}").items()}


def _without(link: str, text: str) -> Any:
    """Return a report without the links before the paths in it."""
    return json.loads(text.replace(f"{link}/", "")) if text else text
