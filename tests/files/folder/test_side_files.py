"""Hold the files beside the weights: which of them travel with a model, and which never do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.models.sharded_model import write_adapter_of_two, write_sharded_model
from safetensors.torch import load_file

import loratool
from loratool.errors import UsageError
from loratool.files.folder import side_files
from loratool.files.folder.side_files import edited_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_sharded_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter_of_two(tmp_path / "adapter")


TRAVEL = [
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "spiece.model", "source.spm"),
    *("qwen.tiktoken", "vocab.json", "vocab.txt", "vocab-src.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja", "generation_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    *("2_Dense/config.json", "2_Dense/model.safetensors", "modeling_x.py", "LICENSE", "NOTICE.txt", "GEMMA_LICENSE"),
    *("notes.md", "params.json", "extra.txt", "spk_dict.pt", "Roboto-Regular.ttf"),
]

# name -> a word of the reason for which it is left behind
STAY = {
    "pytorch_model.bin": "weights",
    "consolidated.00.pth": "weights",
    "model.gguf": "weights",
    "tf_model.h5": "weights",
    "other.safetensors": "weights",
    "pytorch_model.bin.index.json": "weights",
    "model.safetensors.index.fp16.json": "weights",
    "optimizer.pt": "training",
    "trainer_state.json": "training",
    "training_args.bin": "training",
    "adapter_config.json": "adapter",
    "adapter_model.safetensors": "adapter",
    "README.md": "card",
    ".gitattributes": "hidden",
    ".git/config": "hidden",
    "original/params.json": "weights",
    "onnx/model.onnx": "weights",
    "checkpoint-500/model.safetensors": "training",
    "my-lora/adapter_config.json": "adapter",
    "figure.png": "not copied",
    "assets/notes.txt": "not copied",
    "metal/model.bin": "weights",
}


def write_files(folder: Path, names: Iterable[str]) -> None:
    """Write files whose content is their name."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)


def test_each_file_travels_or_is_named_with_its_size_and_the_reason(tmp_path: Path, model: Path, adapter: Path) -> None:
    write_files(model, [*TRAVEL, *STAY])
    report = loratool.merge(model, adapter, tmp_path / "out")
    out = tmp_path / "out"
    for name in [*TRAVEL, "config.json"]:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert (out / "README.md").read_text().startswith("---\n")  # its own card
    expected = {name.partition("/")[0] + "/" * ("/" in name): (len(name), why) for name, why in STAY.items()}
    assert {row.name: row.nbytes for row in report.left_behind} == {name: size for name, (size, _) in expected.items()}
    assert all(expected[row.name][1] in row.reason for row in report.left_behind)
    assert [row.name for row in report.left_behind] == list(report.not_copied)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == {
        *TRAVEL,
        "README.md",
        "config.json",
        "loratool.undo",
        *report.files,
        "model.safetensors.index.json",
    }


def test_text_travels_below_ten_megabytes(tmp_path: Path, model: Path, adapter: Path) -> None:
    """What a tokenizer needs travels at any size."""
    for name, size in (("small.json", 10**7), ("large.json", 10**7 + 1), ("tokenizer.json", 10**7 + 1)):
        (model / name).write_bytes(bytes(size))
    report = loratool.merge(model, adapter, tmp_path / "out")
    assert [(row.name, row.nbytes) for row in report.left_behind] == [("large.json", 10**7 + 1)]
    assert "too large" in report.left_behind[0].reason
    assert (tmp_path / "out" / "small.json").exists() and (tmp_path / "out" / "tokenizer.json").exists()


