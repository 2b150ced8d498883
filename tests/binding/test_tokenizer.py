"""Hold whose tokenizer a merged model gets: announced in a line, decided by --tokenizer, and undone to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, weights, write_model, write_peft
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError, UsageError

EMBEDDING = "model.embed_tokens.weight"
LAYER = "model.layers.0.self_attn.q_proj"

OF_BASE = {
    "tokenizer.json": "base",
    "tokenizer_config.json": "base",
    "vocab.json": "base",
    "chat_template.jinja": "base",
    "additional_chat_templates/tool.jinja": "base",
}

OF_ADAPTER = {"tokenizer.json": "adapter", "tokenizer_config.json": "adapter", "special_tokens_map.json": "adapter"}


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(text))


def texts_of(folder: Path) -> dict[str, str]:
    """Return the tokenizer's files that a folder has."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    others = (
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "model.safetensors",
        "loratool.undo",
    )
    return {name: json.loads((folder / name).read_text()) for name in files if name not in others}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {EMBEDDING: weights(8, 4), "lm_head.weight": weights(8, 4, seed=1), f"{LAYER}.weight": weights(4, 4)}
    folder = write_model(tmp_path / "base", tensors, {"model_type": "llama", "vocab_size": 8})
    write_texts(folder, OF_BASE)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, rows: int | None, texts: dict[str, str]) -> Path:
        """Write an adapter of a layer and, with so many rows, of embedding and head."""
        saved = ["embed_tokens", "lm_head"] if rows else None
        folder = write_peft(tmp_path / name, {LAYER: factors(4, 4, 2)}, modules_to_save=saved)
        file = folder / "adapter_model.safetensors"
        whole = {
            f"base_model.model.{n}.weight": weights(rows or 0, 4, seed=3) for n in ("model.embed_tokens", "lm_head")
        }
        save_file(load_file(file) | (whole if rows else {}), file)
        write_texts(folder, texts)
        return folder

    return write


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# rows of the adapter's vocabulary, files beside it, --tokenizer -> the output's files, a word of the note
CASES: dict[str, tuple[int | None, dict[str, str], str | None, dict[str, str], str]] = {
    "resized": (10, OF_ADAPTER, None, OF_ADAPTER, "that of"),
    "trained": (8, OF_ADAPTER, None, OF_ADAPTER, "that of"),
    "resized, but the base's": (10, OF_ADAPTER, "base", OF_BASE, "the base's"),
    "another vocabulary is not touched": (None, OF_ADAPTER, None, OF_BASE, "--tokenizer adapter"),
    "asked for": (None, OF_ADAPTER, "adapter", OF_ADAPTER, "that of"),
    "a template alone": (10, {"chat_template.jinja": "a"}, None, OF_BASE, "another chat template, which"),
    "a template alone, asked for": (
        None,
        {"chat_template.jinja": "a"},
        "adapter",
        OF_BASE | {"chat_template.jinja": "a"},
        "that of",
    ),
    "added tokens": (10, {"added_tokens.json": "a"}, None, OF_BASE | {"added_tokens.json": "a"}, "that of"),
    "the same": (10, {"tokenizer.json": "base"}, None, OF_BASE, ""),
    "the same, asked for": (10, {"tokenizer.json": "base"}, "adapter", OF_BASE, ""),
    "none": (8, {}, None, OF_BASE, ""),
    "none for new words": (10, {}, None, OF_BASE, "the vocabulary has 10 rows now"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tokenizer_is_chosen_told_and_undone(
    base: Path, adapter: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    rows, texts, choice, expected, word = CASES[case]
    one = adapter("adapter", rows, texts)
    report = loratool.merge(base, one, tmp_path / "out", tokenizer=choice)
    assert texts_of(tmp_path / "out") == expected
    assert len(report.notes) == bool(word) and all(word in note for note in report.notes)
    left = {row.name: row.reason for row in report.left_behind}
    assert left.keys() == OF_BASE.keys() - expected.keys() and all("tokenizer" in why for why in left.values())
    loratool.unmerge(tmp_path / "out", one, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def test_of_several_none_is_guessed(base: Path, adapter: Callable[..., Path], tmp_path: Path) -> None:
    both = [adapter("a", 8, OF_ADAPTER), adapter("b", None, {"tokenizer.json": "b"})]
    assert loratool.merge(base, both, tmp_path / "one").notes[0].startswith(f"tokenizer: that of {both[0]}")
    with pytest.raises(UsageError, match=f"several adapters have a tokenizer beside them: {both[0]}, {both[1]}"):
        loratool.merge(base, both, tmp_path / "out", tokenizer="adapter")
    report = loratool.merge(base, both, tmp_path / "out", tokenizer=both[1])
    assert texts_of(tmp_path / "out") == {"tokenizer.json": "b"} and report.notes == (f"tokenizer: that of {both[1]}",)
    loratool.unmerge(tmp_path / "out", both, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def test_two_that_train_the_vocabulary_leave_the_bases(
    base: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Trained tokens of two adapters can be merged, but no tokenizer has both."""
    pair = []
    for name in "ab":
        folder = write_peft(tmp_path / name, {"lm_head": factors(8, 4, 2)}, target_modules=["lm_head"])
        write_texts(folder, {"tokenizer.json": name})
        pair.append(folder)
    report = loratool.merge(base, pair, tmp_path / "out")
    assert texts_of(tmp_path / "out") == OF_BASE
    assert "the base's" in report.notes[0] and "--tokenizer FOLDER takes" in report.notes[0]
    write_texts(pair[1], {"tokenizer.json": "a"})
    loratool.merge(base, pair, tmp_path / "same")
    assert texts_of(tmp_path / "same") == {"tokenizer.json": "a"}


def test_the_undo_file_has_only_what_differs(base: Path, adapter: Callable[..., Path], tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text(json.dumps("x" * 10_000))
    one = adapter("adapter", 10, OF_ADAPTER | {"tokenizer.json": "x" * 10_000})
    report = loratool.merge(base, one, tmp_path / "out")
    assert texts_of(tmp_path / "out") == texts_of(one) | {"tokenizer.json": "x" * 10_000}
    assert report.undo_bytes is not None and report.undo_bytes < 10_000


def test_a_tokenizer_that_is_not_there(base: Path, adapter: Callable[..., Path], tmp_path: Path) -> None:
    one = adapter("adapter", 8, {})
    with pytest.raises(InputError, match="adapter: has no tokenizer beside it"):
        loratool.merge(base, one, tmp_path / "out", tokenizer="adapter")
    (tmp_path / "empty").mkdir()
    for folder, why in (("empty", "has no tokenizer's files"), ("absent", "No such file")):
        with pytest.raises(InputError, match=f"{folder}: {why}"):
            loratool.merge(base, one, tmp_path / "out", tokenizer=tmp_path / folder)
    with pytest.raises(UsageError, match="a single file has no tokenizer beside its weights"):
        loratool.merge(base, one, tmp_path / "out.safetensors", tokenizer="base")
    assert not (tmp_path / "out").exists()


def test_a_single_file_takes_none(base: Path, adapter: Callable[..., Path], tmp_path: Path, run: Any) -> None:
    one = adapter("adapter", 10, OF_ADAPTER)
    assert loratool.merge(base, one, tmp_path / "out.safetensors").notes == ()
    told = run("merge", base, one, "-o", tmp_path / "out", "--tokenizer", "base")
    assert told.exit_code == 0 and "note: tokenizer: the base's" in told.stdout
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[EMBEDDING], weights(10, 4, seed=3))
