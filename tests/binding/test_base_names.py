"""Name in one line that an adapter was trained on another model of the hub; shapes decide, names never."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import factors, weights, write_model, write_peft

import loratool

META, PLAIN, UNSLOTH = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", "unsloth/Llama-3.1-8B-bnb-4bit"

# (what the adapter's config names, what the base is, the end of the note; None for no note)
NAMES = [
    (PLAIN, PLAIN, None),
    (PLAIN.lower(), PLAIN, None),
    (UNSLOTH, PLAIN, "the same model by its name in another storage format"),
    ("unsloth/llama-3.1-8b-unsloth-bnb-4bit", PLAIN, "the same model by its name in another storage format"),
    (PLAIN, META, "which is tuned to follow instructions by its name"),
    ("unsloth/Llama-3.1-8B-Instruct-bnb-4bit", PLAIN, "which is not tuned to follow instructions by its name"),
    ("NousResearch/Llama-3.1-8B", PLAIN, "of the same name"),
    ("Qwen/Qwen3-8B", PLAIN, f"and the base is {PLAIN}"),
    ("./llama", PLAIN, None),
    ("/models/llama", PLAIN, None),
    ("models/cache/llama", PLAIN, None),
    ("", PLAIN, None),
    (None, PLAIN, None),
    (8, PLAIN, None),
    ("a/b\nforged", PLAIN, None),
]


def model_at(folder: Path, name: object = None) -> Path:
    config = {"model_type": "llama", **({} if name is None else {"_name_or_path": name})}
    return write_model(folder, {"model.layers.0.q_proj.weight": weights(8, 8)}, config)


def adapter_at(folder: Path, named: object) -> Path:
    return write_peft(folder, {"model.layers.0.q_proj": factors(8, 8, 2)}, base_model_name_or_path=named)


@pytest.mark.parametrize("cached", [True, False], ids=["in the cache", "by its config"])
@pytest.mark.parametrize(("named", "given", "end"), NAMES, ids=lambda each: str(each)[:30])
def test_another_base_is_a_note(tmp_path: Path, named: object, given: str, end: str | None, cached: bool) -> None:
    folder = tmp_path / f"models--{given.replace('/', '--')}" / "snapshots" / "0a1b" if cached else tmp_path / "base"
    base, adapter = model_at(folder, None if cached else given), adapter_at(tmp_path / "style", named)
    notes = loratool.merge(base, adapter, tmp_path / "out", dry_run=True).notes
    if end is None:
        assert not notes
    else:
        (note,) = notes
        assert note.startswith(f"{adapter} was trained on {named}, and the base is {given}") and note.endswith(end)
    assert [each for each in loratool.inspect(adapter, base=base).notes if "trained on" in each] == [*notes]  # type: ignore[union-attr]


def test_a_folder_here_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, adapter = model_at(tmp_path / "models" / "llama", PLAIN), adapter_at(tmp_path / "style", "models/llama")
    assert not loratool.merge(base, adapter, "out").notes


def test_a_proof_says_it_too(tmp_path: Path) -> None:
    base, adapter = model_at(tmp_path / "base", PLAIN), adapter_at(tmp_path / "style", META)
    loratool.merge(base, adapter, tmp_path / "out")
    report = loratool.verify(base, adapter, tmp_path / "out")
    assert report.status == "proven" and len(report.notes) == 1 and META in report.notes[0]


@pytest.mark.parametrize("name", [8, [], {}, "\x1b[31m/x", "a/b/c", "llama", "a" * 10**5 + "/b"])
def test_any_name_in_a_config_is_read(tmp_path: Path, name: object) -> None:
    base = model_at(tmp_path / "base", name)
    assert json.loads((base / "config.json").read_text())["_name_or_path"] == name
    notes = loratool.merge(base, adapter_at(tmp_path / "style", META), tmp_path / "out", dry_run=True).notes
    assert not any("\x1b" in note for note in notes) and all(len(note) < 1000 for note in notes)