def test_what_travelled_is_replaced_and_what_is_the_users_is_not(tmp_path: Path, model: Path, adapter: Path) -> None:
    """A text of any name is ours only while its words are beside the base too."""
    write_files(model, [*TRAVEL, "2_Dense/vocabulary.txt"])
    (model / "modules.json").write_text(json.dumps([{"idx": 1, "path": "2_Dense", "type": "x.Dense"}]))
    for _ in range(2):
        loratool.merge(model, adapter, tmp_path / "out", force=True)
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back", force=True)
    assert (tmp_path / "back/2_Dense/vocabulary.txt").exists()
    for name in ("notes.md", "todo.txt", "2_Dense/notes.txt", "README.md"):
        former = (tmp_path / "out" / name).read_bytes() if (tmp_path / "out" / name).exists() else None
        (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(UsageError, match=f"holds {name}"):
            loratool.merge(model, adapter, tmp_path / "out", force=True)
        (tmp_path / "out" / name).write_bytes(former) if former else (tmp_path / "out" / name).unlink()
    loratool.merge(model, adapter, tmp_path / "out", force=True)


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "deep/1_Router", "type": "sentence_transformers.models.Router"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def test_the_folders_of_modules_travel_whole(tmp_path: Path, model: Path, adapter: Path) -> None:
    files = ["deep/1_Router/query_0/config.json", "deep/1_Router/query_0/weights.bin", "deep/1_Router/words.dat"]
    others = ["deep/1_Router/.DS_Store", "deep/other.txt"]
    write_files(model, [*files, *others])
    (model / "modules.json").write_text(json.dumps(MODULES))
    report = loratool.merge(model, adapter, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == name for name in files)
    assert sorted(report.not_copied) == others


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "C:/x", "a\\b"])
def test_a_module_outside_of_the_folder_is_refused(tmp_path: Path, model: Path, adapter: Path, path: str) -> None:
    (model / "modules.json").write_text(json.dumps([{"idx": 0, "path": path, "type": "x.Dense"}]))
    with pytest.raises(loratool.InputError, match=r"modules.json: names '.*', which is not a folder beside it"):
        loratool.merge(model, adapter, tmp_path / "out")


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"path": 3}]', "[" * 100_000])
def test_what_lists_no_modules_names_no_folder(tmp_path: Path, model: Path, adapter: Path, content: str) -> None:
    (model / "modules.json").write_text(content)
    loratool.merge(model, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "modules.json").read_text() == content


def test_a_link_to_a_folder_in_a_module_is_named(tmp_path: Path, model: Path, adapter: Path) -> None:
    write_files(model, ["2_Dense/config.json"])
    (model / "modules.json").write_text(json.dumps([{"idx": 1, "path": "2_Dense", "type": "x.Dense"}]))
    (model / "2_Dense" / "more").symlink_to(tmp_path)
    with pytest.raises(loratool.InputError, match="2_Dense/more: is copied with the model, but is not a readable file"):
        loratool.merge(model, adapter, tmp_path / "out")


def test_templates_and_pooling_folders_can_be_written_twice(tmp_path: Path, model: Path, adapter: Path) -> None:
    for name in ("additional_chat_templates/x.jinja", "1_Pooling/config.json", "1_Pooling/weights.bin"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    for _ in range(2):
        report = loratool.merge(model, adapter, tmp_path / "out", force=True)
    assert report.not_copied == ("1_Pooling/weights.bin",)


def test_a_shard_is_never_a_side_file(tmp_path: Path, model: Path, adapter: Path) -> None:
    """An index may name its shards as it likes, a tokenizer's suffix included."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        (model / file).rename(model / f"{file}.model")
    index["weight_map"] = {name: f"{file}.model" for name, file in index["weight_map"].items()}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    loratool.merge(model, adapter, tmp_path / "out")
    before, after = (
        load_file(f / f"{index['weight_map']['a.weight'].removesuffix('.model')}.model")
        for f in (model, tmp_path / "out")
    )
    assert not torch.equal(before["a.weight"], after["a.weight"])


@pytest.mark.parametrize("kind", ["dangling", "fifo"])
def test_a_side_file_that_cannot_be_read_is_found_first(tmp_path: Path, model: Path, adapter: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(model / "tokenizer.json")
    else:
        (model / "tokenizer.json").symlink_to("absent")
    with pytest.raises(loratool.InputError, match=r"tokenizer.json: is copied with the model"):
        loratool.merge(model, adapter, tmp_path / "out")


def test_what_cannot_be_read_or_counted_is_told_without_a_size(
    tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that travel for their size alone, and of folders with files without end."""
    monkeypatch.setattr(side_files, "MOST_COUNTED", 3)
    (model / "gone.txt").symlink_to("absent")
    os.mkfifo(model / "pipe.json")
    write_files(model, [*(f"many/{i}.png" for i in range(4)), *(f"few/{i}.png" for i in range(3))])
    report = loratool.merge(model, adapter, tmp_path / "out")
    told = {row.name: (row.nbytes, row.reason) for row in report.left_behind}
    assert told.keys() == {"gone.txt", "pipe.json", "many/", "few/"}
    assert told["gone.txt"] == (None, "cannot be read") and told["pipe.json"][1] == "cannot be read"
    assert told["many/"][0] is None and told["few/"][0] == 27


def test_folders_that_cannot_be_looked_into_are_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may look into any, so that the system's answer is changed."""
    write_files(tmp_path, ["onnx/a.onnx", "figures/a.png", "tokenizer.json"])
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "onnx" and real(path, mode))
    travels, left = side_files.classify_side_files(tmp_path, ())
    assert travels == ["tokenizer.json"]
    assert {each.name: each.reason for each in left} == {
        "onnx/": "cannot be read",
        "figures/": side_files.why_left("figures/", None),
    }


@pytest.mark.parametrize("former", ["{", "x", "[" * 100_000])
def test_a_record_that_is_not_ours_is_refused(former: str) -> None:
    assert json.loads(side_files.provenance("merge", {"a": 1}, '{"verb": "x"}'))["former"] == {"verb": "x"}
    with pytest.raises(loratool.InputError, match="`loratool` is broken; it is not ours"):
        side_files.provenance("merge", {}, former)


def test_no_code_comes_with_an_adapters_tokenizer(tmp_path: Path, model: Path, adapter: Path) -> None:
    """Not even code that is named like a tokenizer's text, which `trust_remote_code` would run; the base's stays."""
    for name in ("tokenizer_x.py", "vocab.py", "chat_template.py", "tokenizer_config.json"):
        (adapter / name).write_text("{}")
    (model / "tokenizer_of_base.py").write_text("{}")
    loratool.merge(model, adapter, tmp_path / "merged", tokenizer="adapter")
    written = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"tokenizer_config.json", "tokenizer_of_base.py"} <= written
    assert not written & {"tokenizer_x.py", "vocab.py", "chat_template.py"}


def test_nested_configs_follow() -> None:
    config = {
        "torch_dtype": "float16",
        "text_config": {"dtype": "bfloat16", "rope": {"dtype": None}},
        "dtype": {"a": 1},
    }
    expected = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "rope": {"dtype": None}},
        "dtype": {"a": 1},
    }
    assert edited_config(config, {}, "float32") == expected


@pytest.mark.parametrize("command", ["merge", "unmerge", "convert", "init"])
def test_each_command_that_writes_a_model_tells_the_reason(
    tmp_path: Path, model: Path, adapter: Path, run: Any, command: str
) -> None:
    loratool.merge(model, adapter, tmp_path / "merged")
    for folder in (model, tmp_path / "merged"):
        write_files(folder, ["optimizer.pt"])
    arguments = {
        "merge": [model, adapter],
        "unmerge": [tmp_path / "merged", adapter],
        "convert": [model, "--dtype", "fp16"],
        "init": [model, "--method", "pissa", "--rank", "2", "--no-undo", "--target", "a", "--residual", tmp_path / "r"],
    }
    result = run(command, *arguments[command], "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "not copied: optimizer.pt (12 B): the state of a training run\n" in result.stdout
